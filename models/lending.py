"""One copy of a model's weights on a GPU: one process owns it and lends it, the workers borrow it.

The owner puts the checkpoint's tensors, in the dtype that workers score in, into one allocation of the GPU that holds
nothing else, and writes an offer: the handle that opens it, the table of what lies where, and its fingerprint. The
offer goes into a memory that the fleet made and that is sealed then (`models.sealing`), so no worker can forge it for
another. A worker opens the handle, compares the fingerprint, and its tensors are views of the owner's memory.

CUDA can map writable only. So a worker that is taken over could change what others score with, and the owner looks
again and again (`intact`), under a key that never leaves it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from models import ModelFailed
from models.cuda_memory import HANDLE_BYTES, PAGE_BYTES, CudaError, CudaRuntime
from models.sealed_memory import is_sealed, seal
from models.tensors import map_tensors
from models.weights import Checkpoint

ALIGNMENT_BYTES = 256
"""Where cudaMalloc's own addresses begin."""
PIECE_BYTES = 16 << 20
"""What is copied, and what is multiplied with one run of keys, at a time."""
SEED_BYTES = 32

_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


class NotShareable(Exception):
    """This device's memory cannot be shared between processes; the text says why."""


def open_gpu(device: str) -> tuple[torch.device, CudaRuntime]:
    """The GPU that `device` ("auto", "cuda", "cuda:N") names, for sharing its memory. Raises `NotShareable`."""
    if device == "cpu" or not torch.cuda.is_available():
        raise NotShareable("there is no CUDA device")
    index = torch.device("cuda" if device == "auto" else device).index
    index = torch.cuda.current_device() if index is None else index
    if is_slice(os.environ.get("CUDA_VISIBLE_DEVICES", ""), torch.cuda.get_device_name(index)):
        raise NotShareable("a MIG slice shares no memory between processes")
    try:
        return torch.device("cuda", index), CudaRuntime.of_torch(torch.version.cuda, index)
    except CudaError as exc:
        raise NotShareable(str(exc)) from exc


def is_slice(visible: str, name: str) -> bool:
    """Whether a device is a MIG slice, by `CUDA_VISIBLE_DEVICES` ("MIG-…") or by its name ("… MIG 1g.10gb")."""
    return visible.startswith("MIG-") or "MIG" in name.split()


def lend(checkpoint: Checkpoint, dtype: torch.dtype, cuda: CudaRuntime) -> LentWeights:
    """Put the checkpoint's weights where workers can borrow them.

    Raises `NotShareable`; `ModelFailed` where they cannot be read, or find no room.
    """
    try:
        tensors = map_tensors(checkpoint.weights())
    except (OSError, ValueError, SafetensorError) as exc:
        raise ModelFailed(f"the weights of model {checkpoint.name!r} cannot be read") from exc
    return LentWeights(tensors, dtype, checkpoint.weight_hashes, cuda)


class LentWeights:
    """The owner's side. The memory is there for as long as the process."""

    def __init__(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, hashes: Mapping[str, str], cuda: CudaRuntime
    ) -> None:
        """Copy `tensors` to the device as `dtype`; `hashes` are those of the files that they come from.

        Raises `NotShareable`; `ModelFailed` where they find no room, or one is not of floating point.
        """
        self._key = secrets.token_bytes(SEED_BYTES)
        table, end = {}, 0
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise ModelFailed(f"tensor {name!r} of the weights is not of floating point")
            table[name] = _Place(end, tuple(tensor.shape))
            end = _round_up(table[name].end(dtype), ALIGNMENT_BYTES)
        self.size_bytes = _round_up(max(end, 1), PAGE_BYTES)
        try:
            address = cuda.allocate(self.size_bytes)
        except CudaError as exc:
            raise ModelFailed(f"the weights find no room: {exc}") from exc
        try:
            handle = cuda.export(address)
        except CudaError as exc:
            raise NotShareable(str(exc)) from exc
        self._block = from_dlpack(cuda.view(address, self.size_bytes))
        self._block.zero_()  # what was there before is nobody's to see
        for name, tensor in tensors.items():
            _copy(tensor, table[name].view(self._block, dtype).view(-1))
        seed = secrets.token_bytes(SEED_BYTES)
        self._offer = Offer(
            handle, self.size_bytes, dtype, dict(hashes), table, seed, fingerprint(self._block, seed)
        )
        self._expected = fingerprint(self._block, self._key)

    def offer(self, descriptor: int) -> None:
        """Write the offer into the empty memory behind `descriptor`, and seal it."""
        rest = memoryview(self._offer.to_json())
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        seal(descriptor)

    def intact(self) -> bool:
        """Whether the memory is as it was written. Whatever was changed goes unseen with a chance of 2^-33 at most."""
        return fingerprint(self._block, self._key) == self._expected


class BorrowedWeights:
    """A worker's side. Make it before any tenant's data is near."""

    def __init__(self, descriptor: int, cuda: CudaRuntime) -> None:
        """Map what is offered in the memory behind `descriptor`.

        Raises `CudaError` where it cannot be mapped here; `ModelFailed` where it is not what was offered.
        """
        self._offer = Offer.read(descriptor)
        address = cuda.open(self._offer.handle)
        self._block = from_dlpack(cuda.view(address, self._offer.size_bytes))
        if fingerprint(self._block, self._offer.seed) != self._offer.fingerprint:
            raise ModelFailed("the lent weights are not what was offered")

    def hashes(self) -> dict[str, str]:
        """SHA-256, in hex, of each file of weights that the owner has read."""
        return self._offer.hashes

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every tensor, by the names of the checkpoint's files, as a view of the owner's memory.

        Raises `ModelFailed` where they are lent in another dtype.
        """
        if dtype != self._offer.dtype:
            raise ModelFailed("the lent weights are in another dtype than is asked for")
        return {name: place.view(self._block, dtype) for name, place in self._offer.table.items()}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in the memory a tensor lies, and its shape."""

    start: int
    shape: tuple[int, ...]

    def end(self, dtype: torch.dtype) -> int:
        return self.start + math.prod(self.shape) * dtype.itemsize

    def view(self, block: Tensor, dtype: torch.dtype) -> Tensor:
        return block[self.start : self.end(dtype)].view(dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class Offer:
    """What a worker needs to borrow the weights: no secret to any worker, and of no use to anybody else."""

    handle: bytes
    size_bytes: int
    dtype: torch.dtype
    hashes: dict[str, str]
    table: dict[str, _Place]
    seed: bytes
    fingerprint: str

    def to_json(self) -> bytes:
        dtype = next(name for name, dtype in _DTYPES.items() if dtype == self.dtype)
        return json.dumps(
            {
                "handle": self.handle.hex(),
                "size_bytes": self.size_bytes,
                "dtype": dtype,
                "hashes": self.hashes,
                "table": {name: [place.start, list(place.shape)] for name, place in self.table.items()},
                "seed": self.seed.hex(),
                "fingerprint": self.fingerprint,
            },
            separators=(",", ":"),
        ).encode()

    @classmethod
    def read(cls, descriptor: int) -> Offer:
        """The offer in the sealed memory behind `descriptor`. Raises `ModelFailed` where it holds none."""
        if not is_sealed(descriptor):
            raise ModelFailed("the weights that are lent are not sealed")
        try:
            told = json.loads(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
            offer = cls(
                bytes.fromhex(told["handle"]),
                told["size_bytes"],
                _DTYPES[told["dtype"]],
                told["hashes"],
                {name: _Place(start, tuple(shape)) for name, (start, shape) in told["table"].items()},
                bytes.fromhex(told["seed"]),
                told["fingerprint"],
            )
            offer._check()
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise ModelFailed("the offer of lent weights cannot be read") from exc
        return offer

    def _check(self) -> None:
        """Raises `ValueError` where something would lie outside of the memory, or crooked in it."""
        if len(self.handle) != HANDLE_BYTES or self.size_bytes < 1 or self.size_bytes % PAGE_BYTES:
            raise ValueError("not a handle, or not a whole number of pages")
        for place in self.table.values():
            if place.start < 0 or place.start % ALIGNMENT_BYTES or any(size < 0 for size in place.shape):
                raise ValueError("not a place")
            if place.end(self.dtype) > self.size_bytes:
                raise ValueError("a place outside of the memory")


@torch.inference_mode()
def fingerprint(block: Tensor, seed: bytes) -> str:
    """What `block`, whole 32-bit words of it, comes to under the keys that `seed` stands for; computed where it lies.

    Each piece is a multilinear hash: the sum of 32-bit words times 64-bit keys, modulo 2^64, which is the same in
    whatever order it is added up. To who does not know the keys, two different pieces have the same sum with a
    chance of 2^-33 at most, for a difference of words is no multiple of 2^32 (Lemire and Kaser, "Strongly universal
    string hashing is fast", 2014). To who does know them it proves no more than that nothing was damaged.
    """
    words = block.view(torch.int32)
    step = min(len(words), PIECE_BYTES // 4)
    drawn = bytearray(hashlib.shake_256(seed).digest(8 * step))
    keys = torch.frombuffer(drawn, dtype=torch.int64).to(block.device)
    pieces = (words[start : start + step] for start in range(0, len(words), step))
    sums = torch.stack([(piece * keys[: len(piece)]).sum() for piece in pieces]).tolist()
    return hashlib.sha256(struct.pack(f"<{len(sums)}q", *sums)).hexdigest()


@torch.inference_mode()
def _copy(tensor: Tensor, target: Tensor) -> None:
    """Converted here, piece by piece: the device needs no room but the target's own."""
    flat, step = tensor.reshape(-1), PIECE_BYTES // target.element_size()
    for start in range(0, len(flat), step):
        target[start : start + step].copy_(flat[start : start + step].to(target.dtype))


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
