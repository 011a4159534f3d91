"""What the gateway and a screening child say to each other. The child has seen hostile bytes: its word is
checked."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from service.processes.wire import COMMON, Limits, Vocabulary
from service.screening import ImageLimits
from service.screening.resize import MAX_CLEAN_PIXELS
from service.screening.signals import Findings, Looks

SPARE_BYTES = 64 * 1024
REGION_BYTES = MAX_CLEAN_PIXELS * 3
MAX_TEXT_CHARACTERS = 4_000


@dataclass(frozen=True, slots=True)
class Equipment:
    """What a child loads to look at images with, besides what measures skin. It is an argument of the child's."""

    nets: bool = True
    """The two networks for nudity and gore."""
    text: bool = True
    """The two networks that read text."""
    heads: str | None = None
    """A folder of linear classifiers."""
    plugins: tuple[str, ...] = ()
    """Entry points of the group `pericarp.image_detectors`, by name."""

    def to_argument(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_argument(cls, argument: str) -> Equipment:
        fields = json.loads(argument)
        return cls(**{**fields, "plugins": tuple(fields["plugins"])})


@dataclass(frozen=True, slots=True)
class CleanRequest:
    """Clean one encoded image, and look for what `looks` names."""

    id: int
    image: bytes
    looks: Looks = field(default_factory=Looks)


@dataclass(frozen=True, slots=True)
class CleanReply:
    """The image as pixels, which stand in the child's region (`processes/shared_memory.py`): RGB, `columns` × `rows` × 3 bytes.

    `width` and `height` are the original's, upright.
    """

    id: int
    columns: int
    rows: int
    width: int
    height: int
    format: str
    metadata: tuple[str, ...]
    trailing_bytes: int
    findings: Findings = field(default_factory=Findings)
    text: tuple[str, ...] = ()
    """Lines read in the image; at most `MAX_TEXT_CHARACTERS` in all."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """The image is refused. `spent` says that the decoder touched it: this child should not serve another."""

    id: int
    reason: str
    detail: str
    limit: int | None
    spent: bool


@dataclass(frozen=True, slots=True)
class EncodeRequest:
    """Clean one encoded image and write it again as `format`; as the one that it has where that is empty."""

    id: int
    image: bytes
    format: str


@dataclass(frozen=True, slots=True)
class EncodeReply:
    """The new file, no larger than an image may be; the rest as in `CleanReply`.

    It crosses on the wire: the region holds a clean image, and a file may be five times as large.
    """

    id: int
    image: bytes
    format: str
    width: int
    height: int
    metadata: tuple[str, ...]
    trailing_bytes: int


def vocabulary(limits: ImageLimits) -> Vocabulary:
    """Both sides' messages; no frame larger than the largest encoded image."""
    return Vocabulary(
        *COMMON,
        CleanRequest,
        CleanReply,
        Rejected,
        EncodeRequest,
        EncodeReply,
        limits=Limits(envelope_bytes=SPARE_BYTES, frame_bytes=limits.bytes + SPARE_BYTES),
    )
