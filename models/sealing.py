"""One copy of a model's weights for all workers of this host, in memory that nobody can change any more.

The fleet makes an empty memory (memfd_create(2)) and hands its descriptor to every worker that it starts. The first
one fills it with the checkpoint's tensors, in the dtype that it scores in, and seals it; the others map what they
find. It is sealed before the worker says Hello, so before any tenant's data is near, and from then on the kernel
refuses every change through every descriptor, even to root: no worker can alter what another scores with. Nor can
who changes the checkpoint's files later: what was loaded first scores until the service stops.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from models import ModelFailed
from models.sealed_memory import is_sealed, seal

ALIGNMENT_BYTES = 64
"""A cache line, and the widest vector register."""
PIECE_BYTES = 16 << 20
"""What is converted at a time, so that a large tensor is never held twice."""

_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}


class SealedWeights:
    """The memory behind `descriptor`: empty, or whole and sealed. In between, only one process at a time sees it."""

    def __init__(self, descriptor: int) -> None:
        """`descriptor` is open for reading and writing, and stays the caller's to close."""
        self._descriptor = descriptor

    @property
    def path(self) -> Path:
        """A safetensors file for as long as the descriptor is open; its mappings outlive both."""
        return Path(f"/proc/self/fd/{self._descriptor}")

    @property
    def sealed(self) -> bool:
        return is_sealed(self._descriptor)

    def hashes(self) -> dict[str, str]:
        """SHA-256, in hex, of each file of weights that was read; none where nothing is sealed yet."""
        if not self.sealed:
            return {}
        with safe_open(self.path, framework="pt") as opened:
            return dict(opened.metadata() or {})

    def fill(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, hashes: Mapping[str, str]) -> None:
        """Write `tensors` as `dtype` and seal them, unless another process has done so before or does so now.

        Raises `OSError` where there is no memory left; then it is empty again. `ModelFailed` where a tensor is not
        of floating point.
        """
        with self._locked():
            if self.sealed:
                return
            try:
                os.ftruncate(self._descriptor, 0)  # what a process left that died as it wrote
                self._write(tensors, dtype, hashes)
                seal(self._descriptor)
            except BaseException:
                os.ftruncate(self._descriptor, 0)
                raise

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among all processes; the kernel lets go for one that dies."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN)

    def _write(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, hashes: Mapping[str, str]) -> None:
        """In the format of safetensors, which knows no gaps: sizes that would misalign the next come last."""

        def size_bytes(name: str) -> int:
            return tensors[name].numel() * dtype.itemsize

        order = sorted(tensors, key=lambda name: (size_bytes(name) % ALIGNMENT_BYTES != 0, name))
        header: dict[str, object] = {"__metadata__": dict(hashes)}
        end = 0
        for name in order:
            if not tensors[name].is_floating_point():
                raise ModelFailed(f"tensor {name!r} of the weights is not of floating point")
            start, end = end, end + size_bytes(name)
            shape = list(tensors[name].shape)
            header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT_BYTES)
        place = self._put(struct.pack("<Q", len(text)) + text, 0)
        for name in order:
            flat, step = tensors[name].reshape(-1), PIECE_BYTES // dtype.itemsize
            for start in range(0, len(flat), step):
                piece = flat[start : start + step]
                place = self._put(piece.to(dtype).view(torch.uint8).numpy().data, place)

    def _put(self, data: bytes | memoryview, place: int) -> int:
        """Write all of `data` at byte `place`; where it ends."""
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self._descriptor, rest, place)
            rest, place = rest[written:], place + written
        return place
