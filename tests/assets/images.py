"""Test images, drawn here: ordinary ones, ones that carry secrets, and hostile ones. Nothing is read from disk."""

from __future__ import annotations

import io
import re
import struct
import zlib
from functools import cache

import numpy as np
from PIL import Image

GPS_SECRET = b"Nullarbor-31.27S"
SECRETS = {
    "exif": b"secret-exif-artist",
    "gps": GPS_SECRET,
    "xmp": b"secret-xmp-creator",
    "iptc": b"secret-iptc-byline",
    "icc": b"secret-icc-description",
    "comment": b"secret-comment",
    "text": b"secret-text-chunk",
    "ztxt": b"secret-ztxt-chunk",
    "itxt": b"secret-itxt-chunk",
    "thumbnail": b"secret-thumbnail",
    "c2pa": b"secret-c2pa-manifest",
    "trailing": b"secret-trailing-bytes",
    "unknown": b"secret-unknown-chunk",
}
"""What is planted, by where; none may be found in anything that leaves the child."""


@cache
def photo(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A picture with slopes, edges and grain, so that every resize and every turn shows."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    red = 255 * x / max(1, width - 1)
    green = 255 * y / max(1, height - 1)
    blue = 255 * (((x // 8) + (y // 8)) % 2)
    grain = rng.integers(-20, 20, (height, width, 3))
    pixels = np.clip(np.stack([red, green, blue], axis=-1) + grain, 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    if mode in ("RGBA", "LA"):
        alpha = Image.fromarray(((x + y) % 256).astype(np.uint8))
        image = image.convert(mode)
        image.putalpha(alpha)
        return image
    return image.convert(mode)


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    """The image as a file of `form`: JPEG, PNG, WEBP, GIF, …"""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def tiff_block(orientation: int | None = None, *, order: str = "<", secrets: bool = False) -> bytes:
    """An EXIF block: IFD0 with an orientation and, with `secrets`, an artist, GPS data and a thumbnail."""
    entries: list[tuple[int, int, int, bytes]] = []
    if orientation is not None:
        entries.append((0x0112, 3, 1, struct.pack(order + "HH", orientation, 0)))
    extra = b""
    if secrets:
        start = 8 + 2 + 12 * (len(entries) + 2) + 4
        artist = SECRETS["exif"] + b"\0"
        entries.append((0x013B, 2, len(artist), struct.pack(order + "I", start)))
        gps_at = start + len(artist)
        entries.append((0x8825, 4, 1, struct.pack(order + "I", gps_at)))
        place = GPS_SECRET + b"\0"
        gps = struct.pack(order + "H", 1)
        gps += struct.pack(order + "HHII", 0x001B, 7, len(place), gps_at + 2 + 12 + 4)
        extra = artist + gps + struct.pack(order + "I", 0) + place + SECRETS["thumbnail"]
    mark = b"II*\0" if order == "<" else b"MM\0*"
    body = mark + struct.pack(order + "IH", 8, len(entries))
    for tag, kind, count, value in entries:
        body += struct.pack(order + "HHI", tag, kind, count) + value
    return body + struct.pack(order + "I", 0) + extra


def jpeg_segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def with_segments(jpeg: bytes, *segments: bytes) -> bytes:
    """A JPEG with more segments right after SOI."""
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def png_chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunks(png: bytes, *chunks: bytes) -> bytes:
    """A PNG with more chunks right before its first IDAT."""
    at = png.index(b"IDAT") - 4
    return png[:at] + b"".join(chunks) + png[at:]


def draw_png(
    width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: bytes, interlace: int = 0
) -> bytes:
    """A PNG of raw `rows` (each with its filter byte), as its header says or not."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + b"".join(chunks)
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND")
    )


def riff_chunk(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + bytes(len(body) & 1)


def draw_webp(*chunks: bytes) -> bytes:
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def with_riff_chunks(webp: bytes, size: tuple[int, int], *chunks: bytes) -> bytes:
    """A simple WebP made extended, with metadata chunks after its picture."""
    canvas = (size[0] - 1).to_bytes(3, "little") + (size[1] - 1).to_bytes(3, "little")
    flags = 0x2C | (0x10 if webp[12:16] == b"VP8L" else 0)
    return draw_webp(riff_chunk(b"VP8X", bytes([flags, 0, 0, 0]) + canvas), webp[12:], *chunks)


def secretive_jpeg(plain: bytes, orientation: int = 1) -> bytes:
    """The JPEG with metadata of every kind and bytes after its end."""
    iptc = (
        b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0" + struct.pack(">I", len(SECRETS["iptc"])) + SECRETS["iptc"]
    )
    profile = struct.pack(">I", 200) + b"ADBE" + bytes(28) + b"acsp" + SECRETS["icc"]
    return (
        with_segments(
            plain,
            jpeg_segment(0xE1, b"Exif\0\0" + tiff_block(orientation, secrets=True)),
            jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x>" + SECRETS["xmp"] + b"</x>"),
            jpeg_segment(0xE2, b"ICC_PROFILE\0\x01\x01" + profile),
            jpeg_segment(0xE2, b"MPF\0" + SECRETS["unknown"]),
            jpeg_segment(0xE0, b"JFXX\0\x10" + SECRETS["thumbnail"]),
            jpeg_segment(0xEB, b"JP\0\x01\0\0\0\x01" + SECRETS["c2pa"]),
            jpeg_segment(0xED, iptc),
            jpeg_segment(0xEC, SECRETS["unknown"]),
            jpeg_segment(0xFE, SECRETS["comment"]),
        )
        + SECRETS["trailing"]
    )


def secretive_png(plain: bytes, orientation: int = 1) -> bytes:
    """The PNG with metadata of every kind and bytes after its end."""
    late = png_chunk(b"tEXt", b"Late\0" + SECRETS["text"])
    return (
        with_chunks(
            plain,
            png_chunk(b"eXIf", tiff_block(orientation, secrets=True)),
            png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(SECRETS["icc"])),
            png_chunk(b"tEXt", b"Author\0" + SECRETS["text"]),
            png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(SECRETS["ztxt"])),
            png_chunk(b"iTXt", b"Title\0\0\0\0\0" + SECRETS["itxt"]),
            png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + SECRETS["xmp"]),
            png_chunk(b"caBX", SECRETS["c2pa"]),
            png_chunk(b"prVt", SECRETS["unknown"]),
            png_chunk(b"tIME", struct.pack(">HBBBBB", 2026, 1, 2, 3, 4, 5)),
        )[: -len(png_chunk(b"IEND"))]
        + late
        + png_chunk(b"IEND")
        + SECRETS["trailing"]
    )


def secretive_webp(plain: bytes, size: tuple[int, int], orientation: int = 1) -> bytes:
    """The WebP with metadata of every kind and bytes after its end."""
    return (
        with_riff_chunks(
            plain,
            size,
            riff_chunk(b"EXIF", tiff_block(orientation, secrets=True)),
            riff_chunk(b"XMP ", b"<x>" + SECRETS["xmp"] + b"</x>"),
            riff_chunk(b"C2PA", SECRETS["c2pa"]),
            riff_chunk(b"UNKN", SECRETS["unknown"]),
        )
        + SECRETS["trailing"]
    )


@cache
def huge_png() -> bytes:
    """12000 × 12000 black pixels in 420 KB: 432 MB once decoded."""
    rows = zlib.compressobj(9)
    row = bytes(1 + 3 * 12_000)
    data = b"".join(rows.compress(row) for _ in range(12_000)) + rows.flush()
    header = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", data) + png_chunk(b"IEND")


@cache
def scan_bomb(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated: each costs a pass over the whole picture."""
    jpeg = encode(Image.new("RGB", (side, side), (90, 120, 30)), "JPEG", progressive=True)
    starts = [match.start() for match in re.finditer(rb"\xff\xda", jpeg)]
    return jpeg[:-2] + jpeg[starts[-1] : -2] * scans + b"\xff\xd9"


def animation(form: str, frames: int = 3, size: int = 32) -> bytes:
    """An animated PNG or WebP (or GIF) of different frames."""
    pictures = [photo(size, size, seed=seed) for seed in range(frames)]
    return encode(pictures[0], form, save_all=True, append_images=pictures[1:], duration=100)
