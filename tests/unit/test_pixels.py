"""From walked file to pixels: the reference's values, upright, on white, and nothing else."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from models import Pixels
from service.errors import ImageRejected
from service.screening import REASONS, ImageLimits
from service.screening.pixels import DecoderRefused, clean_image, decode
from service.screening.resize import (
    FETCH_PIXELS,
    MAX_CLEAN_PIXELS,
    PROCESSOR_PIXELS,
    plan_resizes,
    smart_resize,
)
from service.screening.structure import walk
from tests.assets import images
from tests.reference import Qwen2VLImageProcessorPil, fetch_image, fetch_resize

LIMITS = ImageLimits(bytes=16 * 2**20, pixels=40_000_000, side=16_384, aspect=200, frames=1)


def array(pixels: Pixels) -> npt.NDArray[np.uint8]:
    return np.frombuffer(pixels.data, np.uint8).reshape(pixels.height, pixels.width, 3)


def clean(data: bytes) -> npt.NDArray[np.uint8]:
    return array(clean_image(data, LIMITS).pixels)


def reference(data: bytes) -> npt.NDArray[np.uint8]:
    """What the reference decodes: `convert("RGB")`, an alpha channel on white."""
    image = Image.open(io.BytesIO(data))
    if image.mode == "RGBA":
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.split()[3])
        return np.asarray(white)
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(
    ("mode", "form", "options"),
    [
        ("RGB", "JPEG", {}),
        ("RGB", "JPEG", {"quality": 95, "subsampling": 0}),
        ("RGB", "JPEG", {"progressive": True}),
        ("RGB", "JPEG", {"restart_marker_rows": 1}),
        ("RGB", "JPEG", {"keep_rgb": True}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("L", "PNG", {}),
        ("1", "PNG", {}),
        ("P", "PNG", {}),
        ("P", "PNG", {"bits": 4}),
        ("RGB", "WEBP", {}),
        ("RGB", "WEBP", {"lossless": True}),
        ("RGBA", "WEBP", {}),
        ("RGBA", "WEBP", {"lossless": True}),
    ],
)
def test_values_are_those_of_the_reference(mode: str, form: str, options: dict[str, object]) -> None:
    data = images.encode(images.photo(97, 61, mode), form, **options)
    assert np.array_equal(clean(data), reference(data))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_ends_upright(form: str, orientation: int) -> None:
    block = images.tiff_block(orientation)
    data = images.encode(images.photo(64, 40), form, exif=b"Exif\0\0" + block)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    cleaned = clean_image(data, LIMITS)
    assert (cleaned.width, cleaned.height) == ((40, 64) if orientation >= 5 else (64, 40))
    assert np.array_equal(array(cleaned.pixels), np.asarray(upright.convert("RGB")))


@pytest.mark.parametrize("plant", [images.secretive_jpeg, images.secretive_png])
def test_metadata_changes_no_pixel(plant: object) -> None:
    form = "JPEG" if plant is images.secretive_jpeg else "PNG"
    plain = images.encode(images.photo(64, 40), form)
    assert callable(plant)
    assert clean_image(plant(plain), LIMITS).pixels == clean_image(plain, LIMITS).pixels


def test_alpha_goes_on_white() -> None:
    hidden = Image.new("RGBA", (4, 1), (200, 0, 0, 0))
    hidden.putpixel((1, 0), (200, 0, 0, 255))
    hidden.putpixel((2, 0), (0, 0, 0, 128))
    for form, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        row = clean(images.encode(hidden, form, **options))[0].tolist()
        assert row == [[255, 255, 255], [200, 0, 0], [127, 127, 127], [255, 255, 255]]


def test_grey_alpha_goes_on_white() -> None:
    image = Image.new("LA", (2, 1), (10, 0))
    image.putpixel((1, 0), (10, 255))
    assert clean(images.encode(image, "PNG"))[0].tolist() == [[255] * 3, [10] * 3]


@pytest.mark.parametrize(
    ("transparency", "row"),
    [
        (b"\0", [[255, 255, 255], [0, 255, 0], [0, 0, 255]]),
        (b"\xff\0", [[255, 0, 0], [255, 255, 255], [0, 0, 255]]),
        (b"\xff\xff\x80", [[255, 0, 0], [0, 255, 0], [127, 127, 255]]),
    ],
)
def test_palette_transparency_goes_on_white(transparency: bytes, row: list[list[int]]) -> None:
    palette = images.png_chunk(b"PLTE", bytes([255, 0, 0, 0, 255, 0, 0, 0, 255]))
    data = images.draw_png(3, 1, 8, 3, b"\0\0\1\2", palette, images.png_chunk(b"tRNS", transparency))
    assert clean(data)[0].tolist() == row


@pytest.mark.parametrize(
    ("depth", "colour", "rows", "key", "row"),
    [
        (8, 2, b"\0" + bytes([1, 2, 3, 1, 2, 4]), (1, 2, 3), [[255, 255, 255], [1, 2, 4]]),
        (8, 0, b"\0" + bytes([7, 8]), (7,), [[255] * 3, [8] * 3]),
        (4, 0, b"\0\x7f", (7,), [[255] * 3, [255] * 3]),
        (4, 0, b"\0\x78", (7,), [[255] * 3, [136] * 3]),
        (2, 0, b"\0\x60", (1,), [[255] * 3, [170] * 3]),
        (1, 0, b"\0\x40", (0,), [[255] * 3, [255] * 3]),
        (1, 0, b"\0\x40", (1,), [[0] * 3, [255] * 3]),
        (16, 0, b"\0" + struct.pack(">HH", 0x1234, 0x1235), (0x1234,), [[255] * 3, [0x12] * 3]),
        (
            16,
            2,
            b"\0" + struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0x1234, 0x5678, 0x9ABD),
            (0x1234, 0x5678, 0x9ABC),
            [[255] * 3, [0x12, 0x56, 0x9A]],
        ),
    ],
)
def test_key_transparency_goes_on_white_for_exactly_the_key(
    depth: int, colour: int, rows: bytes, key: tuple[int, ...], row: list[list[int]]
) -> None:
    chunk = images.png_chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))
    assert clean(images.draw_png(2, 1, depth, colour, rows, chunk))[0].tolist() == row


def test_sixteen_bit_grey_is_shifted_not_clipped() -> None:
    ramp = np.arange(0, 65536, 256, dtype=np.uint16)
    rows = b"".join(b"\0" + half.astype(">u2").tobytes() for half in np.split(ramp, 2))
    assert clean(images.draw_png(128, 2, 16, 0, rows))[:, :, 0].ravel().tolist() == list(range(256))


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_colour_and_alpha(colour: int, channels: int) -> None:
    sample = [0x40FF, 0x80FF, 0xC0FF, 0xFFFF] if channels > 2 else [0x40FF, 0xFFFF]
    data = images.draw_png(1, 1, 16, colour, b"\0" + struct.pack(f">{channels}H", *sample[:channels]))
    expected = [0x40, 0x80, 0xC0] if channels > 2 else [0x40] * 3
    assert clean(data)[0, 0].tolist() == expected


def test_interlaced_png() -> None:
    # Seven passes over 1 × 1: only the first has a pixel.
    assert clean(images.draw_png(1, 1, 8, 2, b"\0\1\2\3", interlace=1))[0, 0].tolist() == [1, 2, 3]


def test_cmyk_is_inverted_as_adobe_does() -> None:
    data = images.encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    red, green, blue = clean(data)[4, 4].tolist()
    assert red > 240 and green < 15 and blue < 15


def test_partial_data_is_never_a_picture() -> None:
    picture = images.photo(200, 160)
    for options in ({}, {"restart_marker_rows": 1}, {"subsampling": 0}):
        jpeg = images.encode(picture, "JPEG", **options)
        start = jpeg.rindex(b"\xff\xda") + 20
        for cut in range(start, len(jpeg) - 40, 97):
            with pytest.raises(ImageRejected) as caught:
                clean_image(jpeg[:cut].rstrip(b"\xff") + b"\xff\xd9", LIMITS)
            assert caught.value.reason == "damaged"
    rows = b"".join(b"\0" + bytes(range(30)) for _ in range(10))
    for data in (zlib.compress(rows[:-1]), zlib.compress(rows)[:-10], b"", b"\x78\x9c"):
        png = images.draw_png(10, 10, 8, 2, rows).replace(
            images.png_chunk(b"IDAT", zlib.compress(rows)), images.png_chunk(b"IDAT", data)
        )
        with pytest.raises(ImageRejected) as caught:
            clean_image(png, LIMITS)
        assert caught.value.reason == "damaged"
    for lossless in (False, True):
        webp = images.encode(picture, "WEBP", lossless=lossless)
        kind, body = webp[12:16], webp[20:]
        for share in (0.3, 0.9, 0.99):
            with pytest.raises(ImageRejected):
                clean_image(images.draw_webp(images.riff_chunk(kind, body[: int(len(body) * share)])), LIMITS)


def test_a_picture_that_ends_in_mid_grey_is_still_a_picture() -> None:
    for mode, grey in (("RGB", (128, 128, 128)), ("L", 128), ("CMYK", (127, 127, 127, 127))):
        for options in ({}, {"progressive": True}, {"restart_marker_rows": 1}):
            data = images.encode(Image.new(mode, (64, 48), grey), "JPEG", **options)
            assert clean(data).shape == (48, 64, 3)


def test_a_single_pixel_and_thin_images() -> None:
    for width, height in ((1, 1), (1, 200), (200, 1), (28, 5600)):
        data = images.encode(images.photo(width, height), "PNG")
        assert clean(data).shape == (height, width, 3)


def test_shapes_that_the_model_refuses_are_refused_here() -> None:
    for width, height in ((5720, 41), (41, 5720)):
        with pytest.raises(ImageRejected) as caught:
            clean_image(images.encode(Image.new("L", (width, height)), "PNG"), LIMITS)
        assert caught.value.reason == "aspect"


@settings(max_examples=500, deadline=None)
@given(st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from([FETCH_PIXELS, PROCESSOR_PIXELS]))
def test_smart_resize_is_the_references(height: int, width: int, pixels: tuple[int, int]) -> None:
    try:
        expected = fetch_resize(height, width, 28, *pixels)
    except ValueError:
        with pytest.raises(ValueError, match="longer than"):
            smart_resize(height, width, pixels)
        return
    assert smart_resize(height, width, pixels) == expected


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 16_384), st.integers(1, 16_384))
def test_a_plan_ends_where_nothing_is_left_to_do(height: int, width: int) -> None:
    try:
        sizes = plan_resizes(height, width)
    except ValueError:
        return
    if not sizes:
        assert height * width <= MAX_CLEAN_PIXELS
        return
    last = sizes[-1]
    assert last[0] * last[1] <= MAX_CLEAN_PIXELS
    assert smart_resize(*last, FETCH_PIXELS) == last
    assert smart_resize(*last, PROCESSOR_PIXELS) == last


@pytest.mark.parametrize("size", [(1024, 1024), (1001, 1003), (3000, 2000), (5000, 120), (4096, 4096)])
def test_shrinking_first_leaves_the_models_input_as_it_was(size: tuple[int, int]) -> None:
    processor = Qwen2VLImageProcessorPil(min_pixels=PROCESSOR_PIXELS[0], max_pixels=PROCESSOR_PIXELS[1])

    def feed(image: Image.Image) -> tuple[list[int], bytes]:
        ready = processor(images=[fetch_image({"image": image})], return_tensors="np")
        return ready["image_grid_thw"].tolist(), ready["pixel_values"].tobytes()

    data = images.encode(images.photo(*size), "JPEG")
    whole = decode(walk(data, LIMITS))
    shrunk = clean_image(data, LIMITS).pixels
    assert (whole.width, whole.height) == size
    assert shrunk.width * shrunk.height <= MAX_CLEAN_PIXELS
    assert feed(Image.fromarray(array(shrunk))) == feed(Image.fromarray(array(whole)))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP"]), st.data())
def test_flipped_bytes_are_pixels_or_a_refusal(form: str, drawn: st.DataObject) -> None:
    """Checksums are mended, so that the damage reaches the decoder."""
    data = bytearray(images.encode(images.photo(40, 30), form))
    for _ in range(drawn.draw(st.integers(1, 6))):
        data[drawn.draw(st.integers(2, len(data) - 1))] = drawn.draw(st.integers(0, 255))
    if form == "PNG":
        data = _mend(data)
    try:
        cleaned = clean_image(bytes(data), LIMITS)
    except ImageRejected as exc:
        assert exc.reason in REASONS
        return
    assert cleaned.pixels.width * cleaned.pixels.height <= MAX_CLEAN_PIXELS


def _mend(data: bytearray) -> bytearray:
    position = 8
    while position + 12 <= len(data):
        end = position + 8 + int.from_bytes(data[position : position + 4], "big")
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[position + 4 : end]))
        position = end + 4
    return data


def test_the_decoders_refusal_is_told_from_the_walks() -> None:
    png = images.draw_png(10, 10, 8, 2, bytes(5))
    with pytest.raises(DecoderRefused):
        clean_image(png, LIMITS)
    with pytest.raises(ImageRejected) as caught:
        clean_image(b"GIF89a", LIMITS)
    assert not isinstance(caught.value, DecoderRefused)
