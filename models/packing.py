"""Segments -> packs: ids, positions, bounds and score rows of one shared-prefix forward. Integers only.

A pack lays the prompt's prefix and many candidates behind one another in a single row:

    ids        p p p p p | a a a | b b b b b | c c
    positions  0 1 2 3 4 | 5 6 7 | 5 6 7 8 9 | 5 6
    attends    causal    | prefix and itself, each candidate apart

It is exact, not an approximation, because (1) the query comes before the document in the prompt, so the
prefix is the same tokens for every candidate; (2) every candidate's positions restart where the prefix ends;
(3) a candidate's rows attend to the prefix and, causally, to itself, and to nothing else. Each candidate then
computes what it would compute alone, up to the order of floating-point sums.

Only the first pack of a job carries the prefix; later ones attend to what its layers kept
(`attention.PrefixMemory`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Grid:
    """One image as visual tokens: `rows * columns`, row-major; `image` is its number in the job."""

    image: int
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Placed:
    """The visual tokens of `grid` stand at `start … start + grid.tokens` of their segment or pack."""

    start: int
    grid: Grid


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of token ids, image placeholders included, and where in it the images stand, in order."""

    ids: tuple[int, ...]
    images: tuple[Placed, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Pack:
    """One forward's input.

    `ids` [tokens] and `positions` [3, tokens] (time, height, width). `prefix_tokens` is the prefix's length,
    and `holds_prefix` says whether its tokens are the first of this pack. Candidate `candidates[i]` of the
    job occupies `bounds[i] … bounds[i + 1]`; its score is read at row `score_rows[i]`, its last.
    """

    ids: Integers
    positions: Integers
    images: tuple[Placed, ...]
    prefix_tokens: int
    holds_prefix: bool
    candidates: tuple[int, ...]
    bounds: tuple[int, ...]

    @property
    def score_rows(self) -> tuple[int, ...]:
        return tuple(bound - 1 for bound in self.bounds[1:])


def pack(prefix: Segment, candidates: Sequence[Segment], *, budget_tokens: int) -> list[Pack]:
    """Cut one job into packs of at most `budget_tokens` tokens; every candidate is in exactly one.

    A candidate that exceeds the budget alone has a pack of its own. No candidates, no packs.
    """
    prefix_positions, end = place(prefix, 0)
    packs = []
    for number, chosen in enumerate(plan(len(prefix), [len(each) for each in candidates], budget_tokens)):
        holds_prefix = number == 0
        segments = [prefix] if holds_prefix else []
        positions = [prefix_positions] if holds_prefix else []
        for index in chosen:
            segments.append(candidates[index])
            positions.append(place(candidates[index], end)[0])
        starts = np.cumsum([0, *map(len, segments)]).tolist()
        packs.append(
            Pack(
                ids=np.array([token for segment in segments for token in segment.ids], dtype=np.int64),
                positions=np.concatenate(positions, axis=1),
                images=tuple(
                    Placed(start + placed.start, placed.grid)
                    for start, segment in zip(starts, segments, strict=False)
                    for placed in segment.images
                ),
                prefix_tokens=len(prefix),
                holds_prefix=holds_prefix,
                candidates=tuple(chosen),
                bounds=tuple(starts[1:] if holds_prefix else starts),
            )
        )
    return packs


def plan(prefix_tokens: int, lengths: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Which candidates go together: shortest first, so that neighbours in a pack are of like length.

    `lengths` are the candidates' tokens. The first group's budget also pays for the prefix.
    """
    groups: list[list[int]] = []
    left = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not groups or lengths[index] > left:
            left = budget_tokens if groups else max(budget_tokens - prefix_tokens, lengths[index])
            groups.append([])
        groups[-1].append(index)
        left -= lengths[index]
    return groups


def place(segment: Segment, start: int) -> tuple[Integers, int]:
    """Positions [3, tokens] of `segment` when it begins at `start`, and the position after it.

    Qwen2.5-VL's rule for still images (transformers `Qwen2_5_VLModel.get_rope_index`): text counts up on all
    three axes alike; an image stands still in time and counts its rows and columns from where it begins; what
    follows begins after the larger of the two.
    """
    positions = np.empty((3, len(segment)), dtype=np.int64)
    done = 0
    for placed in segment.images:
        start = _count(positions, done, placed.start, start)
        grid, done = placed.grid, placed.start + placed.grid.tokens
        positions[0, placed.start : done] = start
        positions[1, placed.start : done] = start + np.repeat(np.arange(grid.rows), grid.columns)
        positions[2, placed.start : done] = start + np.tile(np.arange(grid.columns), grid.rows)
        start += max(grid.rows, grid.columns)
    return positions, _count(positions, done, len(segment), start)


def _count(positions: Integers, begin: int, end: int, start: int) -> int:
    positions[:, begin:end] = np.arange(start, start + end - begin)
    return start + end - begin
