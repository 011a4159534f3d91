"""Shared-prefix attention over one pack: one function, its fast forms, and the dense reference beside them.

In a pack (see `packing`) a prefix attends causally to itself; a candidate attends to the whole prefix of its own
part and causally to itself. `cascade` computes just that on a CPU, `flex` on a GPU. The dense form is one call of
SDPA with the pack's rule written out as a mask; it is what the others are tested against, and runs on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from models import cascade
from models.cascade import Block, Prefix
from models.flex import FlexMask
from models.memory import PrefixMemory
from models.packing import Pack

Form = Literal["cascade", "flex", "dense"]


@dataclass(frozen=True, slots=True)
class Layout:
    """What attention must know of its pack; made once per pack, for all layers.

    `blocks` and `last_blocks` are the cascade's, `flex` is the kernel's; `mask` [tokens, recalled prefixes' + pack's
    tokens] is the dense form's, True where a row may attend.
    """

    form: Form
    pack: Pack
    memories: tuple[PrefixMemory | None, ...]
    blocks: tuple[Block, ...] = ()
    last_blocks: tuple[Block, ...] = ()
    flex: FlexMask | None = None
    mask: Tensor | None = None

    @classmethod
    def of(
        cls, pack: Pack, *, form: Form, memories: Sequence[PrefixMemory | None], device: torch.device
    ) -> Layout:
        """`memories` are one a part: what holds its prefix keeps there, if anywhere, the others recall from there.

        Raises `RuntimeError` where a part can have its prefix from nowhere.
        """
        if len(memories) != len(pack.parts):
            raise RuntimeError("a layout takes one memory, or None, per part of its pack")
        for part, memory in zip(pack.parts, memories, strict=True):
            if memory is None and not part.holds_prefix:
                raise RuntimeError("a part without its prefix needs a memory of it")
        if form == "cascade":
            made = cls(form, pack, tuple(memories), cascade.blocks(pack), cascade.last_blocks(pack))
        elif form == "flex":
            made = cls(form, pack, tuple(memories), flex=FlexMask(pack, device))
        else:
            made = cls(form, pack, tuple(memories), mask=_dense_mask(pack).to(device))
        return made


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, layer: int, layout: Layout, last: bool = False
) -> Tensor:
    """Attention of `query` over the prefixes of `layout`'s pack and over `key` and `value`, the pack's own.

    `query` [rows, heads, size], scaled already, is one row per token of the pack, or with `last` one per
    candidate, its last. `key` and `value` [tokens, key heads, size]. Keeps and recalls prefixes under `layer`.
    All three are of one dtype; the result has the shape and the dtype of `query`.

    Raises `RuntimeError` where these are not of `layout`'s pack: candidates would attend to one another, and their
    scores would be wrong without a sign.
    """
    pack = layout.pack
    rows = len(pack.score_rows) if last else len(pack.ids)
    if query.shape[0] != rows or not len(key) == len(value) == len(pack.ids):
        raise RuntimeError("this forward is not over the layout's pack")
    prefixes = keep(key, value, layer=layer, layout=layout)
    if layout.form == "cascade":
        blocks = layout.last_blocks if last else layout.blocks
        return cascade.attend(query, key, value, blocks, prefixes)
    keys, values = _join(key, value, prefixes, layout)
    if layout.form == "flex":
        return _flex(query, keys, values, layout, last=last)
    return _dense(query, keys, values, layout, last=last)


def keep(key: Tensor, value: Tensor, *, layer: int, layout: Layout) -> list[Prefix]:
    """Keep the prefixes that the pack holds, recall the others: keys and values of each part's, in order."""
    prefixes: list[Prefix] = []
    for part, memory in zip(layout.pack.parts, layout.memories, strict=True):
        if part.holds_prefix:
            rows = slice(part.start, part.start + part.prefix_tokens)
            prefix = key[rows], value[rows]
            if memory is not None:
                memory.keep(layer, *prefix)
        else:
            assert memory is not None
            prefix = memory.recall(layer)
            if len(prefix[0]) != part.prefix_tokens:
                raise RuntimeError("this memory is not of the part's prefix")
        prefixes.append(prefix)
    return prefixes


def _join(key: Tensor, value: Tensor, prefixes: Sequence[Prefix], layout: Layout) -> tuple[Tensor, Tensor]:
    """Keys and values [1, key heads, recalled + tokens, size]: the prefixes that are recalled, then the pack's own."""
    recalled = [
        prefix for part, prefix in zip(layout.pack.parts, prefixes, strict=True) if not part.holds_prefix
    ]
    keys = torch.cat([*(prefix[0] for prefix in recalled), key])
    values = torch.cat([*(prefix[1] for prefix in recalled), value])
    return keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)


def _flex(query: Tensor, keys: Tensor, values: Tensor, layout: Layout, *, last: bool) -> Tensor:
    """The kernel is compiled for whole packs: where only the last rows ask, the others ask for nothing."""
    assert layout.flex is not None
    rows = list(layout.pack.score_rows)
    queries = query
    if last:
        queries = query.new_zeros(len(layout.pack.ids), *query.shape[1:])
        queries[rows] = query
    out = layout.flex.attend(queries.transpose(0, 1).unsqueeze(0), keys, values, 1.0)[0]
    return out[rows] if last else out


def _dense(query: Tensor, keys: Tensor, values: Tensor, layout: Layout, *, last: bool) -> Tensor:
    assert layout.mask is not None
    group = query.shape[1] // keys.shape[1]  # a key head serves `group` query heads
    out = scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),  # [1, heads, rows, size]
        keys.repeat_interleave(group, dim=1),
        values.repeat_interleave(group, dim=1),
        attn_mask=layout.mask[list(layout.pack.score_rows)] if last else layout.mask,
        scale=1.0,
    )
    return out[0].transpose(0, 1)


def _dense_mask(pack: Pack) -> Tensor:
    """The rule, written out. Keys: the prefixes that are recalled, in the order of the parts, then the pack's."""
    job, candidate = _owners(pack)  # of every row of the pack; candidate 0 is the prefix
    numbers = [number for number, part in enumerate(pack.parts) if not part.holds_prefix]
    recalled = torch.tensor(
        [number for number in numbers for _ in range(pack.parts[number].prefix_tokens)], dtype=torch.int64
    )
    place = torch.arange(len(job))
    related = (candidate == 0) | (candidate[:, None] == candidate)
    own = (job[:, None] == job) & related & (place[:, None] >= place)
    return torch.cat([job[:, None] == recalled, own], dim=1)


def _owners(pack: Pack) -> tuple[Tensor, Tensor]:
    job, candidate = torch.empty(2, len(pack.ids), dtype=torch.int64)
    for number, part in enumerate(pack.parts):
        job[part.start : part.bounds[-1]] = number
        candidate[part.start : part.bounds[0]] = 0
        for place, (start, end) in enumerate(pairwise(part.bounds), start=1):
            candidate[start:end] = place
    return job, candidate
