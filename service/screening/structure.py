"""Walk a file before anything decodes it: what it is by its content, how large, where it ends.

`walk` is pure Python over bytes, its work is bounded by the file's size and by a cap on parts, and it
allocates no more than one copy of the file. It refuses whatever is not a whole, consistent JPEG, PNG or WebP
within the limits.
"""

from __future__ import annotations

from service.screening import ImageLimits, Structure, check_bytes, reject
from service.screening.jpeg import walk_jpeg
from service.screening.png import walk_png
from service.screening.webp import walk_webp

ACCEPTED = "JPEG, PNG and WebP are accepted"

# Only to tell the caller what was sent; nothing is decided by these names.
_OTHERS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"GIF8", "a GIF"),
    (0, b"BM", "a BMP"),
    (0, b"II*\0", "a TIFF"),
    (0, b"MM\0*", "a TIFF"),
    (0, b"%PDF", "a PDF"),
    (0, b"8BPS", "a PSD"),
    (0, b"\0\0\1\0", "an icon"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000"),
    (0, b"\xff\x0a", "a JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL"),
    (4, b"ftypavif", "an AVIF"),
    (4, b"ftypavis", "an AVIF"),
    (4, b"ftyphei", "a HEIC"),
    (4, b"ftyphev", "a HEIC"),
    (4, b"ftypmif1", "a HEIC"),
    (4, b"ftyp", "a video"),
    (0, b"PK\3\4", "a zip archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"version https://git-lfs", "a Git LFS pointer instead of the image"),
)
_TEXTS: tuple[tuple[bytes, str], ...] = (
    (b"<svg", "an SVG"),
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<", "markup"),
    (b"{", "JSON"),
    (b"[", "JSON"),
)


def walk(data: bytes, limits: ImageLimits) -> Structure:
    """What `data` is. Raises `ImageRejected`; decodes nothing."""
    check_bytes(len(data), limits)
    if data.startswith(b"\xff\xd8"):
        return walk_jpeg(data, limits)
    if data.startswith(b"\x89PNG"):
        return walk_png(data, limits)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return walk_webp(data, limits)
    raise reject("format", f"This is {_name(data)}; {ACCEPTED}.")


def _name(data: bytes) -> str:
    """What the bytes look like, in words for the caller."""
    if not data:
        return "empty"
    for offset, magic, name in _OTHERS:
        if data.startswith(magic, offset):
            return name
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in start:
        return "an SVG"
    for magic, name in _TEXTS:
        if start.startswith(magic):
            return name
    if all(byte >= 0x20 or byte in b"\t\r\n\f" for byte in data[:512]):
        return "text"
    return "no image format that is known here"
