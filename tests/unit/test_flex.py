"""FlexAttention's two descriptions of a pack agree with the pack's rule, and so does what it computes."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from models.flex import BLOCK, SMALLEST_BUCKET, FlexMask, bucket, compilations, warm_up
from models.packing import Pack, Segment, Share, pack

CPU = torch.device("cpu")


def make_pack(seed: int) -> tuple[Pack, int]:
    """A random pack of up to four jobs, and how many tokens of prefixes are in memories."""
    rng = random.Random(seed)
    shares = []
    for _ in range(rng.randint(1, 4)):
        segments = [Segment((1,) * rng.randint(1, 200)) for _ in range(rng.randint(0, 12))]
        holds_prefix = not segments or rng.random() < 0.5
        shares.append(
            Share(Segment((1,) * rng.randint(1, 500)), segments, tuple(range(len(segments))), holds_prefix)
        )
    return pack(shares), sum(len(share.prefix) for share in shares if not share.holds_prefix)


def write_rule(packed: Pack, remembered: int) -> torch.Tensor:
    """[tokens, remembered + tokens], pair by pair from the definition, with no cleverness."""
    allowed = torch.zeros(len(packed.ids), remembered + len(packed.ids), dtype=torch.bool)
    start = 0
    for part in packed.parts:
        prefix: list[int] = list(range(remembered + part.start, remembered + part.bounds[0]))
        if not part.holds_prefix:
            prefix = list(range(start, start + part.prefix_tokens))
            start += part.prefix_tokens
        for row in range(part.start, part.bounds[0]):
            allowed[row, [key for key in prefix if key <= remembered + row]] = True
        for begin, end in zip(part.bounds, part.bounds[1:], strict=False):
            for row in range(begin, end):
                allowed[row, prefix] = True
                allowed[row, remembered + begin : remembered + row + 1] = True
    return allowed


@pytest.mark.parametrize("seed", range(8))
def test_the_mask_is_the_packs_rule(seed: int) -> None:
    packed, remembered = make_pack(seed)
    mask = FlexMask(packed, CPU)
    rule = torch.zeros(mask.rows, mask.rows, dtype=torch.bool)
    own = slice(remembered, remembered + len(packed.ids))
    rule[own, : own.stop] = write_rule(packed, remembered)
    rows = torch.arange(mask.rows)
    written = mask.block_mask.mask_mod(torch.tensor(0), torch.tensor(0), rows[:, None], rows[None, :])
    assert torch.equal(written[own], rule[own])

    blocks = mask.rows // BLOCK
    part, whole = torch.zeros(2, blocks, blocks, dtype=torch.bool)
    listed = mask.block_mask
    assert listed.full_kv_indices is not None and listed.full_kv_num_blocks is not None
    for query in range(blocks):
        part[query, listed.kv_indices[0, 0, query, : listed.kv_num_blocks[0, 0, query]].long()] = True
        whole[query, listed.full_kv_indices[0, 0, query, : listed.full_kv_num_blocks[0, 0, query]].long()] = (
            True
        )
    by_block = rule.view(blocks, BLOCK, blocks, BLOCK)
    assert torch.equal(part | whole, by_block.any(3).any(1))
    assert not (whole & ~by_block.all(3).all(1)).any()
    assert not (part & whole).any()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("seed", range(3))
def test_what_it_computes_is_attention_under_the_rule(seed: int) -> None:
    packed, remembered = make_pack(seed)
    torch.manual_seed(seed)
    tokens = len(packed.ids)
    query = torch.randn(1, 4, tokens, 16)
    key, value = torch.randn(2, 1, 2, remembered + tokens, 16)
    expected = scaled_dot_product_attention(
        query,
        key.repeat_interleave(2, dim=1),
        value.repeat_interleave(2, dim=1),
        attn_mask=write_rule(packed, remembered),
        scale=0.25,
    )
    out = FlexMask(packed, CPU).attend(query, key, value, 0.25)
    assert (out - expected.transpose(1, 2)).abs().max() < 1e-5


def test_buckets_are_few_and_hold_their_rows() -> None:
    assert {bucket(rows) for rows in range(1, 16_385)} == {256, 512, 1024, 2048, 4096, 8192, 16_384}
    assert all(bucket(rows) >= max(rows, SMALLEST_BUCKET) for rows in range(1, 5000))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_a_warm_up_asks_for_every_bucket_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    attend = FlexMask.attend

    def watching(
        mask: FlexMask, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        asked.append((mask.rows, query.shape[2]))
        return attend(mask, query, key, value, scaling)

    monkeypatch.setattr(FlexMask, "attend", watching)
    warm_up(heads=4, key_heads=2, size=16, dtype=torch.float32, device=CPU, most_rows=900)
    assert asked == [(256, 256), (512, 512), (1024, 1024)]
    assert compilations() == 0  # nothing is compiled on a CPU
