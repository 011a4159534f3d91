"""From clean pixels to a file again, for whoever stores the image: at its full size, upright, with nothing else in it.

The file is written from a fresh image that was made of the pixel bytes alone. It can therefore hold only what the
three writers put there themselves: a JPEG its JFIF header and tables, a PNG `IHDR`, `IDAT` and `IEND`, a WebP one
bitstream. Transparency went on white before: who stores the file stores what was looked at.

Runs in the screening child: an encoder reads pixels that a hostile file chose.
"""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

from PIL import Image

from service.screening import ImageFormat, ImageLimits, Reencoded, reject
from service.screening.pixels import decode
from service.screening.structure import walk

if TYPE_CHECKING:
    from models import Pixels

WRITERS: dict[ImageFormat, tuple[str, dict[str, Any]]] = {
    "jpeg": ("JPEG", {"quality": 90}),
    "png": ("PNG", {"compress_level": 1}),
    "webp": ("WEBP", {"quality": 90, "method": 2}),
}
"""Pillow's name of each writer and its options: fast ones, for the child's time is limited."""

WEBP_SIDE = 16_383
"""Pixels; VP8 keeps a side in 14 bits (RFC 6386, section 9.1)."""


def reencode(data: bytes, form: ImageFormat | None, limits: ImageLimits) -> Reencoded:
    """The image of `data` as a new file of `form`, or of the format that it had.

    Raises `ImageRejected` as `clean_image` does, and where the new file would exceed the limits itself.
    """
    structure = walk(data, limits)
    pixels = decode(structure)
    form = form or structure.format
    return Reencoded(
        image=encode(pixels, form, limits),
        format=form,
        width=pixels.width,
        height=pixels.height,
        metadata=tuple(sorted(structure.metadata)),
        trailing_bytes=structure.trailing_bytes,
    )


def encode(pixels: Pixels, form: ImageFormat, limits: ImageLimits) -> bytes:
    """A file of these pixels. Raises `ImageRejected` where `form` cannot hold it within the limits."""
    if form == "webp" and max(pixels.width, pixels.height) > WEBP_SIDE:
        raise reject(
            "side_too_long",
            f"A WebP may have sides of {WEBP_SIDE:,} pixels at most. Ask for a PNG or a JPEG.",
            WEBP_SIDE,
        )
    name, options = WRITERS[form]
    written = BytesIO()
    try:
        with Image.frombytes("RGB", (pixels.width, pixels.height), pixels.data) as image:
            image.save(written, name, **options)
    except (
        OSError,
        ValueError,
    ) as exc:  # what Pillow's writers raise where a library gives up, of memory mostly
        raise reject(
            "too_complex", f"It cannot be written as {name}. Scale it down, or ask for another format."
        ) from exc
    size_bytes = written.tell()
    if size_bytes > limits.bytes:
        raise reject(
            "too_many_bytes",
            f"Written as {name} it has {size_bytes:,} bytes; at most {limits.bytes:,} are sent. "
            "Ask for a JPEG or a WebP, or scale it down.",
            limits.bytes,
        )
    return written.getvalue()
