"""Limits of tokens, months and keys, in force and in shadow; gateways' leases; usage by day and key."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from tenants.access import Caller
from tenants.audit import Audit, Decision, Entry, decode
from tenants.database import Database
from tenants.directory import Directory
from tenants.errors import QuotaExceeded, RequestTooCostly
from tenants.key_limits import KeyLimits
from tenants.limits import Standing
from tenants.policy import Policy
from tenants.quotas import Hold, Quotas
from tenants.usage import Use
from tests.integration.conftest import MakeCaller, run_as_superuser

pytestmark = pytest.mark.timeout(120)

SLOW = Policy(
    requests_per_minute=1,
    request_burst=1_000,
    images_per_minute=1,
    image_burst=20,
    tokens_per_minute=1,
    token_burst=1_000,
    concurrent_requests=1_000,
)
"""Refills so slowly that a test sees no refill."""


def new_id() -> str:
    return str(uuid.uuid4())


def entry_of(hold: Hold) -> Entry:
    return Entry(hold.request_id, hold.tenant, hold.key_id, "search", "rerank", Decision.ANSWERED, "ok", 200)


async def ask(quotas: Quotas, caller: Caller, *, images: int = 0, tokens: int = 1) -> Hold | QuotaExceeded:
    try:
        return await quotas.hold(caller, new_id(), images=images, tokens=tokens)
    except QuotaExceeded as exc:
        return exc


async def held(quotas: Quotas, caller: Caller, *, images: int = 0, tokens: int = 1) -> Hold:
    hold = await ask(quotas, caller, images=images, tokens=tokens)
    assert isinstance(hold, Hold), hold
    return hold


async def refused(quotas: Quotas, caller: Caller, *, images: int = 0, tokens: int = 1) -> QuotaExceeded:
    refusal = await ask(quotas, caller, images=images, tokens=tokens)
    assert isinstance(refusal, QuotaExceeded), refusal
    return refusal


async def left(quotas: Quotas, caller: Caller) -> dict[str, int]:
    return {standing.name: standing.remaining for standing in await quotas.look(caller)}


def with_key(caller: Caller, name: str, **limits: int) -> Caller:
    return replace(caller, key_id=name, key_limits=KeyLimits(**limits))


# -- tokens -----------------------------------------------------------------------------------------------------


async def test_tokens_are_reserved_at_the_most_and_settled_as_used(
    quotas: Quotas, make_caller: MakeCaller
) -> None:
    caller = await make_caller(SLOW)
    hold = await held(quotas, caller, tokens=900)
    assert (await refused(quotas, caller, tokens=101)).violated == ("tokens",)
    await quotas.settle(hold, entry_of(hold), tokens=250)
    assert (await left(quotas, caller))["tokens"] == 750
    await held(quotas, caller, tokens=750)
    assert (await refused(quotas, caller, tokens=1)).violated == ("tokens",)


async def test_more_tokens_than_fit_at_once_are_not_told_to_wait(
    quotas: Quotas, make_caller: MakeCaller
) -> None:
    caller = await make_caller(SLOW)
    with pytest.raises(RequestTooCostly) as caught:
        await quotas.hold(caller, new_id(), images=0, tokens=1_001)
    assert (caught.value.limit, caught.value.cost, caught.value.at_once) == ("tokens", 1_001, 1_000)
    with pytest.raises(RequestTooCostly) as caught:
        key = with_key(caller, "small", tokens_per_minute=10)
        await quotas.hold(key, new_id(), images=0, tokens=11)
    assert caught.value.at_once == 10


async def test_what_is_reserved_does_not_come_back_while_its_request_runs(
    quotas: Quotas, make_caller: MakeCaller
) -> None:
    """Else its refund would give back what time had given back already, and more would pass than the limit."""
    caller = await make_caller(replace(SLOW, tokens_per_minute=6_000))  # the whole burst in 10 s
    hold = await held(quotas, caller, tokens=1_000)
    await asyncio.sleep(1.0)
    assert (await left(quotas, caller))["tokens"] == 0
    await quotas.settle(hold, entry_of(hold), tokens=0)
    assert (await left(quotas, caller))["tokens"] == 1_000


async def test_what_was_used_comes_back_from_when_its_request_ended(
    quotas: Quotas, make_caller: MakeCaller
) -> None:
    caller = await make_caller(replace(SLOW, tokens_per_minute=6_000))
    hold = await held(quotas, caller, tokens=1_000)
    await quotas.settle(hold, entry_of(hold))
    await asyncio.sleep(1.0)
    assert (await left(quotas, caller))["tokens"] >= 100  # although nobody looked in between


@pytest.mark.parametrize("rate", [7, 59, 999_983, 60_000_000])
async def test_any_rate_admits_exactly_its_burst(quotas: Quotas, make_caller: MakeCaller, rate: int) -> None:
    """No rounding: rates that do not divide a minute's microseconds, and one that takes a token in each."""
    caller = await make_caller(replace(SLOW, tokens_per_minute=rate, token_burst=rate))
    await held(quotas, caller, tokens=rate - 1)
    assert isinstance(await ask(quotas, caller, tokens=1), Hold)
    assert (await refused(quotas, caller, tokens=1)).violated == ("tokens",)


async def test_random_requests_are_decided_as_counting_says(quotas: Quotas, make_caller: MakeCaller) -> None:
    caller = await make_caller(replace(SLOW, request_burst=150, tokens_per_month=5_000))
    rng = random.Random(5)
    running: list[Hold] = []
    requests = images = tokens = reserved_images = reserved_tokens = 0
    for _ in range(400):
        if running and rng.random() < 0.5:
            hold = running.pop(rng.randrange(len(running)))
            used_images, used_tokens = rng.randint(0, hold.images), rng.randint(0, hold.tokens)
            for _ in range(rng.randint(1, 2)):  # the second time changes nothing
                await quotas.settle(hold, entry_of(hold), images=used_images, tokens=used_tokens)
            images, tokens = images + used_images, tokens + used_tokens
            reserved_images, reserved_tokens = reserved_images - hold.images, reserved_tokens - hold.tokens
            continue
        cost = rng.choice((0, 0, 0, 0, 1, 3)), rng.choice((1, 2, 5, 20))
        expected = tuple(
            name
            for name, too_much in (
                ("requests", requests + 1 > 150),
                ("images", cost[0] > 0 and images + reserved_images + cost[0] > 20),
                ("tokens", tokens + reserved_tokens + cost[1] > 1_000),
                ("tokens_month", tokens + reserved_tokens + cost[1] > 5_000),
            )
            if too_much
        )
        outcome = await ask(quotas, caller, images=cost[0], tokens=cost[1])
        assert (outcome.violated if isinstance(outcome, QuotaExceeded) else ()) == expected
        if isinstance(outcome, Hold):
            running.append(outcome)
            requests += 1
            reserved_images, reserved_tokens = reserved_images + cost[0], reserved_tokens + cost[1]
    assert requests == 150, "the limits were reached"


# -- months -----------------------------------------------------------------------------------------------------


async def test_a_months_requests_and_tokens_end_with_the_month(
    quotas: Quotas, make_caller: MakeCaller, superuser_url: str
) -> None:
    caller = await make_caller(replace(SLOW, requests_per_month=3, tokens_per_month=100))
    hold = await held(quotas, caller, tokens=90)
    refusal = await refused(quotas, caller, tokens=20)
    assert refusal.violated == ("tokens_month",)
    now = datetime.now(UTC)
    ends = (now.replace(day=1, hour=0, minute=0, second=0, microsecond=0) + timedelta(days=32)).replace(day=1)
    assert abs(refusal.retry_after_s - (ends - now).total_seconds()) < 60
    await quotas.settle(hold, entry_of(hold), tokens=10)
    for _ in range(2):
        await held(quotas, caller, tokens=20)
    assert (await refused(quotas, caller, tokens=20)).violated == ("requests_month",)
    told = {standing.name: standing for standing in await quotas.look(caller)}
    assert (told["requests_month"].remaining, told["tokens_month"].remaining) == (0, 50)
    assert told["requests_month"].window_s == (ends - timedelta(days=1)).day * 86_400
    await run_as_superuser(
        superuser_url,
        f"update pericarp.quota set month = month - interval '1 month' where tenant_id = '{caller.tenant}'",
    )
    assert isinstance(await ask(quotas, caller, tokens=20), Hold), "a new month has begun"


# -- keys -------------------------------------------------------------------------------------------------------


async def test_a_keys_own_limit_holds_that_key_alone(quotas: Quotas, make_caller: MakeCaller) -> None:
    tenant = await make_caller(replace(SLOW, request_burst=10))
    small = with_key(tenant, "small", requests_per_minute=1, request_burst=3, tokens_per_minute=500)
    big = with_key(tenant, "big")
    outcomes = await asyncio.gather(*(ask(quotas, small, tokens=10) for _ in range(8)))
    refusals = [outcome for outcome in outcomes if isinstance(outcome, QuotaExceeded)]
    assert [refusal.violated for refusal in refusals] == [("key_requests",)] * 5
    assert (await left(quotas, big))["requests"] == 7, "what the key refused cost the tenant nothing"
    outcomes = await asyncio.gather(*(ask(quotas, big, tokens=10) for _ in range(10)))
    assert sum(isinstance(outcome, Hold) for outcome in outcomes) == 7
    refusal = await refused(quotas, small, tokens=10)
    assert refusal.violated == ("requests", "key_requests")
    assert {"key_requests": 0, "key_tokens": 470}.items() <= {
        standing.name: standing.remaining for standing in refusal.standings
    }.items()


async def test_every_limit_of_a_key_refuses(quotas: Quotas, make_caller: MakeCaller) -> None:
    tenant = await make_caller(SLOW)
    for number, (limits, first, then) in enumerate(
        (
            ({"requests_per_minute": 1}, (0, 1), (0, 1)),
            ({"images_per_minute": 5}, (5, 1), (1, 1)),
            ({"tokens_per_minute": 50}, (0, 50), (0, 1)),
            ({"requests_per_month": 1}, (0, 1), (0, 1)),
            ({"tokens_per_month": 60}, (0, 60), (0, 1)),
            ({"concurrent_requests": 1}, (0, 1), (0, 1)),
        )
    ):
        key = with_key(tenant, f"key-{number}", **limits)
        await held(quotas, key, images=first[0], tokens=first[1])
        refusal = await refused(quotas, key, images=then[0], tokens=then[1])
        (violated,) = refusal.violated
        assert violated.startswith("key_")
        assert (await left(quotas, key))[violated] == 0


async def test_what_a_key_used_is_charged_to_it_whoever_counts_it(
    quotas: Quotas, make_caller: MakeCaller
) -> None:
    """Another key's request counts what this one's left behind."""
    tenant = await make_caller(SLOW)
    first = with_key(tenant, "first", tokens_per_minute=100, tokens_per_month=100)
    second = with_key(tenant, "second", tokens_per_minute=100)
    hold = await held(quotas, first, tokens=80)
    await quotas.settle(hold, entry_of(hold), tokens=60)
    await held(quotas, second, tokens=10)
    told = await left(quotas, first)
    assert told["key_tokens"] in (40, 41, 42)  # 100 a minute come back
    assert told["key_tokens_month"] == 40
    assert told["tokens"] == 1_000 - 60 - 10


# -- shadow -----------------------------------------------------------------------------------------------------


async def test_a_limit_in_shadow_counts_and_never_denies(quotas: Quotas, make_caller: MakeCaller) -> None:
    caller = await make_caller(replace(SLOW, request_burst=3, shadow=("requests",)))
    holds = [await held(quotas, caller) for _ in range(5)]
    assert [hold.shadowed for hold in holds] == [(), (), (), ("requests",), ("requests",)]
    told = {standing.name: standing for standing in holds[-1].standings}
    assert told["requests"].shadow and not told["tokens"].shadow
    for hold in holds:
        await quotas.settle(hold, entry_of(hold))
    use = (await quotas.usage(caller)).today[caller.key_id]
    assert (use.requests, use.shadowed, use.refused) == (5, 2, 0)


@pytest.mark.parametrize(
    ("name", "changes", "cost"),
    [
        ("images", {"image_burst": 20}, (9, 1)),
        ("tokens", {"token_burst": 20}, (0, 9)),
        ("tokens_month", {"tokens_per_month": 20}, (0, 9)),
        ("requests_month", {"requests_per_month": 2}, (0, 1)),
        ("concurrency", {"concurrent_requests": 2}, (0, 1)),
    ],
)
async def test_what_a_shadow_would_have_refused_is_not_charged_to_it(
    quotas: Quotas, make_caller: MakeCaller, name: str, changes: dict[str, int], cost: tuple[int, int]
) -> None:
    """So that it counts what it would refuse in force: of four, the third and the fourth."""
    policy = replace(SLOW, **changes, shadow=(name,))  # type: ignore[arg-type]
    caller = await make_caller(policy)
    holds = [await held(quotas, caller, images=cost[0], tokens=cost[1]) for _ in range(4)]
    assert [hold.shadowed for hold in holds] == [(), (), (name,), (name,)]
    if name != "concurrency":
        before = (await left(quotas, caller))[name]
        for hold in holds:
            await quotas.settle(hold, entry_of(hold))
        assert (await left(quotas, caller))[name] == before
    forced = replace(caller, policy=replace(policy, shadow=()))
    if name != "concurrency":
        assert name in (await refused(quotas, forced, images=cost[0], tokens=cost[1])).violated


async def test_a_request_too_large_for_a_limit_in_shadow_passes(
    quotas: Quotas, make_caller: MakeCaller
) -> None:
    caller = await make_caller(replace(SLOW, token_burst=10, shadow=("tokens",)))
    assert (await held(quotas, caller, tokens=50)).shadowed == ("tokens",)


# -- gateways ---------------------------------------------------------------------------------------------------


@asynccontextmanager
async def gateway(app_url: str, lease_s: float) -> AsyncIterator[Quotas]:
    database = Database(app_url)
    await database.open()
    try:
        yield Quotas(database, lease_s=lease_s)
    finally:
        await database.close()


async def test_a_gateway_that_says_nothing_loses_all_its_slots_with_its_lease(
    app_url: str, quotas: Quotas, make_caller: MakeCaller
) -> None:
    caller = await make_caller(replace(SLOW, concurrent_requests=4))
    async with gateway(app_url, lease_s=1.0) as dead:
        assert await dead.extend_lease()
        await asyncio.gather(*(held(dead, caller) for _ in range(4)))
        assert (await refused(quotas, caller)).violated == ("concurrency",)
        await asyncio.sleep(1.05)
        outcomes = await asyncio.gather(*(ask(quotas, caller) for _ in range(6)))
        assert sum(isinstance(outcome, Hold) for outcome in outcomes) == 4


async def test_a_gateway_that_goes_on_saying_so_keeps_them(
    app_url: str, quotas: Quotas, make_caller: MakeCaller
) -> None:
    caller = await make_caller(replace(SLOW, concurrent_requests=1))
    async with gateway(app_url, lease_s=2.0) as alive:
        await held(alive, caller)
        for _ in range(8):
            await asyncio.sleep(0.4)
            assert await alive.extend_lease()
        assert (await refused(quotas, caller)).violated == ("concurrency",)


async def test_a_gateway_that_was_slow_goes_on_and_takes_nothing_back(
    app_url: str, quotas: Quotas, audit: Audit, make_caller: MakeCaller
) -> None:
    caller = await make_caller(replace(SLOW, concurrent_requests=1))
    async with gateway(app_url, lease_s=0.3) as slow:
        before = await held(slow, caller, tokens=100)
        await asyncio.sleep(0.4)
        assert not await slow.extend_lease(), "what it held may be another's by now"
        after = await held(quotas, caller, tokens=100)
        assert (await refused(slow, caller)).violated == ("concurrency",)
        receipt = await slow.settle(before, entry_of(before), tokens=30)  # its work is told all the same
        assert receipt in {entry.id for entry in await audit.list_entries(caller.tenant)}
        assert (await refused(quotas, caller)).violated == ("concurrency",)
        assert (await left(quotas, caller))["tokens"] == 870
        assert await quotas.release(after)
        assert isinstance(await ask(slow, caller), Hold)


async def test_what_a_dead_gateway_reserved_counts_as_used_and_is_told(
    app_url: str, quotas: Quotas, audit: Audit, make_caller: MakeCaller
) -> None:
    caller = await make_caller(SLOW)
    async with gateway(app_url, lease_s=0.2) as dead:
        orphan = await held(dead, caller, images=2, tokens=300)
    await asyncio.sleep(0.3)
    assert (await left(quotas, caller))["tokens"] == 700, "reserved until it is closed"
    while not await audit.list_entries(caller.tenant):
        await quotas.reap()
    (told,) = await audit.list_entries(caller.tenant)
    assert decode(told.body).decision is Decision.ORPHANED
    assert decode(told.body).request_id == orphan.request_id
    assert not await quotas.release(orphan), "closed is closed"
    assert (await left(quotas, caller))["tokens"] == 700
    assert (await quotas.usage(caller)).today[caller.key_id] == Use(requests=1, images=2, tokens=300)


async def test_many_first_requests_of_a_gateway_agree_on_one_lease(
    app_url: str, superuser_url: str, make_caller: MakeCaller
) -> None:
    caller = await make_caller(SLOW)
    async with gateway(app_url, lease_s=30.0) as fresh:
        await asyncio.gather(*(held(fresh, caller) for _ in range(8)))
    connection = await asyncpg.connect(superuser_url)
    try:
        gateways = await connection.fetch(
            "select distinct gateway_id from pericarp.slot where tenant_id = $1", caller.tenant
        )
    finally:
        await connection.close()
    assert len(gateways) == 1


# -- usage ------------------------------------------------------------------------------------------------------


async def test_usage_is_told_by_day_and_key(quotas: Quotas, make_caller: MakeCaller) -> None:
    tenant = await make_caller(replace(SLOW, concurrent_requests=2))
    first, second = with_key(tenant, "first"), with_key(tenant, "second")
    for key, tokens in ((first, 100), (first, 50), (second, 7)):
        hold = await held(quotas, key, images=1, tokens=200)
        await quotas.settle(hold, entry_of(hold), images=1, tokens=tokens)
    running = [await held(quotas, second) for _ in range(2)]
    await refused(quotas, second)
    usage = await quotas.usage(tenant)
    expected = {
        "first": Use(requests=2, images=2, tokens=150),
        "second": Use(requests=1, images=1, tokens=7, refused=1),
    }
    assert usage.today == usage.month == expected
    by_day = await quotas.usage_by_day(tenant)
    assert {(row.day, row.key_id): row.use for row in by_day} == {
        (usage.day, key): use for key, use in expected.items()
    }
    assert [row.key_id for row in await quotas.usage_by_day(tenant, key_id="first")] == ["first"]
    assert await quotas.usage_by_day(tenant, until=usage.day - timedelta(days=1)) == ()
    for hold in running:
        await quotas.release(hold)
    assert (await quotas.usage(tenant)).today["second"].requests == 3


async def test_looking_charges_nothing(quotas: Quotas, make_caller: MakeCaller) -> None:
    caller = await make_caller(replace(SLOW, requests_per_month=10))
    before = await quotas.look(caller)
    for _ in range(5):
        assert await quotas.look(caller) == before
    assert [standing.name for standing in before] == [
        "requests",
        "images",
        "tokens",
        "requests_month",
        "concurrency",
    ]
    assert before[0] == Standing("requests", 1_000, 60, 1_000, 0, per_window=1)


async def test_old_usage_is_forgotten_when_its_tenants_policy_says_so(
    quotas: Quotas, directory: Directory, make_caller: MakeCaller, superuser_url: str
) -> None:
    short = await make_caller(replace(SLOW, retention_days=10))
    long = await make_caller(replace(SLOW, retention_days=1_000))
    for caller in (short, long):
        await run_as_superuser(
            superuser_url,
            f"insert into pericarp.usage (tenant_id, day, key_id, requests) select '{caller.tenant}',"
            " current_date - age, 'k', 1 from generate_series(0, 30) age",
        )
    while await quotas.forget_usage():
        pass
    since = (await quotas.usage(short)).day - timedelta(days=100)
    assert len(await quotas.usage_by_day(short, since=since)) == 11
    assert len(await quotas.usage_by_day(long, since=since)) == 31
