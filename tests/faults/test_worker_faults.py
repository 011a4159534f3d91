"""Workers that die, stand still or break their promises in the middle of a request."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from service.errors import DeadlineExceeded, Overloaded, WorkerLost
from service.fleet.local import LocalFleet
from service.fleet.messages import SCORING, Assign, Cancel, EndSession, Forget, ScoreRequest
from service.fleet.router import Party
from service.processes.children import ChildLost, Launch, bare_environ, start_child
from service.processes.wire import Failure
from tests.integration.fleet_conformance import ACME, BETA, job, until
from tests.integration.test_fleet import FAKE, assigned, running, spares


def busy(fleet: LocalFleet, tenant: str = ACME) -> int:
    """The pid of the tenant's worker while it computes, else 0."""
    return next((state.pid for state in fleet.workers() if state.busy and state.tenant == tenant), 0)


@pytest.mark.parametrize("spare_workers", [0, 1])
async def test_a_worker_killed_in_a_request_is_replaced_and_the_request_answered(spare_workers: int) -> None:
    async with running(spare_workers=spare_workers) as fleet:
        await fleet.score(ACME, job(), deadline_s=20)
        asked = asyncio.create_task(fleet.score(ACME, job("sleep 0.4"), deadline_s=20))
        await until(lambda: busy(fleet))
        killed = busy(fleet)
        os.kill(killed, signal.SIGKILL)
        scored = await asked
        assert scored.retried
        assert scored.worker != killed
        assert scored.scores.margins == (1.0, 3.0, 2.0)
        assert fleet.tally.ends == {"died": 1}


async def test_a_request_that_loses_two_workers_is_given_up_and_the_next_one_answered() -> None:
    async with running(spare_workers=1) as fleet:
        asked = asyncio.create_task(fleet.score(ACME, job("sleep 5"), deadline_s=20))
        for _ in range(2):
            await until(lambda: busy(fleet))
            killed = busy(fleet)
            os.kill(killed, signal.SIGKILL)
            await until(lambda pid=killed: busy(fleet) != pid)
        with pytest.raises(WorkerLost):
            await asked
        assert not (await fleet.score(ACME, job(), deadline_s=20)).retried


async def test_those_in_line_behind_a_killed_request_are_answered_too() -> None:
    async with running(spare_workers=1) as fleet:
        asked = [asyncio.create_task(fleet.score(ACME, job("sleep 0.3"), deadline_s=20)) for _ in range(4)]
        await until(lambda: busy(fleet))
        os.kill(busy(fleet), signal.SIGKILL)
        scored = await asyncio.gather(*asked)
        assert [one.retried for one in scored] == [True, True, False, False], "two were at the worker"


async def test_a_job_that_kills_workers_takes_no_neighbour_with_it() -> None:
    async with running(spare_workers=1, jobs_at_once=16) as fleet:
        await fleet.score(ACME, job(), deadline_s=20)
        sleeps = [asyncio.create_task(fleet.score(ACME, job("sleep 0.2"), deadline_s=20)) for _ in range(3)]
        killer = asyncio.create_task(fleet.score(ACME, job("exit"), deadline_s=20))
        sleeps += [asyncio.create_task(fleet.score(ACME, job("sleep 0.2"), deadline_s=20)) for _ in range(3)]
        with pytest.raises(WorkerLost):
            await killer
        for scored in await asyncio.gather(*sleeps):
            assert scored.retried


async def test_a_killed_worker_costs_its_tenant_alone() -> None:
    async with running(spare_workers=1) as fleet:
        asked = [asyncio.create_task(fleet.score(t, job("sleep 0.4"), deadline_s=20)) for t in (ACME, BETA)]
        await until(lambda: busy(fleet, ACME) and busy(fleet, BETA))
        os.kill(busy(fleet, ACME), signal.SIGKILL)
        first, second = await asyncio.gather(*asked)
        assert first.retried and not second.retried


async def test_a_stopped_worker_is_noticed_by_its_silence_and_replaced() -> None:
    async with running(spare_workers=1, silence_s=2.0) as fleet:
        await fleet.score(ACME, job(), deadline_s=20)
        asked = asyncio.create_task(fleet.score(ACME, job("sleep 0.2"), deadline_s=20))
        await until(lambda: busy(fleet))
        stopped = busy(fleet)
        os.kill(stopped, signal.SIGSTOP)
        scored = await asked
        assert scored.retried and scored.worker != stopped
        assert fleet.tally.ends == {"silent": 1}
        await until(lambda: not Path(f"/proc/{stopped}").exists())


async def test_a_worker_stuck_in_a_computation_is_killed_and_its_next_job_answered() -> None:
    async with running(spare_workers=1, silence_s=2.0) as fleet:
        await fleet.score(ACME, job(), deadline_s=20)
        asked = asyncio.create_task(fleet.score(ACME, job("stuck"), deadline_s=60))
        await until(lambda: busy(fleet))
        stuck = busy(fleet)
        with pytest.raises(WorkerLost):
            await asked
        assert not Path(f"/proc/{stuck}").exists()
        assert (await fleet.score(ACME, job(), deadline_s=20)).worker != stuck


async def test_an_idle_worker_or_spare_that_dies_is_replaced_before_it_is_needed() -> None:
    async with running(spare_workers=1, keep_warm=(Party(ACME),)) as fleet:
        await until(lambda: spares(fleet) and ACME in assigned(fleet))
        [spare], warm = spares(fleet), assigned(fleet)[ACME]
        for pid in (spare, warm):
            os.kill(pid, signal.SIGKILL)
        await until(lambda: spares(fleet) - {spare, warm} and assigned(fleet).get(ACME, warm) != warm)


async def test_a_worker_that_hangs_long_past_its_deadline_is_killed() -> None:
    async with running(spare_workers=1, overrun_s=0.3) as fleet:
        await fleet.score(ACME, job(), deadline_s=20)
        with pytest.raises(DeadlineExceeded):
            await fleet.score(ACME, job("hang 60"), deadline_s=0.3)
        hung = busy(fleet)
        assert hung
        scored = await fleet.score(ACME, job("sleep 1.5"), deadline_s=20)
        assert scored.worker != hung and scored.retried, "it was killed with the one that it had beside"
        assert fleet.tally.ends == {"overdue": 1}


async def test_a_worker_that_hangs_is_noticed_though_every_caller_hangs_up_long_before() -> None:
    async with running(spare_workers=1, overrun_s=0.3) as fleet:
        hung = (await fleet.score(ACME, job(), deadline_s=20)).worker

        async def replaced() -> bool:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await fleet.score(ACME, job("hang 60"), deadline_s=0.5)
            return hung not in assigned(fleet).values()

        async with asyncio.timeout(20):
            while not await replaced():
                pass


async def test_a_worker_that_fails_in_unforeseen_ways_too_often_gives_up_and_is_replaced(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with running(spare_workers=1) as fleet:
        first = await fleet.score(ACME, job(), deadline_s=20)
        for _ in range(3):
            with pytest.raises(Exception, match="no usable score"):
                await fleet.score(ACME, job("raise over my text"), deadline_s=20)
        assert (await fleet.score(ACME, job(), deadline_s=20)).worker != first.worker
    logged = "".join(capsys.readouterr())
    assert "RuntimeError at fake_worker.py" in logged
    assert "my text" not in logged


async def test_when_no_replacement_can_be_started_the_request_is_refused_and_the_rest_serve_on() -> None:
    async with running(spare_workers=0, max_workers=2) as fleet:
        await fleet.score(BETA, job(), deadline_s=20)
        await fleet.score(ACME, job(), deadline_s=20)
        fleet._starts.launch = Launch((sys.executable, "-c", "import sys; sys.exit('disk gone')"), SCORING)
        asked = asyncio.create_task(fleet.score(ACME, job("sleep 5"), deadline_s=60))
        await until(lambda: busy(fleet))
        start_s = time.monotonic()
        os.kill(busy(fleet), signal.SIGKILL)
        with pytest.raises(Overloaded) as refused:
            await asked
        assert time.monotonic() - start_s < 10
        assert refused.value.reason == "worker_start"
        assert refused.value.retry_after_s is not None
        assert fleet.reason is not None and "disk gone" in fleet.reason
        await fleet.score(BETA, job(), deadline_s=20)


def fake_worker() -> Launch:
    command = (sys.executable, "-P", "-m", FAKE, "--fd", "{fd}", "--parent", "{parent}", "--model", "puppet")
    options = ("--device", "cpu", "--dtype", "float32", "--threads", "1")
    return Launch((*command, *options), SCORING, bare_environ())


async def test_a_worker_dies_rather_than_serve_a_second_tenant() -> None:
    for second in (Assign(BETA), ScoreRequest(2, BETA, job(), time.monotonic() + 9)):
        child = await start_child(fake_worker())
        await child.tell(Assign(ACME))
        assert (await child.ask(ScoreRequest(1, ACME, job(), time.monotonic() + 9))).id == 1
        await child.tell(second)
        async with asyncio.timeout(2):
            await asyncio.shield(child.lost)
        await child.stop()


async def test_a_worker_without_a_tenant_scores_nothing() -> None:
    child = await start_child(fake_worker())
    with pytest.raises(ChildLost):
        await child.ask(ScoreRequest(1, ACME, job(), time.monotonic() + 9))
    await child.stop()


@pytest.mark.parametrize(
    ("assign", "tenant", "group"),
    [
        (Assign(ACME), BETA, None),
        (Assign(ACME), ACME, "pool"),
        (Assign(None, "pool"), ACME, "other-pool"),
        (Assign(None, "pool"), ACME, None),
        (Assign(None, "pool"), "pool", None),
    ],
)
async def test_a_worker_ends_itself_rather_than_serve_another_party(
    assign: Assign, tenant: str, group: str | None
) -> None:
    child = await start_child(fake_worker())
    await child.tell(assign)
    mine = ScoreRequest(1, assign.tenant or ACME, job(), time.monotonic() + 20, group=assign.group)
    await child.ask(mine)
    with pytest.raises(ChildLost):
        await child.ask(ScoreRequest(2, tenant, job(), time.monotonic() + 20, group=group))
    await child.stop()


@pytest.mark.parametrize("again", [Assign(BETA), Assign(None, "pool"), Assign(ACME, "pool"), Assign(None)])
async def test_a_worker_is_assigned_once(again: Assign) -> None:
    child = await start_child(fake_worker())
    await child.tell(Assign(ACME))
    await child.tell(Assign(ACME))
    await child.ask(ScoreRequest(1, ACME, job(), time.monotonic() + 20))
    await child.tell(again)
    async with asyncio.timeout(10):
        await asyncio.shield(child.lost)
    await child.stop()


async def test_a_worker_without_a_tenant_has_no_jobs_to_drop_and_no_sessions_to_end() -> None:
    for message in (Cancel(1), EndSession("s", ACME), Forget(ACME)):
        child = await start_child(fake_worker())
        await child.tell(message)
        async with asyncio.timeout(2):
            await asyncio.shield(child.lost)
        await child.stop()


async def test_a_worker_answers_jobs_as_they_end_and_says_nothing_of_one_that_was_taken_back() -> None:
    child = await start_child(fake_worker())
    await child.tell(Assign(ACME))
    end_s = time.monotonic() + 9
    long = asyncio.create_task(child.ask(ScoreRequest(1, ACME, job("sleep 9"), end_s + 9)))
    while (await child.ask(ScoreRequest(2, ACME, job("running", "a"), end_s))).scores.margins != (2.0,):
        pass
    await child.tell(Cancel(1))
    await child.tell(Cancel(77))  # never heard of, or answered long ago
    assert (await child.ask(ScoreRequest(3, ACME, job("running", "a"), end_s))).scores.margins == (1.0,)
    assert not long.done()
    long.cancel()
    await child.stop()


async def test_a_worker_drops_a_job_whose_deadline_is_past() -> None:
    child = await start_child(fake_worker())
    await child.tell(Assign(ACME))
    reply = await child.ask(ScoreRequest(1, ACME, job("sleep 5"), time.monotonic() - 0.1))
    assert reply == Failure(1, "deadline")
    await child.stop()


@pytest.mark.parametrize("spare_workers", [0, 2])
async def test_under_random_kills_and_hang_ups_every_request_ends_and_no_worker_is_shared(
    spare_workers: int,
) -> None:
    dice = random.Random(7)
    served: dict[int, set[str]] = {}
    outcomes: Counter[str] = Counter()

    async def ask(fleet: LocalFleet, number: int) -> None:
        tenant = dice.choice("abcde")
        texts = ["x" * dice.randrange(9) for _ in range(4)]
        try:
            async with asyncio.timeout(dice.choice((0.05, 20, 20, 20))):
                wait_s = dice.choice((0, 0, 0.02, 0.1))
                scored = await fleet.score(tenant, job(f"sleep {wait_s}", *texts), deadline_s=15)
        except (TimeoutError, WorkerLost, Overloaded) as exc:
            outcomes[type(exc).__name__] += 1
            return
        assert scored.scores.margins == tuple(float(len(text)) for text in texts)
        served.setdefault(scored.worker, set()).add(tenant)
        outcomes["answered"] += 1

    async def kill(fleet: LocalFleet) -> None:
        while True:
            await asyncio.sleep(dice.uniform(0.05, 0.4))
            workers = fleet.workers()
            assert sum(state.state == "assigned" for state in workers) <= 3
            if workers:
                os.kill(dice.choice(workers).pid, signal.SIGKILL)

    async with running(spare_workers=spare_workers, max_workers=3, patience_s=0.3, queue_limit=30) as fleet:
        killer = asyncio.create_task(kill(fleet))
        requests = []
        for number in range(120):
            requests.append(asyncio.create_task(ask(fleet, number)))
            await asyncio.sleep(dice.uniform(0, 0.04))
        await asyncio.gather(*requests)
        killer.cancel()
    assert all(len(tenants) == 1 for tenants in served.values())
    assert outcomes["answered"] > 60, outcomes
    assert outcomes["DeadlineExceeded"] == 0
