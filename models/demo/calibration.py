"""Is a score a probability? Reliability on held-out rows, and two numbers, fitted on others and folded into the weights.

The binary term of the training sets scores about right; what is left is a factor and an offset of z_yes - z_no (Platt,
1999). The factor goes into the final norm. The offset goes where the last token's state hardly varies: the direction
along which every state has the same length, found by least squares, is added to "yes" and taken from "no".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.demo.data import Corpus
from models.demo.model import Model, Row
from models.demo.questions import draw_rows

BINS = 10
# what is asked of a reranker most: a text against images, an image against texts, texts against texts
CHECKED = (
    ("concept", "show"), ("photo", "show"), ("title", "show"), ("concept", "tell"), ("photo", "tell"), ("text", "gloss"),
    ("text", "passage"), ("concept", "words"),
)  # fmt: skip
QUERIES = 25  # of each split, task and language


@dataclass(frozen=True, slots=True)
class Reliability:
    """Expected calibration error over equal-width bins, of every candidate and of the first of each list.

    `bins` are (mean score, share that was right, how many) of every candidate, `firsts` the same of the first ones.
    """

    error: float
    first_error: float
    bins: tuple[tuple[float, float, int], ...]
    firsts: tuple[tuple[float, float, int], ...]


def draw_checked(corpus: Corpus, seed: int, *, fitted: bool = False) -> list[Row]:
    """Rows of all pairings and both languages; those that are fitted on are drawn apart from those that are measured."""
    rows = []
    for split, task in CHECKED:
        for language in ("en", "zh"):
            drawn = draw_rows(corpus, split, task, language, 2 * QUERIES, seed)
            rows += drawn[::2] if fitted else drawn[1::2]
    return rows


def measure(margins: Sequence[Sequence[float]]) -> Reliability:
    """Reliability of sigmoid(z_yes - z_no) of rows whose first candidate alone is right."""
    scores, labels, firsts, hits = [], [], [], []
    for row in margins:
        likely = 1 / (1 + np.exp(-np.array(row)))
        scores += likely.tolist()
        labels += [1.0] + [0.0] * (len(row) - 1)
        firsts.append(float(likely.max()))
        hits.append(float(likely.argmax() == 0))
    bins, first_bins = (
        _fill_bins(np.array(scores), np.array(labels)),
        _fill_bins(np.array(firsts), np.array(hits)),
    )
    return Reliability(_weigh(bins), _weigh(first_bins), bins, first_bins)


def fit(margins: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The factor and the offset under which sigmoid(factor z + offset) is likeliest, by Newton's method."""
    z = torch.tensor([value for row in margins for value in row], dtype=torch.float64)
    right = torch.tensor([float(at == 0) for row in margins for at in range(len(row))], dtype=torch.float64)
    inputs = torch.stack([z, torch.ones_like(z)], 1)
    chosen = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for _ in range(30):
        likely = torch.sigmoid(inputs @ chosen)
        slope = inputs.T @ (right - likely)
        bend = inputs.T @ (inputs * (likely * (1 - likely))[:, None])
        chosen = chosen + torch.linalg.solve(bend + 1e-6 * torch.eye(2, dtype=torch.float64), slope)
    return float(chosen[0]), float(chosen[1])


@torch.no_grad()
def fold(model: Model, states: Tensor, factor: float, offset: float, answers: tuple[int, int]) -> float:
    """Fold both into the weights, given final states [samples, hidden] behind the norm; returns the offset's spread.

    A negative factor would turn every order around, and is refused.
    """
    if factor <= 0:
        raise ValueError("scores that fall with relevance cannot be calibrated")
    language = model.model.language_model
    language.norm.weight.mul_(factor)
    states = states.double() * factor
    width = states.shape[1]
    gram = states.T @ states / len(states) + 1e-4 * torch.eye(
        width, dtype=torch.float64, device=states.device
    )
    direction = torch.linalg.solve(gram, states.mean(0))
    constant = states @ direction
    direction = direction / constant.mean() * offset
    table = language.embed_tokens.weight
    table[answers[0]] += direction.to(table.dtype) / 2
    table[answers[1]] -= direction.to(table.dtype) / 2
    return float((states @ direction).std())


def _fill_bins(
    scores: NDArray[np.float64], labels: NDArray[np.float64]
) -> tuple[tuple[float, float, int], ...]:
    place = np.minimum((scores * BINS).astype(int), BINS - 1)
    return tuple(
        (float(scores[place == at].mean()), float(labels[place == at].mean()), int((place == at).sum()))
        for at in range(BINS)
        if (place == at).any()
    )


def _weigh(bins: Sequence[tuple[float, float, int]]) -> float:
    total = sum(count for _, _, count in bins)
    return sum(abs(score - right) * count for score, right, count in bins) / total
