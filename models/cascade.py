"""Shared-prefix attention on a CPU: a pack's rows in blocks, each over its prefix and over its own keys at once.

A block is a run of neighbouring rows: short candidates together, a long one (or a prefix) in pieces. The keys of its
prefix and its own stand behind one another, so one softmax goes over both: it is exact, and nothing is merged
afterwards. A block is small enough for its scores to stay in a core's cache, and large enough for its products to
run nearly at the rate of larger ones. Candidates are never padded; what a block computes in vain is where its mask
closes, between its own candidates and above the diagonal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.packing import Integers, Pack, Part

BLOCK_TOKENS = 64
ALIGNED_KEYS = 16
"""Scores of so many keys, or a multiple, fill a CPU's vectors: products are a tenth faster, softmax a quarter."""

Prefix = tuple[Tensor, Tensor]
"""Keys and values of a prompt's prefix, each [prefix tokens, key heads, size]."""


@dataclass(frozen=True, slots=True)
class Block:
    """The queries `rows` attend to all of the prefix of part `prefix`, where there is one, and to `keys` of the pack.

    `mask` [rows, keys + padding] fp32 is 0 where a row may attend to a key of the pack, and -inf where not.
    """

    rows: slice
    keys: slice
    prefix: int | None
    mask: Tensor


def blocks(pack: Pack) -> tuple[Block, ...]:
    """Blocks over all rows of `pack`, in order."""
    made: list[Block] = []
    for number, part in enumerate(pack.parts):
        if part.holds_prefix:
            cut = _cut((part.start, part.bounds[0]))
            made += [_block(rows, bounds, None, behind=0) for rows, bounds in cut]
        cut = _cut(part.bounds)
        made += [_block(rows, bounds, number, behind=part.prefix_tokens) for rows, bounds in cut]
    return tuple(made)


def last_blocks(pack: Pack) -> tuple[Block, ...]:
    """Blocks over the queries of `pack.score_rows` alone, one a part: these are few enough for one product."""
    made, done = [], 0
    for number, part in enumerate(pack.parts):
        if part.candidates:
            made.append(_last_block(part, number, done))
            done += len(part.candidates)
    return tuple(made)


def attend(
    query: Tensor, key: Tensor, value: Tensor, over: Sequence[Block], prefixes: Sequence[Prefix]
) -> Tensor:
    """Softmax attention of `query` [rows, heads, size], scaled already, block by block.

    `key` and `value` [tokens, key heads, size] are the pack's, `prefixes` one a part; `over` are all rows in order.
    The result is [rows, heads, size].
    """
    out = torch.empty(query.shape, dtype=query.dtype)
    counts = [block.rows.stop - block.rows.start for block in over]
    longest = max((block.mask.shape[1] for block in over), default=0)
    queries, results = (states.transpose(0, 1).split_with_sizes(counts, 1) for states in (query, out))
    own = torch.stack((_by_head(key), _by_head(value)))  # [2, key heads, 1, size, tokens]
    seen: _Seen | None = None
    for block, rows, result in zip(over, queries, results, strict=True):
        if seen is None or seen.prefix != block.prefix:
            seen = _Seen(block.prefix, prefixes, query.shape[1] // key.shape[1], longest, own)
        keys, values = seen.with_own(block)
        scores = torch.bmm(rows, keys)  # [heads, rows, prefix + own keys + padding]
        scores.narrow(2, seen.shared, block.mask.shape[1]).add_(block.mask)
        torch.softmax(scores, dim=-1, out=scores)
        torch.bmm(scores, values.mT, out=result)
    return out


class _Seen:
    """What the blocks of one prefix see: its keys and values, and behind them a block's own, in one buffer.

    A key head stands there once for each query head that it serves. Padding is zeros, or own keys of a block before.
    """

    def __init__(
        self, prefix: int | None, prefixes: Sequence[Prefix], group: int, longest: int, own: Tensor
    ) -> None:
        shared = () if prefix is None else prefixes[prefix]
        self.prefix = prefix
        self.shared = len(shared[0]) if shared else 0
        self._own = own
        _, key_heads, _, size, _ = own.shape
        self._joint = own.new_zeros(2, key_heads, group, size, self.shared + longest)
        self._by_query_head = self._joint.flatten(1, 2)
        for joint, states in zip(self._joint, shared, strict=False):
            joint[..., : self.shared] = _by_head(states)

    def with_own(self, block: Block) -> tuple[Tensor, ...]:
        """Keys and values [heads, size, keys], until the next call."""
        start, count = block.keys.start, block.keys.stop - block.keys.start
        self._joint.narrow(4, self.shared, count).copy_(self._own.narrow(4, start, count))
        return self._by_query_head.narrow(3, 0, self.shared + block.mask.shape[1]).unbind()


def _by_head(states: Tensor) -> Tensor:
    """[tokens, key heads, size] as [key heads, 1, size, tokens]."""
    return states.permute(1, 2, 0).unsqueeze(1)


def _cut(bounds: Sequence[int]) -> Iterable[tuple[slice, Sequence[int]]]:
    """Rows that make a block, and the bounds of the spans that they lie in, or of the one that they are a piece of."""
    spans: list[int] = []
    for start, end in pairwise(bounds):
        if spans and end - spans[0] > BLOCK_TOKENS:
            yield slice(spans[0], spans[-1]), spans
            spans = []
        if end - start <= BLOCK_TOKENS:
            spans = [*(spans or [start]), end]
            continue
        pieces = -(-(end - start) // BLOCK_TOKENS)
        cuts = [start + (end - start) * piece // pieces for piece in range(pieces + 1)]
        for first, last in pairwise(cuts):
            yield slice(first, last), (start, last)
    if spans:
        yield slice(spans[0], spans[-1]), spans


def _block(rows: slice, bounds: Sequence[int], prefix: int | None, *, behind: int) -> Block:
    keys = slice(bounds[0], rows.stop)
    place, owner = np.arange(keys.start, keys.stop), _owners(bounds)
    row = slice(rows.start - keys.start, None)
    seen = (owner[row, None] == owner) & (place[row, None] >= place)
    return Block(rows, keys, prefix, _mask(seen, behind))


def _last_block(part: Part, number: int, done: int) -> Block:
    seen = np.arange(len(part.candidates))[:, None] == _owners(part.bounds)
    keys = slice(part.bounds[0], part.bounds[-1])
    return Block(slice(done, done + len(part.candidates)), keys, number, _mask(seen, part.prefix_tokens))


def _owners(bounds: Sequence[int]) -> Integers:
    """[rows]: in which span, counted from 0, a row between the first and the last of `bounds` lies."""
    return np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))


def _mask(seen: NDArray[np.bool_], behind: int) -> Tensor:
    """`seen` [rows, keys] as what is added to scores, padded so that these keys, `behind` others, end aligned."""
    padding = -(behind + seen.shape[1]) % ALIGNED_KEYS
    mask = np.full((len(seen), seen.shape[1] + padding), -np.inf, dtype=np.float32)
    mask[:, : seen.shape[1]][seen] = 0
    return torch.from_numpy(mask)
