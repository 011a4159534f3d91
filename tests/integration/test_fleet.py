"""Worker processes of this host: given out, retired, bounded, and ended."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from models import DEMO, Item, Job, Pixels
from service.errors import Overloaded
from service.fleet.local import LocalFleet
from service.fleet.router import Party
from service.fleet.starts import KEPT_BYTES
from tests.integration.fleet_conformance import ACME, BETA, POOL, FleetConformance, job, until
from tests.integration.test_lock import LOCK

FAKE = "tests.integration.fake_worker"


@asynccontextmanager
async def running(**settings: Any) -> AsyncIterator[LocalFleet]:
    puppets = {"model": "puppet", "worker": FAKE, "max_workers": 2, "jobs_at_once": 2, "queue_limit": 4}
    fleet = LocalFleet(**{**puppets, **settings})
    await fleet.start()
    try:
        yield fleet
    finally:
        pids = [state.pid for state in fleet.workers()]
        start_s = time.monotonic()
        await fleet.close()
        assert time.monotonic() - start_s < 3
        assert not [pid for pid in pids if alive(pid)]


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def spares(fleet: LocalFleet) -> set[int]:
    return {state.pid for state in fleet.workers() if state.state == "spare"}


def assigned(fleet: LocalFleet) -> dict[str | None, int]:
    return {state.tenant: state.pid for state in fleet.workers() if state.state == "assigned"}


class TestLocalFleet(FleetConformance):
    @pytest.fixture(params=[0, 1], ids=["no-spare", "one-spare"])
    async def fleet(self, request: pytest.FixtureRequest) -> AsyncIterator[LocalFleet]:
        async with running(spare_workers=request.param) as fleet:
            yield fleet


async def test_a_spare_is_given_for_life_and_another_is_prepared() -> None:
    async with running(spare_workers=1) as fleet:
        await until(lambda: spares(fleet))
        [spare] = spares(fleet)
        assert (await fleet.score(ACME, job(), deadline_s=20)).worker == spare
        await until(lambda: spares(fleet))
        assert spare not in spares(fleet)
        [other] = spares(fleet)
        assert (await fleet.score(BETA, job(), deadline_s=20)).worker == other


async def test_an_idle_worker_retires_but_not_one_to_be_kept_warm() -> None:
    async with running(spare_workers=0, idle_s=0.3, keep_warm=(Party(BETA),)) as fleet:
        await until(lambda: BETA in assigned(fleet))
        warm = assigned(fleet)[BETA]
        first = await fleet.score(ACME, job(), deadline_s=20)
        await until(lambda: ACME not in assigned(fleet))
        await until(lambda: not alive(first.worker))
        assert assigned(fleet) == {BETA: warm}
        assert fleet.ready
        assert (await fleet.score(ACME, job(), deadline_s=20)).worker != first.worker


@pytest.mark.parametrize("spare_workers", [0, 1])
async def test_at_the_cap_the_least_recently_used_idle_worker_retires(spare_workers: int) -> None:
    async with running(spare_workers=spare_workers, max_workers=2) as fleet:
        old = (await fleet.score("a", job(), deadline_s=20)).worker
        kept = (await fleet.score("b", job(), deadline_s=20)).worker
        await fleet.score("c", job(), deadline_s=20)
        assert set(assigned(fleet)) == {"b", "c"}
        assert assigned(fleet)["b"] == kept
        await until(lambda: not alive(old))


async def test_a_busy_worker_never_retires_and_who_finds_no_seat_waits_for_one() -> None:
    async with running(spare_workers=1, max_workers=1) as fleet:
        await fleet.score("a", job(), deadline_s=20)
        await until(lambda: spares(fleet))
        busy = asyncio.create_task(fleet.score("a", job("sleep 0.5"), deadline_s=20))
        await asyncio.sleep(0.05)
        waits = asyncio.create_task(fleet.score("b", job(), deadline_s=20))
        await asyncio.sleep(0.2)
        assert not waits.done()
        assert set(assigned(fleet)) == {"a"}
        await busy
        await waits
        assert set(assigned(fleet)) == {"b"}


async def test_a_tenant_that_never_rests_cannot_keep_its_seat_for_ever() -> None:
    async with running(spare_workers=1, max_workers=1, patience_s=0.3) as fleet:
        stop = False

        async def hammer() -> None:
            while not stop:
                await fleet.score("a", job("sleep 0.02"), deadline_s=20)

        await fleet.score("a", job(), deadline_s=20)
        hammers = [asyncio.create_task(hammer()) for _ in range(3)]
        await asyncio.sleep(0.1)
        await fleet.score("b", job(), deadline_s=10)
        stop = True
        await asyncio.gather(*hammers)


async def test_a_worker_s_environment_holds_what_is_listed_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PERICARP_DATABASE_URL", "postgresql://secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HF_HOME", "/nowhere")
    inherited_fd = os.dup(2)
    os.set_inheritable(inherited_fd, True)
    async with running(spare_workers=1) as fleet:
        worker = (await fleet.score(ACME, job(), deadline_s=20)).worker
        if os.geteuid() != 0:
            pytest.skip("the worker's /proc is closed to us, as it should be")
        environ = Path(f"/proc/{worker}/environ").read_bytes().decode().strip("\0").split("\0")
        names = {entry.partition("=")[0] for entry in environ}
        assert names <= {
            *("PATH", "LANG", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "HOME", "HF_HOME", "HF_HUB_CACHE"),
            *("XDG_CACHE_HOME", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"),
            *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
            "TOKENIZERS_PARALLELISM",
            *("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"),
        }
        assert {"HF_HOME=/nowhere", f"MALLOC_TRIM_THRESHOLD_={KEPT_BYTES}"} <= set(environ)
        assert len(os.listdir(f"/proc/{worker}/fd")) == 4  # stdin, stdout, stderr, its socket
        assert Path(f"/proc/{worker}/comm").read_text().strip() == f"prc-w-{ACME[:8]}"
        command = Path(f"/proc/{worker}/cmdline").read_text()
        assert "secret" not in command and ACME not in command
    os.close(inherited_fd)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can drop root")
async def test_workers_of_root_are_users_of_their_own_who_still_score(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0o600)
    async with running(spare_workers=1) as fleet:
        owners = []
        for tenant in (ACME, BETA):
            worker = (await fleet.score(tenant, job(), deadline_s=20)).worker
            status = Path(f"/proc/{worker}/status").read_text()  # it may not even ask who it is
            told = dict(re.findall(r"(Uid|Gid|Groups):(.*)", status))
            (uid,), (gid,) = set(told["Uid"].split()), set(told["Gid"].split())
            owners.append(uid)
            assert uid == gid and int(uid) > 60_000
            assert not told["Groups"].split()
            assert (await fleet.score(tenant, job(f"open {secret}", "a"), deadline_s=20)).scores.margins == (
                0,
            )
        assert owners[0] != owners[1]


@pytest.mark.parametrize("spare_workers", [0, 1])
async def test_a_model_that_cannot_be_loaded_refuses_instead_of_hanging(spare_workers: int) -> None:
    async with running(model="missing", spare_workers=spare_workers) as fleet:
        start_s = time.monotonic()
        with pytest.raises(Overloaded) as refused:
            await fleet.score(ACME, job(), deadline_s=60)
        assert time.monotonic() - start_s < 10
        assert refused.value.reason == "worker_start"
        assert "missing" not in refused.value.detail
        assert not fleet.ready
        assert fleet.reason is not None and "no model called missing" in fleet.reason
        start_s = time.monotonic()
        with pytest.raises(Overloaded):
            await fleet.score(ACME, job(), deadline_s=60)
        assert time.monotonic() - start_s < 0.5


async def test_a_worker_that_never_gets_ready_counts_as_failed() -> None:
    async with running(model="silent", start_s=0.5) as fleet:
        await until(lambda: fleet.reason is not None and "not ready within 0.5 s" in fleet.reason)
        assert not fleet.ready


async def test_closing_while_workers_start_leaves_none() -> None:
    fleet = LocalFleet(model="silent", worker=FAKE, spare_workers=2)
    await fleet.start()
    await asyncio.sleep(0.5)
    ours = children()
    assert len(ours) == 2
    await fleet.close()
    assert not children()
    await fleet.close()


def children() -> set[int]:
    """Live child processes of this one that are workers."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
                command = (entry / "cmdline").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if stat.rpartition(")")[2].split()[1] == str(os.getpid()) and FAKE in command:
                found.add(int(entry.name))
    return found


async def test_the_embedded_model_scores_in_a_confined_worker() -> None:
    async with running(model=DEMO, worker="service.fleet.worker", device="cpu", threads=1) as fleet:
        image = Pixels(56, 56, bytes(56 * 56 * 3))
        texts = (Item("a lychee"), Item("a lychee", image), Item(image=image))
        scored = await fleet.score(ACME, Job(Item("fruit", image), texts), deadline_s=240)
        assert len(scored.scores.margins) == 3
        assert scored.scores.image_tokens > 0
        assert fleet.card is not None and fleet.card.name == DEMO
        assert [
            measure for measure in fleet.sandbox if not measure.held and measure.name in LOCK | {"data"}
        ] == []
        if os.geteuid() == 0:
            threads = list(Path(f"/proc/{scored.worker}/task").iterdir())
            assert len(threads) > 2, "those that compute are among them"
            for thread in threads:
                status = (thread / "status").read_text()
                assert "\nUid:\t6" in status
                assert "\nNoNewPrivs:\t1" in status
                assert "\nSeccomp:\t2" in status
                assert "\nCapEff:\t0000000000000000" in status


async def test_a_worker_with_weights_of_its_own_is_kept_warm_but_never_as_a_spare() -> None:
    warm = Party(ACME, own_weights=True)
    async with running(spare_workers=1, idle_s=0.3, keep_warm=(warm, POOL)) as fleet:
        await until(lambda: len([state for state in fleet.workers() if state.state == "assigned"]) == 2, 60)
        own = {state.tenant or state.group: state.own_weights for state in fleet.workers()}
        assert {name: kept for name, kept in own.items() if name} == {ACME: True, "pool": False}
        await until(lambda: spares(fleet))
        await asyncio.sleep(0.5)
        assert not [state for state in fleet.workers() if state.state == "spare" and state.own_weights]
        assert (await fleet.score(ACME, job(), deadline_s=60, party=warm)).worker == next(
            state.pid for state in fleet.workers() if state.tenant == ACME
        )


async def test_what_a_shared_worker_keeps_of_a_tenant_that_is_long_away_is_wiped() -> None:
    async with running(spare_workers=0, idle_s=0.4, keep_warm=(POOL,)) as fleet:
        await fleet.score(ACME, job("session", "a"), deadline_s=60, session="s", party=POOL)
        await until(lambda: not any(state.tenants for state in fleet.workers()))
        scored = await fleet.score(ACME, job("session", "a"), deadline_s=60, party=POOL)
        assert scored.scores.margins == (0.0,)


async def test_who_waits_for_weights_of_its_own_holds_up_nobody_else() -> None:
    async with running(spare_workers=1, max_workers=2, model="puppet-own-missing") as fleet:
        await until(lambda: spares(fleet), 60)
        asked = [
            asyncio.create_task(fleet.score(tenant, job(), deadline_s=60, party=party))
            for tenant, party in ((ACME, Party(ACME, own_weights=True)), (BETA, None))
        ]
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(outcomes[0], Overloaded) and outcomes[0].reason == "worker_start"
        assert not isinstance(outcomes[1], BaseException)
        assert fleet.ready, "other tenants can be served"
        assert fleet.reason is not None and "started" in fleet.reason


async def test_too_many_tenants_to_keep_warm_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="keep warm"):
        LocalFleet(model="puppet", max_workers=1, keep_warm=(Party("a"), Party("b")))
