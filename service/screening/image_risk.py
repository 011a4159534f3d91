"""What a picture shows, as signals: skin, the two networks, linear heads and plugins.

    skin.py     measures without a network        nets.py   the networks and their preprocessing
    framing.py  frames off, strips into pieces    glance.py which views of a picture the networks see

A detector that is missing or fails is named in `failed`; it never becomes a score of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import cv2
import numpy as np

from service.processes.wire import Detector
from service.screening import skin
from service.screening.framing import unframe
from service.screening.glance import Glance, glance
from service.screening.heads import Head
from service.screening.nets import (
    IMAGE_SAFETY,
    OPEN_NSFW,
    RUN,
    SIDE,
    ImageSafety,
    NetFailed,
    NetMissing,
    OpenNsfw,
)
from service.screening.signals import Findings, Signal
from service.screening.skin import RGB
from tenants.risk import Category

VERSION = "1"
"""Of the rules here and in `glance.py`: a change of them changes scores as other weights would."""
OUR_LICENCE = "Apache-2.0"

Result = TypeVar("Result")


class ImageDetector(Protocol):
    """Another detector of pictures: what a plugin of `pericarp.image_detectors` makes."""

    name: str
    licence: str

    def detect(self, rgb: RGB) -> tuple[Signal, ...]:
        """Its signals for a picture, uint8 [height, width, 3]; each under its own `name`."""
        ...


class Sight:
    """Every detector of pictures that this process has. Not for several threads."""

    def __init__(
        self, *, nets: bool = True, heads: Sequence[Head] = (), plugins: Sequence[ImageDetector] = ()
    ) -> None:
        """Load the networks. One that is not wanted, missing or altered is left out, and fails with every picture."""
        cv2.setNumThreads(1)
        self._missing: list[str] = []
        self._nsfw = self._load(OpenNsfw.name, OpenNsfw, nets)
        self._safety = self._load(ImageSafety.name, ImageSafety, nets)
        self._heads = tuple(heads)
        self._plugins = tuple(plugins)

    @property
    def detectors(self) -> tuple[Detector, ...]:
        """What there is to look with."""
        return (
            Detector("skin", True, VERSION, OUR_LICENCE),
            Detector(OpenNsfw.name, self._nsfw is not None, version(OPEN_NSFW.sha256), OPEN_NSFW.licence),
            Detector(
                ImageSafety.name,
                self._safety is not None,
                version(IMAGE_SAFETY.sha256),
                IMAGE_SAFETY.licence,
            ),
            *(
                Detector(head.name, self._nsfw is not None, version(head.sha256), head.licence)
                for head in self._heads
            ),
            *(
                Detector(plugin.name, True, _plugin_version(plugin), plugin.licence)
                for plugin in self._plugins
            ),
        )

    def look(self, picture: RGB) -> Findings:
        """What is found in a picture, uint8 [height, width, 3]. Never raises: what failed is named."""
        failed = list(self._missing)
        content = unframe(picture)
        cues = skin.measure(skin.shrink(content))
        seen = self._glance(content, cues.saturation, failed)
        signals = [Signal("skin", Category.SEXUAL, skin.score(cues), "skin.smooth")]
        for name, category, score in (
            (OpenNsfw.name, Category.SEXUAL, seen.nsfw),
            (ImageSafety.name, Category.SEXUAL, seen.sexual),
            (ImageSafety.name, Category.GORE, seen.gore),
        ):
            if score is not None:
                signals.append(Signal(name, category, score, f"{name}.{category}"))
        for head in self._heads:
            if seen.features is None:
                failed.append(head.name)
            else:
                signals.append(head.judge(seen.features))
        for plugin in self._plugins:
            signals += _ask(plugin, picture, failed)
        return Findings(tuple(signals), tuple(dict.fromkeys(failed)))

    def warm_up(self) -> None:
        """Take all the memory that a look will ever need."""
        plain = np.zeros((SIDE, SIDE, 3), np.uint8)
        for net in (self._nsfw, self._safety):
            if net is not None:
                net.look([plain] * RUN)
        self.look(plain)

    def _load(self, name: str, make: Callable[[], Result], wanted: bool) -> Result | None:
        try:
            if wanted:
                return make()
        except NetMissing:
            pass  # as one that is not wanted: named with every picture
        self._missing.append(name)
        return None

    def _glance(self, content: RGB, saturation: float, failed: list[str]) -> Glance:
        """With both networks; without one that fails."""
        nsfw, safety = self._nsfw, self._safety
        while True:
            try:
                return glance(content, saturation=saturation, open_nsfw=nsfw, image_safety=safety)
            except NetFailed as exc:
                failed.append(str(exc))
                nsfw = None if OpenNsfw.name in failed else nsfw
                safety = None if ImageSafety.name in failed else safety


def _ask(plugin: ImageDetector, picture: RGB, failed: list[str]) -> tuple[Signal, ...]:
    """A plugin's signals, where they are ones; else it has failed. It gets a copy: what it writes, it keeps."""
    try:
        signals = tuple(plugin.detect(picture.copy()))
        sound = all(signal.detector == plugin.name and 0.0 <= signal.score <= 1.0 for signal in signals)
    except Exception:  # noqa: BLE001 - foreign code may raise anything; its message may hold anything
        sound = False
    if not sound:
        failed.append(plugin.name)
        return ()
    return signals


def version(sha256: str) -> str:
    """Of a detector with weights of this digest: changes with them and with our rules."""
    return f"{sha256[:12]}.{VERSION}"


def _plugin_version(plugin: ImageDetector) -> str:
    return str(getattr(plugin, "version", ""))
