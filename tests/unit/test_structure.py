"""The walk before decoding: what passes, what is refused, and why."""

from __future__ import annotations

import dataclasses
import struct
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import ImageRejected
from service.screening import METADATA, REASONS, ImageLimits, Structure
from service.screening.jpeg import MAX_SCANS
from service.screening.png import MAX_CHUNKS
from service.screening.structure import walk
from tests.assets import images

LIMITS = ImageLimits(bytes=16 * 2**20, pixels=40_000_000, side=16_384, aspect=200, frames=1)

JPEG = images.encode(images.photo(61, 43), "JPEG")
PROGRESSIVE = images.encode(images.photo(61, 43), "JPEG", progressive=True)
RESTARTS = images.encode(images.photo(61, 43), "JPEG", restart_marker_rows=1)
GREY_JPEG = images.encode(images.photo(61, 43, "L"), "JPEG")
CMYK_JPEG = images.encode(images.photo(61, 43, "CMYK"), "JPEG")
PNG = images.encode(images.photo(61, 43), "PNG")
PNG_ALPHA = images.encode(images.photo(61, 43, "RGBA"), "PNG")
PNG_PALETTE = images.encode(images.photo(61, 43, "P"), "PNG")
WEBP = images.encode(images.photo(61, 43), "WEBP")
WEBP_LOSSLESS = images.encode(images.photo(61, 43), "WEBP", lossless=True)
WEBP_ALPHA = images.encode(images.photo(61, 43, "RGBA"), "WEBP")
ALL = {
    "jpeg": JPEG,
    "jpeg progressive": PROGRESSIVE,
    "jpeg restarts": RESTARTS,
    "jpeg grey": GREY_JPEG,
    "jpeg cmyk": CMYK_JPEG,
    "png": PNG,
    "png alpha": PNG_ALPHA,
    "png palette": PNG_PALETTE,
    "webp": WEBP,
    "webp lossless": WEBP_LOSSLESS,
    "webp alpha": WEBP_ALPHA,
}


def refusal(data: bytes, limits: ImageLimits = LIMITS) -> ImageRejected:
    with pytest.raises(ImageRejected) as caught:
        walk(data, limits)
    assert caught.value.reason in REASONS
    return caught.value


def within(**changes: int) -> ImageLimits:
    return dataclasses.replace(LIMITS, **changes)


@pytest.mark.parametrize("name", ALL)
def test_reads_format_and_size_and_drops_what_follows(name: str) -> None:
    data = ALL[name]
    plain, longer = walk(data, LIMITS), walk(data + b"<script>", LIMITS)
    assert plain.format == name.split()[0]
    assert (plain.width, plain.height, plain.frames, plain.orientation) == (61, 43, 1, 1)
    assert (plain.end, plain.trailing_bytes) == (len(data), 0)
    assert (longer.end, longer.trailing_bytes) == (len(data), 8)
    assert longer.core == plain.core


@pytest.mark.parametrize(
    ("data", "channels", "depth"),
    [
        (JPEG, 3, 8),
        (GREY_JPEG, 1, 8),
        (CMYK_JPEG, 4, 8),
        (PNG_ALPHA, 4, 8),
        (PNG_PALETTE, 1, 8),
        (images.draw_png(1, 1, 16, 0, b"\0\1\2"), 1, 16),
        (WEBP, 3, 8),
        (WEBP_ALPHA, 4, 8),
    ],
)
def test_reads_channels_and_depth(data: bytes, channels: int, depth: int) -> None:
    structure = walk(data, LIMITS)
    assert (structure.channels, structure.depth) == (channels, depth)


@pytest.mark.parametrize("name", ALL)
def test_a_cut_file_is_damaged_wherever_it_is_cut(name: str) -> None:
    data = ALL[name]
    assert {refusal(data[:cut]).reason for cut in range(12, len(data))} == {"damaged"}
    assert {refusal(data[:cut]).reason for cut in range(12)} <= {"damaged", "format"}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (b"hello, I am an image", "text"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (b'{"image": 1}', "JSON"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (images.encode(images.photo(8, 8), "GIF"), "GIF"),
        (images.encode(images.photo(8, 8), "BMP"), "BMP"),
        (images.encode(images.photo(8, 8), "TIFF"), "TIFF"),
        (images.encode(images.photo(8, 8), "AVIF"), "AVIF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"%PDF-1.7\n", "PDF"),
        (bytes(1024), "no image format"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "no image format"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
    ],
)
def test_other_content_is_refused_by_what_it_is(data: bytes, said: str) -> None:
    error = refusal(data)
    assert error.reason == "format"
    assert said in error.detail
    assert "JPEG, PNG and WebP" in error.detail


@pytest.mark.parametrize("name", ["jpeg", "png", "webp", "webp alpha"])
@pytest.mark.parametrize(
    ("limits", "reason", "limit"),
    [
        (within(bytes=100), "too_many_bytes", 100),
        (within(pixels=61 * 43 - 1), "too_many_pixels", 61 * 43 - 1),
        (within(side=60), "side_too_long", 60),
        (within(aspect=1), "aspect", 1),
    ],
)
def test_limits_are_checked_and_named(name: str, limits: ImageLimits, reason: str, limit: int) -> None:
    error = refusal(ALL[name], limits)
    assert (error.reason, error.limit) == (reason, limit)
    assert f"{limit:,}" in error.detail
    walk(ALL[name], within(pixels=61 * 43, side=61, aspect=2, bytes=len(ALL[name])))


def test_a_pixel_flood_is_refused_from_its_header() -> None:
    flood = images.huge_png()
    assert len(flood) < 450_000
    tracemalloc.start()
    start = time.perf_counter()
    error = refusal(flood)
    elapsed_s = time.perf_counter() - start
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.reason == "too_many_pixels"
    assert "144,000,000" in error.detail
    assert elapsed_s < 0.1
    assert peak_bytes < 1_000_000


@pytest.mark.parametrize(
    "data",
    [
        # 40 million pixels from a hundred bytes: the header lies, or most of the picture is missing.
        images.draw_png(8000, 5000, 8, 2, bytes(100)),
        JPEG.replace(struct.pack(">HH", 43, 61), struct.pack(">HH", 5000, 8000)),
        PROGRESSIVE.replace(struct.pack(">HH", 43, 61), struct.pack(">HH", 5000, 8000)),
    ],
)
def test_a_header_that_promises_more_than_the_data_can_hold_is_refused(data: bytes) -> None:
    assert refusal(data).reason == "damaged"


def test_a_scan_bomb_is_refused_and_an_ordinary_progressive_jpeg_is_not() -> None:
    bomb = images.scan_bomb(64, 500)
    error = refusal(bomb)
    assert (error.reason, error.limit) == ("too_complex", MAX_SCANS)
    walk(images.scan_bomb(64, 20), LIMITS)


def test_a_progressive_jpeg_closed_before_its_last_scan_is_refused() -> None:
    last = PROGRESSIVE.rindex(b"\xff\xda")
    assert refusal(PROGRESSIVE[:last] + b"\xff\xd9").reason == "damaged"


def test_many_parts_are_refused() -> None:
    jpeg = images.with_segments(JPEG, images.jpeg_segment(0xFE, b"") * 5000)
    png = images.with_chunks(PNG, images.png_chunk(b"prVt") * (MAX_CHUNKS + 1))
    assert refusal(jpeg).reason == "too_complex"
    assert refusal(png).reason == "too_complex"


@pytest.mark.parametrize("fill", [b"\xff", b"\xff\x00", b"\xff\xd0", b"\x00"])
def test_a_walk_takes_one_pass(fill: bytes) -> None:
    filling = fill * (8 * 2**20 // len(fill))
    start = time.perf_counter()
    walk(JPEG[:-2] + filling + JPEG[-2:], LIMITS)
    if fill == b"\xff":
        walk(JPEG[:2] + filling + JPEG[2:], LIMITS)
    assert time.perf_counter() - start < 2.0


@pytest.mark.parametrize(
    "data",
    [
        images.draw_png(0, 5, 8, 2, b"\0"),
        images.draw_png(5, 0, 8, 2, b"\0"),
        images.draw_png(2**31 - 1, 0, 8, 2, b"\0"),
        JPEG.replace(struct.pack(">HH", 43, 61), struct.pack(">HH", 0, 61)),
        JPEG.replace(struct.pack(">HH", 43, 61), struct.pack(">HH", 43, 0)),
    ],
)
def test_an_image_of_no_size_is_refused(data: bytes) -> None:
    assert refusal(data).reason == "damaged"


@pytest.mark.parametrize(
    "data",
    [
        images.draw_png(4, 4, 3, 2, bytes(100)),  # no such depth
        images.draw_png(4, 4, 8, 5, bytes(100)),  # no such colour type
        images.draw_png(4, 4, 8, 3, bytes(100)),  # palette without one
        images.draw_png(4, 4, 8, 3, bytes(100), images.png_chunk(b"PLTE", bytes(4))),
        images.draw_png(4, 4, 8, 3, bytes(100), images.png_chunk(b"PLTE", bytes(3 * 257))),
        images.draw_png(4, 4, 8, 2, bytes(100), images.png_chunk(b"tRNS", bytes(5))),
        images.draw_png(4, 4, 8, 2, bytes(100), images.png_chunk(b"IHDR", bytes(13))),
        images.draw_png(4, 4, 8, 2, bytes(100), images.png_chunk(b"CRIT", b"x")),
        images.draw_png(4, 4, 8, 2, bytes(100), images.png_chunk(b"acTL", b"x")),
        images.with_chunks(PNG, images.png_chunk(b"IDAT", b""), images.png_chunk(b"tEXt", b"a")),
        PNG.replace(b"IHDR", b"IHDS", 1),
        PNG[:20] + b"\x01" + PNG[21:],  # a flipped byte against its CRC
        PNG[:8] + PNG[33:],  # no IHDR
        images.draw_png(4, 4, 8, 2, b"")[:-24] + images.png_chunk(b"IEND"),
    ],
)
def test_an_inconsistent_png_is_refused(data: bytes) -> None:
    if data == images.with_chunks(PNG, images.png_chunk(b"IDAT", b""), images.png_chunk(b"tEXt", b"a")):
        walk(data, LIMITS)  # an empty IDAT is no data yet
    else:
        assert refusal(data).reason == "damaged"


def test_png_data_in_two_places_is_refused() -> None:
    data = images.with_chunks(PNG, images.png_chunk(b"IDAT", b"\x78"), images.png_chunk(b"tEXt", b"a"))
    assert refusal(data).reason == "damaged"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (JPEG.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc3\0\x11\x08"), "format"),  # lossless
        (JPEG.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc9\0\x11\x08"), "format"),  # arithmetic
        (JPEG.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "format"),  # 12 bits
        (JPEG[:2] + b"\0\0" + JPEG[2:], "damaged"),
        (images.with_segments(JPEG, b"\xff\xd8"), "damaged"),
        (images.with_segments(JPEG, b"\xff\xd0"), "damaged"),  # a restart outside a scan
        (images.with_segments(JPEG, b"\xff\xe5\0\1"), "damaged"),
        (images.with_segments(JPEG, images.jpeg_segment(0xDC, b"\0\x2b")), "damaged"),  # DNL
        (JPEG[: JPEG.rindex(b"\xff\xda")] + b"\xff\xd9", "damaged"),  # no scan
        (JPEG[:2] + JPEG[JPEG.rindex(b"\xff\xda") :], "damaged"),  # a scan without a frame
        (b"\xff\xd8\xff\xd9", "damaged"),
    ],
)
def test_an_odd_jpeg_is_refused(data: bytes, reason: str) -> None:
    assert refusal(data).reason == reason


@pytest.mark.parametrize(
    "data",
    [
        images.draw_webp(),
        images.draw_webp(WEBP[12:], WEBP[12:]),
        images.draw_webp(images.riff_chunk(b"VP8 ", b"short")),
        images.draw_webp(images.riff_chunk(b"VP8L", b"\x2fabc")),
        images.with_riff_chunks(WEBP, (60, 43)),  # a canvas of another size
        images.draw_webp(
            images.riff_chunk(b"VP8X", bytes([2, 0, 0, 0]) + bytes(6))
        ),  # animated, without frames
        images.draw_webp(WEBP[12:], b"odd"),
        images.draw_webp(WEBP[12:], b"EXIF\xff\0\0\0"),
        images.draw_webp(images.riff_chunk(b"ALPH", b"\0")),
    ],
)
def test_an_inconsistent_webp_is_refused(data: bytes) -> None:
    assert refusal(data).reason == "damaged"


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_an_animation_is_refused_unless_the_limit_lets_it_in(form: str) -> None:
    data = images.animation(form)
    error = refusal(data)
    assert (error.reason, error.limit) == ("animated", 1)
    assert "3 frames" in error.detail
    assert walk(data, within(frames=3)).frames == 3


def test_one_frame_is_no_animation() -> None:
    still = images.draw_png(1, 1, 8, 2, bytes(4), images.png_chunk(b"acTL", struct.pack(">II", 0, 0)))
    assert walk(still, LIMITS).frames == 1


def test_the_second_picture_of_a_jpeg_is_trailing_bytes() -> None:
    both = walk(JPEG + JPEG, LIMITS)
    assert (both.frames, both.trailing_bytes) == (1, len(JPEG))


@pytest.mark.parametrize(
    ("data", "kinds"),
    [
        (
            images.secretive_jpeg(JPEG),
            {"exif", "xmp", "icc", "multi-picture", "thumbnail", "c2pa", "iptc", "comment", "application"},
        ),
        (images.secretive_png(PNG), {"exif", "xmp", "icc", "text", "c2pa", "time", "unknown"}),
        (images.secretive_webp(WEBP, (61, 43)), {"exif", "xmp", "c2pa", "unknown"}),
    ],
)
def test_metadata_is_named_and_no_part_of_the_core(data: bytes, kinds: set[str]) -> None:
    structure = walk(data, LIMITS)
    assert structure.metadata == kinds
    assert kinds <= set(METADATA)
    assert structure.trailing_bytes == len(images.SECRETS["trailing"])
    assert [secret for secret in images.SECRETS.values() if secret in structure.core] == []
    assert b"Exif" not in structure.core


def test_the_core_walks_as_the_whole_did() -> None:
    for data in (*ALL.values(), images.secretive_jpeg(JPEG), images.secretive_png(PNG)):
        structure = walk(data, LIMITS)
        again = walk(structure.core, LIMITS)
        assert again.core == structure.core
        assert (again.width, again.height, again.metadata) == (structure.width, structure.height, frozenset())


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 9, 99])
def test_orientation_is_read(order: str, orientation: int) -> None:
    block = images.tiff_block(orientation, order=order)
    seen = {
        walk(images.with_segments(JPEG, images.jpeg_segment(0xE1, b"Exif\0\0" + block)), LIMITS).orientation,
        walk(images.with_chunks(PNG, images.png_chunk(b"eXIf", block)), LIMITS).orientation,
        walk(images.with_riff_chunks(WEBP, (61, 43), images.riff_chunk(b"EXIF", block)), LIMITS).orientation,
    }
    assert seen == {orientation if 1 <= orientation <= 8 else 1}


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_exif_block_gives_an_orientation(block: bytes) -> None:
    for start in (b"", b"II*\0", b"MM\0*", b"II*\0\x08\0\0\0"):
        data = images.with_chunks(PNG, images.png_chunk(b"eXIf", start + block))
        assert 1 <= walk(data, LIMITS).orientation <= 8


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(ALL)), st.data())
def test_flipped_bytes_are_walked_or_refused(name: str, drawn: st.DataObject) -> None:
    data = bytearray(ALL[name])
    for _ in range(drawn.draw(st.integers(1, 8))):
        data[drawn.draw(st.integers(0, len(data) - 1))] = drawn.draw(st.integers(0, 255))
    try:
        structure = walk(bytes(data), LIMITS)
    except ImageRejected as exc:
        assert exc.reason in REASONS
        return
    assert isinstance(structure, Structure)
    assert structure.width * structure.height <= LIMITS.pixels
