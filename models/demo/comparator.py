"""Where the language model begins: weights under which it compares two bags of embeddings, before any training.

After the stage "vision", the mean input embedding of a text and the mean visual token of an image say what they name,
and their cosine ranks. Learning from nothing to compute that takes a small transformer most of its training; but a
transformer can be written down that does it, and trained on from there. Three layers do the work, two begin as identity:

    layer 0, attention   every token notes whether `<Query` and whether `<Document` stand before it
    layer 0, MLP         the control tokens behind a document are told from their namesakes before it
    layer 1, attention   the first of them takes the mean of the query's content, the second that of the document's
    layer 2, attention   behind their norms, where both have length 1, the last token takes both
    layer 2, MLP         multiplies the two, dimension by dimension, and sums: x*y = silu(x)*y - silu(-x)*y
    head                 z_yes - z_no reads that sum, the cosine

Template tokens and notes live in eight directions that content hardly uses and from which it is removed. A head looks
for what its query's bias names; where it has nothing to take, it looks at template tokens, which have no content.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.demo.model import Model, Packer

RESERVED, HALF = 8, 62  # directions of the template; dimensions that one pair of heads compares
# Sizes in the residual stream: a template token, its mark, a note; a mark that is told from its namesakes. All are large
# beside content (about 1), so that the norms leave it its size: then words that say little weigh little.
TEMPLATE, MARK, NOTE, TOLD = 16.0, 4.0, 8.0, 50.0
# What a mean is multiplied by: large beside all marks, and large beside what the last token is. More than this, and
# what bf16 makes of the template's zeros drowns the marks.
GATHERED, SHARE = 200.0, 8.0
SLOTS = (
    28,
    29,
    30,
    31,
)  # head dimensions that rotary positions turn the slowest: content alone, wherever it stands
LOGIT, NULL = (
    14.0,
    3.0,
)  # attention logits: of what a head looks for, anything else has 0 or less; of the template
# What learns from there: the product, and all behind it. What gathers stands still, because it multiplies a small change
# of weights by GATHERED: trained as well, it forgot in forty steps what it had been given.
LEARNING = tuple(
    f"model.language_model.{part}" for part in ("layers.2.mlp.", "layers.3.", "layers.4.", "norm.")
)
SCALE = 8.0  # of attention logits: the root of a head's dimensions


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
    template, query, document, in_query, in_document, asked, offered, answer = marks
    clean = torch.eye(width, device=table.device) - marks.T @ marks
    table.copy_(table @ clean)
    last: Any = model.model.visual.merger.mlp[2]
    last.weight.copy_(clean @ last.weight)
    last.bias.copy_(clean @ last.bias)
    for token in packer.list_template_tokens():
        table[token] = TEMPLATE * template
    table[packer.find("<Query")] += TEMPLATE * query
    table[packer.find("<Document")] += TEMPLATE * document
    first, second = packer.closing
    table[first] += MARK * asked
    table[second] += MARK * offered
    yes, no = packer.answers
    shared = (table[yes] + table[no]) / 2
    table[yes], table[no] = shared + 2 * answer, shared - 2 * answer
    for layer in language.layers:
        _quiet(layer, language.config.initializer_range)
    _write_notes(language.layers[0].self_attn, ((query, in_query), (document, in_document)), width)
    _write_marks(language.layers[0].mlp, (asked, offered), in_document, width)
    _write_means(
        language.layers[1].self_attn, (in_query, in_document, template), (asked, offered), rest, width
    )
    _write_pair(language.layers[2].self_attn, (asked, offered, template), rest, width)
    _write_product(language.layers[2].mlp, rest, template, answer)


def _quiet(layer: Any, size: float) -> None:
    """Random inputs, silent outputs: an identity that can learn."""
    for name, parameter in layer.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif name.endswith("bias") or "o_proj" in name or "down_proj" in name:
            parameter.zero_()
        else:
            parameter.normal_(0.0, size)


def _write_notes(attention: Any, pairs: Sequence[tuple[Tensor, Tensor]], width: int) -> None:
    slot = SLOTS[3]
    _hush(attention)
    size = (width / 2) ** 0.5  # of either half of a sought token behind the norm
    for group, (sought, noted) in enumerate(pairs):
        head = 2 * group
        attention.k_proj.weight[64 * group + slot] = sought
        attention.q_proj.bias[64 * head + slot] = SCALE * 20.0 / size
        attention.v_proj.weight[64 * group] = sought
        attention.o_proj.weight[:, 64 * head] = NOTE / size * noted


def _write_marks(mlp: Any, marks: Sequence[Tensor], in_document: Tensor, width: int) -> None:
    """A mark grows to TOLD where its token stands behind `<Document`: one unit multiplies the two."""
    unit = (
        width / (TEMPLATE**2 + MARK**2 + 2 * NOTE**2)
    ) ** 0.5  # what a size of 1 is behind the norm of such a token
    reached = NOTE * unit * torch.sigmoid(torch.tensor(NOTE * unit)) * MARK * unit
    for place, mark in enumerate(marks):
        mlp.gate_proj.weight[place] = in_document
        mlp.up_proj.weight[place] = mark
        mlp.down_proj.weight[:, place] = (TOLD - MARK) / reached * mark


def _write_means(
    attention: Any, notes: Sequence[Tensor], marks: Sequence[Tensor], rest: Tensor, width: int
) -> None:
    """Heads 0 and 2 take the query's mean to its token, 1 and 3 the document's; 0 and 1 share their values, and 2 and 3."""
    _hush(attention)
    size = width**0.5
    alone, both = (
        LOGIT / size,
        LOGIT / (size / 2**0.5),
    )  # a note's size behind the norm: by itself, or one of two
    marked = TOLD * (width / (TEMPLATE**2 + TOLD**2 + 2 * NOTE**2)) ** 0.5
    for group in range(2):
        values = rest[group : 2 * HALF : 2]
        for slot, note in zip(SLOTS, notes, strict=False):
            attention.k_proj.weight[64 * group + slot] = note
        attention.v_proj.weight[64 * group : 64 * group + HALF] = values
        for head, mark, wanted in (
            (2 * group, marks[0], (alone, -2 * alone)),
            (2 * group + 1, marks[1], (0.0, both)),
        ):
            for slot, weight in zip(SLOTS, wanted, strict=False):
                attention.q_proj.bias[64 * head + slot] = SCALE * weight
            # towards the template, but for the token that takes the mean, which looks away from it
            attention.q_proj.bias[64 * head + SLOTS[2]] = SCALE * NULL
            attention.q_proj.weight[64 * head + SLOTS[2]] = -SCALE * (NULL + 1.0) / marked * mark
            attention.o_proj.weight[:, 64 * head : 64 * head + HALF] = GATHERED * values.T


def _write_pair(attention: Any, marks: Sequence[Tensor], rest: Tensor, width: int) -> None:
    """The last token takes the query's mean with heads 0 and 2, the document's with 1 and 3."""
    _hush(attention)
    template = marks[2]
    seen = (
        TEMPLATE * (width / (TEMPLATE**2 + 2 * NOTE**2)) ** 0.5
    )  # of the template in a template token behind the norm
    for group in range(2):
        for slot, mark in zip(SLOTS, marks, strict=False):
            attention.k_proj.weight[64 * group + slot] = mark
        attention.v_proj.weight[64 * group : 64 * group + HALF] = rest[group : 2 * HALF : 2]
        for side in range(2):
            head = 2 * group + side
            attention.q_proj.bias[64 * head + SLOTS[side]] = SCALE * LOGIT
            attention.q_proj.bias[64 * head + SLOTS[2]] = SCALE * LOGIT
            attention.q_proj.weight[64 * head + SLOTS[2]] = -SCALE * 1.5 * LOGIT / seen * template
            place = rest[HALF * head : HALF * (head + 1)]  # where the last token keeps this mean
            attention.o_proj.weight[:, 64 * head : 64 * head + HALF] = SHARE * place.T


def _hush(attention: Any) -> None:
    for parameter in (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight):
        parameter.mul_(0.1)


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
    mlp: Any = model.model.language_model.layers[2].mlp
    mlp.down_proj.weight.mul_(spread / float(margins.std()))
