"""Untrusted images: the contract between the gateway and the one process that touches their bytes.

    pool.py       the gateway's side: `Screen.clean(images)`, children, time limits
    child.py      the locked process: bytes in, pixels out
    structure.py  walks a file before anything decodes it: what it is, how large, where it ends
    jpeg.py, png.py, webp.py   one walk each; they hand on the compressed pixels and nothing else
    pixels.py     decode, flatten, orient, shrink
    encode.py     clean pixels as a file again, for whoever stores it
    fetch.py      remote images, where a Policy allows; locations.py says which URLs and addresses

This module is free of Pillow. An image is judged by its content, never by its name or declared type. Metadata
is dropped before decoding: the decoder is fed a file rebuilt from the parts that carry pixels, so that no
text chunk, profile, thumbnail or trailing byte ever reaches it, nor anything after it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from models import Pixels
from service.errors import ImageRejected
from service.screening.signals import Findings

REASONS = (
    "format",
    "damaged",
    "too_many_bytes",
    "too_many_pixels",
    "side_too_long",
    "aspect",
    "animated",
    "too_complex",
    "timeout",
    "crashed",
    "unreachable",
)
"""Why an image is refused; a closed list, part of the API."""

METADATA = (
    "application",
    "c2pa",
    "comment",
    "exif",
    "icc",
    "iptc",
    "multi-picture",
    "text",
    "thumbnail",
    "time",
    "unknown",
    "xmp",
)
"""Kinds of metadata that are told apart; all are dropped."""

ImageFormat = Literal["jpeg", "png", "webp"]
FORMATS: tuple[ImageFormat, ...] = get_args(ImageFormat)


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What an image may be. Everything here is checked from the header, before a pixel is decoded."""

    bytes: int
    pixels: int
    side: int
    aspect: int
    frames: int


@dataclass(frozen=True, slots=True)
class Structure:
    """What the walk over a file found. `width` and `height` are as stored, before `orientation`."""

    format: ImageFormat
    width: int
    height: int
    channels: int
    depth: int
    """Bits of one sample."""
    frames: int
    orientation: int
    """EXIF's 1 to 8; 1 where there is none or it makes no sense."""
    end: int
    """Where the image ends; whatever follows is no part of it."""
    trailing_bytes: int
    metadata: frozenset[str]
    """Which of `METADATA` were present; all are dropped."""
    core: bytes = field(repr=False)
    """The file again, from the parts that carry pixels only."""
    transparent: tuple[int, ...] | None = None
    """The sample value (grey) or three (colour) that a PNG's tRNS makes transparent; not in `core`."""


@dataclass(frozen=True, slots=True)
class Cleaned:
    """One image that a model may see, and what was left behind. Its `width` and `height` were so, upright."""

    pixels: Pixels
    width: int
    height: int
    format: ImageFormat
    metadata: tuple[str, ...]
    trailing_bytes: int
    findings: Findings = field(default_factory=Findings)
    """What was found in it, where it was looked for."""
    text: tuple[str, ...] = field(default=(), repr=False)
    """Lines of text that were read in it: as untrusted as any other text."""


@dataclass(frozen=True, slots=True)
class Reencoded:
    """One image as a new file made of its pixels alone, upright and at its full size, and what was left behind."""

    image: bytes = field(repr=False)
    format: ImageFormat
    width: int
    height: int
    metadata: tuple[str, ...]
    trailing_bytes: int


def reject(reason: str, detail: str, limit: int | None = None) -> ImageRejected:
    """The error that refuses an image; `detail` is for the caller."""
    assert reason in REASONS
    return ImageRejected(detail, reason=reason, limit=limit)


def check_bytes(size_bytes: int, limits: ImageLimits) -> None:
    """Raises `ImageRejected` where the encoded image is too large."""
    if size_bytes > limits.bytes:
        raise reject(
            "too_many_bytes",
            f"The image has {size_bytes:,} bytes; at most {limits.bytes:,} are accepted. "
            "Compress it or scale it down.",
            limits.bytes,
        )


def check_size(width: int, height: int, limits: ImageLimits) -> None:
    """Raises `ImageRejected` where a header promises more than may be decoded. Call it before decoding."""
    if width < 1 or height < 1:
        raise reject("damaged", f"The image says that it is {width} × {height} pixels.")
    if max(width, height) > limits.side:
        raise reject(
            "side_too_long",
            f"The image is {width} × {height} pixels; no side may exceed {limits.side:,}. "
            "Scale it down or crop it.",
            limits.side,
        )
    if width * height > limits.pixels:
        raise reject(
            "too_many_pixels",
            f"The image has {width * height:,} pixels; at most {limits.pixels:,} are accepted. "
            "Scale it down.",
            limits.pixels,
        )
    if max(width, height) > limits.aspect * min(width, height):
        raise reject(
            "aspect",
            f"The image is {width} × {height} pixels; one side may be at most "
            f"{limits.aspect} times the other. Crop it.",
            limits.aspect,
        )


def check_frames(frames: int, limits: ImageLimits) -> None:
    """Raises `ImageRejected` for an animation: a viewer sees later frames, neither filter nor model does."""
    if frames > limits.frames:
        raise reject(
            "animated",
            f"The image has {frames} frames; at most {limits.frames} accepted. "
            "Send the frame that matters as a still image.",
            limits.frames,
        )
