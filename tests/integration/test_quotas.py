"""Admission: exact under concurrency, all or nothing, by the database's clock; settled with its entry or not at all."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace

import asyncpg
import pytest

from tenants.access import Caller
from tenants.audit import Audit, Decision, Entry, decode, encode
from tenants.database import Database
from tenants.errors import DatabaseUnavailable, QuotaExceeded, RequestTooCostly
from tenants.policy import Policy
from tenants.quotas import Hold, Quotas
from tests.integration.conftest import MakeCaller, Proxy

pytestmark = pytest.mark.timeout(120)

SLOW = Policy(
    requests_per_minute=1, request_burst=50, images_per_minute=1, image_burst=20, concurrent_requests=1_000
)
"""Refills so slowly that a test sees no refill."""
SETTLE = "select pericarp.settle($1, $2, $3, $4, 0, 0, 1, $5)"


def new_id() -> str:
    return str(uuid.uuid4())


def entry_of(hold: Hold, decision: Decision = Decision.ANSWERED) -> Entry:
    return Entry(
        request_id=hold.request_id,
        tenant=hold.tenant,
        key_id=hold.key_id,
        role="search",
        operation="rerank",
        decision=decision,
        code="ok",
        status=200,
    )


async def try_hold(
    quotas: Quotas, caller: Caller, images: int = 0, most_s: float = 60.0
) -> Hold | QuotaExceeded:
    try:
        return await quotas.hold(caller, new_id(), images=images, most_s=most_s)
    except QuotaExceeded as exc:
        return exc


async def remaining(quotas: Quotas, caller: Caller) -> dict[str, int]:
    """What is left, read from a refusal, which costs nothing."""
    probe = replace(caller, policy=replace(caller.policy, concurrent_requests=1))
    keeper = await try_hold(quotas, caller)
    refused = await try_hold(quotas, probe)
    assert isinstance(refused, QuotaExceeded)
    if isinstance(keeper, Hold):
        await quotas.release(keeper)
    return {standing.name: standing.remaining for standing in refused.standings if standing.name != "tokens"}


# -- rates ------------------------------------------------------------------------------------------------------


async def test_of_64_requests_at_once_exactly_the_limit_is_admitted(
    quotas: Quotas, make_caller: MakeCaller
) -> None:
    caller = await make_caller(SLOW)
    outcomes = await asyncio.gather(*(try_hold(quotas, caller) for _ in range(64)))
    refusals = [outcome for outcome in outcomes if isinstance(outcome, QuotaExceeded)]
    assert len(outcomes) - len(refusals) == 50
    assert {refusal.violated for refusal in refusals} == {("requests",)}


async def test_of_many_images_at_once_exactly_the_limit_is_admitted(
    quotas: Quotas, make_caller: MakeCaller
) -> None:
    caller = await make_caller(SLOW)
    outcomes = await asyncio.gather(*(try_hold(quotas, caller, images=3) for _ in range(40)))
    admitted = [outcome for outcome in outcomes if isinstance(outcome, Hold)]
    assert len(admitted) == 6  # 18 of 20 images
    last = await try_hold(quotas, caller, images=2)
    assert isinstance(last, Hold)
    assert isinstance(await try_hold(quotas, caller, images=1), QuotaExceeded)
    assert isinstance(await try_hold(quotas, caller, images=0), Hold)  # text goes on


async def test_two_gateways_share_one_limit(quotas: Quotas, app_url: str, make_caller: MakeCaller) -> None:
    caller = await make_caller(SLOW)
    other = Database(app_url)
    await other.open()
    try:
        gateways = [quotas, Quotas(other)]
        outcomes = await asyncio.gather(*(try_hold(gateways[n % 2], caller) for n in range(80)))
    finally:
        await other.close()
    assert sum(isinstance(outcome, Hold) for outcome in outcomes) == 50


async def test_the_first_requests_of_a_tenant_may_race(quotas: Quotas, make_caller: MakeCaller) -> None:
    policy = Policy(requests_per_minute=1, request_burst=3, concurrent_requests=10)
    for caller in [await make_caller(policy) for _ in range(15)]:
        outcomes = await asyncio.gather(*(try_hold(quotas, caller) for _ in range(8)))
        assert sum(isinstance(outcome, Hold) for outcome in outcomes) == 3


async def test_a_refused_request_costs_nothing(quotas: Quotas, make_caller: MakeCaller) -> None:
    caller = await make_caller(replace(SLOW, request_burst=10))
    assert isinstance(await try_hold(quotas, caller, images=20), Hold)
    for _ in range(20):  # refused for images: neither request nor slot may be charged
        outcome = await try_hold(quotas, caller, images=1)
        assert isinstance(outcome, QuotaExceeded)
        assert outcome.violated == ("images",)
        left = {standing.name: standing.remaining for standing in outcome.standings}
        assert left == {"requests": 9, "images": 0, "tokens": 2_000_000, "concurrency": 999}


async def test_every_violated_limit_is_named(quotas: Quotas, make_caller: MakeCaller) -> None:
    caller = await make_caller(replace(SLOW, request_burst=1, concurrent_requests=1))
    assert isinstance(await try_hold(quotas, caller, images=20), Hold)
    outcome = await try_hold(quotas, caller, images=2)
    assert isinstance(outcome, QuotaExceeded)
    assert outcome.violated == ("requests", "images", "concurrency")
    assert 115 <= outcome.retry_after_s <= 120  # two images at one a minute
    assert "requests, images, concurrency" in str(outcome)


async def test_whoever_waits_as_told_is_admitted(quotas: Quotas, make_caller: MakeCaller) -> None:
    caller = await make_caller(Policy(requests_per_minute=50, request_burst=1))
    assert isinstance(await try_hold(quotas, caller), Hold)
    outcome = await try_hold(quotas, caller)
    assert isinstance(outcome, QuotaExceeded)
    assert outcome.retry_after_s == 2  # 1.2 s, rounded up
    await asyncio.sleep(0.9)
    assert isinstance(await try_hold(quotas, caller), QuotaExceeded)
    await asyncio.sleep(1.1)
    assert isinstance(await try_hold(quotas, caller), Hold)


async def test_what_never_fits_is_not_told_to_wait(quotas: Quotas, make_caller: MakeCaller) -> None:
    caller = await make_caller(SLOW)
    with pytest.raises(RequestTooCostly) as caught:
        await quotas.hold(caller, new_id(), images=21)
    assert (caught.value.limit, caught.value.cost, caught.value.at_once) == ("images", 21, 20)


async def test_what_is_left_is_told(quotas: Quotas, make_caller: MakeCaller) -> None:
    caller = await make_caller(Policy(requests_per_minute=60, images_per_minute=30, concurrent_requests=4))
    hold = await quotas.hold(caller, new_id(), images=7)
    told = {standing.name: standing for standing in hold.standings}
    assert (told["requests"].limit, told["requests"].remaining, told["requests"].more_in_s) == (60, 59, 1)
    assert (told["images"].limit, told["images"].remaining, told["images"].more_in_s) == (30, 23, 2)
    assert (told["concurrency"].limit, told["concurrency"].remaining) == (4, 3)
    assert told["requests"].window_s == 60


async def test_tenants_do_not_share_limits(quotas: Quotas, make_caller: MakeCaller) -> None:
    first, second = (
        await make_caller(replace(SLOW, request_burst=1)),
        await make_caller(replace(SLOW, request_burst=1)),
    )
    assert isinstance(await try_hold(quotas, first), Hold)
    assert isinstance(await try_hold(quotas, second), Hold)
    assert isinstance(await try_hold(quotas, first), QuotaExceeded)


# -- slots ------------------------------------------------------------------------------------------------------


async def test_no_more_run_at_once_than_there_are_slots(quotas: Quotas, make_caller: MakeCaller) -> None:
    caller = await make_caller(Policy(requests_per_minute=1_000_000, concurrent_requests=5))
    running, most, admitted = 0, 0, 0

    async def worker() -> None:
        nonlocal running, most, admitted
        for _ in range(12):
            hold = await try_hold(quotas, caller)
            if isinstance(hold, QuotaExceeded):
                assert hold.violated == ("concurrency",)
                await asyncio.sleep(0.005)
                continue
            running += 1
            admitted += 1
            most = max(most, running)
            await asyncio.sleep(0.002)
            running -= 1
            await quotas.settle(hold, entry_of(hold))

    await asyncio.gather(*(worker() for _ in range(32)))
    assert most <= 5
    assert admitted > 5
    outcomes = [await try_hold(quotas, caller) for _ in range(6)]
    assert [isinstance(outcome, Hold) for outcome in outcomes] == [True] * 5 + [False]


async def test_a_slot_whose_gateway_died_comes_free_by_time(quotas: Quotas, make_caller: MakeCaller) -> None:
    caller = await make_caller(Policy(concurrent_requests=2))
    held = [await try_hold(quotas, caller, most_s=0.3) for _ in range(2)]
    assert all(isinstance(hold, Hold) for hold in held)
    assert isinstance(await try_hold(quotas, caller), QuotaExceeded)
    await asyncio.sleep(0.35)
    assert isinstance(await try_hold(quotas, caller), Hold)


async def test_a_late_settle_frees_nobody_elses_slot_and_still_writes(
    quotas: Quotas, audit: Audit, make_caller: MakeCaller
) -> None:
    caller = await make_caller(Policy(concurrent_requests=1))
    late = await quotas.hold(caller, new_id(), images=0, most_s=0.05)
    await asyncio.sleep(0.1)
    current = await quotas.hold(caller, new_id(), images=0, most_s=60)
    assert current.slot != late.slot  # what an orphan holds is nobody else's before it is closed
    receipt = await quotas.settle(late, entry_of(late))
    assert isinstance(await try_hold(quotas, caller), QuotaExceeded)
    assert [entry.id for entry in await audit.list_entries(caller.tenant)] == [receipt]
    assert not await quotas.release(late)
    assert await quotas.release(current)
    assert isinstance(await try_hold(quotas, caller), Hold)


async def test_a_lowered_limit_counts_what_runs_already(quotas: Quotas, make_caller: MakeCaller) -> None:
    caller = await make_caller(Policy(concurrent_requests=4))
    held = [await quotas.hold(caller, new_id(), images=0) for _ in range(4)]
    lowered = replace(caller, policy=replace(caller.policy, concurrent_requests=2))
    for hold in held[:2]:  # the low slots come free first, the high ones still run
        await quotas.release(hold)
    assert isinstance(await try_hold(quotas, lowered), QuotaExceeded)
    await quotas.release(held[2])
    assert isinstance(await try_hold(quotas, lowered), Hold)


async def test_the_same_request_is_held_once(quotas: Quotas, make_caller: MakeCaller) -> None:
    """So that a hold whose answer was lost on the way can be repeated."""
    caller = await make_caller(replace(SLOW, request_burst=5))
    request_id = new_id()
    first = await quotas.hold(caller, request_id, images=4)
    again = await quotas.hold(caller, request_id, images=4)
    assert again == first
    assert await remaining(quotas, caller) == {"requests": 3, "images": 16, "concurrency": 0}


# -- settling ---------------------------------------------------------------------------------------------------


async def test_settling_frees_the_slot_and_refunds_once(
    quotas: Quotas, audit: Audit, make_caller: MakeCaller
) -> None:
    caller = await make_caller(replace(SLOW, concurrent_requests=1))
    hold = await quotas.hold(caller, new_id(), images=20)
    receipt = await quotas.settle(hold, entry_of(hold), images=5)
    for _ in range(3):
        assert await quotas.settle(hold, entry_of(hold), images=0) == receipt
    assert len(await audit.list_entries(caller.tenant)) == 1
    next_hold = await quotas.hold(caller, new_id(), images=15)
    assert {standing.name: standing.remaining for standing in next_hold.standings}["images"] == 0


@pytest.mark.parametrize(("used", "left"), [(-5, 10), (0, 10), (7, 3), (10, 0), (99, 0), (None, 0)])
async def test_a_refund_never_exceeds_the_reservation(
    quotas: Quotas, make_caller: MakeCaller, used: int | None, left: int
) -> None:
    caller = await make_caller(SLOW)
    await quotas.hold(caller, new_id(), images=10)  # what another request holds is not given back
    hold = await quotas.hold(caller, new_id(), images=10)
    await quotas.settle(hold, entry_of(hold), images=used)
    assert (await remaining(quotas, caller))["images"] == left


async def test_releasing_gives_images_and_slot_back(
    quotas: Quotas, audit: Audit, make_caller: MakeCaller
) -> None:
    caller = await make_caller(replace(SLOW, concurrent_requests=1))
    hold = await quotas.hold(caller, new_id(), images=20)
    assert await quotas.release(hold)
    assert not await quotas.release(hold)
    assert isinstance(await try_hold(quotas, caller, images=20), Hold)
    assert await audit.list_entries(caller.tenant) == ()


async def test_no_entry_no_settlement(quotas: Quotas, database: Database, make_caller: MakeCaller) -> None:
    caller = await make_caller(replace(SLOW, concurrent_requests=1))
    hold = await quotas.hold(caller, new_id(), images=20)
    with pytest.raises(asyncpg.CheckViolationError):  # an entry that the log does not take
        await database.call(SETTLE, hold.tenant, hold.request_id, hold.slot, hold.token, b"")
    refused = await try_hold(quotas, caller, images=1)
    assert isinstance(refused, QuotaExceeded)
    assert refused.violated == ("images", "concurrency")  # neither slot nor images came back
    await quotas.settle(hold, entry_of(hold))


async def test_an_entry_of_another_request_is_refused(quotas: Quotas, make_caller: MakeCaller) -> None:
    caller, other = await make_caller(), await make_caller()
    hold = await quotas.hold(caller, new_id(), images=0)
    with pytest.raises(ValueError, match="another"):
        await quotas.settle(hold, replace(entry_of(hold), request_id=new_id()))
    with pytest.raises(ValueError, match="another"):
        await quotas.settle(hold, replace(entry_of(hold), tenant=other.tenant))


async def test_an_entry_is_durable_although_admission_is_not(
    app_url: str, quotas: Quotas, make_caller: MakeCaller
) -> None:
    caller = await make_caller()
    hold = await quotas.hold(caller, new_id(), images=0)
    connection = await asyncpg.connect(
        app_url, server_settings={"role": "pericarp_quota", "synchronous_commit": "off"}
    )
    try:
        async with connection.transaction():
            body = encode(entry_of(hold))
            await connection.execute(SETTLE, hold.tenant, hold.request_id, hold.slot, hold.token, body)
            assert await connection.fetchval("show synchronous_commit") == "on"
        assert await connection.fetchval("show synchronous_commit") == "off"
    finally:
        await connection.close()


async def test_an_outage_between_hold_and_settle_loses_nothing(
    proxy: Proxy, quotas: Quotas, audit: Audit, make_caller: MakeCaller
) -> None:
    caller = await make_caller(Policy(concurrent_requests=1))
    through = Database(proxy.url)
    await through.open()
    try:
        hold = await Quotas(through).hold(caller, new_id(), images=0)
        await proxy.cut()
        with pytest.raises(DatabaseUnavailable):
            await Quotas(through).settle(hold, entry_of(hold))
        assert await audit.list_entries(caller.tenant) == ()
        await proxy.resume()
        receipt = await Quotas(through).settle(hold, entry_of(hold))
        assert [entry.id for entry in await audit.list_entries(caller.tenant)] == [receipt]
        assert isinstance(await try_hold(quotas, caller), Hold)
    finally:
        await through.close()


# -- orphans ----------------------------------------------------------------------------------------------------


async def test_an_orphan_is_closed_once_and_audited(
    quotas: Quotas, audit: Audit, make_caller: MakeCaller
) -> None:
    while await quotas.reap():  # what other tests left
        pass
    caller = await make_caller()
    orphan = await quotas.hold(caller, new_id(), images=3, most_s=0.05)
    alive = await quotas.hold(caller, new_id(), images=0, most_s=60)
    assert await audit.list_entries(caller.tenant) == ()
    await asyncio.sleep(0.1)
    assert sum(await asyncio.gather(*(quotas.reap() for _ in range(4)))) >= 1
    (told,) = await audit.list_entries(caller.tenant)
    entry = decode(told.body)
    assert (entry.decision, entry.request_id, entry.key_id) == (
        Decision.ORPHANED,
        orphan.request_id,
        caller.key_id,
    )
    assert entry.image_count == 3
    await quotas.reap()
    await quotas.settle(alive, entry_of(alive))
    await quotas.settle(orphan, entry_of(orphan))  # its gateway lived after all: both facts stand in the log
    decisions = [decode(entry.body).decision for entry in await audit.list_entries(caller.tenant)]
    assert decisions == [Decision.ANSWERED, Decision.ANSWERED, Decision.ORPHANED]


# -- the shape of the tables ------------------------------------------------------------------------------------


async def test_updates_stay_hot(app_url: str, superuser_url: str, make_caller: MakeCaller) -> None:
    """Otherwise every request would write index entries, and the tables would grow with use."""
    caller = await make_caller(Policy(requests_per_minute=1_000_000, concurrent_requests=5))
    busy = Database(app_url)
    await busy.open()
    for _ in range(150):
        hold = await Quotas(busy).hold(caller, new_id(), images=0)
        await Quotas(busy).release(hold)
    await busy.close()  # a backend that ends tells its statistics
    await asyncio.sleep(0.2)
    connection = await asyncpg.connect(superuser_url)
    try:
        rows = await connection.fetch(
            "select relname, n_tup_upd, n_tup_hot_upd from pg_stat_user_tables"
            " where schemaname = 'pericarp' and relname in ('quota', 'slot')"
        )
    finally:
        await connection.close()
    assert len(rows) == 2
    for row in rows:
        assert row["n_tup_upd"] >= 150
        assert row["n_tup_hot_upd"] / row["n_tup_upd"] > 0.95, row["relname"]
