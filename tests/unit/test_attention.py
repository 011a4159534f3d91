"""The cascade and the dense form are softmax over what a row may see, and refuse to be called for anything else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.attention import Form, Layout, PrefixMemory, attend
from models.packing import Pack, Segment, pack

HEADS, KEY_HEADS, SIZE = 6, 2, 16
CPU = torch.device("cpu")


class Layer(torch.nn.Module):
    layer_idx = 3


def make_packs(prefix: int, lengths: list[int], budget: int = 10_000) -> list[Pack]:
    return pack(Segment((1,) * prefix), [Segment((2,) * length) for length in lengths], budget_tokens=budget)


def make_states(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """As transformers hands them over: query [1, heads, tokens, size], a transposed view."""
    torch.manual_seed(seed)
    shapes = ((1, tokens, heads, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    query, key, value = (torch.randn(shape).transpose(1, 2) * 2 for shape in shapes)
    return query, key, value


def expected(query: Tensor, key: Tensor, value: Tensor, each: Pack) -> Tensor:
    """Row by row, in fp64, from the definition. For a pack that holds its prefix."""
    out = torch.zeros(1, query.shape[2], HEADS, SIZE, dtype=torch.float64)
    starts = [0, *each.bounds]
    for row in range(query.shape[2]):
        own = max(start for start in starts if start <= row)
        seen = [*range(min(row + 1, each.prefix_tokens)), *range(max(own, each.prefix_tokens), row + 1)]
        for head in range(HEADS):
            source = head // (HEADS // KEY_HEADS)
            scores = key[0, source, seen].double() @ query[0, head, row].double() / SIZE**0.5
            out[0, row, head] = scores.softmax(-1) @ value[0, source, seen].double()
    return out


@pytest.mark.parametrize("form", ["cascade", "dense"])
@pytest.mark.parametrize("lengths", [[1], [5, 5, 5], [1, 2, 9, 30, 31], [40, 3]])
def test_a_row_sees_the_prefix_and_its_own_candidate(form: Form, lengths: list[int]) -> None:
    (each,) = make_packs(7, lengths)
    query, key, value = make_states(len(each.ids))
    layout = Layout.of(each, form=form, memory=None, device=CPU)
    out, _ = attend(Layer(), query, key, value, None, scaling=SIZE**-0.5, layout=layout)
    assert (out - expected(query, key, value, each)).abs().max() < 2e-5


@pytest.mark.parametrize("form", ["cascade", "dense"])
def test_a_later_pack_recalls_the_prefix(form: Form) -> None:
    (whole,) = make_packs(7, [4, 9])
    first, second = make_packs(7, [4, 9], budget=11)
    query, key, value = make_states(20)
    reference = expected(query, key, value, whole)
    memory = PrefixMemory()
    for each, rows in ((first, slice(0, 11)), (second, slice(11, 20))):
        layout = Layout.of(each, form=form, memory=memory, device=CPU)
        q, k, v = (tensor[:, :, rows] for tensor in (query, key, value))
        out, _ = attend(Layer(), q, k, v, None, scaling=SIZE**-0.5, layout=layout)
        assert (out - reference[:, rows]).abs().max() < 2e-5


def test_last_rows_are_the_same_alone() -> None:
    (each,) = make_packs(7, [1, 2, 9, 30, 31, 64])
    query, key, value = make_states(len(each.ids))
    layout = Layout.of(each, form="cascade", memory=None, device=CPU)
    whole, _ = attend(Layer(), query, key, value, None, scaling=SIZE**-0.5, layout=layout)
    last, _ = attend(Layer(), query, key, value, None, scaling=SIZE**-0.5, layout=layout, last_rows_only=True)
    rows = list(each.score_rows)
    assert last.shape == whole.shape
    assert (last[:, rows] - whole[:, rows]).abs().max() < 2e-5


def test_bf16_stays_near_fp32() -> None:
    (each,) = make_packs(20, [5, 17])
    query, key, value = (tensor.bfloat16() for tensor in make_states(len(each.ids)))
    layout = Layout.of(each, form="cascade", memory=None, device=CPU)
    out, _ = attend(Layer(), query, key, value, None, scaling=SIZE**-0.5, layout=layout)
    assert out.dtype == torch.bfloat16
    assert (out - expected(query, key, value, each)).abs().max() < 0.05


def test_misuse_is_refused() -> None:
    first, second = make_packs(7, [4, 9], budget=11)
    query, key, value = make_states(11)
    layout = Layout.of(first, form="cascade", memory=None, device=CPU)
    with pytest.raises(RuntimeError, match="layout"):
        attend(Layer(), query, key, value, None, scaling=1.0)
    with pytest.raises(RuntimeError, match="no mask"):
        attend(Layer(), query, key, value, torch.ones(1, 1, 11, 11), scaling=1.0, layout=layout)
    with pytest.raises(RuntimeError, match="not over"):
        attend(Layer(), *make_states(12), None, scaling=1.0, layout=layout)
    orphan = Layout.of(second, form="cascade", memory=None, device=CPU)
    with pytest.raises(RuntimeError, match="memory"):
        attend(Layer(), *make_states(9), None, scaling=1.0, layout=orphan)
