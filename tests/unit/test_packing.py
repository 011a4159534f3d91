"""Packs hold every candidate once, at the positions that it would have alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.packing import Grid, Placed, Segment, Share, pack, place, plan
from models.stock import Qwen2_5_VLForConditionalGeneration
from tests.tiny_qwen import make_config, make_tokenizer

PAD = 7


@st.composite
def segments(draw: st.DrawFn, least: int = 1) -> Segment:
    """Text runs with images between them; an image is never the last token, as in the prompt."""
    ids: list[int] = []
    images: list[Placed] = []
    for _ in range(draw(st.integers(0, 2))):
        ids += [1] * draw(st.integers(1, 4))
        grid = Grid(len(images), draw(st.integers(1, 5)), draw(st.integers(1, 5)))
        images.append(Placed(len(ids), grid))
        ids += [PAD] * grid.tokens
    ids += [2] * draw(st.integers(least, 8))
    return Segment(tuple(ids), tuple(images))


@pytest.fixture(scope="module")
def stock() -> Qwen2_5_VLForConditionalGeneration:
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(make_config(make_tokenizer()))


@settings(max_examples=100, deadline=None)
@given(segment=segments())
def test_positions_are_the_stock_models(stock: Qwen2_5_VLForConditionalGeneration, segment: Segment) -> None:
    ids = torch.tensor([segment.ids])
    grids = [(1, 2 * placed.grid.rows, 2 * placed.grid.columns) for placed in segment.images]
    expected, delta = stock.model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == PAD).int(),
        image_grid_thw=torch.tensor(grids) if grids else None,
    )
    positions, end = place(segment, 0)
    assert positions.tolist() == expected[:, 0].tolist()
    assert end == delta.item() + len(segment)


@st.composite
def shares(draw: st.DrawFn) -> Share:
    candidates = draw(st.lists(segments(), max_size=6))
    chosen = draw(st.permutations(range(len(candidates))))[: draw(st.integers(0, len(candidates)))]
    return Share(draw(segments()), candidates, tuple(chosen), holds_prefix=not chosen or draw(st.booleans()))


@settings(max_examples=150, deadline=None)
@given(chosen=st.lists(shares(), min_size=1, max_size=4))
def test_a_pack_is_its_shares_rearranged(chosen: list[Share]) -> None:
    packed = pack(chosen)
    rows = iter(packed.score_rows)
    end = 0
    for share, part in zip(chosen, packed.parts, strict=True):
        prefix, own = share.prefix, len(share.prefix) if share.holds_prefix else 0
        assert (part.start, part.candidates, part.prefix_tokens) == (end, share.candidates, len(prefix))
        assert part.bounds[0] == part.start + own
        assert part.bounds[-1] - part.start == share.tokens
        assert packed.ids[part.start : part.bounds[0]].tolist() == list(prefix.ids[:own])
        images = list(part.images)
        for placed in prefix.images if own else ():
            assert images.pop(0) == Placed(part.start + placed.start, placed.grid)
        for number, index in enumerate(part.candidates):
            start, end = part.bounds[number], part.bounds[number + 1]
            candidate = share.segments[index]
            assert packed.ids[start:end].tolist() == list(candidate.ids)
            assert next(rows) == end - 1
            # Alone, behind the prefix, the candidate would have these positions.
            shifted = tuple(Placed(len(prefix) + placed.start, placed.grid) for placed in candidate.images)
            alone, _ = place(Segment(prefix.ids + candidate.ids, prefix.images + shifted), 0)
            assert np.array_equal(packed.positions[:, start:end], alone[:, len(prefix) :])
            for placed in candidate.images:
                assert images.pop(0) == Placed(start + placed.start, placed.grid)
        assert images == []
        end = part.bounds[-1]
    assert end == len(packed.ids) == packed.positions.shape[1]
    assert list(rows) == []


@given(
    lengths=st.lists(st.integers(1, 60), max_size=40), budget=st.integers(1, 100), pieces=st.integers(1, 4)
)
def test_plan_keeps_the_budget(lengths: list[int], budget: int, pieces: int) -> None:
    groups = plan(lengths, budget, pieces=pieces)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert group
        assert sum(lengths[index] for index in group) <= budget or len(group) == 1
    assert [lengths[index] for group in groups for index in group] == sorted(lengths)


@given(lengths=st.lists(st.integers(10, 20), min_size=16, max_size=60), pieces=st.integers(1, 4))
def test_plan_divides_evenly(lengths: list[int], pieces: int) -> None:
    tokens = [sum(lengths[index] for index in group) for group in plan(lengths, 10_000, pieces=pieces)]
    assert len(tokens) == pieces
    assert max(tokens) - min(tokens) <= 2 * max(lengths)


def test_no_candidates_make_no_groups() -> None:
    assert plan([], 10, pieces=2) == []
