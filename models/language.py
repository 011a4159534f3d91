"""The language model of a Qwen2.5-VL checkpoint as a scorer of packs.

The stock modules' parameters, as they are and where they are, under a forward of our own: it differs from the stock
one in that rows attend as their pack says, that in the last layer only the score rows go further, that the head is
one fp32 vector and not a vocabulary, and that a bf16 model keeps in fp32 all that is not a matrix product: the
residual stream, norms, rotation, softmax. In fp32 it is the stock model's forward up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, silu

from models import ModelFailed
from models.attention import Form, Layout, attend, keep
from models.memory import PrefixMemory
from models.packing import Pack
from models.stock import Qwen2_5_VLForConditionalGeneration

STEP_ROWS, TILE_ROWS = 64, 1024
"""On a CPU oneDNN compiles a bf16 product for each number of rows, and keeps the code for ever. So these are few: the
multiples of the one up to the other."""
ALIGNED_ROWS = 16
"""A product whose rows come last in memory is up to a third slower in fp32 where these fill no whole vectors."""

# Kinds of rotation whose frequencies are fixed when the model is loaded, and not by the length of a text.
_ROTATIONS = ("default", "linear", "yarn", "llama3", "mrope")

_Turn = tuple[Tensor, Tensor]
"""cos and sin [size / 2, tokens] in fp32."""


@dataclass(frozen=True, slots=True)
class _Rotation:
    """How a pack's rows turn; queries also take on the scale of the scores."""

    query: _Turn
    key: _Turn


class Language:
    """The language model of one checkpoint as a scorer of packs. Safe for several threads at once."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, *, yes: int, no: int, form: Form) -> None:
        """`yes` and `no` are the ids of the two answers. Raises `ModelFailed` for a model that is none of these."""
        stock: Any = model.model.language_model
        config: Any = stock.config
        if config.hidden_act != "silu" or stock.rotary_emb.rope_type not in _ROTATIONS:
            raise ModelFailed("the language model has an activation or a rotation that Qwen2.5-VL has not")
        self._form = form
        self._embedding: Tensor = stock.embed_tokens.weight
        self._dtype = self._embedding.dtype
        self._device = self._embedding.device
        self._layers = [_Layer(layer, number, self._dtype) for number, layer in enumerate(stock.layers)]
        self._norm = _Norm(stock.norm)
        rows = model.lm_head.weight[[yes, no]].detach().float()  # [2, hidden]
        self._head = rows[0] - rows[1]
        # [size / 2] each: the frequency of a channel pair, and the axis that it counts along
        self._frequencies: Tensor = stock.rotary_emb.inv_freq.float()
        sections = torch.tensor(stock.rotary_emb.mrope_section)
        self._axes = torch.repeat_interleave(torch.arange(len(sections)) % 3, sections).to(self._device)
        self._rotation_scale: float = stock.rotary_emb.attention_scaling

    @torch.inference_mode()
    def margins(
        self,
        pack: Pack,
        features: Sequence[Mapping[int, Tensor]],
        memories: Sequence[PrefixMemory | None],
    ) -> Tensor:
        """[candidates of the pack, part by part]: z_yes - z_no in fp32, on the device.

        `features[i]` maps `Grid.image` to its visual tokens [tokens, hidden] for part `i`; `memories[i]` is where the
        part's prefix is kept or recalled (see `Layout.of`). Raises `RuntimeError` for a pack that lacks a prefix.
        """
        layout = Layout.of(pack, form=self._form, memories=memories, device=self._device)
        hidden = self._embed(pack, features)  # [tokens, hidden] in fp32
        rotation = self._rotate(pack)
        *layers, last = self._layers
        for layer in layers:
            layer.run(hidden, rotation, layout)
        margins: Tensor = self._norm(last.run_last(hidden, rotation, layout)) @ self._head
        return margins

    def _embed(self, pack: Pack, features: Sequence[Mapping[int, Tensor]]) -> Tensor:
        hidden = self._embedding[torch.from_numpy(pack.ids).to(self._device)].float()
        for part, seen in zip(pack.parts, features, strict=True):
            for placed in part.images:
                hidden[placed.start : placed.start + placed.grid.tokens] = seen[placed.grid.image].to(
                    self._dtype
                )
        return hidden

    def _rotate(self, pack: Pack) -> _Rotation:
        """Qwen2.5-VL's three-axis rotation: each channel pair turns with the position on its own axis."""
        positions = torch.from_numpy(pack.positions).to(self._device, torch.float32)  # [3, tokens]
        angles = positions[self._axes] * self._frequencies.unsqueeze(1)  # [size / 2, tokens]
        cos, sin = angles.cos() * self._rotation_scale, angles.sin() * self._rotation_scale
        scale = self._layers[0].size ** -0.5
        return _Rotation(query=(cos * scale, sin * scale), key=(cos, sin))


class _Norm:
    """Root-mean-square norm, in fp32."""

    def __init__(self, stock: Any) -> None:
        self._weight: Tensor = stock.weight.detach().float()
        self._epsilon: float = stock.variance_epsilon

    def __call__(self, hidden: Tensor) -> Tensor:
        mean: Tensor = torch.linalg.vecdot(hidden, hidden).div_(hidden.shape[1]).unsqueeze(1)  # [rows, 1]
        return (hidden * mean.add_(self._epsilon).rsqrt_()).mul_(self._weight)


class _Layer:
    """One decoder layer over the stock layer's weights, with products in `dtype` and all else in fp32.

    On a CPU the rows of a large pack go through it in tiles.
    """

    def __init__(self, stock: Any, number: int, dtype: torch.dtype) -> None:
        self._number = number
        self._dtype = dtype
        self._attention = stock.self_attn
        self._mlp = stock.mlp
        self._attention_norm = _Norm(stock.input_layernorm)
        self._mlp_norm = _Norm(stock.post_attention_layernorm)
        on_cpu = stock.self_attn.q_proj.weight.device.type == "cpu"
        self._tile_rows = TILE_ROWS if on_cpu else None
        self._step_rows = STEP_ROWS if on_cpu and dtype == torch.bfloat16 else 1
        self._aligned_rows = max(ALIGNED_ROWS, self._step_rows) if on_cpu else 1
        # A CPU is no faster at attention in bf16, and the scores of fp32 are worth more.
        self._attention_dtype = torch.float32 if on_cpu else dtype
        self.size: int = self._attention.head_dim

    def run(self, hidden: Tensor, rotation: _Rotation, layout: Layout) -> None:
        """Add this layer's output to `hidden` [tokens, hidden]."""
        stock = self._attention
        query, key, value = self._project(
            hidden, (stock.q_proj, rotation.query), (stock.k_proj, rotation.key), (stock.v_proj, None)
        )
        self._finish(hidden, attend(query, key, value, layer=self._number, layout=layout))

    def run_last(self, hidden: Tensor, rotation: _Rotation, layout: Layout) -> Tensor:
        """This layer's output [candidates, hidden] at the score rows: nobody reads the others."""
        stock = self._attention
        key, value = self._project(hidden, (stock.k_proj, rotation.key), (stock.v_proj, None))
        rows = list(layout.pack.score_rows)
        hidden = hidden[rows]
        if not rows:
            keep(key, value, layer=self._number, layout=layout)
            return hidden
        cos, sin = rotation.query
        (query,) = self._project(hidden, (stock.q_proj, (cos[:, rows], sin[:, rows])))
        self._finish(hidden, attend(query, key, value, layer=self._number, layout=layout, last=True))
        return hidden

    def _project(self, hidden: Tensor, *wanted: tuple[Any, _Turn | None]) -> list[Tensor]:
        """The normed rows through each linear module, turned where it comes with a turn: [rows, heads, size] each.

        Rows come last in memory: a head's halves, which turn against one another, are then long runs.
        """
        weights = [module.weight.to(self._dtype) for module, _ in wanted]
        width = _up(len(hidden), self._aligned_rows)
        results = [hidden.new_empty(len(weight), width) for weight in weights]  # [heads * size, rows]
        for rows in self._tiles(len(hidden)):
            count = len(hidden[rows])
            normed = hidden.new_zeros(_up(count, self._aligned_rows), hidden.shape[1], dtype=self._dtype)
            normed[:count] = self._attention_norm(hidden[rows])
            for (module, turn), weight, result in zip(wanted, weights, results, strict=True):
                product = torch.mm(weight, normed.T)[:, :count] + module.bias.float().unsqueeze(1)
                if turn is None:
                    result[:, rows] = product
                else:
                    _turn(product, turn[0][:, rows], turn[1][:, rows], result[:, rows])
        return [
            result.view(-1, self.size, width).permute(2, 0, 1)[: len(hidden)].to(self._attention_dtype)
            for result in results
        ]

    def _finish(self, hidden: Tensor, attended: Tensor) -> None:
        """Add to `hidden` [rows, hidden] what follows `attended` [rows, heads, size]."""
        attended = attended.reshape(len(hidden), -1)
        mlp = self._mlp
        out, gate, up, down = (
            module.weight.to(self._dtype)
            for module in (self._attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        )
        for rows in self._tiles(len(hidden)):
            tile = hidden[rows]
            self._add(tile, self._padded(attended[rows]), out)
            normed = self._padded(self._mlp_norm(tile))
            self._add(tile, silu(linear(normed, gate), inplace=True).mul_(linear(normed, up)), down)

    def _add(self, tile: Tensor, rows: Tensor, weight: Tensor) -> None:
        """Add to `tile` [rows, hidden], in fp32, the product of `rows`, which may be padded, and a linear `weight`."""
        if self._dtype == torch.float32:
            tile.addmm_(rows, weight.T)
        else:
            tile += linear(rows, weight)[: len(tile)]

    def _tiles(self, rows: int) -> Iterator[slice]:
        step = self._tile_rows or max(rows, 1)
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def _padded(self, rows: Tensor) -> Tensor:
        """`rows` in the products' dtype, with zeros behind them up to the next step."""
        rows = rows.to(self._dtype)
        short = -len(rows) % self._step_rows
        return pad(rows, (0, 0, 0, short)) if short else rows


def _up(rows: int, step: int) -> int:
    """The next multiple of `step`."""
    return rows + -rows % step


def _turn(states: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Turn channel i of each head of `states` [heads * size, rows] with channel i + size / 2, into `out`."""
    half, rows = cos.shape
    first, second = states.view(-1, 2, half, rows).unbind(1)  # [heads, size / 2, rows]
    out_first, out_second = out.view(-1, 2, half, rows).unbind(1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
