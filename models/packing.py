"""Segments -> packs: ids, positions, bounds and score rows of one shared-prefix forward. Integers only.

A pack lays the prompt's prefix and many candidates behind one another in a single row, and so for several jobs:

    ids        p p p p p | a a a | b b b b b | c c || q q q | d d | e e e
    positions  0 1 2 3 4 | 5 6 7 | 5 6 7 8 9 | 5 6 || 0 1 2 | 3 4 | 3 4 5
    attends    causal    | prefix and itself, each candidate apart

It is exact, not an approximation, because (1) the query comes before the document in the prompt, so the
prefix is the same tokens for every candidate; (2) every candidate's positions restart where the prefix ends;
(3) a candidate's rows attend to its own job's prefix and, causally, to itself, and to nothing else. Each
candidate then computes what it would compute alone, up to the order of floating-point sums.

Only one pack of a job carries the prefix; the others attend to what its layers kept (`memory.PrefixMemory`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

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
class Share:
    """What one job asks of a pack: some of its candidates, and its prefix where nobody has computed it yet.

    `candidates` are numbers in `segments`. `holds_prefix` without candidates only fills the prefix's memory.
    """

    prefix: Segment
    segments: Sequence[Segment]
    candidates: tuple[int, ...]
    holds_prefix: bool

    @property
    def tokens(self) -> int:
        own = sum(len(self.segments[index]) for index in self.candidates)
        return own + len(self.prefix) if self.holds_prefix else own


@dataclass(frozen=True, slots=True)
class Part:
    """Where a share stands in its pack.

    Its rows are `start … bounds[-1]`, the prefix's first where `holds_prefix`. Candidate `candidates[i]` of the
    job occupies `bounds[i] … bounds[i + 1]`; its score is read at its last row. `images` are placed in the pack.
    """

    start: int
    prefix_tokens: int
    holds_prefix: bool
    candidates: tuple[int, ...]
    bounds: tuple[int, ...]
    images: tuple[Placed, ...]


@dataclass(frozen=True, slots=True)
class Pack:
    """One forward's input: `ids` [tokens], `positions` [3, tokens] (time, height, width), a part per share."""

    ids: Integers
    positions: Integers
    parts: tuple[Part, ...]

    @property
    def score_rows(self) -> tuple[int, ...]:
        """The last row of every candidate, part by part."""
        return tuple(bound - 1 for part in self.parts for bound in part.bounds[1:])


def pack(shares: Sequence[Share]) -> Pack:
    """Lay shares behind one another, as they are: see `plan` for how many tokens go together."""
    ids: list[int] = []
    positions, parts = [], []
    for share in shares:
        start = len(ids)
        prefix_positions, end = place(share.prefix, 0)
        segments = [share.prefix] if share.holds_prefix else []
        if share.holds_prefix:
            positions.append(prefix_positions)
        for index in share.candidates:
            segments.append(share.segments[index])
            positions.append(place(share.segments[index], end)[0])
        starts = [start, *(start + tokens for tokens in accumulate(map(len, segments)))]
        for segment in segments:
            ids += segment.ids
        parts.append(
            Part(
                start=start,
                prefix_tokens=len(share.prefix),
                holds_prefix=share.holds_prefix,
                candidates=share.candidates,
                bounds=tuple(starts[1:] if share.holds_prefix else starts),
                images=tuple(
                    Placed(begin + placed.start, placed.grid)
                    for begin, segment in zip(starts, segments, strict=False)
                    for placed in segment.images
                ),
            )
        )
    return Pack(np.array(ids, dtype=np.int64), np.concatenate(positions, axis=1), tuple(parts))


def plan(lengths: Sequence[int], budget_tokens: int, *, pieces: int = 1) -> list[tuple[int, ...]]:
    """Which candidates of one job go together: shortest first, so that neighbours in a pack are of like length.

    `lengths` are the candidates' tokens. No group exceeds the budget but one candidate that does alone, and the
    groups are even: `pieces` threads that work on them end at about the same time.
    """
    total = sum(lengths)
    groups_wanted = max(1, -(-total // budget_tokens))
    even = -(-total // (-(-groups_wanted // pieces) * pieces))
    groups: list[list[int]] = []
    tokens = done = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[index]
        full = groups and (tokens + length > budget_tokens or done + length / 2 > even * len(groups))
        if not groups or full:
            groups.append([])
            tokens = 0
        groups[-1].append(index)
        tokens += length
        done += length
    return [tuple(group) for group in groups]


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
