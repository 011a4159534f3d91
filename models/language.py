"""The language model of a Qwen2.5-VL checkpoint as a scorer of packs.

The stock modules' parameters, as they are and where they are, under a forward of our own: it differs from the stock
one in that rows attend as their pack says, that in the last layer only the score rows go further, that the head is
one fp32 vector and not a vocabulary, and that a bf16 model keeps in fp32 all that is not a matrix product: the
residual stream, norms, rotation, softmax. In fp32 it is the stock model's forward up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from models import ModelFailed
from models.attention import Form, Layout, attend, keep
from models.memory import PrefixMemory
from models.packing import Pack
from models.stock import Qwen2_5_VLForConditionalGeneration

# Kinds of rotation whose frequencies are fixed when the model is loaded, and not by the length of a text.
_ROTATIONS = ("default", "linear", "yarn", "llama3", "mrope")


@dataclass(frozen=True, slots=True)
class _Rotation:
    """cos and sin [tokens, 1, size / 2] in fp32; for queries times the scale of the scores."""

    query: tuple[Tensor, Tensor]
    key: tuple[Tensor, Tensor]


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
        self._layers = [_Layer(layer, number) for number, layer in enumerate(stock.layers)]
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
        angles = (positions[self._axes].T * self._frequencies).unsqueeze(1)  # [tokens, 1, size / 2]
        cos, sin = angles.cos() * self._rotation_scale, angles.sin() * self._rotation_scale
        scale = self._layers[0].size ** -0.5
        return _Rotation(query=(cos * scale, sin * scale), key=(cos, sin))


class _Norm:
    """Root-mean-square norm, in fp32."""

    def __init__(self, stock: Any) -> None:
        self._weight: Tensor = stock.weight.detach().float()
        self._epsilon: float = stock.variance_epsilon

    def __call__(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self._weight.shape, self._weight, self._epsilon)


class _Layer:
    """One decoder layer over the stock layer's weights."""

    def __init__(self, stock: Any, number: int) -> None:
        self._number = number
        self._attention = stock.self_attn
        self._mlp = stock.mlp
        self._attention_norm = _Norm(stock.input_layernorm)
        self._mlp_norm = _Norm(stock.post_attention_layernorm)
        self._dtype: torch.dtype = self._attention.q_proj.weight.dtype
        self.size: int = self._attention.head_dim

    def run(self, hidden: Tensor, rotation: _Rotation, layout: Layout) -> None:
        """Add this layer's output to `hidden` [tokens, hidden] in fp32."""
        normed = self._attention_norm(hidden).to(self._dtype)
        key, value = self._keys(normed, rotation)
        query = self._queries(normed, *rotation.query, key.shape[1])
        attended = attend(query, key, value, layer=self._number, layout=layout)
        hidden += linear(attended.reshape(len(hidden), -1), self._attention.o_proj.weight)
        hidden += self._feed(hidden)

    def run_last(self, hidden: Tensor, rotation: _Rotation, layout: Layout) -> Tensor:
        """This layer's output [candidates, hidden] at the score rows: nobody reads the others."""
        normed = self._attention_norm(hidden).to(self._dtype)
        key, value = self._keys(normed, rotation)
        rows = list(layout.pack.score_rows)
        hidden = hidden[rows]
        if not rows:
            keep(key, value, layer=self._number, layout=layout)
            return hidden
        cos, sin = rotation.query
        query = self._queries(normed[rows], cos[rows], sin[rows], key.shape[1])
        attended = attend(query, key, value, layer=self._number, layout=layout, last=True)
        hidden += linear(attended.reshape(len(hidden), -1), self._attention.o_proj.weight)
        hidden += self._feed(hidden)
        return hidden

    def _queries(self, normed: Tensor, cos: Tensor, sin: Tensor, key_heads: int) -> Tensor:
        """[rows, key heads, group, size], rotated and scaled."""
        query = _project(normed, self._attention.q_proj).view(len(normed), -1, self.size)
        return _rotated(query, cos, sin).view(len(normed), key_heads, -1, self.size)

    def _keys(self, normed: Tensor, rotation: _Rotation) -> tuple[Tensor, Tensor]:
        """Keys, rotated, and values: [tokens, key heads, size] each."""
        key, value = (
            _project(normed, module).view(len(normed), -1, self.size)
            for module in (self._attention.k_proj, self._attention.v_proj)
        )
        return _rotated(key, *rotation.key), value

    def _feed(self, hidden: Tensor) -> Tensor:
        normed = self._mlp_norm(hidden).to(self._dtype)
        gate = silu(_project(normed, self._mlp.gate_proj), inplace=True)
        return _project(gate.mul_(_project(normed, self._mlp.up_proj)), self._mlp.down_proj)


def _project(rows: Tensor, module: Any) -> Tensor:
    return linear(rows, module.weight, module.bias)


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn `states` [rows, heads, size], channel i with channel i + size / 2, in fp32 and back."""
    exact = states.float()
    first, second = exact.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(states.dtype)
