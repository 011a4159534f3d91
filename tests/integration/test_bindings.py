"""What workers keep ends with its session: whoever closed it, whatever was under way, and without a database too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from service.bindings import Bindings
from service.fleet.router import Fleet
from service.housekeeping import repeat
from tenants.access import Caller
from tenants.database import Database
from tenants.errors import DatabaseUnavailable, SessionNotFound
from tenants.sessions import Session, Sessions, make_session_id
from tests.integration.conftest import MakeCaller, Proxy
from tests.integration.test_sessions import close, open_one


class Workers:
    """Stands in for a fleet: keeps a session from its score on until its end, as a worker does."""

    def __init__(self) -> None:
        self.kept: set[tuple[str, str]] = set()
        self.ended: list[str] = []

    def score(self, caller: Caller, session: Session) -> None:
        self.kept.add((str(caller.tenant), session.id))

    async def end_session(self, tenant: str, session: str) -> None:
        self.ended.append(session)
        self.kept.discard((tenant, session))


class Gateway:
    """One gateway's bindings and workers over a database of its own."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.sessions = Sessions(database)
        self.workers = Workers()
        self.bindings = Bindings(sessions=self.sessions, fleet=cast(Fleet, self.workers))

    async def request(self, caller: Caller, session: Session) -> None:
        with await self.bindings.use(caller.tenant, session.id):
            self.workers.score(caller, session)


@pytest.fixture
async def gateways(app_url: str) -> AsyncIterator[tuple[Gateway, Gateway]]:
    databases = [Database(app_url), Database(app_url)]
    for database in databases:
        await database.open()
    first, second = map(Gateway, databases)
    yield first, second
    for database in databases:
        await database.close()


async def test_a_session_closed_here_is_ended_here_at_once(
    gateways: tuple[Gateway, Gateway], make_caller: MakeCaller
) -> None:
    here, _ = gateways
    caller = await make_caller()
    session, other = [await open_one(here.sessions, caller) for _ in range(2)]
    await here.request(caller, session)
    await here.request(caller, other)
    await close(here.sessions, caller, session.id)
    await here.bindings.end(caller.tenant, session.id)
    assert here.workers.kept == {(str(caller.tenant), other.id)}
    await here.bindings.sweep()
    assert here.workers.ended == [session.id], "and is forgotten"


async def test_a_session_closed_elsewhere_is_ended_at_every_gateway_that_used_it(
    gateways: tuple[Gateway, Gateway], make_caller: MakeCaller
) -> None:
    first, second = gateways
    caller = await make_caller()
    session = await open_one(first.sessions, caller)
    await first.request(caller, session)
    await second.request(caller, session)
    await close(first.sessions, caller, session.id)
    await first.bindings.end(caller.tenant, session.id)
    assert second.workers.kept
    await second.bindings.sweep()
    assert not first.workers.kept and not second.workers.kept
    with pytest.raises(SessionNotFound):
        await second.request(caller, session)


async def test_an_expired_session_is_ended_and_closed(
    gateways: tuple[Gateway, Gateway], make_caller: MakeCaller
) -> None:
    here, elsewhere = gateways
    caller = await make_caller()
    session = await open_one(here.sessions, caller, ttl_s=1)
    await here.request(caller, session)
    await here.bindings.sweep()
    assert here.workers.kept, "not before its time"
    await asyncio.sleep(1.1)
    await elsewhere.bindings.sweep()  # whoever closes it
    await here.bindings.sweep()
    assert here.workers.ended == [session.id]
    assert elsewhere.workers.ended == [], "who never used it has nothing to end"
    assert await here.sessions.list_open(caller.tenant) == ()


async def test_a_request_on_its_way_when_its_session_is_closed_leaves_nothing_behind(
    gateways: tuple[Gateway, Gateway], make_caller: MakeCaller
) -> None:
    here, _ = gateways
    caller = await make_caller()
    session = await open_one(here.sessions, caller)
    with await here.bindings.use(caller.tenant, session.id):
        await close(here.sessions, caller, session.id)
        await here.bindings.end(caller.tenant, session.id)
        here.workers.score(caller, session)  # it reached its worker only now
    assert here.workers.kept
    await here.bindings.sweep()
    assert not here.workers.kept
    assert here.workers.ended == [session.id] * 2
    await here.bindings.sweep()
    assert here.workers.ended == [session.id] * 2


async def test_what_is_not_open_binds_nothing(
    gateways: tuple[Gateway, Gateway], make_caller: MakeCaller
) -> None:
    here, _ = gateways
    caller, neighbour = await make_caller(), await make_caller()
    foreign = await open_one(here.sessions, neighbour)
    for session_id in (make_session_id(), foreign.id, "no id"):
        with pytest.raises(SessionNotFound):
            await here.bindings.use(caller.tenant, session_id)
        await here.bindings.end(caller.tenant, session_id)
    await here.bindings.sweep()
    assert here.workers.ended == []


async def test_without_a_database_what_ought_to_have_expired_is_ended_all_the_same(
    proxy: Proxy, make_caller: MakeCaller
) -> None:
    caller = await make_caller()
    here = Gateway(Database(proxy.url))
    await here.database.open()
    try:
        short, long = [await open_one(here.sessions, caller, ttl_s=ttl_s) for ttl_s in (1, 600)]
        await here.request(caller, short)
        await here.request(caller, long)
        await proxy.cut()
        await asyncio.sleep(1.1)
        with pytest.raises(DatabaseUnavailable):
            await here.bindings.sweep()
        assert here.workers.kept == {(str(caller.tenant), long.id)}
        await proxy.resume()
        await here.bindings.sweep()
        assert here.workers.ended == [short.id]
    finally:
        await here.database.close()


async def test_a_use_costs_one_statement_and_a_sweep_two(app_url: str, make_caller: MakeCaller) -> None:
    class Counting(Database):
        statements: list[str]

        async def call(self, statement: str, *arguments: object) -> list[Any]:
            self.statements.append(statement)
            return await super().call(statement, *arguments)

    caller = await make_caller()
    database = Counting(app_url)
    database.statements = []
    await database.open()
    try:
        here = Gateway(database)
        session = await open_one(here.sessions, caller)
        for work, statements in (
            (here.bindings.sweep, 1),  # nothing is bound: only what has expired is asked for
            (lambda: here.request(caller, session), 1),
            (here.bindings.sweep, 2),
        ):
            database.statements.clear()
            await work()
            assert len(database.statements) == statements, database.statements
    finally:
        await database.close()


@pytest.mark.parametrize("trouble", [DatabaseUnavailable, ZeroDivisionError])
async def test_no_trouble_in_one_sweep_is_the_end_of_sweeping(trouble: type[Exception]) -> None:
    swept = asyncio.Semaphore(0)

    async def sweep() -> None:
        swept.release()
        raise trouble

    sweeping = asyncio.create_task(repeat(0, sweep))
    async with asyncio.timeout(10):
        for _ in range(3):
            await swept.acquire()
    sweeping.cancel()
    await asyncio.gather(sweeping, return_exceptions=True)
    assert sweeping.cancelled()
