"""Shared-prefix attention over one pack: a fast cascade, and the dense reference beside it.

In a pack (see `packing`) the prefix attends causally to itself; a candidate attends to the whole prefix and
causally to itself. The cascade computes a candidate's two parts apart, both without a mask, and merges them
by their log-sum-exp:

    out = w * out_prefix + (1 - w) * out_self        w = sigmoid(lse_prefix - lse_self)

which is softmax over the union, exactly. The prefix part is one dense product for all candidates. The self
part runs over buckets of candidates of like length, padded on the right: under a causal mask a real row never
sees padding behind it. The dense form is one call of SDPA with the pack's rule written out as a mask; it is
the reference that the cascade is tested against, and what runs on a device without the CPU kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from models.packing import Pack

NAME = "pericarp_shared_prefix"
Form = Literal["cascade", "dense"]

# How much longer than its shortest a bucket's longest candidate may be: less padding against fewer calls.
_STRETCH, _SLACK_TOKENS = 1.25, 8


class PrefixMemory:
    """Keys and values of one job's prefix by layer: the first pack keeps, later ones recall."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Copy `key` and `value` [1, key heads, prefix tokens, size]; a view would hold the whole pack."""
        self._layers[layer] = (key.clone(), value.clone())

    def recall(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._layers[layer]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Candidates of like length.

    `rows` [candidates, longest] of the pack, `real` [candidates, longest] where these are no padding, and `ends`
    [candidates], the last row of each.
    """

    rows: Tensor
    real: Tensor
    ends: Tensor


@dataclass(slots=True)
class Layout:
    """What attention must know of its pack. Made once per pack, given to the forward as `layout`.

    `own_prefix_tokens` is the prefix's length where the pack holds it, and 0 where `memory` has it from an
    earlier pack. `memory` is None where no later pack will ask.
    """

    form: Form
    tokens: int
    prefix_tokens: int
    own_prefix_tokens: int
    bounds: tuple[int, ...]
    memory: PrefixMemory | None
    device: torch.device
    buckets: list[Bucket] = field(default_factory=list)
    mask: Tensor | None = None

    @classmethod
    def of(cls, pack: Pack, *, form: Form, memory: PrefixMemory | None, device: torch.device) -> Layout:
        layout = cls(
            form=form,
            tokens=len(pack.ids),
            prefix_tokens=pack.prefix_tokens,
            own_prefix_tokens=pack.prefix_tokens if pack.holds_prefix else 0,
            bounds=pack.bounds,
            memory=memory,
            device=device,
        )
        if form == "cascade":
            layout.buckets = _buckets(pack.bounds, device)
        else:
            layout.mask = _dense_mask(layout)
        return layout


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layout: Layout | None = None,
    last_rows_only: bool = False,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface, over one pack.

    `query` [1, heads, tokens, size], `key` and `value` [1, key heads, tokens, size]; returns [1, tokens, heads, size].
    `last_rows_only` leaves all but the last row of each candidate undefined: the last layer owes the head no more.
    Refuses, by `RuntimeError`, any call that is not a forward over `layout`'s pack: candidates would attend to one
    another, and their scores would be wrong without a sign.
    """
    if layout is None or attention_mask is not None or dropout:
        raise RuntimeError("shared-prefix attention needs a pack's layout, and takes no mask and no dropout")
    if query.shape[0] != 1 or query.shape[2] != layout.tokens or key.shape[2] != layout.tokens:
        raise RuntimeError("this forward is not over the layout's pack")
    own, layer = layout.own_prefix_tokens, int(module.layer_idx)  # type: ignore[arg-type]
    if own:
        prefix_key, prefix_value = key[:, :, :own], value[:, :, :own]
        if layout.memory is not None:
            layout.memory.keep(layer, prefix_key, prefix_value)
    elif layout.memory is not None:
        prefix_key, prefix_value = layout.memory.recall(layer)
    else:
        raise RuntimeError("a pack without its prefix needs a memory of it")
    cascade = _cascade_last_rows if last_rows_only else _cascade
    compute = cascade if layout.form == "cascade" else _dense
    return compute(query, key, value, prefix_key, prefix_value, scaling, layout), None


def _cascade(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    scaling: float,
    layout: Layout,
) -> Tensor:
    heads, key_heads, size = query.shape[1], key.shape[1], query.shape[3]
    group, own = heads // key_heads, layout.own_prefix_tokens
    rows = layout.tokens - own
    out = query.new_empty(layout.tokens, heads, size)  # [tokens, heads, size]
    if own:
        prefix_out, _ = _flash(
            query[:, :, :own], _spread(prefix_key, group), _spread(prefix_value, group), scaling, True
        )
        out[:own] = prefix_out[0].transpose(0, 1)

    # To the prefix, unmasked: the query heads of one key head are more rows of it, and no key is copied.
    folded = query[:, :, own:].reshape(1, key_heads, group * rows, size)  # [1, key heads, group * rows, size]
    to_prefix, prefix_lse = _flash(folded, prefix_key, prefix_value, scaling, False)
    to_prefix = to_prefix.view(heads, rows, size).transpose(0, 1)  # [rows, heads, size]
    prefix_lse = prefix_lse.reshape(heads, rows).transpose(0, 1)  # [rows, heads]

    by_row = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # [tokens, heads, size]
    for bucket in layout.buckets:
        # [candidates, longest, heads, size] -> [candidates, heads, longest, size]
        q, k, v = (tensor[bucket.rows].transpose(1, 2) for tensor in by_row)
        to_self, self_lse = _flash(q, _spread(k, group), _spread(v, group), scaling, True)
        real = bucket.rows[bucket.real]  # [real rows], of the pack
        alone = to_self.transpose(1, 2)[bucket.real]  # [real rows, heads, size]
        alone_lse = self_lse.transpose(1, 2)[bucket.real]  # [real rows, heads]
        out[real] = _merge(alone, alone_lse, to_prefix[real - own], prefix_lse[real - own])
    return out.unsqueeze(0)


def _cascade_last_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    scaling: float,
    layout: Layout,
) -> Tensor:
    heads, key_heads, size = query.shape[1], key.shape[1], query.shape[3]
    group = heads // key_heads
    out = query.new_zeros(layout.tokens, heads, size)  # [tokens, heads, size]
    for bucket in layout.buckets:
        count = len(bucket.ends)
        q = query[0, :, bucket.ends].reshape(
            key_heads, group * count, size
        )  # [key heads, group * candidates, size]
        to_prefix, prefix_lse = _flash(q.unsqueeze(0), prefix_key, prefix_value, scaling, False)
        # One row needs no causal mask, only to overlook padding; a plain product does, and no key head is copied.
        q = q.view(key_heads, group, count, size).transpose(1, 2)  # [key heads, candidates, group, size]
        k, v = key[0][:, bucket.rows], value[0][:, bucket.rows]  # [key heads, candidates, longest, size]
        weights = (q @ k.transpose(2, 3)).float() * scaling  # [key heads, candidates, group, longest]
        weights.masked_fill_(~bucket.real[:, None], -torch.inf)
        self_lse = weights.logsumexp(dim=-1, keepdim=True)
        to_self = (weights - self_lse).exp().to(v.dtype) @ v  # [key heads, candidates, group, size]
        # [key heads, candidates, group, …] and [heads, candidates, …] -> [candidates, heads, …]
        alone = to_self.transpose(0, 1).reshape(count, heads, size)
        alone_lse = self_lse.transpose(0, 1).reshape(count, heads)
        to_prefix = to_prefix.view(heads, count, size).transpose(0, 1)
        out[bucket.ends] = _merge(
            alone, alone_lse, to_prefix, prefix_lse.reshape(heads, count).transpose(0, 1)
        )
    return out.unsqueeze(0)


def _merge(alone: Tensor, alone_lse: Tensor, to_prefix: Tensor, prefix_lse: Tensor) -> Tensor:
    """Two parts of one softmax, [rows, heads, size] with log-sum-exp [rows, heads], in fp32 and back."""
    weight = torch.sigmoid(prefix_lse - alone_lse).unsqueeze(-1)
    return torch.lerp(alone.float(), to_prefix.float(), weight).to(alone.dtype)


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    scaling: float,
    layout: Layout,
) -> Tensor:
    group = query.shape[1] // key.shape[1]
    if not layout.own_prefix_tokens:
        key, value = torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2)
    out = scaled_dot_product_attention(
        query, _spread(key, group), _spread(value, group), attn_mask=layout.mask, scale=scaling
    )
    return out.transpose(1, 2)  # [1, tokens, heads, size]


def _flash(query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Output as `query`, and log-sum-exp [batch, heads, rows] in fp32.

    The kernel reads as many key heads as query heads without a check; `_spread` makes them so.
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, scale=scaling
    )
    return out, lse


def _spread(tensor: Tensor, group: int) -> Tensor:
    """[batch, key heads, rows, size] -> [batch, heads, rows, size]: a key head serves `group` heads."""
    return tensor if group == 1 else tensor.repeat_interleave(group, dim=1)


def _buckets(bounds: tuple[int, ...], device: torch.device) -> list[Bucket]:
    spans = sorted(((end - start, start) for start, end in pairwise(bounds)))
    groups: list[list[tuple[int, int]]] = []
    for span in spans:
        if not groups or span[0] > groups[-1][0][0] * _STRETCH + _SLACK_TOKENS:
            groups.append([])
        groups[-1].append(span)
    buckets = []
    for members in groups:
        lengths = torch.tensor([length for length, _ in members]).unsqueeze(1)  # [candidates, 1]
        starts = torch.tensor([start for _, start in members]).unsqueeze(1)
        steps = torch.arange(members[-1][0]).unsqueeze(0)  # [1, longest]
        real = steps < lengths
        rows = torch.where(
            real, starts + steps, starts
        )  # padding repeats the first row: finite, and never read
        ends = (starts + lengths - 1).squeeze(1)
        buckets.append(Bucket(rows.to(device), real.to(device), ends.to(device)))
    return buckets


def _dense_mask(layout: Layout) -> Tensor:
    """[1, 1, tokens, prefix + candidate tokens], True where a row may attend: the rule, written out."""
    missing = layout.prefix_tokens - layout.own_prefix_tokens
    owner = torch.zeros(missing + layout.tokens, dtype=torch.int32)  # 0 is the prefix
    for number, (start, end) in enumerate(pairwise(layout.bounds), start=1):
        owner[missing + start : missing + end] = number
    place = torch.arange(missing + layout.tokens)
    rows = slice(missing, None)
    causal = place[rows, None] >= place[None, :]
    related = (owner[None, :] == 0) | (owner[rows, None] == owner[None, :])
    return (causal & related)[None, None].to(layout.device)
