"""The model and its two forwards: many images of one size at once, and packed rows of one query with its candidates.

Only stock transformers modules (`Qwen2_5_VLForConditionalGeneration`) hold weights. The vision tower is called module
by module because the stock forward attends image by image, which is slow for thousands of small ones; up to 112 px
a window of the tower is the whole image, so both are the same. A row is prefix + candidates under a mask in which a
candidate sees the prefix and itself, positions restarting at the prefix's end: what the service computes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from models.demo.tokenizer import strip_added_tokens
from models.stock import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from models.tensors import native_dtype

Model = Qwen2_5_VLForConditionalGeneration
PATCH, MERGE = 14, 2
UNIT = PATCH * MERGE  # pixels of one visual token's side
MAX_PIXELS = (
    16 * UNIT * UNIT
)  # the model never saw more than 112 x 112, and larger ones would mean nothing to it
SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


@dataclass(frozen=True, slots=True)
class Entry:
    """One side of a pair: text, and an image by its number in the corpus (or in a table of views)."""

    text: str = ""
    image: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One query with its candidates; `labels[i]` is 1.0 where candidate i is relevant."""

    query: Entry
    candidates: tuple[Entry, ...]
    labels: tuple[float, ...]
    instruction: str = INSTRUCTION
    task: str = ""


@dataclass(slots=True)
class Packed:
    """Rows as tensors. `slots` are the flat places of visual tokens, `images` whose they are."""

    ids: Tensor  # [rows, tokens]
    positions: Tensor  # [3, rows, tokens]
    mask: Tensor  # [rows, 1, tokens, tokens], True = may attend
    ends: Tensor  # [rows, candidates], place of each candidate's last token
    slots: Tensor
    images: list[int]
    tokens: int
    labels: Tensor = field(default_factory=lambda: torch.zeros(0))

    def to(self, device: torch.device | str) -> Packed:
        """The same on another device."""
        ids, positions, mask, ends, slots, labels = (
            tensor.to(device)
            for tensor in (self.ids, self.positions, self.mask, self.ends, self.slots, self.labels)
        )
        return Packed(ids, positions, mask, ends, slots, self.images, self.tokens, labels)


def build_model(tokenizer: Tokenizer, seed: int) -> Model:
    """Random weights, about 9 M parameters; patches of 14 px merged 2 x 2, as in production."""
    torch.manual_seed(seed)
    token = find_control_tokens(tokenizer)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.03,
            "bos_token_id": token["endoftext"],
            "eos_token_id": token["im_end"],
            "pad_token_id": None,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
        },
        vision_config={
            "depth": 5,
            "hidden_size": 192,
            "intermediate_size": 576,
            "num_heads": 6,
            "out_hidden_size": 256,
            "fullatt_block_indexes": [2, 4],
            "window_size": 112,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
        },
        image_token_id=token["image_pad"],
        video_token_id=token["video_pad"],
        vision_start_token_id=token["vision_start"],
        vision_end_token_id=token["vision_end"],
        tie_word_embeddings=True,
    )
    return Model(config)


def find_control_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the control tokens that the prompt and the configuration name, by their bare names."""
    ids = {name: tokenizer.token_to_id(f"<|{name}|>") for name in _CONTROL}
    return {name: token for name, token in ids.items() if token is not None}


def autocast(device: str) -> torch.autocast:
    """Products in bf16 where the device has instructions for it; elsewhere they would be many times slower."""
    native = native_dtype(torch.device(device)) == "bf16"
    return torch.autocast(device, torch.bfloat16, enabled=native, cache_enabled=False)


def count_parameters(model: torch.nn.Module) -> int:
    """Distinct parameters; the tied embedding counts once."""
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


def encode_images(model: Model, pixels: Tensor) -> Tensor:
    """Normalised RGB of one size, [images, 3, height, width] -> merged visual tokens, [images, tokens, hidden].

    Patches come in the order of the stock image processor: by merged 2 x 2 block, then inside the block.
    """
    visual = model.model.visual
    count, _, height, width = pixels.shape
    rows, columns = height // UNIT, width // UNIT
    patches = pixels.reshape(count, 3, rows, MERGE, PATCH, columns, MERGE, PATCH)
    patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(count, -1, 3 * PATCH * PATCH)
    # a still image is its own second frame: both halves of the temporal kernel see the same pixels
    kernel = visual.patch_embed.proj.weight.sum(2).flatten(1)
    hidden = functional.linear(patches, kernel)  # [images, patches, dim]
    cos, sin = visual.rotary_pos_emb(hidden[0], _place_patches(rows, columns).to(hidden.device))
    for block in visual.blocks:
        hidden = hidden + _attend(block.attn, block.norm1(hidden), cos, sin)
        hidden = hidden + block.mlp(block.norm2(hidden))
    merged = visual.merger(hidden.reshape(-1, hidden.shape[-1]))
    return merged.reshape(count, rows * columns, -1)  # type: ignore[no-any-return]


class Packer:
    """Turns rows into tensors, byte for byte the prompt that the service sends."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._plain = strip_added_tokens(tokenizer)
        token = find_control_tokens(tokenizer)
        yes, no = self.read("yes"), self.read("no")
        self.answers = (yes[0], no[0])
        self._pad, self._end = token["image_pad"], token["im_end"]
        self._start, self._opened, self._closed = (
            token["im_start"],
            token["vision_start"],
            token["vision_end"],
        )
        self.closing = (self._end, self._start)  # of the control tokens behind a document, the first two
        self._head = [self._start, *self.read(f"system\n{SYSTEM}"), self._end, *self.read("\n"), self._start]
        self._tail = [self._end, *self.read("\n"), self._start, *self.read("assistant\n")]

    def pack(self, rows: Sequence[Row], grids: Callable[[int], tuple[int, int]]) -> Packed:
        """`grids` tells the (height, width) in visual tokens of an entry's image."""
        built = [self._lay(row, grids) for row in rows]
        length = max(len(row.ids) for row in built)
        width = max(len(row.ends) for row in built)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        positions = torch.zeros(3, len(rows), length, dtype=torch.long)
        segments = torch.full((len(rows), length), -1)
        ends = torch.zeros(len(rows), width, dtype=torch.long)
        labels = torch.full((len(rows), width), -1.0)
        slots: list[int] = []
        images: list[int] = []
        for at, (row, laid) in enumerate(zip(rows, built, strict=True)):
            size = len(laid.ids)
            ids[at, :size] = torch.tensor(laid.ids)
            positions[:, at, :size] = torch.tensor(laid.positions).T
            segments[at, :size] = torch.tensor(laid.segments)
            ends[at, : len(laid.ends)] = torch.tensor(laid.ends)
            labels[at, : len(row.labels)] = torch.tensor(row.labels)
            slots += [at * length + slot for slot in laid.slots]
            images += laid.images
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        same = segments[:, :, None] == segments[:, None, :]
        mask = (same | (segments[:, None, :] == 0)) & causal
        tokens = sum(len(row.ids) for row in built)
        return Packed(
            ids, positions, mask[:, None], ends, torch.tensor(slots, dtype=torch.long), images, tokens, labels
        )

    def find(self, token: str) -> int:
        """The id of a piece of the template that is one token."""
        (found,) = self.read(token)
        return found

    def list_template_tokens(self) -> list[int]:
        """Every token that the template puts behind `<Query`, `<Query` included."""
        words = [
            *self.read(">:"),
            *self.read("\n"),
            *self.read("<Query"),
            *self.read("<Document"),
            *self.read("<Instruct"),
        ]
        return sorted({*words, *self._tail, self._opened, self._closed})

    def read(self, text: str) -> list[int]:
        """Ids of caller text: control tokens in it stay plain characters."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def _lay(self, row: Row, grids: Callable[[int], tuple[int, int]]) -> _Laid:
        laid = _Laid()
        laid.add_text(self._head, 0)
        opening = f"user\n<Instruct>: {row.instruction}<Query>:"
        closing = f"{row.query.text}\n<Document"
        if row.query.image is None:
            laid.add_text(self.read(opening + closing), 0)
        else:
            laid.add_text(self.read(opening), 0)
            self._lay_image(laid, row.query.image, grids, 0)
            laid.add_text(self.read(closing), 0)
        origin = laid.next
        for number, candidate in enumerate(row.candidates, start=1):
            laid.next = origin
            if candidate.image is None:
                laid.add_text(self.read(f">:{candidate.text}"), number)
            else:
                laid.add_text(self.read(">:"), number)
                self._lay_image(laid, candidate.image, grids, number)
                if candidate.text:
                    laid.add_text(self.read(candidate.text), number)
            laid.add_text(self._tail, number)
            laid.ends.append(len(laid.ids) - 1)
        return laid

    def _lay_image(
        self, laid: _Laid, image: int, grids: Callable[[int], tuple[int, int]], segment: int
    ) -> None:
        height, width = grids(image)
        laid.add_text([self._opened], segment)
        laid.add_image(image, height, width, self._pad, segment)
        laid.add_text([self._closed], segment)


def read_states(model: Model, packed: Packed, visual: Tensor) -> Tensor:
    """The last token's state of every candidate, behind the final norm, [rows, candidates, hidden].

    `visual` holds the visual tokens of `packed.slots`.
    """
    table = model.model.language_model.embed_tokens.weight
    embedded = functional.embedding(packed.ids, table)
    if len(packed.slots):
        flat = embedded.flatten(0, 1).index_copy(0, packed.slots, visual.to(embedded.dtype))
        embedded = flat.reshape(embedded.shape)
    out = model.model.language_model(
        inputs_embeds=embedded,
        attention_mask={"full_attention": packed.mask},
        position_ids=packed.positions,
        use_cache=False,
    ).last_hidden_state
    return out.gather(1, packed.ends[:, :, None].expand(-1, -1, out.shape[-1]))  # type: ignore[no-any-return]


def score_rows(model: Model, packed: Packed, visual: Tensor, answers: tuple[int, int]) -> Tensor:
    """z_yes - z_no of every candidate in fp32, [rows, candidates]; `answers` are the ids of yes and no."""
    table = model.model.language_model.embed_tokens.weight
    states = read_states(model, packed, visual).float()
    with torch.autocast(states.device.type, enabled=False):
        margins: Tensor = states @ (table[answers[0]] - table[answers[1]])
    return margins


def save_export(model: Model, folder: Path) -> None:
    """Write the weights in bf16 with their configuration; the tokenizer is beside them already."""
    folder.mkdir(parents=True, exist_ok=True)
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    copied.config.dtype = torch.bfloat16
    copied.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    processor = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_pixels": MAX_PIXELS,
        "merge_size": MERGE,
        "min_pixels": 4 * UNIT * UNIT,
        "patch_size": PATCH,
        "processor_class": "Qwen2_5_VLProcessor",
        "temporal_patch_size": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")


_CONTROL = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")


@dataclass(slots=True)
class _Laid:
    ids: list[int] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    next: int = 0

    def add_text(self, ids: Sequence[int], segment: int) -> None:
        self.ids += ids
        self.positions += [(at, at, at) for at in range(self.next, self.next + len(ids))]
        self.segments += [segment] * len(ids)
        self.next += len(ids)

    def add_image(self, image: int, height: int, width: int, pad: int, segment: int) -> None:
        count = height * width
        self.slots += range(len(self.ids), len(self.ids) + count)
        self.images.append(image)
        self.ids += [pad] * count
        at = self.next
        self.positions += [(at, at + row, at + column) for row in range(height) for column in range(width)]
        self.segments += [segment] * count
        self.next += max(height, width)


def _attend(attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    count, length, _ = hidden.shape
    q, k, v = attention.qkv(hidden).reshape(count, length, 3, attention.num_heads, -1).unbind(2)
    q, k, v = (
        x.transpose(1, 2) for x in (_rotate(q, cos, sin), _rotate(k, cos, sin), v)
    )  # [images, heads, tokens, dim]
    # written out: for sequences this short it trains half again as fast as the fused kernel on a CPU
    weights = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    out = weights.softmax(-1).to(v.dtype) @ v
    return attention.proj(out.transpose(1, 2).reshape(count, length, -1))  # type: ignore[no-any-return]


def _place_patches(rows: int, columns: int) -> Tensor:
    """Height and width of each patch, counted in patches, in the order of merged blocks. [patches, 2]"""
    shape = (rows, columns, MERGE, MERGE)
    high = torch.arange(rows * MERGE).view(rows, 1, MERGE, 1).expand(shape)
    wide = torch.arange(columns * MERGE).view(1, columns, 1, MERGE).expand(shape)
    return torch.stack([high.flatten(), wide.flatten()], -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of queries or keys, [images, tokens, heads, dim]; cos and sin are [tokens, dim]."""
    first, second = x.chunk(2, -1)
    turned = x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
    return turned.to(x.dtype)
