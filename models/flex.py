"""Shared-prefix attention by FlexAttention: one fused kernel over a block mask, for a GPU.

The pack's rule is given to the kernel twice: as a list of the blocks that hold any allowed pair, so that the rest is
never read, and as a function of two rows for the blocks that are allowed in part. A thousand candidates of one
prefix are then a narrow diagonal and one column of blocks.

Compiled code is for one shape, so shapes are bucketed: rows are padded to a power of two that holds all keys.
Padding costs next to nothing, for its blocks are in no list. `warm_up` compiles every bucket before the first
request, and `compilations` counts what was compiled: it stays where it is under load.

FlexAttention: J. Dong et al., "Flex Attention: A Programming Model for Generating Optimized Attention Kernels", 2024,
arXiv 2412.05496.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from models.packing import Pack, Part

BLOCK = 128
SMALLEST_BUCKET = 256

_compiled_shapes: set[tuple[object, ...]] = set()
_compiling = threading.Lock()


def compilations() -> int:
    """How many shapes this process has compiled attention for."""
    return len(_compiled_shapes)


class FlexMask:
    """The rule of one pack. Keys are the prefixes that memories hold, in the order of their parts, then the pack."""

    def __init__(self, pack: Pack, device: torch.device) -> None:
        self._remembered = sum(part.prefix_tokens for part in pack.parts if not part.holds_prefix)
        self._tokens = len(pack.ids)
        self.rows = bucket(self._remembered + self._tokens)
        spans = list(_spans(pack, self._remembered))
        job = np.full(self.rows, -1, dtype=np.int32)  # [rows]; padding belongs to no job
        owner = np.full(self.rows, -1, dtype=np.int32)  # [rows]; 0 is a prefix
        for number, prefix, candidates in spans:
            job[slice(*prefix)], owner[slice(*prefix)] = number, 0
            for place, candidate in enumerate(candidates, start=1):
                job[slice(*candidate)], owner[slice(*candidate)] = number, place
        self.block_mask = _block_mask(spans, owner, job, self.rows, self._remembered, device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """`query` [1, heads, tokens, size], `key` and `value` [1, key heads, remembered + tokens, size].

        Returns [1, tokens, heads, size].
        """
        behind = self.rows - self._remembered - self._tokens
        query = pad(query, (0, 0, self._remembered, behind))
        key, value = pad(key, (0, 0, 0, behind)), pad(value, (0, 0, 0, behind))
        kernel = _kernel(query, key)
        out: Tensor = kernel(query, key, value, block_mask=self.block_mask, scale=scaling, enable_gqa=True)
        return out[:, :, self._remembered : self._remembered + self._tokens].transpose(1, 2)


def warm_up(
    *, heads: int, key_heads: int, size: int, dtype: torch.dtype, device: torch.device, most_rows: int
) -> None:
    """Compile the kernel for every bucket up to that of `most_rows`; `size` is that of a head."""
    for rows in (
        SMALLEST_BUCKET << step for step in range((bucket(most_rows) // SMALLEST_BUCKET).bit_length())
    ):
        part = Part(0, 1, holds_prefix=True, candidates=(0,), bounds=(1, rows), images=())
        ids = np.zeros(rows, dtype=np.int64)
        mask = FlexMask(Pack(ids, np.broadcast_to(ids, (3, rows)), (part,)), device)
        query = torch.zeros(1, heads, rows, size, dtype=dtype, device=device)
        key = torch.zeros(1, key_heads, rows, size, dtype=dtype, device=device)
        mask.attend(query, key, key, 1.0)


def bucket(rows: int) -> int:
    """The power of two that holds `rows`, at least `SMALLEST_BUCKET`."""
    return max(SMALLEST_BUCKET, 1 << (rows - 1).bit_length())


def _kernel(query: Tensor, key: Tensor) -> Callable[..., Any]:
    """The compiled kernel on a GPU; elsewhere the plain one, which is slow and for tests."""
    if query.device.type != "cuda":
        return flex_attention
    shape = (*query.shape, *key.shape, query.dtype, query.device)
    with _compiling:
        _compiled_shapes.add(shape)
    return _compile()


@functools.cache
def _compile() -> Callable[..., Any]:
    # One entry a bucket: the default limit would fall back to the slow kernel without a word.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


Span = tuple[int, int]


def _spans(pack: Pack, remembered: int) -> Iterator[tuple[int, Span, list[Span]]]:
    """Of each part: its number, where its prefix is among the keys, and where its candidates are."""
    start = 0
    for number, part in enumerate(pack.parts):
        prefix = _prefix_span(part, start, remembered)
        if not part.holds_prefix:
            start += part.prefix_tokens
        yield number, prefix, [(remembered + a, remembered + b) for a, b in pairwise(part.bounds)]


def _prefix_span(part: Part, start: int, remembered: int) -> Span:
    if part.holds_prefix:
        return remembered + part.start, remembered + part.bounds[0]
    return start, start + part.prefix_tokens


def _block_mask(
    spans: list[tuple[int, Span, list[Span]]],
    owner: NDArray[np.int32],
    job: NDArray[np.int32],
    rows: int,
    remembered: int,
    device: torch.device,
) -> BlockMask:
    blocks = rows // BLOCK
    some = np.zeros((blocks, blocks), dtype=bool)  # [query block, key block]: any pair allowed
    for _, prefix, candidates in spans:
        own = [prefix, *candidates] if prefix[0] >= remembered else candidates
        for span in own:
            first, last = span[0] // BLOCK, (span[1] - 1) // BLOCK
            some[first : last + 1, prefix[0] // BLOCK : (prefix[1] - 1) // BLOCK + 1] = True
            some[first : last + 1, first : last + 1] = True
    some &= np.tri(blocks, dtype=bool)
    # Allowed whole: keys of one job's prefix alone, queries of that job's candidates alone.
    jobs_of, owners_of = job.reshape(blocks, BLOCK), owner.reshape(blocks, BLOCK)
    one_job = (jobs_of == jobs_of[:, :1]).all(1)
    keys = np.where(one_job & (owners_of == 0).all(1), jobs_of[:, 0], -1)
    queries = np.where(one_job & (owners_of > 0).all(1), jobs_of[:, 0], -2)
    whole = some & (queries[:, None] == keys[None, :])
    owners, jobs = torch.from_numpy(owner).to(device), torch.from_numpy(job).to(device)

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        related = (owners[key] == 0) | (owners[key] == owners[query])
        return (jobs[query] == jobs[key]) & related & (key <= query) & (jobs[query] >= 0)

    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole, device),
        *_listed(whole, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=allowed,
        seq_lengths=(rows, rows),
    )


def _listed(blocks: NDArray[np.bool_], device: torch.device) -> tuple[Tensor, Tensor]:
    """[1, 1, query blocks] how many, and [1, 1, query blocks, key blocks] which, those that count first."""
    counts = torch.from_numpy(blocks.sum(1, dtype=np.int32))[None, None]
    which = torch.from_numpy(np.argsort(~blocks, axis=1, kind="stable").astype(np.int32))[None, None]
    return counts.to(device), which.to(device)
