"""What a screening child looks at images with: loaded before it locks itself in, and nothing opens a file later.

Only children import this: onnxruntime and OpenCV come with it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from models import Pixels
from service.processes.wire import Detector
from service.screening.heads import BadHead, read_heads
from service.screening.image_risk import Sight, version
from service.screening.messages import MAX_TEXT_CHARACTERS, Equipment
from service.screening.nets import NetFailed, NetMissing
from service.screening.ocr import DETECTION, RECOGNITION, TextReader
from service.screening.plugins import load_plugins
from service.screening.signals import Findings, ImageText, Looks


class Eyes:
    """What a child looks with. Not for several threads."""

    def __init__(self, equipment: Equipment) -> None:
        """Load it all. Raises BadHead and BadPlugin; a network whose file is missing is only left out."""
        heads = read_heads(Path(equipment.heads)) if equipment.heads is not None else ()
        plugins = load_plugins(equipment.plugins)
        names = [*(head.name for head in heads), *(plugin.name for plugin in plugins)]
        if len(set(names)) != len(names):
            raise BadHead("a head and a plugin, or two plugins, have the same name")
        self._sight = Sight(nets=equipment.nets, heads=heads, plugins=plugins)
        self._reader = _load_reader() if equipment.text else None

    @property
    def detectors(self) -> tuple[Detector, ...]:
        """What there is to look with, and what is missing."""
        ocr = Detector(
            TextReader.name,
            self._reader is not None,
            version(DETECTION.sha256 + RECOGNITION.sha256),
            RECOGNITION.licence,
        )
        return (*self._sight.detectors, ocr)

    def look(self, pixels: Pixels, looks: Looks) -> tuple[Findings, tuple[str, ...]]:
        """What `looks` asks for: what was found, and the lines of text. Never raises: what failed is named."""
        picture = np.frombuffer(pixels.data, np.uint8).reshape(pixels.height, pixels.width, 3)
        findings = self._sight.look(picture) if looks.risk else Findings()
        if looks.text is ImageText.OFF:
            return findings, ()
        try:
            if self._reader is None:
                raise NetFailed(TextReader.name)
            strict = looks.text is ImageText.STRICT
            reading = self._reader.read(picture, strict=strict)
        except NetFailed:
            return Findings(findings.signals, (*findings.failed, TextReader.name)), ()
        if strict and not reading.whole:  # what was not read must not pass unnoticed
            findings = Findings(findings.signals, (*findings.failed, TextReader.name))
        return findings, _cap(reading.lines)

    def warm_up(self) -> None:
        """Take all the memory that looking will ever need, and load what loads late."""
        self._sight.warm_up()
        if self._reader is not None:
            self._reader.warm_up()


def _load_reader() -> TextReader | None:
    try:
        return TextReader()
    except NetMissing:
        return None


def _cap(lines: tuple[str, ...]) -> tuple[str, ...]:
    """The first lines, of at most `MAX_TEXT_CHARACTERS` in all."""
    kept: list[str] = []
    left = MAX_TEXT_CHARACTERS
    for line in lines:
        kept += [line[:left]] if left > 0 else []
        left -= len(line)
    return tuple(kept)
