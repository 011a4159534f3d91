"""What a worker keeps of its tenant's work: a prefix's keys and values, images' features, what sessions pin."""

from __future__ import annotations

from torch import Tensor


class PrefixMemory:
    """Keys and values of one prompt's prefix, by layer: the pack that holds the prefix keeps, others recall."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Copy `key` and `value` [1, key heads, prefix tokens, size]; a view would hold the whole pack."""
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
