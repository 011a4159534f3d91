"""A corpus of 1,234 malformed and odd image files, where it is at hand, and how each is to be judged.

Its manifest suggests `accept`, `reject` or `policy` (decodes, but is of a format that a list of formats should leave
out) for each. What is judged otherwise here stands in one table, for the test of the child and the one over HTTP.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

REFUSED = frozenset({"format", "damaged", "animated", "side_too_long", "too_many_pixels"})
"""Why a file of the corpus may be refused under the default limits. None of them takes long, or a child's life."""

DISAGREEMENTS: dict[str, tuple[str | None, str]] = {
    "made/ztxt_bomb_64MiB.png": (
        None,
        "its picture is whole; the text bomb is dropped without being unpacked",
    ),
    "made/aspect_20000x1.png": ("side_too_long", "20,000 pixels are more than the default limit lets in"),
    "pillow/apng/chunk_multi_actl.png": (
        "animated",
        "two acTL: a viewer may believe the one with two frames",
    ),
    "pillow/broken_data_stream.png": ("damaged", "an IDAT's checksum is wrong"),
    "pillow/truncated_app14.jpg": ("damaged", "bytes between two segments"),
    "pillow/truncated_end_chunk.png": ("damaged", "its IEND is cut"),
    "sharp/testimgl.jpg": ("format", "a lossless JPEG, which browsers do not show"),
    "pillow/frame_size.mpo": (None, "its first picture; the second is trailing bytes"),
    "pillow/ignore_frame_size.mpo": (None, "its first picture; the second is trailing bytes"),
}
"""What we judge otherwise than the corpus suggests: the reason to refuse it or none, and why."""


@dataclass(frozen=True)
class OddFile:
    """One file, with what the corpus says of it."""

    name: str
    path: Path
    suggest: str
    still: bool
    """Pillow reads one frame of a JPEG, PNG or WebP in it."""

    @cached_property
    def data(self) -> bytes:
        return self.path.read_bytes()

    def may_be(self, reason: str | None) -> bool:
        """Whether it may be judged so: refused for `reason`, or accepted where that is none."""
        if self.name in DISAGREEMENTS:
            return reason == DISAGREEMENTS[self.name][0]
        if self.suggest == "accept" and self.still:
            return reason is None
        return reason in REFUSED


def odd_files() -> list[OddFile]:
    """All of them. Skips the test where the corpus is not at hand."""
    above = (folder / "shared" / "data" / "robustness" for folder in Path(__file__).resolve().parents)
    corpus = next((folder for folder in above if folder.is_dir()), None)
    if corpus is None:
        pytest.skip("no corpus of odd files at shared/data/robustness beside the repository")
    return [
        OddFile(
            entry["file"].removeprefix("files/"),
            corpus / entry["file"],
            entry["suggest"],
            entry["pillow13"].get("format") in ("JPEG", "PNG", "WEBP")
            and (entry["pillow13"].get("frames") or 1) == 1,
        )
        for entry in map(json.loads, (corpus / "manifest.jsonl").read_text().splitlines())
    ]
