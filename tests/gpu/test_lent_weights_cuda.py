"""One copy of the weights for two workers of a real GPU: what the second one takes, scores, tampering. Skipped without one."""

from __future__ import annotations

import ctypes
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from models import Item, Job, Pixels
from models.lending import BorrowedWeights, LentWeights, NotShareable, open_gpu
from models.stock import Qwen2_5_VLForConditionalGeneration
from service.fleet.local import LocalFleet
from tests.integration.fleet_conformance import ACME, BETA, until
from tests.tiny_qwen import make_config, make_tokenizer


def shares_memory() -> bool:
    """Whether this machine's GPU may be shared; where not, that is tested against the stub."""
    try:
        open_gpu("cuda")
    except NotShareable:
        return False
    return True


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not shares_memory(), reason="no CUDA device whose memory can be shared"),
]

JOB = Job(Item("red shoe"), (Item("a red shoe"), Item("something", Pixels(90, 60, bytes(90 * 60 * 3)))))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny but for its middle layers: 200 MB in bf16, so that a copy more would be seen."""
    directory, tokenizer = tmp_path_factory.mktemp("wide"), make_tokenizer()
    config: Any = make_config(tokenizer)
    config.text_config.intermediate_size = 1 << 18
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).bfloat16().save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@asynccontextmanager
async def running(checkpoint: Path, **settings: Any) -> AsyncIterator[LocalFleet]:
    given: dict[str, Any] = {"spare_workers": 0, "max_workers": 2, "start_s": 280.0}
    fleet = LocalFleet(model=str(checkpoint), device="cuda", **{**given, **settings})
    await fleet.start()
    try:
        yield fleet
    finally:
        await fleet.close()


async def score_as_two(fleet: LocalFleet) -> tuple[list[tuple[float, ...]], int]:
    """Scores in two tenants' workers, and what the second worker took of the GPU's memory, in bytes."""
    first = (await fleet.score(ACME, JOB, deadline_s=280)).scores.margins
    free, _ = torch.cuda.mem_get_info()
    second = (await fleet.score(BETA, JOB, deadline_s=280)).scores.margins
    return [first, second], free - torch.cuda.mem_get_info()[0]


@pytest.mark.timeout(900)
async def test_the_second_worker_needs_no_room_for_weights_and_scores_are_the_same(checkpoint: Path) -> None:
    async with running(checkpoint) as fleet:
        lent, lent_bytes = await score_as_two(fleet)
        size_bytes = fleet.lent.size_bytes
        assert fleet.card is not None and (fleet.card.weights, fleet.card.unlent) == ("lent", None)
        assert fleet.lent.workers == 2 and size_bytes > 200_000_000
    async with running(checkpoint, share_weights=False) as fleet:
        own, own_bytes = await score_as_two(fleet)
        assert fleet.card is not None and fleet.card.weights == "own"
    assert lent == own
    print(
        f"second worker: {lent_bytes} bytes with lent weights, {own_bytes} with its own, weights {size_bytes}"
    )
    assert own_bytes - lent_bytes > 0.9 * size_bytes


@pytest.mark.timeout(600)
async def test_tampering_by_a_process_that_maps_the_weights_is_found(checkpoint: Path) -> None:
    """This test is the one that tampers: to the driver it is a worker like the others."""
    async with running(checkpoint, weights_check_s=0.5) as fleet:
        before = (await fleet.score(ACME, JOB, deadline_s=280)).scores.margins
        await until(lambda: fleet.lent.checks >= 3, within_s=30)
        assert fleet.lent.changes == 0
        owner = fleet._ownership._owner
        assert owner is not None
        borrowed = BorrowedWeights(owner.descriptor, open_gpu("cuda")[1])
        assert mapped_bytes(borrowed._block) == owner.size_bytes, "nothing else travels"
        borrowed._block[12_345] ^= 1
        torch.cuda.synchronize()
        await until(lambda: fleet.lent.changes == 1, within_s=30)
        assert (await fleet.score(ACME, JOB, deadline_s=280)).scores.margins == before
        assert fleet.lent.changes == 1


def mapped_bytes(block: torch.Tensor) -> int:
    """The whole allocation that `block` begins, as the driver knows it."""
    start, size = ctypes.c_uint64(), ctypes.c_size_t()
    driver = ctypes.CDLL("libcuda.so.1")
    address = ctypes.c_uint64(block.data_ptr())
    assert driver.cuMemGetAddressRange_v2(ctypes.byref(start), ctypes.byref(size), address) == 0
    assert start.value == address.value
    return size.value


def test_an_offer_lies_on_pages_of_its_own() -> None:
    _, cuda = open_gpu("cuda")
    tensors = {"a": torch.randn(1000), "b": torch.randn(3, 5)}
    lent = LentWeights(tensors, torch.float32, {}, cuda)
    assert mapped_bytes(lent._block) == lent.size_bytes
    assert lent.intact()
    lent._block[0] ^= 1
    assert not lent.intact()
    offer = os.memfd_create("offer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    lent.offer(offer)
    os.close(offer)
