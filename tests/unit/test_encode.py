"""A clean file holds its pixels at full size, upright, and nothing that its input held besides."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from models import Pixels
from service.errors import ImageRejected
from service.screening import FORMATS, ImageFormat, ImageLimits
from service.screening.encode import encode, reencode
from tests.assets import images

LIMITS = ImageLimits(bytes=2**20, pixels=40_000_000, side=17_000, aspect=200, frames=1)
SIZE = (64, 40)
PLAIN = {form: images.encode(images.photo(*SIZE), form.upper()) for form in FORMATS}


def secretive(form: ImageFormat, orientation: int = 1) -> bytes:
    if form == "webp":
        return images.secretive_webp(PLAIN[form], SIZE, orientation)
    write = images.secretive_jpeg if form == "jpeg" else images.secretive_png
    return write(PLAIN[form], orientation)


def parts(form: ImageFormat, data: bytes) -> list[bytes]:
    """What a file is made of: markers before the first scan, chunks, or RIFF chunks. Nothing follows its end."""
    found = []
    if form == "jpeg":
        at = 2
        while data[at + 1] != 0xDA:
            found.append(data[at + 1 : at + 2])
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        assert data.count(b"\xff\xd9") == 1
        assert data.endswith(b"\xff\xd9")
        return found
    at, head, order = (8, 8, ">I") if form == "png" else (12, 8, "<I")
    while at < len(data):
        kind_at, size_at = (at + 4, at) if form == "png" else (at, at + 4)
        (size,) = struct.unpack_from(order, data, size_at)
        found.append(data[kind_at : kind_at + 4])
        at += head + size + (4 if form == "png" else size & 1)
    assert at == len(data)
    return found


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_a_clean_file_is_made_of_its_pixels_alone(source: ImageFormat, form: ImageFormat) -> None:
    again = reencode(secretive(source), form, LIMITS)
    assert again.format == form
    assert [secret for secret in images.SECRETS.values() if secret in again.image] == []
    allowed = {
        "jpeg": {b"\xe0", b"\xdb", b"\xc0", b"\xc4"},
        "png": {b"IHDR", b"IDAT", b"IEND"},
        "webp": {b"VP8 "},
    }
    assert set(parts(form, again.image)) <= allowed[form]
    with Image.open(io.BytesIO(again.image)) as image:
        assert image.size == SIZE
        assert image.mode == "RGB"


@pytest.mark.parametrize("form", FORMATS)
def test_the_format_is_the_images_own_unless_another_is_asked_for(form: ImageFormat) -> None:
    assert reencode(PLAIN[form], None, LIMITS).format == form


def test_pixels_stay_as_they_are_and_stand_upright() -> None:
    again = reencode(secretive("png", orientation=6), None, LIMITS)
    assert (again.width, again.height) == (40, 64)
    with Image.open(io.BytesIO(again.image)) as image, Image.open(io.BytesIO(PLAIN["png"])) as stored:
        assert np.array_equal(np.asarray(image), np.rot90(np.asarray(stored), -1))
    assert again.metadata == ("c2pa", "exif", "icc", "text", "time", "unknown", "xmp")
    assert again.trailing_bytes == len(images.SECRETS["trailing"])


def test_what_hides_under_transparency_is_gone() -> None:
    hidden = Image.new("RGBA", SIZE, (200, 10, 10, 0))
    again = reencode(images.encode(hidden, "PNG"), None, LIMITS)
    with Image.open(io.BytesIO(again.image)) as image:
        assert image.getextrema() == ((255, 255),) * 3


def test_a_file_that_would_be_too_large_is_refused_with_what_to_do() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    with pytest.raises(ImageRejected, match="Ask for a JPEG") as caught:
        encode(Pixels(700, 700, noise.tobytes()), "png", LIMITS)
    assert (caught.value.reason, caught.value.limit) == ("too_many_bytes", LIMITS.bytes)


def test_a_side_that_webp_cannot_hold_is_refused_with_what_to_do() -> None:
    long = Pixels(16_384, 100, bytes(16_384 * 100 * 3))
    with pytest.raises(ImageRejected, match="Ask for a PNG") as caught:
        encode(long, "webp", LIMITS)
    assert (caught.value.reason, caught.value.limit) == ("side_too_long", 16_383)
    assert encode(long, "jpeg", LIMITS)


def test_a_damaged_image_has_no_clean_file() -> None:
    with pytest.raises(ImageRejected):
        reencode(PLAIN["png"][:-30], None, LIMITS)
