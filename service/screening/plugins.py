"""Detectors of others, for images: entry points of the group `pericarp.image_detectors`.

Only those that a setting names are loaded. They run inside the locked child like everything that sees an image, so whatever
they read they must read when they are made. Their licences are theirs: `/readyz` shows them, and no plugin is ever a
dependency (NudeNet's and basegun's weights, say, are AGPL-3.0).

An entry point names something that is called without arguments and gives an `ImageDetector`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import entry_points

from service.screening.image_risk import ImageDetector
from service.screening.signals import IMAGE_DETECTORS

GROUP = "pericarp.image_detectors"
NAME = re.compile(r"[a-z][a-z0-9_]{0,30}")


class BadPlugin(Exception):
    """A plugin that a setting names cannot be used; the message names it and says why."""


def load_plugins(names: Sequence[str]) -> tuple[ImageDetector, ...]:
    """The plugins of these entry points, in order. Raises BadPlugin for one that is missing or does not load."""
    return tuple(_load(name) for name in names)


def _load(name: str) -> ImageDetector:
    found = entry_points(group=GROUP, name=name)
    if len(found) != 1:
        raise BadPlugin(f"{len(found)} installed packages offer an image detector {name}; there must be one")
    (entry,) = found
    try:
        plugin: ImageDetector = entry.load()()
        named, licence = plugin.name, plugin.licence
    except Exception as exc:
        raise BadPlugin(f"the image detector {name} does not load: {type(exc).__name__}") from exc
    if named in IMAGE_DETECTORS or not NAME.fullmatch(named) or not licence:
        raise BadPlugin(f"the image detector {name} needs a licence, and a name of its own in lower case")
    return plugin
