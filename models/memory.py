"""What a worker keeps of its tenants' work: a prefix's keys and values, images' features, what sessions pin.

Every key is a keyed hash (`Hasher`) of all that decides the value, under a secret of this process and one tenant
alone: nobody can make two things collide, nothing that leaks of a key tells what was sent, and what is kept of one
tenant's work is never found by another's. Each tenant has a `Store` of its own, so none can crowd out another's.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models import Pixels
from models.packing import Segment

Key = bytes
"""16 bytes that stand for an image, a prefix, or a candidate behind a prefix."""

_MARGIN_BYTES = 128
"""What one remembered margin costs: two keys, a float and their place in a table."""


class Hasher:
    """Names contents. `context` is what else decides an image's features: weights digest, resize parameters."""

    def __init__(self, context: bytes) -> None:
        self._salt = secrets.token_bytes(32)
        self._context = context

    def image(self, pixels: Pixels) -> Key:
        """The key of an image's features."""
        return self._hash(
            b"image", self._context, pixels.width.to_bytes(8), pixels.height.to_bytes(8), pixels.data
        )

    def segment(self, segment: Segment, images: Sequence[Key], *behind: Key) -> Key:
        """The key of a run of tokens with its images, in order, `behind` what stands before it."""
        ids = b"".join(token.to_bytes(4) for token in segment.ids)
        return self._hash(b"segment", ids, *images, *behind)

    def _hash(self, *parts: bytes) -> Key:
        state = hashlib.blake2b(key=self._salt, digest_size=16)
        for part in parts:
            state.update(len(part).to_bytes(8))  # so that no two lists of parts read alike
            state.update(part)
        return state.digest()


class PrefixMemory:
    """Keys and values of one prompt's prefix, by layer: the pack that holds the prefix keeps, others recall."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Copy `key` and `value` [prefix tokens, key heads, size]; a view would hold the whole pack."""
        self._layers[layer] = (key.clone(), value.clone())

    def recall(self, layer: int) -> tuple[Tensor, Tensor]:
        """What was kept of `layer`. Raises `KeyError` where nothing was."""
        return self._layers[layer]

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for kept in self._layers.values() for tensor in kept)

    def wipe(self) -> None:
        """Overwrite all that is kept, then let go of it."""
        for kept in self._layers.values():
            for tensor in kept:
                tensor.zero_()
        self._layers.clear()


class FeatureCache:
    """Visual tokens of images lately seen, the least recently used forgotten first. Not safe for threads alone."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._size_bytes = 0
        self._kept: OrderedDict[Key, Tensor] = OrderedDict()

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def get(self, key: Key) -> Tensor | None:
        features = self._kept.get(key)
        if features is not None:
            self._kept.move_to_end(key)
        return features

    @torch.inference_mode()
    def wipe(self) -> None:
        """Overwrite all that is kept, then let go of it."""
        for features in self._kept.values():
            features.zero_()
        self._kept.clear()
        self._size_bytes = 0

    def put(self, key: Key, features: Tensor) -> None:
        """Keep a copy of `features` [tokens, hidden]; a view would hold its whole batch."""
        if key in self._kept or features.nbytes > self._limit_bytes:
            return
        self._kept[key] = features.clone()
        self._size_bytes += features.nbytes
        while self._size_bytes > self._limit_bytes:
            self._size_bytes -= self._kept.popitem(last=False)[1].nbytes


@dataclass(slots=True)
class Pins:
    """All that one session keeps, until it ends or `limit_bytes` are full: then the oldest of a kind goes first.

    `margins` are scores under (prefix, candidate). A candidate's own keys and values would be of use only behind
    the same prefix, and there they lead to the same score: so the score is what is kept of them.
    """

    limit_bytes: int
    features: OrderedDict[Key, Tensor] = field(default_factory=OrderedDict)
    prefixes: OrderedDict[Key, PrefixMemory] = field(default_factory=OrderedDict)
    margins: OrderedDict[Key, float] = field(default_factory=OrderedDict)
    size_bytes: int = 0
    users: int = 0
    """Jobs that still use it."""
    ended: bool = False

    def pin_features(self, key: Key, features: Tensor) -> None:
        """Keep a copy of `features` [tokens, hidden]."""
        if key not in self.features and self._make_room(features.nbytes):
            self.features[key] = features.clone()

    def pin_prefix(self, key: Key, memory: PrefixMemory) -> None:
        """Keep `memory`, which nobody may change any more."""
        if key not in self.prefixes and self._make_room(memory.size_bytes):
            self.prefixes[key] = memory

    def pin_margin(self, key: Key, margin: float) -> None:
        if key not in self.margins and self._make_room(_MARGIN_BYTES):
            self.margins[key] = margin

    def end(self) -> None:
        """Keep nothing any more: at once, or when the last job that reads it has ended."""
        self.ended = True
        self.wipe_unused()

    @torch.inference_mode()
    def wipe_unused(self) -> None:
        """Overwrite every tensor that is kept and let go of all, if the session has ended and nobody reads it."""
        if not self.ended or self.users:
            return
        for features in self.features.values():
            features.zero_()
        for memory in self.prefixes.values():
            memory.wipe()
        self.features.clear()
        self.prefixes.clear()
        self.margins.clear()
        self.size_bytes = 0

    def _make_room(self, wanted_bytes: int) -> bool:
        """Forget what is cheapest to compute again. What is forgotten is not overwritten: a job may still read it."""
        if wanted_bytes > self.limit_bytes:
            return False
        while self.size_bytes + wanted_bytes > self.limit_bytes:
            if self.margins:
                self.margins.popitem(last=False)
                self.size_bytes -= _MARGIN_BYTES
            elif self.prefixes:
                self.size_bytes -= self.prefixes.popitem(last=False)[1].size_bytes
            else:
                self.size_bytes -= self.features.popitem(last=False)[1].nbytes
        self.size_bytes += wanted_bytes
        return True


@dataclass(slots=True)
class Store:
    """All that is kept of one tenant's work; `hasher` has a secret of its own."""

    hasher: Hasher
    cache: FeatureCache
    sessions: dict[str, Pins] = field(default_factory=dict)
    users: int = 0
    """Jobs that still use it."""
    ended: bool = False

    def end(self) -> None:
        """Keep nothing any more: at once, or when the last job that reads it has ended."""
        self.ended = True
        for pins in self.sessions.values():
            pins.end()
        self.sessions.clear()
        self.wipe_unused()

    def wipe_unused(self) -> None:
        """Overwrite the cache, if it has ended and nobody reads it."""
        if self.ended and not self.users:
            self.cache.wipe()
