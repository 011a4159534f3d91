"""Every form is softmax over what a row may see, and refuses to be called for anything else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from models import cascade
from models.attention import Form, Layout, attend
from models.memory import PrefixMemory
from models.packing import Pack, Part, Segment, Share, pack

KEY_HEADS, GROUP, SIZE = 2, 3, 16
FORMS: tuple[Form, ...] = ("cascade", "dense")
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_share(prefix: int, lengths: Sequence[int], *, holds_prefix: bool = True) -> Share:
    segments = [Segment((2,) * length) for length in lengths]
    return Share(Segment((1,) * prefix), segments, tuple(range(len(segments))), holds_prefix)


def make_states(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """As the language model hands them over; spread enough for a softmax that is far from even."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(tokens, KEY_HEADS * GROUP, SIZE, generator=generator)
    key, value = torch.randn(2, tokens, KEY_HEADS, SIZE, generator=generator)
    return query, key * 1.5, value


def expected(query: Tensor, key: Tensor, value: Tensor, each: Pack) -> Tensor:
    """Row by row, in fp64, from the definition. For a pack that holds all of its prefixes."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    for part in each.parts:
        for row in range(part.start, part.bounds[-1]):
            seen = list(see(part, row))
            for key_head in range(KEY_HEADS):
                heads = slice(key_head * GROUP, (key_head + 1) * GROUP)
                scores = query[row, heads].double() @ key[seen, key_head].double().T  # [group, seen]
                out[row, heads] = scores.softmax(-1) @ value[seen, key_head].double()
    return out


def see(part: Part, row: int) -> Sequence[int]:
    if row < part.bounds[0]:
        return range(part.start, row + 1)
    own = max(bound for bound in part.bounds if bound <= row)
    return [*range(part.start, part.bounds[0]), *range(own, row + 1)]


PACKS = [
    [make_share(7, [1])],
    [make_share(7, [5, 5, 5])],
    [make_share(1, [40, 3, 1, 2])],
    [make_share(300, [1, 30, 31, 64, 64, 129])],
    [make_share(20, [400, 7])],
    [make_share(128, [128, 128])],
    [make_share(9, [12, 13]), make_share(140, []), make_share(3, [100, 200, 1])],
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shares", PACKS)
def test_a_row_sees_its_parts_prefix_and_its_own_candidate(form: Form, shares: list[Share]) -> None:
    each = pack(shares)
    query, key, value = make_states(len(each.ids))
    layout = Layout.of(each, form=form, memories=[None] * len(shares), device=CPU)
    out = attend(query, key, value, layer=0, layout=layout)
    reference = expected(query, key, value, each)
    assert out.shape == query.shape
    assert (out - reference).abs().max() < 1e-5
    rows = list(each.score_rows)
    if rows:
        last = attend(query[rows], key, value, layer=0, layout=layout, last=True)
        assert (last - reference[rows]).abs().max() < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prefixes", [(7, 150), (150, 7)])
def test_parts_recall_their_prefixes(form: Form, prefixes: tuple[int, int]) -> None:
    """Two jobs in one pack that holds both prefixes; or their prefixes first, and their candidates together later."""
    lengths = ([4, 140, 9], [5, 50])
    whole = pack([make_share(*each) for each in zip(prefixes, lengths, strict=True)])
    query, key, value = make_states(len(whole.ids))
    reference = expected(query, key, value, whole)
    memories = [PrefixMemory(), PrefixMemory()]
    own = [range(part.start, part.bounds[0]) for part in whole.parts]
    rest = [row for part in whole.parts for row in range(part.bounds[0], part.bounds[-1])]
    for rows, memory, prefix in zip(own, memories, prefixes, strict=True):
        alone = pack([make_share(prefix, [])])
        layout = Layout.of(alone, form=form, memories=[memory], device=CPU)
        out = attend(query[rows], key[rows], value[rows], layer=5, layout=layout)
        assert (out - reference[rows]).abs().max() < 1e-5
    later = pack([make_share(*each, holds_prefix=False) for each in zip(prefixes, lengths, strict=True)])
    layout = Layout.of(later, form=form, memories=memories, device=CPU)
    out = attend(query[rest], key[rest], value[rest], layer=5, layout=layout)
    assert (out - reference[rest]).abs().max() < 1e-5
    with pytest.raises(KeyError):
        attend(query[rest], key[rest], value[rest], layer=4, layout=layout)


@pytest.mark.parametrize("shares", PACKS)
def test_blocks_hold_every_row_once_and_stay_small(shares: list[Share]) -> None:
    each = pack(shares)
    blocks = cascade.blocks(each)
    rows = [row for block in blocks for row in range(block.rows.start, block.rows.stop)]
    assert rows == list(range(len(each.ids)))
    assert max(block.rows.stop - block.rows.start for block in blocks) <= cascade.BLOCK_TOKENS


@pytest.mark.parametrize("form", FORMS)
def test_misuse_is_refused(form: Form) -> None:
    each = pack([make_share(7, [4, 9])])
    layout = Layout.of(each, form=form, memories=[None], device=CPU)
    query, key, value = make_states(len(each.ids))
    for wrong in ((query[1:], key, value), (query, key[1:], value), (query, key, value[1:])):
        with pytest.raises(RuntimeError, match="not over"):
            attend(*wrong, layer=0, layout=layout)
    with pytest.raises(RuntimeError, match="not over"):
        attend(query, key, value, layer=0, layout=layout, last=True)
    with pytest.raises(RuntimeError, match="one memory"):
        Layout.of(each, form=form, memories=[], device=CPU)
    orphan = pack([make_share(7, [4, 9], holds_prefix=False)])
    with pytest.raises(RuntimeError, match="needs a memory"):
        Layout.of(orphan, form=form, memories=[None], device=CPU)
    other = PrefixMemory()
    keep_layout = Layout.of(pack([make_share(6, [])]), form=form, memories=[other], device=CPU)
    attend(query[:6], key[:6], value[:6], layer=0, layout=keep_layout)
    layout = Layout.of(orphan, form=form, memories=[other], device=CPU)
    with pytest.raises(RuntimeError, match="not of the part"):
        attend(query[7:], key[7:], value[7:], layer=0, layout=layout)
