"""Skin and texture: the same for every tone, none in grey, and never enough to refuse by itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.screening import skin
from service.screening.skin import RGB
from tests.assets.shapes import MONK

DARK_TO_MEDIUM = MONK[3:]


def plane(colour: tuple[int, int, int], noise: float = 3.0, side: int = 200) -> RGB:
    """A surface of one colour, lit a little unevenly."""
    random = np.random.default_rng(0)
    light = np.linspace(0.92, 1.08, side)[:, None, None] + random.normal(0, noise / 255, (side, side, 1))
    return np.clip(np.array(colour) * light, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("tone", range(5, 8))
def test_skin_of_brown_and_dark_tones_is_skin(tone: int) -> None:
    cues = skin.measure(plane(MONK[tone]))
    assert cues.skin > 0.9
    assert cues.largest > 0.9
    assert cues.smooth > 0.9


def test_grey_has_no_skin_and_no_colour() -> None:
    grey = np.repeat(plane(MONK[5])[..., :1], 3, axis=2)
    cues = skin.measure(grey)
    assert (cues.skin, cues.largest, cues.smooth, cues.saturation) == (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "colour", [(40, 90, 200), (30, 160, 60), (255, 255, 255), (0, 0, 0), (128, 128, 128)]
)
def test_sky_grass_and_paper_are_not_skin(colour: tuple[int, int, int]) -> None:
    assert skin.measure(plane(colour)).skin == 0.0


def test_rough_skin_is_not_smooth() -> None:
    assert skin.measure(plane(MONK[5], noise=60)).smooth < 0.05


def test_two_pieces_are_measured_apart() -> None:
    picture = plane((40, 90, 200))
    picture[20:60, 20:60] = MONK[6]
    picture[100:180, 100:180] = MONK[6]
    cues = skin.measure(picture)
    assert cues.skin == pytest.approx((40 * 40 + 80 * 80) / 200**2, rel=0.02)
    assert cues.largest == pytest.approx(80 * 80 / 200**2, rel=0.02)


def test_skin_at_the_rim_is_told() -> None:
    picture = plane((40, 90, 200))
    picture[:12] = MONK[6]
    assert skin.measure(picture).rim > 4 * skin.measure(picture).skin


def test_a_page_has_more_edges_and_a_plane_less_entropy() -> None:
    page = np.full((200, 200, 3), 255, np.uint8)
    page[::6] = 0
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3)).astype(np.uint8)
    flat = np.full((200, 200, 3), 90, np.uint8)
    assert skin.measure(page).edges > 10 * skin.measure(plane(MONK[5])).edges
    assert skin.measure(flat).entropy == 0.0
    assert skin.measure(page).entropy == pytest.approx(0.65, abs=0.01)  # of one line in six
    assert skin.measure(noise).entropy > 7


def test_skin_alone_stays_below_the_moderate_threshold() -> None:
    assert max(skin.score(skin.measure(plane(tone, noise=0))) for tone in MONK) == skin.MOST < 0.6


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 600), st.integers(1, 600), st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 30, 255]))
def test_every_size_can_be_measured(height: int, width: int, seed: int, spread: int) -> None:
    random = np.random.default_rng(seed)
    picture = random.integers(0, spread + 1, (height, width, 3)).astype(np.uint8)
    small = skin.shrink(picture)
    assert max(small.shape[:2]) == min(256, max(height, width))
    cues = skin.measure(small)
    assert all(0 <= share <= 1 for share in (cues.skin, cues.largest, cues.smooth, cues.rim))
    assert 0 <= cues.smooth <= cues.skin
    assert 0 <= cues.entropy <= 8
    assert 0 <= skin.score(cues) <= skin.MOST
