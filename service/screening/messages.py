"""What the gateway and a screening child say to each other. The child has seen hostile bytes: its word is
checked."""

from __future__ import annotations

from dataclasses import dataclass

from models import Pixels
from service.processes.wire import COMMON, Limits, Vocabulary
from service.screening import ImageLimits
from service.screening.resize import MAX_CLEAN_PIXELS

SPARE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class CleanRequest:
    """Clean one encoded image."""

    id: int
    image: bytes


@dataclass(frozen=True, slots=True)
class CleanReply:
    """The image as pixels; `width` and `height` are the original's, upright."""

    id: int
    pixels: Pixels
    width: int
    height: int
    format: str
    metadata: tuple[str, ...]
    trailing_bytes: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """The image is refused. `spent` says that the decoder touched it: this child should not serve another."""

    id: int
    reason: str
    detail: str
    limit: int | None
    spent: bool


def vocabulary(limits: ImageLimits) -> Vocabulary:
    """Both sides' messages; no frame larger than the largest image, encoded or clean."""
    largest = max(limits.bytes, MAX_CLEAN_PIXELS * 3) + SPARE_BYTES
    return Vocabulary(
        *COMMON,
        CleanRequest,
        CleanReply,
        Rejected,
        limits=Limits(envelope_bytes=SPARE_BYTES, frame_bytes=largest),
    )
