"""The vision tower of Qwen2.5-VL over many images at once: the stock modules' weights in a forward of our own.

    patches -> rows in window order -> blocks, most of them windowed -> merger -> visual tokens of each image

It computes what `get_image_features` computes, to rounding. What differs is what surrounds the products:

* Rows are put in order once: the windows of all images, by length. Windows of one length are then one batch, a view
  of the rows, and one call of attention without a mask. Where whole images attend, they are batched likewise, and
  rows move only if they do not lie in that order already.
* The patch embedding is one product over 8-bit levels. The processor's `(level / 255 - mean) / std` and its second
  frame, which repeats the first, are linear, and folded into weight and bias: all that is not shared with other
  processes, 588 numbers for each hidden one. Levels less 128 are exact in bf16.
* With bf16 weights, only the products are in bf16: the sum of all blocks, norms, rotation and, where the kernel is
  no slower, attention are in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from models import ModelFailed
from models.images import Colours, Patches
from models.packing import Integers
from models.stock import Qwen2_5_VLForConditionalGeneration

VISION_PATCHES = 65_536
"""Patches of one pass: 12 images at the reference's limit, or hundreds of small ones."""

# Up to so many rows, on a CPU, attention in bf16 is no faster than in fp32.
_PRECISE_ROWS = 512
_MIDDLE = 128

Runs = tuple[tuple[int, Integers], ...]
"""An image's tokens as runs that attend to themselves: of each length, the members of all runs, one after another."""


@dataclass(frozen=True, slots=True)
class _Order:
    """Runs of several images, by length: `counts` says how many there are of each length in tokens.

    `take` [tokens] says where each token comes from, and `back` undoes it; both are None where all stay in place.
    """

    counts: dict[int, int]
    take: Tensor | None = None
    back: Tensor | None = None

    @classmethod
    def of(cls, counts: dict[int, int], take: Integers, device: torch.device) -> _Order:
        if np.array_equal(take, np.arange(len(take))):
            return cls(counts)
        return cls(counts, *(torch.from_numpy(each).to(device) for each in (take, _inverse(take))))


class Tower:
    """The vision tower of one checkpoint. Safe for several threads at once."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, colours: Colours) -> None:
        """`model`'s weights are used as they are; `colours` are those of the patches to come.

        Raises `ModelFailed` for a model that is none of these.
        """
        tower: Any = model.model.visual
        if tower.config.hidden_act != "silu":
            raise ModelFailed("the vision tower has an activation that Qwen2.5-VL has not")
        self._tower = tower
        self._whole = frozenset(tower.fullatt_block_indexes)
        self._merge = int(tower.spatial_merge_size)
        self._window = int(tower.window_size // tower.spatial_merge_size // tower.patch_size)
        weight: Tensor = tower.patch_embed.proj.weight  # [hidden, channels, time, height, width]
        self._device, self._dtype = weight.device, weight.dtype
        mean, std = (
            torch.tensor(each, dtype=torch.float64, device=self._device).view(-1, 1)
            for each in (colours.mean, colours.std)
        )
        frame = weight.detach().double().sum(2).flatten(2)  # [hidden, channels, height * width]
        self._embed_bias = (frame * ((_MIDDLE / 255 - mean) / std)).sum((1, 2)).float()
        self._embed = (frame / (255 * std)).flatten(1).to(self._dtype)

    @torch.inference_mode()
    def see(self, images: Sequence[Patches]) -> list[Tensor]:
        """Visual tokens [tokens, hidden] of each image, in order, in the weights' dtype and memory of their own."""
        return [seen for batch in _batches(images) for seen in self._see(batch)]

    def _see(self, images: Sequence[Patches]) -> Iterator[Tensor]:
        grids = [
            (height // self._merge, width // self._merge)
            for _, height, width in (each.patch_grid for each in images)
        ]
        tokens = [rows * columns for rows, columns in grids]
        counts, take = _line_up([_windows(*grid, self._window) for grid in grids])
        windows = _Order.of(counts, take, self._device)
        counts, together = _line_up([((each, np.arange(each)),) for each in tokens])
        whole = _Order.of(counts, _inverse(take)[together], self._device)
        windowed = _Order(windows.counts)  # rows are in this order from their embedding on
        rotation = self._rotation(grids, windows.take)
        levels = torch.cat([each.levels for each in images]).to(self._device)
        rows = linear(levels.to(self._dtype).sub_(_MIDDLE), self._embed)  # [rows, hidden], image by image
        rows = self._sort(rows, windows.take).float().add_(self._embed_bias)
        for number, block in enumerate(self._tower.blocks):
            order = whole if number in self._whole else windowed
            attended = self._attend(block.attn, self._norm(rows, block.norm1), rotation, order)
            self._add(rows, attended, block.attn.proj)
            self._add(rows, self._transform(block.mlp, self._norm(rows, block.norm2)), block.mlp.down_proj)
        merger = self._tower.merger
        merged = merger.mlp(self._norm(rows, merger.ln_q).view(sum(tokens), -1))
        for start, end in pairwise(accumulate(tokens, initial=0)):
            # A copy for each image: what is kept of one must not keep the others' memory.
            yield merged[start:end].clone() if windows.back is None else merged[windows.back[start:end]]

    def _attend(self, attention: Any, rows: Tensor, rotation: tuple[Tensor, Tensor], order: _Order) -> Tensor:
        """Attention's output [rows, hidden] for its normed input, before its last product."""
        qkv = _project(rows, attention.qkv)
        qkv = qkv.view(len(rows), 3, attention.num_heads, -1)  # [rows, 3, heads, size]
        turned = _turn(qkv[:, :2].float(), *rotation)
        query, key, value = (self._sort(each, order.take) for each in (*turned.unbind(1), qkv[:, 2]))
        attended, start = [], 0
        for tokens, count in order.counts.items():
            length = tokens * self._merge**2
            precise = self._device.type == "cpu" and length <= _PRECISE_ROWS
            q, k, v = (
                each[start : start + count * length]
                .to(torch.float32 if precise else self._dtype)
                .view(count, length, *each.shape[1:])
                .transpose(1, 2)  # [count, heads, length, size]
                for each in (query, key, value)
            )
            out = scaled_dot_product_attention(q, k, v, scale=attention.scaling)
            attended.append(out.transpose(1, 2).reshape(count * length, -1).to(self._dtype))
            start += count * length
        out = attended[0] if len(attended) == 1 else torch.cat(attended)
        return self._sort(out, order.back)

    def _transform(self, mlp: Any, rows: Tensor) -> Tensor:
        """The gated layer's output [rows, width] for its normed input, before its last product."""
        gate = silu(_project(rows, mlp.gate_proj), inplace=True)
        return gate.mul_(_project(rows, mlp.up_proj))

    def _add(self, rows: Tensor, states: Tensor, module: Any) -> None:
        """Add what `module` makes of `states` to `rows` [rows, hidden], in fp32: where that is its dtype, at once."""
        if self._dtype == torch.float32:
            rows.addmm_(states, module.weight.T).add_(module.bias)
        else:
            rows.add_(_project(states, module))

    def _norm(self, rows: Tensor, norm: Any) -> Tensor:
        """`rows` [rows, hidden], in fp32, as the next product takes them."""
        return rms_norm(rows, rows.shape[1:], norm.weight.float(), norm.variance_epsilon).to(self._dtype)

    def _sort(self, rows: Tensor, order: Tensor | None) -> Tensor:
        """`rows` [rows, …] in another order of tokens; the rows of one token stay together."""
        if order is None:
            return rows
        return rows.view(len(order), self._merge**2, *rows.shape[1:])[order].flatten(0, 1)

    def _rotation(self, grids: Sequence[tuple[int, int]], take: Tensor | None) -> tuple[Tensor, Tensor]:
        """Cosine and sine [rows, 1, 1, size / 2] of each row's angles: a half by its row, a half by its column."""
        places = [_places(*grid, self._merge) for grid in grids]
        place = self._sort(torch.from_numpy(np.concatenate(places)).to(self._device), take)  # [rows, 2]
        side = self._merge * max(map(max, grids))
        frequencies = self._tower.rotary_pos_emb.inv_freq.float()  # [size / 4]
        angles = torch.arange(side, device=self._device).unsqueeze(1) * frequencies
        cos, sin = (table[place].flatten(1)[:, None, None] for table in (angles.cos(), angles.sin()))
        return cos, sin


def _project(rows: Tensor, module: Any) -> Tensor:
    return linear(rows, module.weight, module.bias)


def _turn(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `rows` [rows, 2, heads, size] in fp32: the pair (a, b) of two halves to (a cos - b sin, b cos + a sin)."""
    half = cos.shape[-1]
    a, b = rows[..., :half], rows[..., half:]
    turned = rows * torch.cat([cos, cos], dim=-1)
    turned[..., :half].addcmul_(b, sin, value=-1)
    turned[..., half:].addcmul_(a, sin)
    return turned


def _line_up(images: Sequence[Runs]) -> tuple[dict[int, int], Integers]:
    """All images' runs by length: how many there are of each, and where [tokens] their tokens lie, image by image."""
    by_length: dict[int, list[Integers]] = {}
    start = 0
    for runs in images:
        for length, members in runs:
            by_length.setdefault(length, []).append(start + members)
        start += sum(len(members) for _, members in runs)
    lengths = sorted(by_length)
    counts = {length: sum(map(len, by_length[length])) // length for length in lengths}
    return counts, np.concatenate([members for length in lengths for members in by_length[length]])


def _inverse(take: Integers) -> Integers:
    back = np.empty_like(take)
    back[take] = np.arange(len(take))
    return back


@lru_cache(maxsize=256)
def _windows(rows: int, columns: int, side: int) -> Runs:
    """An image's tokens by windows of `side * side`, smaller ones at its right and lower edges."""
    by_length: dict[int, list[Integers]] = {}
    numbers = np.arange(rows * columns, dtype=np.int64).reshape(rows, columns)
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            window = numbers[top : top + side, left : left + side].ravel()
            by_length.setdefault(len(window), []).append(window)
    return tuple((tokens, np.concatenate(group)) for tokens, group in by_length.items())


@lru_cache(maxsize=256)
def _places(rows: int, columns: int, merge: int) -> Integers:
    """Row and column [patches, 2] of an image's patches, token by token."""
    place = np.indices((rows * merge, columns * merge)).reshape(2, rows, merge, columns, merge)
    return np.ascontiguousarray(place.transpose(1, 3, 2, 4, 0)).reshape(-1, 2)


def _batches(images: Sequence[Patches]) -> Iterator[list[Patches]]:
    """Images in order, at most `VISION_PATCHES` patches together."""
    batch: list[Patches] = []
    patches = 0
    for each in images:
        if batch and patches + len(each.levels) > VISION_PATCHES:
            yield batch
            batch, patches = [], 0
        batch.append(each)
        patches += len(each.levels)
    if batch:
        yield batch
