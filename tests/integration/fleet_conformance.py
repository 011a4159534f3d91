"""What every fleet must do, whatever runs its workers. Subclass it beside a fixture `fleet`, already started.

The fleet's workers run the puppet of `fake_worker.py` (or its like), at most two of them assigned, with two jobs at
a time each and four in line.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from models import Item, Job, JobTooLong, ModelFailed, Pixels, Work
from service.errors import BadRequest, Contained, DeadlineExceeded, DocumentTooLong, Overloaded
from service.fleet.router import Fleet, Party

ACME, BETA = "5f0c1a2b-acme", "9e8d7c6b-beta"
POOL, OTHER_POOL = Party(group="pool"), Party(group="other-pool")


def job(query: str = "length", *texts: str) -> Job:
    return Job(Item(query), tuple(Item(text) for text in texts or ("a", "bbb", "cc")))


async def until(condition: object, within_s: float = 10.0) -> None:
    """Wait until `condition()` is true."""
    assert callable(condition)
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s, "it never came true"
        await asyncio.sleep(0.01)


class FleetConformance:
    """The contract of `service.fleet.router.Fleet`."""

    async def test_scores_come_in_the_order_of_the_candidates_with_what_they_took(self, fleet: Fleet) -> None:
        scored = await fleet.score(ACME, job(), deadline_s=20)
        assert scored.scores.margins == (1.0, 3.0, 2.0)
        assert scored.scores.stages_ms == {"forward": 0.5}
        assert not scored.retried
        assert scored.queue_ms >= 0 and scored.worker_ms >= 0

    async def test_pixels_arrive_whole(self, fleet: Fleet) -> None:
        images = tuple(Item("x", Pixels(n, 3, bytes(n * 9))) for n in range(1, 9))
        scored = await fleet.score(ACME, Job(Item("length"), images), deadline_s=20)
        assert scored.scores.image_tokens == 3 * sum(range(1, 9))

    async def test_it_is_ready_once_a_worker_has_scored_its_warm_up(self, fleet: Fleet) -> None:
        await until(lambda: fleet.ready)
        assert fleet.card is not None and fleet.card.name == "puppet"
        assert fleet.reason is None

    async def test_two_tenants_never_share_a_worker(self, fleet: Fleet) -> None:
        asked = [
            (tenant, asyncio.create_task(fleet.score(tenant, job(), deadline_s=20)))
            for tenant in (ACME, BETA, BETA, ACME)
        ]
        answered = [(tenant, (await task).worker) for tenant, task in asked]
        pids = {tenant: {worker for other, worker in answered if other == tenant} for tenant in (ACME, BETA)}
        assert len(pids[ACME]) == len(pids[BETA]) == 1
        assert pids[ACME].isdisjoint(pids[BETA])
        assert {(state.tenant, state.pid) for state in fleet.workers() if state.state == "assigned"} == {
            (tenant, pid) for tenant, pids_ in pids.items() for pid in pids_
        }

    async def test_jobs_of_one_tenant_meet_at_its_worker_and_those_of_two_never(self, fleet: Fleet) -> None:
        apart = [fleet.score(tenant, job("meet 2"), deadline_s=1) for tenant in (ACME, BETA)]
        for outcome in await asyncio.gather(*apart, return_exceptions=True):
            assert isinstance(outcome, DeadlineExceeded)
        together = [fleet.score(ACME, job("meet 2"), deadline_s=20) for _ in range(2)]
        first, second = await asyncio.gather(*together)
        assert first.worker == second.worker

    async def test_an_expelled_tenants_worker_is_killed_and_its_jobs_fail(self, fleet: Fleet) -> None:
        await fleet.score(ACME, job(), deadline_s=20)
        other = (await fleet.score(BETA, job(), deadline_s=20)).worker
        (before,) = (state for state in fleet.workers() if state.tenant == ACME)
        tasks = [asyncio.create_task(fleet.score(ACME, job("sleep 30"), deadline_s=60)) for _ in range(4)]
        await until(lambda: fleet.waiting == 2)
        await fleet.expel(ACME)
        await fleet.expel("nobody")
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, Contained)
        await until(lambda: before.pid not in {state.pid for state in fleet.workers()})
        assert (await fleet.score(ACME, job(), deadline_s=20)).worker != before.pid
        assert (await fleet.score(BETA, job(), deadline_s=20)).worker == other

    async def test_an_expelled_tenant_takes_its_pools_worker_with_it_but_not_its_neighbours_work(
        self, fleet: Fleet
    ) -> None:
        shared = (await fleet.score(ACME, job(), deadline_s=60, party=POOL)).worker
        theirs = asyncio.create_task(fleet.score(ACME, job("sleep 30"), deadline_s=60, party=POOL))
        neighbours = asyncio.create_task(fleet.score(BETA, job("sleep 1.5"), deadline_s=60, party=POOL))
        await until(lambda: any(state.running == 2 for state in fleet.workers()))
        await fleet.expel(ACME)
        with pytest.raises(Contained):
            await theirs
        scored = await neighbours
        assert scored.retried and scored.worker != shared

    async def test_a_full_line_refuses_at_once_and_says_when_to_come_back(self, fleet: Fleet) -> None:
        await fleet.score(ACME, job("sleep 1.1"), deadline_s=20)
        tasks = [asyncio.create_task(fleet.score(ACME, job("sleep 0.3"), deadline_s=20)) for _ in range(6)]
        await until(lambda: fleet.waiting == 4)
        (state,) = (state for state in fleet.workers() if state.tenant == ACME)
        assert state.busy and state.running == 2 and state.jobs == 1
        start_s = time.monotonic()
        with pytest.raises(Overloaded) as refused:
            await fleet.score(ACME, job(), deadline_s=20)
        assert time.monotonic() - start_s < 0.2
        assert refused.value.reason == "queue_full"
        assert (refused.value.retry_after_s or 0) >= 5, (
            "four wait, and the last answer took more than a second"
        )
        assert len(await asyncio.gather(*tasks)) == 6
        assert fleet.waiting == 0

    async def test_a_deadline_ends_the_wait_and_the_worker_lives_on(self, fleet: Fleet) -> None:
        first = await fleet.score(ACME, job(), deadline_s=20)
        start_s = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await fleet.score(ACME, job("sleep 0.6"), deadline_s=0.2)
        assert 0.15 < time.monotonic() - start_s < 0.5
        assert (await fleet.score(ACME, job(), deadline_s=20)).worker == first.worker

    async def test_no_time_left_is_a_deadline(self, fleet: Fleet) -> None:
        with pytest.raises(DeadlineExceeded):
            await fleet.score(ACME, job(), deadline_s=0)

    async def test_what_is_cancelled_leaves_the_line_and_the_worker(self, fleet: Fleet) -> None:
        worker = (await fleet.score(ACME, job(), deadline_s=20)).worker
        tasks = [asyncio.create_task(fleet.score(ACME, job("sleep 15"), deadline_s=20)) for _ in range(6)]
        await until(lambda: fleet.waiting == 4)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        start_s = time.monotonic()
        scored = await fleet.score(ACME, job("running", "a"), deadline_s=20)
        assert time.monotonic() - start_s < 2
        assert scored.scores.margins == (1.0,), "there is nothing else at the worker"
        assert scored.worker == worker
        assert fleet.waiting == 0

    async def test_a_job_past_its_deadline_is_dropped_by_its_worker(self, fleet: Fleet) -> None:
        await fleet.score(ACME, job(), deadline_s=20)
        tasks = [asyncio.create_task(fleet.score(ACME, job("sleep 15"), deadline_s=0.5)) for _ in range(6)]
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, DeadlineExceeded)
        async with asyncio.timeout(10):
            while (await fleet.score(ACME, job("running", "a"), deadline_s=10)).scores.margins != (1.0,):
                pass

    async def test_a_session_is_its_own_until_it_ends(self, fleet: Fleet) -> None:
        for session, reused in (("s", 0), ("s", 1), ("t", 0), (None, 0), ("s", 2)):
            scored = await fleet.score(ACME, job("session", "a"), deadline_s=20, session=session)
            assert scored.scores.reused_images == reused
        assert scored.scores.margins == (2.0,), "s and t"
        await fleet.end_session(ACME, "s")
        await fleet.end_session(ACME, "unheard-of")
        await fleet.end_session(BETA, "t")  # another tenant's, who has no worker
        scored = await fleet.score(ACME, job("session", "a"), deadline_s=20, session="t")
        assert (scored.scores.reused_images, scored.scores.margins) == (1, (1.0,))

    async def test_the_tenants_of_a_group_share_a_worker_and_nobody_else_gets_in(self, fleet: Fleet) -> None:
        together = [fleet.score(each, job("meet 2"), deadline_s=60, party=POOL) for each in (ACME, BETA)]
        first, second = await asyncio.gather(*together)
        assert first.worker == second.worker
        stranger = await fleet.score("stranger", job(), deadline_s=60, party=OTHER_POOL)
        assert stranger.worker != first.worker
        (state,) = (state for state in fleet.workers() if state.pid == first.worker)
        assert (state.tenant, state.group, state.jobs) == (None, "pool", 2)
        assert {each.tenant: each.jobs for each in state.tenants} == {ACME: 1, BETA: 1}
        assert not state.own_weights

    async def test_a_tenant_of_the_pool_is_not_one_that_bears_the_groups_name(self, fleet: Fleet) -> None:
        pooled = await fleet.score(ACME, job(), deadline_s=60, party=POOL)
        alone = await fleet.score("pool", job(), deadline_s=60)
        assert pooled.worker != alone.worker

    async def test_no_tenant_is_scored_in_another_ones_party(self, fleet: Fleet) -> None:
        with pytest.raises(ValueError, match="another tenant"):
            await fleet.score(ACME, job(), deadline_s=20, party=Party(BETA))

    async def test_sessions_of_pooled_tenants_are_their_own_even_under_one_name(self, fleet: Fleet) -> None:
        for tenant, reused in ((ACME, 0), (ACME, 1), (BETA, 0), (BETA, 1)):
            scored = await fleet.score(tenant, job("session", "a"), deadline_s=60, session="s", party=POOL)
            assert (scored.scores.reused_images, scored.scores.margins) == (reused, (1.0,))
        await fleet.end_session(BETA, "s")
        for tenant, kept in ((BETA, 0.0), (ACME, 1.0)):
            scored = await fleet.score(tenant, job("session", "a"), deadline_s=60, party=POOL)
            assert scored.scores.margins == (kept,)

    async def test_one_pooled_tenants_full_line_is_no_neighbours(self, fleet: Fleet) -> None:
        await fleet.score(ACME, job(), deadline_s=60, party=POOL)
        tasks = [
            asyncio.create_task(fleet.score(ACME, job("sleep 15"), deadline_s=60, party=POOL))
            for _ in range(6)
        ]
        await until(lambda: fleet.waiting == 4)
        with pytest.raises(Overloaded):
            await fleet.score(ACME, job(), deadline_s=60, party=POOL)
        waits = asyncio.create_task(fleet.score(BETA, job(), deadline_s=60, party=POOL))
        await until(lambda: fleet.waiting == 5)
        for task in tasks[:2]:
            task.cancel()
        assert (await waits).scores.margins == (1.0, 3.0, 2.0), "its turn comes before the others of the line"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def test_a_tenant_may_move_and_its_session_ends_wherever_it_was(self, fleet: Fleet) -> None:
        parties = (POOL, Party(ACME, own_weights=True))
        for party in parties:
            await fleet.score(ACME, job("session", "a"), deadline_s=60, session="s", party=party)
        await fleet.end_session(ACME, "s")
        for party in parties:
            scored = await fleet.score(ACME, job("session", "a"), deadline_s=60, party=party)
            assert scored.scores.margins == (0.0,)

    async def test_weights_of_its_own_come_with_a_worker_that_serves_nobody_else(self, fleet: Fleet) -> None:
        await until(lambda: fleet.ready, 60)
        before = {state.pid for state in fleet.workers()}
        scored = await fleet.score(ACME, job(), deadline_s=60, party=Party(ACME, own_weights=True))
        assert scored.worker not in before, "no spare of the others is taken"
        other = await fleet.score(BETA, job(), deadline_s=60)
        assert other.worker != scored.worker
        assert {state.pid: state.own_weights for state in fleet.workers() if state.tenant} == {
            scored.worker: True,
            other.worker: False,
        }

    async def test_jobs_in_line_when_their_session_ends_leave_nothing_behind(self, fleet: Fleet) -> None:
        await fleet.score(ACME, job("session", "a"), deadline_s=20, session="s")
        sleeps = [asyncio.create_task(fleet.score(ACME, job("sleep 15"), deadline_s=20)) for _ in range(2)]
        await until(lambda: any(state.running == 2 for state in fleet.workers()))
        waits = asyncio.create_task(fleet.score(ACME, job("session", "a"), deadline_s=20, session="s"))
        await until(lambda: fleet.waiting == 1)
        await fleet.end_session(ACME, "s")
        for sleep in sleeps:
            sleep.cancel()
        scored = await waits
        assert (scored.scores.reused_images, scored.scores.margins) == (0, (0.0,))

    async def test_what_a_worker_compiled_is_told(self, fleet: Fleet) -> None:
        for expected in (0, 1, 2):
            assert sum(state.compilations for state in fleet.workers()) == expected
            await fleet.score(ACME, job("compile"), deadline_s=20)

    async def test_what_workers_did_is_told_also_of_one_that_is_gone(self, fleet: Fleet) -> None:
        for times in (1, 2):
            await fleet.score(ACME, job("work"), deadline_s=20)
            assert fleet.tally.work == Work(*(times * number for number in range(1, 10)))
        assert fleet.tally.starts["ready"] >= 1 and fleet.tally.ends.total() == 0
        assert fleet.longest_wait_s == 0.0
        await fleet.expel(ACME)
        await until(lambda: fleet.tally.ends == {"contained": 1})
        await fleet.score(ACME, job("work"), deadline_s=20)
        assert fleet.tally.work.packs == 3

    async def test_the_model_s_own_refusals_keep_their_type(self, fleet: Fleet) -> None:
        with pytest.raises(JobTooLong, match="101 tokens"):
            await fleet.score(ACME, job("too-long"), deadline_s=20)
        uncut = replace(job("whole"), truncate=False)
        with pytest.raises(DocumentTooLong) as refused:
            await fleet.score(ACME, uncut, deadline_s=20)
        assert (refused.value.field, refused.value.limit) == ("documents[2]", 7)
        await fleet.score(ACME, replace(uncut, truncate=True), deadline_s=20)
        for command in ("fail", "nan", "raise over my text"):
            with pytest.raises(ModelFailed) as failed:
                await fleet.score(ACME, job(command), deadline_s=20)
            assert "my text" not in str(failed.value)
        assert (await fleet.score(ACME, job(), deadline_s=20)).scores.margins == (1.0, 3.0, 2.0)

    async def test_text_that_is_no_text_is_a_bad_request(self, fleet: Fleet) -> None:
        with pytest.raises(BadRequest):
            await fleet.score(ACME, job("\ud800"), deadline_s=20)
        await fleet.score(ACME, job(), deadline_s=20)

    async def test_a_closed_fleet_refuses_and_has_no_workers(self, fleet: Fleet) -> None:
        await fleet.score(ACME, job(), deadline_s=20)
        await fleet.close()
        assert fleet.workers() == ()
        assert not fleet.ready
        with pytest.raises(Overloaded):
            await fleet.score(ACME, job(), deadline_s=20)
