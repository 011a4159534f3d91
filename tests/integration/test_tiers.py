"""Isolation tiers in real worker processes with a real model: who shares what, and what nobody can observe."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from models import Item, Job, Pixels, Scores
from service.fleet.local import LocalFleet
from service.fleet.router import Party
from tests.integration.test_shared_weights import maps
from tests.tiny_qwen import save_checkpoint

ACME, BETA, RIVAL = "11111111-acme", "22222222-beta", "33333333-rival"
POOL, RIVALS = Party(group="pool"), Party(group="rivals")
TIERS = ("pooled", "isolated", "dedicated")
PATIENCE_S = 240.0


def picture(value: int) -> Pixels:
    return Pixels(56, 56, bytes([value]) * (56 * 56 * 3))


SEEN = Job(Item("red shoe"), (Item("a shoe", picture(90)), Item("another", picture(200))))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In fp32; workers score in bf16, and so in converted copies."""
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


@asynccontextmanager
async def running(checkpoint: Path, *, max_workers: int = 4) -> AsyncIterator[LocalFleet]:
    fleet = LocalFleet(
        model=str(checkpoint),
        device="cpu",
        dtype="bf16",
        max_workers=max_workers,
        spare_workers=0,
        start_s=PATIENCE_S,
        silence_s=60.0,
    )
    await fleet.start()
    try:
        yield fleet
    finally:
        await fleet.close()


async def score(
    fleet: LocalFleet, tenant: str, party: Party, job: Job = SEEN, session: str | None = None
) -> tuple[Scores, int]:
    scored = await fleet.score(tenant, job, deadline_s=PATIENCE_S, session=session, party=party)
    return scored.scores, scored.worker


async def test_pooled_tenants_share_a_worker_and_nothing_that_it_keeps(checkpoint: Path) -> None:
    async with running(checkpoint) as fleet:
        first, worker = await score(fleet, ACME, POOL)
        assert first.reused_images == 0
        again, _ = await score(fleet, ACME, POOL)
        assert again.reused_images == 2, "kept for the tenant itself"
        others, same_worker = await score(fleet, BETA, POOL)
        assert same_worker == worker
        assert others.reused_images == 0, (
            "the same images, seen for another tenant of the pool, are not found"
        )
        assert others.margins == first.margins == again.margins
        assert others.computed_tokens == first.computed_tokens
        assert (await score(fleet, BETA, POOL))[0].reused_images == 2
        _, rivals_worker = await score(fleet, RIVAL, RIVALS)
        assert rivals_worker != worker
        _, alone = await score(fleet, RIVAL, Party(RIVAL))
        assert alone not in (worker, rivals_worker)


async def test_a_tenant_that_left_the_pool_finds_nothing_there_any_more(checkpoint: Path) -> None:
    async with running(checkpoint) as fleet:
        await score(fleet, ACME, POOL, session="s")
        _, pool = await score(fleet, BETA, POOL)
        await score(fleet, ACME, Party(ACME))

        def kept() -> set[str]:
            return {each.tenant for state in fleet.workers() if state.pid == pool for each in state.tenants}

        while kept() != {BETA}:
            await asyncio.sleep(0.05)
        back, worker = await score(fleet, ACME, POOL, session="s")
        assert (worker, back.reused_images) == (pool, 0)
        assert (await score(fleet, BETA, POOL))[0].reused_images == 2, "nobody else lost anything"


async def test_sessions_work_in_every_tier_and_only_who_is_dedicated_shares_no_weights(
    checkpoint: Path,
) -> None:
    async with running(checkpoint, max_workers=5) as fleet:
        margins, workers = set(), dict[str, int]()
        for tier in TIERS:
            acme, beta = f"acme-{tier}", f"beta-{tier}"
            mine, theirs = (
                POOL if tier == "pooled" else Party(tenant, own_weights=tier == "dedicated")
                for tenant in (acme, beta)
            )
            first, workers[tier] = await score(fleet, acme, mine, session=tier)
            assert first.computed_tokens > 0
            margins.add(first.margins)
            warm, _ = await score(fleet, acme, mine, session=tier)
            assert (warm.computed_tokens, warm.margins) == (0, first.margins)
            # Another tenant that knows the session's very name is as cold as anybody.
            cold, _ = await score(fleet, beta, theirs, session=tier)
            assert (cold.computed_tokens, cold.reused_images) == (first.computed_tokens, 0)
            await fleet.end_session(beta, tier)
            assert (await score(fleet, acme, mine, session=tier))[0].computed_tokens == 0, "not theirs to end"
            await fleet.end_session(acme, tier)
            ended, _ = await score(fleet, acme, mine, session=tier)
            assert ended.computed_tokens > 0
        assert len(margins) == 1
        assert len(set(workers.values())) == 3
        if os.geteuid() != 0:
            return  # nobody else may look into a process that may not be dumped
        assert {tier: len(maps(pid)) for tier, pid in workers.items()} == {
            "pooled": 1,
            "isolated": 1,
            "dedicated": 0,
        }
        own = workers["dedicated"]
        files = [os.readlink(f"/proc/{own}/fd/{fd}") for fd in os.listdir(f"/proc/{own}/fd")]
        assert not [file for file in files if "memfd" in file or "safetensors" in file]
        arguments = Path(f"/proc/{own}/cmdline").read_bytes().split(b"\0")
        assert b"--own-weights" in arguments and b"--shared" not in arguments
