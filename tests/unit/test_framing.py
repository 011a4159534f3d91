"""Frames come off and strips come apart; everything else stays as it is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.screening.framing import tiles, unframe
from service.screening.skin import RGB
from tests.assets import images


def photo(width: int, height: int) -> RGB:
    return np.asarray(images.photo(width, height))


def framed(picture: RGB, top: int, left: int, bottom: int, right: int, colour: tuple[int, int, int]) -> RGB:
    height, width = picture.shape[:2]
    canvas = np.empty((top + height + bottom, left + width + right, 3), np.uint8)
    canvas[:] = colour
    canvas[top : top + height, left : left + width] = picture
    return canvas


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (200, 30, 30), (215, 189, 150)])
@pytest.mark.parametrize(
    "margins", [(200, 200, 200, 200), (0, 500, 0, 0), (40, 0, 300, 10), (600, 600, 600, 600)]
)
def test_a_frame_comes_off(colour: tuple[int, int, int], margins: tuple[int, int, int, int]) -> None:
    content = unframe(framed(photo(320, 240), *margins, colour))
    assert content.shape[0] == pytest.approx(240, abs=6)
    assert content.shape[1] == pytest.approx(320, abs=6)


def test_a_frame_within_a_frame_comes_off() -> None:
    inner = framed(photo(320, 240), 60, 60, 60, 60, (255, 255, 255))
    content = unframe(framed(inner, 90, 90, 90, 90, (10, 10, 10)))
    assert content.shape[:2] == (pytest.approx(240, abs=6), pytest.approx(320, abs=6))


def test_a_photo_without_a_frame_stays_whole() -> None:
    picture = photo(320, 240)
    assert unframe(picture) is picture


@pytest.mark.parametrize("level", [0, 90, 255])
def test_a_plain_picture_stays_whole(level: int) -> None:
    plain = np.full((300, 200, 3), level, np.uint8)
    assert unframe(plain) is plain


def test_a_speck_is_not_cut_out() -> None:
    picture = np.full((400, 400, 3), 255, np.uint8)
    picture[200:203, 200:203] = 0
    assert unframe(picture).shape == picture.shape


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 900), st.integers(1, 900))
def test_tiles_cover_all_of_a_strip(height: int, width: int) -> None:
    canvas = np.zeros((height, width, 3), np.uint8)
    parts = tiles(canvas)
    if max(height, width) < 2 * min(height, width):
        assert parts == ()
        return
    for part in parts:
        part[:] = 1  # tiles are views into the picture
    assert canvas.all()
    assert 2 <= len(parts) <= 6
