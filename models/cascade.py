"""Shared-prefix attention on a CPU: a pack's rows in blocks, each over its prefix and over its own keys at once.

A block is a run of neighbouring rows: short candidates together, a long one (or a prefix) in pieces. Its scores
against the prefix and against its own keys stand side by side in one buffer, and one softmax goes over both: it is
exact, and nothing is merged afterwards. A block is small enough for its scores to stay in a core's cache and large
enough for its products to run at the rate of any other. Candidates are never padded; what a block computes in vain
is where its mask closes, between its own candidates and above the diagonal.

Products run in the tensors' dtype, softmax in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from models.packing import Pack, Part

BLOCK_TOKENS = 128

Prefix = tuple[Tensor, Tensor]
"""Keys and values of a prompt's prefix, each [key heads, prefix tokens, size]."""


@dataclass(frozen=True, slots=True)
class Block:
    """The queries `rows` attend to all of the prefix of part `prefix`, where there is one, and to `keys` of the pack.

    `mask` [rows, 1, keys] fp32 is 0 where a row may attend to a key of the pack, and -inf where not.
    """

    rows: slice
    keys: slice
    prefix: int | None
    mask: Tensor


def blocks(pack: Pack) -> tuple[Block, ...]:
    """Blocks over all rows of `pack`."""
    made: list[Block] = []
    for number, part in enumerate(pack.parts):
        if part.holds_prefix:
            made += [_block(group, None) for group in _groups((part.start, part.bounds[0]))]
        made += [_block(group, number) for group in _groups(part.bounds)]
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
    query: Tensor, key: Tensor, value: Tensor, over: Iterable[Block], prefixes: Sequence[Prefix]
) -> Tensor:
    """Softmax attention of `query` [rows, key heads, group, size], scaled already, block by block.

    `key` and `value` [tokens, key heads, size] are the pack's, `prefixes` one a part. Returns [rows, key heads,
    group, size], transposed in memory.
    """
    rows, key_heads, group, size = query.shape
    # The query heads of one key head are more rows of it, and no key is copied.
    queries = query.transpose(0, 1).reshape(key_heads, rows * group, size)
    keys, values = (
        key.permute(1, 2, 0),
        value.transpose(0, 1),
    )  # [key heads, size, tokens], [key heads, tokens, size]
    out = torch.empty_like(queries)
    for block in over:
        mine = slice(block.rows.start * group, block.rows.stop * group)
        prefix = None if block.prefix is None else prefixes[block.prefix]
        _attend_block(
            queries[:, mine], keys[:, :, block.keys], values[:, block.keys], prefix, block.mask, out[:, mine]
        )
    return out.view(key_heads, rows, group, size).transpose(0, 1)


def _attend_block(
    query: Tensor, key: Tensor, value: Tensor, prefix: Prefix | None, mask: Tensor, out: Tensor
) -> None:
    key_heads, rows, _ = query.shape
    shared = 0 if prefix is None else prefix[0].shape[1]
    weights = query.new_empty(
        key_heads, rows, shared + key.shape[2]
    )  # [key heads, rows * group, prefix + own keys]
    if prefix is not None:
        torch.bmm(query, prefix[0].transpose(1, 2), out=weights[:, :, :shared])
    torch.bmm(query, key, out=weights[:, :, shared:])
    exact = weights.float()
    exact[:, :, shared:].view(key_heads, len(mask), -1, key.shape[2]).add_(mask)
    torch.softmax(exact, dim=-1, out=exact)
    weights = exact.to(query.dtype)
    torch.bmm(weights[:, :, shared:], value, out=out)
    if prefix is not None:
        out.baddbmm_(weights[:, :, :shared], prefix[1])


def _groups(bounds: Sequence[int]) -> Iterable[tuple[slice, list[int]]]:
    """Rows that make a block, and the bounds of the spans that they lie in."""
    spans: list[int] = []
    for start, end in pairwise(bounds):
        if spans and end - spans[0] > BLOCK_TOKENS:
            yield slice(spans[0], spans[-1]), spans
            spans = []
        if end - start <= BLOCK_TOKENS:
            spans = spans or [start]
            spans.append(end)
            continue
        pieces = -(-(end - start) // BLOCK_TOKENS)
        cuts = [start + (end - start) * piece // pieces for piece in range(pieces + 1)]
        for first, last in pairwise(cuts):
            yield slice(first, last), [start, last]
    if spans:
        yield slice(spans[0], spans[-1]), spans


def _block(group: tuple[slice, list[int]], prefix: int | None) -> Block:
    rows, bounds = group
    keys = slice(bounds[0], rows.stop)
    place, owner = torch.arange(keys.start, keys.stop), _owners(bounds)
    row = slice(rows.start - keys.start, None)
    seen = (owner[row, None] == owner) & (place[row, None] >= place)
    return Block(rows, keys, prefix, _mask(seen))


def _last_block(part: Part, number: int, done: int) -> Block:
    owner = _owners(part.bounds)
    seen = torch.arange(len(part.candidates))[:, None] == owner
    keys = slice(part.bounds[0], part.bounds[-1])
    return Block(slice(done, done + len(part.candidates)), keys, number, _mask(seen))


def _owners(bounds: Sequence[int]) -> Tensor:
    """[rows]: in which span, counted from 0, a row between the first and the last of `bounds` lies."""
    lengths = torch.tensor([end - start for start, end in pairwise(bounds)])
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


def _mask(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf).unsqueeze(1)
