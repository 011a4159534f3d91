"""Where the language model begins: weights under which it compares two bags of embeddings, exactly, before any training.

After the stage "vision", the mean input embedding of a text and the mean visual token of an image say what they name.
Learning from nothing to compare those two means takes a small transformer most of its training; but a transformer can
be written down that does it, and trained on from there. Two layers do the work, the others begin as identity:

    layer 0, attention   every token notes whether `<Query` and whether `<Document` stand before it
    layer 1, attention   the last token takes the mean of the query's content and the mean of the document's
    layer 1, MLP         multiplies the two, dimension by dimension, and sums: x*y = silu(x)*y - silu(-x)*y
    head                 z_yes - z_no reads that sum

Template tokens and notes live in eight directions that content hardly uses and from which it is removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.demo.model import Model, Packer

RESERVED, HALF = 8, 62  # directions of the template; dimensions that one pair of heads compares
TEMPLATE, NOTE, SHARE = 8.0, 4.0, 6.0  # sizes in the residual stream: a template token, a note, a mean
SLOTS = (
    28,
    29,
    30,
    31,
)  # head dimensions that rotary positions turn the slowest: content alone, wherever it stands
LOGIT = 14.0  # attention logit of what a head looks for; anything else has 0 or less


@torch.no_grad()
def write_comparator(model: Model, packer: Packer, means: Tensor, seed: int) -> None:
    """Overwrite the language model. `means` are mean embeddings of texts and images, [samples, hidden]."""
    torch.manual_seed(seed)
    language: Any = model.model.language_model
    table = language.embed_tokens.weight
    width = table.shape[1]
    _, vectors = torch.linalg.eigh(means.T @ means / len(means))
    marks, rest = (
        vectors[:, :RESERVED].T,
        vectors[:, RESERVED:].flip(1).T,
    )  # [8, hidden], [hidden - 8, hidden]
    template, query, document, in_query, in_document, _, _, answer = marks
    clean = torch.eye(width) - marks.T @ marks
    table.copy_(table @ clean)
    last: Any = model.model.visual.merger.mlp[2]
    last.weight.copy_(clean @ last.weight)
    last.bias.copy_(clean @ last.bias)
    for token in packer.list_template_tokens():
        table[token] = TEMPLATE * template
    table[packer.find("<Query")] += TEMPLATE * query
    table[packer.find("<Document")] += TEMPLATE * document
    yes, no = packer.answers
    shared = (table[yes] + table[no]) / 2
    table[yes], table[no] = shared + 2 * answer, shared - 2 * answer
    for layer in language.layers:
        _quiet(layer, language.config.initializer_range)
    _write_notes(language.layers[0].self_attn, query, document, in_query, in_document, width)
    _write_means(language.layers[1].self_attn, (in_query, in_document, template), rest, width)
    _write_product(language.layers[1].mlp, rest, template, answer)


def _quiet(layer: Any, size: float) -> None:
    """Random inputs, silent outputs: an identity that can learn."""
    for name, parameter in layer.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif name.endswith("bias") or "o_proj" in name or "down_proj" in name:
            parameter.zero_()
        else:
            parameter.normal_(0.0, size)


def _write_notes(
    attention: Any,
    query: Tensor,
    document: Tensor,
    in_query: Tensor,
    in_document: Tensor,
    width: int,
) -> None:
    slot = SLOTS[3]
    for parameter in (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight):
        parameter.mul_(0.1)
    size = (width / 2) ** 0.5  # of either half of such a token behind the norm
    for group, (sought, noted) in enumerate(((query, in_query), (document, in_document))):
        head = 2 * group
        attention.k_proj.weight[64 * group + slot] = sought
        attention.q_proj.bias[64 * head + slot] = 8 * 20.0 / size
        attention.v_proj.weight[64 * group] = sought
        attention.o_proj.weight[:, 64 * head] = NOTE / size * noted


def _write_means(attention: Any, notes: Sequence[Tensor], rest: Tensor, width: int) -> None:
    """Heads 0 and 2 look at the query, 1 and 3 at the document; 0 and 1 share their values, and so do 2 and 3."""
    for parameter in (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight):
        parameter.mul_(0.1)
    size = width**0.5
    alone, both = (
        LOGIT / size,
        LOGIT / (size / 2**0.5),
    )  # a note's size behind the norm: by itself, or one of two
    for group in range(2):
        for slot, note in zip(SLOTS, notes, strict=False):
            attention.k_proj.weight[64 * group + slot] = note
        attention.v_proj.weight[64 * group : 64 * group + HALF] = rest[group : 2 * HALF : 2]
        for head, wanted in ((2 * group, (alone, -2 * alone, -1.0)), (2 * group + 1, (0.0, both, -1.0))):
            for slot, weight in zip(SLOTS, wanted, strict=False):
                attention.q_proj.bias[64 * head + slot] = 8 * weight
            place = rest[HALF * head : HALF * (head + 1)]  # where the last token keeps this mean
            attention.o_proj.weight[:, 64 * head : 64 * head + HALF] = SHARE * place.T


def _write_product(mlp: Any, rest: Tensor, template: Tensor, answer: Tensor) -> None:
    kept = [rest[HALF * head : HALF * (head + 1)] for head in range(4)]
    asked, offered = torch.cat([kept[0], kept[2]]), torch.cat([kept[1], kept[3]])
    count = len(asked)
    for sign, start in ((1.0, 0), (-1.0, count)):
        mlp.gate_proj.weight[start : start + count] = sign * asked
        mlp.up_proj.weight[start : start + count] = offered
        mlp.down_proj.weight[:, start : start + count] = sign * 0.1 * answer[:, None]
    # a constant to subtract, from what is the same in every last token
    mlp.gate_proj.weight[2 * count] = template
    mlp.up_proj.weight[2 * count] = template
    mlp.down_proj.weight[:, 2 * count] = 0.0


@torch.no_grad()
def scale_answers(model: Model, margins: Tensor, spread: float = 2.0) -> None:
    """Give the margins of random pairs a standard deviation of `spread`; their mean is left to the training."""
    mlp: Any = model.model.language_model.layers[1].mlp
    mlp.down_proj.weight.mul_(spread / float(margins.std()))
