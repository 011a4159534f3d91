"""Linear classifiers of your own over open_nsfw's pooled features: a few kilobytes each, and no second look.

A head is one safetensors file: `weight` float32 [1024] and `bias` float32 [1], optionally `mean` and `scale` [1024] that
are taken off and divided by first. Its metadata name it: `name` (lower-case letters, digits, `_`), `category` (one of the
closed list), `licence`. Its score is the logistic function of weight · (features − mean) / scale + bias.

They see what open_nsfw sees, so they must be fitted on the same: `nets.crop` of upright pictures without frames.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from service.screening.nets import FEATURE_COUNT, Floats
from service.screening.signals import IMAGE_DETECTORS, Signal
from tenants.risk import Category

MOST_BYTES = 64 * 1024
MOST_HEADS = 32
NAME = re.compile(r"[a-z][a-z0-9_]{0,30}")


class BadHead(Exception):
    """A file in the folder of heads is not one; the message names the file and says why."""


@dataclass(frozen=True, slots=True)
class Head:
    """One linear classifier."""

    name: str
    category: Category
    licence: str
    sha256: str
    weight: Floats
    bias: float

    def judge(self, features: Floats) -> Signal:
        """Its signal for the features of some views, float32 [views, 1024]: the worst view counts."""
        logit = float((features @ self.weight).max()) + self.bias
        score = 1.0 / (1.0 + float(np.exp(np.clip(-logit, -60.0, 60.0))))
        return Signal(self.name, self.category, score, f"head.{self.name}")


def read_heads(folder: Path) -> tuple[Head, ...]:
    """Every `*.safetensors` in a folder, by file name. Raises BadHead for one that cannot be used, or for none at all."""
    files = sorted(folder.glob("*.safetensors"))
    if not 1 <= len(files) <= MOST_HEADS:
        raise BadHead(
            f"the folder of heads holds {len(files)} safetensors files; 1 to {MOST_HEADS} are right"
        )
    heads = tuple(_read(file) for file in files)
    if len({head.name for head in heads}) != len(heads):
        raise BadHead("two heads have the same name")
    return heads


def _read(file: Path) -> Head:
    if file.stat().st_size > MOST_BYTES:
        raise BadHead(f"{file.name} has more than {MOST_BYTES:,} bytes")
    content = file.read_bytes()
    try:
        arrays = load(content)
        header_bytes = int.from_bytes(content[:8], "little")
        named = json.loads(content[8 : 8 + header_bytes]).get("__metadata__", {})
        category = Category(named.get("category", ""))
    except (SafetensorError, ValueError, KeyError) as exc:
        raise BadHead(f"{file.name} is no safetensors file, or its metadata names no category") from exc
    if (
        not NAME.fullmatch(named.get("name", ""))
        or named["name"] in IMAGE_DETECTORS
        or not named.get("licence")
    ):
        raise BadHead(f"{file.name} lacks a name of its own or a licence in its metadata")
    wrong = [
        key
        for key, shape in _SHAPES.items()
        if (key in arrays or key in ("weight", "bias"))
        and (
            key not in arrays
            or arrays[key].shape != shape
            or arrays[key].dtype != np.float32
            or not np.isfinite(arrays[key]).all()
        )
    ]
    if wrong or set(arrays) - set(_SHAPES) or not np.all(arrays.get("scale", np.ones(1)) > 0):
        raise BadHead(f"{file.name}: {', '.join(wrong) or 'its tensors'} cannot be used")
    scale = arrays.get("scale", np.ones(FEATURE_COUNT, np.float32))
    mean = arrays.get("mean", np.zeros(FEATURE_COUNT, np.float32))
    weight = (arrays["weight"] / scale).astype(np.float32)
    return Head(
        name=named["name"],
        category=category,
        licence=str(named["licence"])[:64],
        sha256=hashlib.sha256(content).hexdigest(),
        weight=weight,
        bias=float(arrays["bias"][0]) - float(mean @ weight),
    )


_SHAPES = {"weight": (FEATURE_COUNT,), "bias": (1,), "mean": (FEATURE_COUNT,), "scale": (FEATURE_COUNT,)}
