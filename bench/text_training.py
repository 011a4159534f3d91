"""Fits the text classifier's weights: logistic regression on hashed n-grams, by L-BFGS on all samples at once.

The problem is convex and nothing is drawn at random but which harmless windows are looked at, by a fixed seed: the same
corpora give the same weights, up to the last bits of floating-point sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from bench.text_corpora import Labelled
from service.screening.text.classifier import (
    BITS,
    HANZI_WINDOWS,
    SHORTEST,
    WINDOWS,
    Classifier,
    grams,
    has_hanzi,
    scan,
)
from service.screening.text.views import view

BUCKETS = 2**BITS
RIDGE = 1e-4
SEEN = 3
"""An n-gram that is seen less often weighs nothing."""
STEPS, FIRST_STEPS = 60, 12
ENGLISH_HATE_WEIGHT = 3.0
HARMLESS_WINDOWS = 30_000
HARD_WINDOWS = 15_000
SEED = 7

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Sample:
    """A scanned text, or a window of one, and what it should score."""

    scanned: str
    hateful: float
    weight: float


class Design:
    """All samples as the rows of a sparse matrix [rows, columns]: a column is an n-gram that `SEEN` samples or more have."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        rows = [grams(sample.scanned).astype(np.int32) for sample in samples]
        buckets = np.concatenate(rows)
        row = np.repeat(np.arange(len(rows), dtype=np.int32), [len(each) for each in rows])
        seen = np.bincount(buckets, minlength=BUCKETS)
        self.chosen = np.flatnonzero(seen >= SEEN)
        column = np.full(BUCKETS, -1, np.int32)
        column[self.chosen] = np.arange(len(self.chosen))
        kept = column[buckets] >= 0
        row, buckets = row[kept], column[buckets[kept]]
        self.rarity = np.log(2 * len(rows) / np.minimum(seen[self.chosen], len(rows)))
        scale = 1 / np.sqrt([max(len(sample.scanned), SHORTEST) for sample in samples])
        shape = (len(rows), len(self.chosen))
        self._matrix = _sparse(row, buckets, scale[row] * self.rarity[buckets], shape)
        order = np.argsort(buckets, kind="stable")
        turned = scale[row[order]] * self.rarity[buckets[order]]
        self._transposed = _sparse(buckets[order], row[order], turned, shape[::-1])
        self.hateful = torch.tensor([sample.hateful for sample in samples])
        self.weight = torch.tensor([sample.weight for sample in samples])

    def logits(self, weights: torch.Tensor) -> torch.Tensor:
        """[rows]"""
        return self._matrix @ weights

    def gradient(self, by_row: torch.Tensor) -> torch.Tensor:
        """[columns]"""
        return self._transposed @ by_row


def _sparse(row: Integers, column: Integers, values: Floats, shape: tuple[int, ...]) -> torch.Tensor:
    """float32 [shape], of entries in the order of their rows; entries of one place add up."""
    begin = np.concatenate(([0], np.cumsum(np.bincount(row, minlength=shape[0])))).astype(np.int32)
    return torch.sparse_csr_tensor(
        torch.from_numpy(begin), torch.from_numpy(column), torch.from_numpy(values.astype(np.float32)), shape
    )


def train(labelled: Sequence[Labelled], harmless: Sequence[Labelled]) -> Classifier:
    """Weights from posts with labels and from harmless documents, first at random windows, then at the hardest."""
    torch.set_num_threads(1)  # sums in one order
    posts = [Sample(scan(view(each.text)), each.hateful, _weight(each)) for each in labelled]
    pool = [window for each in harmless for window in _windows(scan(view(each.text)))]
    pool += [
        window for post in posts if not post.hateful and post.weight >= 1 for window in _windows(post.scanned)
    ]
    chosen = np.random.default_rng(SEED).permutation(len(pool))
    drawn = [Sample(pool[index], 0.0, 1.0) for index in chosen[:HARMLESS_WINDOWS]]
    weights, _ = _fit(Design(posts + drawn), FIRST_STEPS)
    others = [Sample(pool[index], 0.0, 1.0) for index in chosen[HARMLESS_WINDOWS : 5 * HARMLESS_WINDOWS]]
    logits = np.array(
        [weights[grams(each.scanned)].sum() / np.sqrt(max(len(each.scanned), SHORTEST)) for each in others]
    )
    hardest = [others[index] for index in np.argsort(-logits, kind="stable")[:HARD_WINDOWS]]
    return _round(*_fit(Design(posts + drawn + hardest), STEPS))


def _weight(each: Labelled) -> float:
    """English has a quarter of the hateful posts that Chinese has."""
    return each.weight * (ENGLISH_HATE_WEIGHT if each.language == "en" and each.hateful == 1 else 1.0)


def _windows(scanned: str) -> Iterator[str]:
    for length, step in HANZI_WINDOWS if has_hanzi(scanned) else WINDOWS:
        for begin in range(0, max(0, len(scanned) - length + step - 1) + 1, step):
            yield scanned[begin : begin + length]


def _fit(design: Design, steps: int) -> tuple[Floats, float]:
    """Weights [BUCKETS] and bias of least regularised loss. Rare n-grams may weigh more than common ones."""
    columns = len(design.chosen)
    point = torch.zeros(columns + 1, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [point], max_iter=steps, history_size=8, line_search_fn="strong_wolfe", tolerance_change=1e-7
    )
    share = design.weight / design.weight.sum()

    @torch.no_grad()
    def loss() -> torch.Tensor:
        logits = design.logits(point[:-1]) + point[-1]
        error = share * (torch.sigmoid(logits) - design.hateful)
        point.grad = torch.cat((design.gradient(error) + RIDGE * point[:-1], error.sum()[None]))
        missed = torch.nn.functional.softplus(logits) - design.hateful * logits
        return share @ missed + RIDGE / 2 * (point[:-1] @ point[:-1])

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    values = point.detach().double().numpy()
    weights = np.zeros(BUCKETS)
    weights[design.chosen] = values[:-1] * design.rarity
    return weights, float(values[-1])


def _round(weights: Floats, bias: float) -> Classifier:
    """The weights as int8; the few largest are cut, so that the others keep their digits."""
    scale = float(np.quantile(np.abs(weights[weights != 0]), 0.9995)) / 127
    return Classifier(
        np.clip(np.rint(weights / scale), -127, 127).astype(np.int8), np.array([[scale, bias]] * 2)
    )
