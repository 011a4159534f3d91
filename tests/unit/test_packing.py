"""Packs hold every candidate once, at the positions that it would have alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.packing import Grid, Placed, Segment, pack, place, plan
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


@settings(max_examples=150, deadline=None)
@given(prefix=segments(), candidates=st.lists(segments(), max_size=12), budget=st.integers(1, 120))
def test_packs_are_the_job_rearranged(prefix: Segment, candidates: list[Segment], budget: int) -> None:
    packs = pack(prefix, candidates, budget_tokens=budget)
    assert sorted(index for each in packs for index in each.candidates) == list(range(len(candidates)))
    assert [each.holds_prefix for each in packs] == [True, *[False] * (len(packs) - 1)][: len(packs)]
    for each in packs:
        own = len(prefix) if each.holds_prefix else 0
        assert each.bounds[0] == own
        assert each.bounds[-1] == len(each.ids) == each.positions.shape[1]
        assert each.ids[:own].tolist() == list(prefix.ids[:own])
        assert len(each.candidates) == 1 or len(each.ids) <= max(
            budget, own + len(candidates[each.candidates[0]])
        )
        images = list(each.images[len(prefix.images) if own else 0 :])
        for number, index in enumerate(each.candidates):
            start, end = each.bounds[number], each.bounds[number + 1]
            candidate = candidates[index]
            assert each.ids[start:end].tolist() == list(candidate.ids)
            assert each.score_rows[number] == end - 1
            # Alone, behind the prefix, the candidate would have these positions.
            shifted = tuple(Placed(len(prefix) + placed.start, placed.grid) for placed in candidate.images)
            alone, _ = place(Segment(prefix.ids + candidate.ids, prefix.images + shifted), 0)
            assert np.array_equal(each.positions[:, start:end], alone[:, len(prefix) :])
            for placed in candidate.images:
                assert images.pop(0) == Placed(start + placed.start, placed.grid)
        assert images == []


@given(
    prefix=st.integers(1, 50), lengths=st.lists(st.integers(1, 60), max_size=40), budget=st.integers(1, 100)
)
def test_plan_keeps_the_budget(prefix: int, lengths: list[int], budget: int) -> None:
    groups = plan(prefix, lengths, budget)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for number, group in enumerate(groups):
        tokens = sum(lengths[index] for index in group) + (prefix if number == 0 else 0)
        assert group
        assert tokens <= budget or len(group) == 1 or (number == 0 and prefix >= budget)
        assert sorted(lengths[index] for index in group) == [lengths[index] for index in group]


def test_no_candidates_make_no_packs() -> None:
    assert pack(Segment((1, 2)), [], budget_tokens=10) == []
