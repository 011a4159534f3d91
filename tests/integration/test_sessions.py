"""Sessions: opened within a limit, used within a time, ended for good by whoever is first, and each end in the log."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from datetime import timedelta

import asyncpg
import pytest

from tenants.access import Caller, TenantId
from tenants.audit import Audit, Decision, Entry, decode
from tenants.database import Database
from tenants.errors import DatabaseUnavailable, QuotaExceeded, RequestTooCostly, SessionNotFound
from tenants.policy import Policy
from tenants.sessions import (
    DEFAULT_TTL_S,
    LONGEST_S,
    SESSION_PATTERN,
    Session,
    Sessions,
    make_session_id,
)
from tests.integration.conftest import MakeCaller, Proxy, run_as_superuser

NO_IDS = ["", "ses_", "x" * 100_000, "ses_" + "a" * 23, "ses_" + "ä" * 22, "ses_\0", "' or true --", "\ud800"]


def entry_of(caller: Caller, session_id: str, operation: str = "session_open") -> Entry:
    return Entry(
        request_id=str(uuid.uuid4()),
        tenant=caller.tenant,
        key_id=caller.key_id,
        role=caller.role,
        operation=operation,
        decision=Decision.ANSWERED,
        code="ok",
        status=201,
        session=session_id,
    )


async def open_one(sessions: Sessions, caller: Caller, ttl_s: int = DEFAULT_TTL_S) -> Session:
    session_id = make_session_id()
    session, _ = await sessions.open(caller, session_id, entry_of(caller, session_id), ttl_s=ttl_s)
    return session


async def close(sessions: Sessions, caller: Caller, session_id: str) -> uuid.UUID:
    return await sessions.close(caller.tenant, session_id, entry_of(caller, session_id, "session_close"))


async def told(audit: Audit, caller: Caller) -> list[tuple[str, str, str]]:
    """Operation, decision and session of the tenant's entries, oldest first."""
    entries = [decode(each.body) for each in await audit.list_entries(caller.tenant)]
    return [(entry.operation, entry.decision.value, entry.session) for entry in reversed(entries)]


PassTime = Callable[..., Awaitable[None]]


@pytest.fixture
def pass_time(superuser_url: str) -> PassTime:
    """`await pass_time(session, seconds)`: so much time goes by for it; `in_use`, it was used all the while."""

    async def shift(session: Session, seconds: float, *, in_use: bool = False) -> None:
        step = f"interval '{seconds} seconds'"
        idle = "" if in_use else f", expires_at = expires_at - {step}, last_used_at = last_used_at - {step}"
        await run_as_superuser(
            superuser_url,
            f"update pericarp.session set created_at = created_at - {step}, ends_at = ends_at - {step}{idle}"
            f" where id = '{session.id}'",
        )

    return shift


# -- life -------------------------------------------------------------------------------------------------------


async def test_an_opened_session_is_found_used_and_closed_each_with_its_entry(
    sessions: Sessions, audit: Audit, make_caller: MakeCaller
) -> None:
    caller = await make_caller()
    session_id = make_session_id()
    opened, receipt = await sessions.open(caller, session_id, entry_of(caller, session_id))
    assert SESSION_PATTERN.fullmatch(opened.id)
    assert opened.expires_at - opened.created_at == timedelta(seconds=DEFAULT_TTL_S)
    assert opened.ends_at - opened.created_at == timedelta(seconds=LONGEST_S)
    assert await sessions.find(caller.tenant, opened.id) == opened
    left_s = await sessions.use(caller.tenant, opened.id)
    assert DEFAULT_TTL_S - 5 < left_s <= DEFAULT_TTL_S
    used = await sessions.find(caller.tenant, opened.id)
    assert used.requests == 1
    assert used.last_used_at is not None and used.last_used_at >= opened.created_at
    assert used.expires_at - used.last_used_at == timedelta(seconds=DEFAULT_TTL_S)
    closing = await close(sessions, caller, opened.id)
    assert await told(audit, caller) == [
        ("session_open", "answered", opened.id),
        ("session_close", "answered", opened.id),
    ]
    assert {each.id for each in await audit.list_entries(caller.tenant)} == {receipt, closing}


async def test_ids_never_repeat() -> None:
    ids = {make_session_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(SESSION_PATTERN.fullmatch(each) for each in ids)


async def test_open_sessions_are_listed_newest_first(sessions: Sessions, make_caller: MakeCaller) -> None:
    caller, neighbour = await make_caller(), await make_caller()
    opened = [await open_one(sessions, caller) for _ in range(3)]
    await open_one(sessions, neighbour)
    assert await sessions.list_open(caller.tenant) == tuple(reversed(opened))
    await close(sessions, caller, opened[1].id)
    assert await sessions.list_open(caller.tenant) == (opened[2], opened[0])


async def test_what_is_not_open_is_not_found_whatever_the_reason(
    sessions: Sessions, audit: Audit, make_caller: MakeCaller, pass_time: PassTime
) -> None:
    caller, neighbour = await make_caller(), await make_caller()
    closed, expired = await open_one(sessions, caller), await open_one(sessions, caller, ttl_s=5)
    await close(sessions, caller, closed.id)
    await pass_time(expired, 6)
    foreign = await open_one(sessions, neighbour)
    entries = len(await audit.list_entries(caller.tenant))
    for session_id in (closed.id, expired.id, foreign.id, make_session_id(), *NO_IDS):
        with pytest.raises(SessionNotFound):
            await sessions.find(caller.tenant, session_id)
        with pytest.raises(SessionNotFound):
            await sessions.use(caller.tenant, session_id)
        with pytest.raises(SessionNotFound):
            await close(sessions, caller, session_id)
    assert len(await audit.list_entries(caller.tenant)) == entries
    assert (await sessions.find(neighbour.tenant, foreign.id)) == foreign


async def test_an_entry_of_another_session_is_refused(sessions: Sessions, make_caller: MakeCaller) -> None:
    caller, neighbour = await make_caller(), await make_caller()
    session_id = make_session_id()
    for entry in (entry_of(caller, make_session_id()), entry_of(neighbour, session_id)):
        with pytest.raises(ValueError, match="another session"):
            await sessions.open(caller, session_id, entry)
    for ttl_s in (0, LONGEST_S + 1):
        with pytest.raises(ValueError, match="ttl_s"):
            await sessions.open(caller, session_id, entry_of(caller, session_id), ttl_s=ttl_s)
    assert await sessions.list_open(caller.tenant) == ()


# -- time -------------------------------------------------------------------------------------------------------


async def test_a_use_moves_the_expiry_up_to_the_longest_age(
    sessions: Sessions, make_caller: MakeCaller, pass_time: PassTime
) -> None:
    caller = await make_caller()
    session = await open_one(sessions, caller, ttl_s=100)
    await pass_time(session, 90)
    assert 95 < await sessions.use(caller.tenant, session.id) <= 100
    await pass_time(session, 90)
    assert 95 < await sessions.use(caller.tenant, session.id) <= 100
    await pass_time(session, LONGEST_S - 90 - 90 - 60, in_use=True)
    assert 55 < await sessions.use(caller.tenant, session.id) <= 60, "its age is near its end"
    now = await sessions.find(caller.tenant, session.id)
    assert now.expires_at == now.ends_at
    await pass_time(session, 60)
    with pytest.raises(SessionNotFound):
        await sessions.use(caller.tenant, session.id)


async def test_the_longest_time_to_live_is_the_longest_age(
    sessions: Sessions, make_caller: MakeCaller
) -> None:
    session = await open_one(sessions, await make_caller(), ttl_s=LONGEST_S)
    assert session.expires_at == session.ends_at


async def test_an_expired_session_is_closed_once_by_however_many_gateways(
    sessions: Sessions, audit: Audit, app_url: str, make_caller: MakeCaller, pass_time: PassTime
) -> None:
    await sessions.expire()  # what other tests left
    caller = await make_caller()
    expired = [await open_one(sessions, caller, ttl_s=5) for _ in range(8)]
    alive = await open_one(sessions, caller)
    for session in expired:
        await pass_time(session, 6)
    other = Database(app_url)
    await other.open()
    try:
        closed = await asyncio.gather(*(each.expire() for each in (sessions, Sessions(other), sessions)))
    finally:
        await other.close()
    assert sum(closed) == 8
    assert await sessions.expire() == 0
    assert await sessions.list_open(caller.tenant) == (alive,)
    endings = [each for each in await told(audit, caller) if each[0] == "session_close"]
    assert sorted(endings) == sorted(("session_close", "expired", each.id) for each in expired)
    (ending, *_) = [decode(each.body) for each in await audit.list_entries(caller.tenant, limit=1)]
    assert (ending.key_id, ending.role, ending.code, ending.status) == (caller.key_id, "", "expired", 0)


async def test_expiry_goes_in_portions(
    sessions: Sessions, make_caller: MakeCaller, pass_time: PassTime
) -> None:
    await sessions.expire()
    caller = await make_caller()
    for _ in range(3):
        await pass_time(await open_one(sessions, caller, ttl_s=5), 6)
    assert [await sessions.expire(most=2) for _ in range(3)] == [2, 1, 0]


async def test_who_asks_what_is_gone_learns_what_is_closed_or_expired(
    sessions: Sessions, make_caller: MakeCaller, pass_time: PassTime
) -> None:
    caller, neighbour = await make_caller(), await make_caller()
    closed, expired, alive = [await open_one(sessions, caller, ttl_s=60) for _ in range(3)]
    foreign = await open_one(sessions, neighbour)
    await close(sessions, caller, closed.id)
    await pass_time(expired, 61)
    asked: list[tuple[TenantId, str]] = [
        *((caller.tenant, session.id) for session in (closed, alive, expired, foreign)),
        (neighbour.tenant, foreign.id),
    ]
    assert await sessions.gone(asked) == [asked[0], asked[2], asked[3]]
    assert await sessions.gone([]) == []


# -- the limit --------------------------------------------------------------------------------------------------


async def test_of_many_opened_at_once_exactly_the_limit_is_open(
    sessions: Sessions, audit: Audit, app_url: str, make_caller: MakeCaller
) -> None:
    caller = await make_caller(Policy(sessions=5))
    other = Database(app_url)
    await other.open()
    try:
        gateways = [sessions, Sessions(other)]
        outcomes = await asyncio.gather(
            *(open_one(gateways[n % 2], caller) for n in range(24)), return_exceptions=True
        )
    finally:
        await other.close()
    assert sum(isinstance(outcome, Session) for outcome in outcomes) == 5
    assert {outcome.violated for outcome in outcomes if isinstance(outcome, QuotaExceeded)} == {("sessions",)}
    assert len(await sessions.list_open(caller.tenant)) == 5
    assert len(await audit.list_entries(caller.tenant)) == 5


async def test_a_refusal_says_when_one_more_fits_and_what_ended_does_not_count(
    sessions: Sessions, make_caller: MakeCaller, pass_time: PassTime
) -> None:
    wide = await make_caller(Policy(sessions=3))
    opened = [await open_one(sessions, wide, ttl_s=ttl_s) for ttl_s in (50, 100, 150)]
    narrow = Caller(wide.tenant, wide.tenant_name, wide.key_id, wide.role, Policy(sessions=2))
    with pytest.raises(QuotaExceeded) as full:
        await open_one(sessions, wide)
    assert 45 < full.value.retry_after_s <= 50
    with pytest.raises(QuotaExceeded) as lowered:  # two have to end until one fits
        await open_one(sessions, narrow)
    assert 95 < lowered.value.retry_after_s <= 100
    await pass_time(opened[0], 51)
    with pytest.raises(QuotaExceeded) as expired:  # until the log tells of its end
        await open_one(sessions, wide)
    assert expired.value.retry_after_s == 1
    await sessions.expire()
    await open_one(sessions, wide)
    await close(sessions, wide, opened[1].id)
    await open_one(sessions, wide)
    with pytest.raises(QuotaExceeded):
        await open_one(sessions, wide)


async def test_a_tenant_without_sessions_is_told_that_waiting_does_not_help(
    sessions: Sessions, make_caller: MakeCaller
) -> None:
    with pytest.raises(RequestTooCostly):
        await open_one(sessions, await make_caller(Policy(sessions=0)))


# -- broken connections -----------------------------------------------------------------------------------------


async def test_the_same_opening_and_closing_again_act_once(
    sessions: Sessions, audit: Audit, make_caller: MakeCaller
) -> None:
    """What a connection that is lost after the commit makes of one call."""
    caller = await make_caller(Policy(sessions=1))
    session_id = make_session_id()
    opening, closing = entry_of(caller, session_id), entry_of(caller, session_id, "session_close")
    first = await sessions.open(caller, session_id, opening)
    assert await sessions.open(caller, session_id, opening) == first
    receipt = await sessions.close(caller.tenant, session_id, closing)
    assert await sessions.close(caller.tenant, session_id, closing) == receipt
    assert len(await told(audit, caller)) == 2
    with pytest.raises(SessionNotFound):  # another request comes too late
        await close(sessions, caller, session_id)


async def test_without_a_database_nothing_is_promised(proxy: Proxy, make_caller: MakeCaller) -> None:
    caller = await make_caller()
    database = Database(proxy.url)
    await database.open()
    try:
        sessions = Sessions(database)
        session = await open_one(sessions, caller)
        await proxy.cut()
        with pytest.raises(DatabaseUnavailable):
            await sessions.use(caller.tenant, session.id)
        with pytest.raises(DatabaseUnavailable):
            await sessions.gone([(caller.tenant, session.id)])
        await proxy.resume()
        assert await sessions.use(caller.tenant, session.id) > 0
    finally:
        await database.close()


# -- cost -------------------------------------------------------------------------------------------------------


async def test_a_use_reads_one_row_by_the_primary_key(
    sessions: Sessions, superuser_url: str, make_caller: MakeCaller
) -> None:
    """A foreign, a closed and an unknown id cost the same look-up: nothing of another tenant is read on the way."""
    caller = await make_caller()
    await open_one(sessions, caller)
    connection = await asyncpg.connect(superuser_url)
    try:
        async with connection.transaction():
            await connection.execute("set local role pericarp_owner")
            await connection.execute("set local enable_seqscan = off")
            await connection.execute("select set_config('app.tenant_id', $1, true)", str(caller.tenant))
            plan = await connection.fetch(
                "explain update pericarp.session set requests = requests + 1"
                f" where tenant_id = '{caller.tenant}' and id = 'ses_x' and expires_at > clock_timestamp()"
            )
    finally:
        await connection.close()
    lines = "\n".join(row[0] for row in plan)
    assert "Index Scan using session_pkey" in lines
    assert "Index Cond: ((tenant_id =" in lines and "(id = 'ses_x'::text)" in lines
