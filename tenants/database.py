"""Postgres: how it is migrated and spoken to. The only commit, and the only seam to the driver.

Two pools, one database. `transaction(tenant)` is for everything but the hot path: it binds the tenant for row
security and commits at its end. `call` runs one SQL function on an autocommit connection as `pericarp_quota`,
a role that has no table privileges: one round trip per admission.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from tenants.errors import DatabaseUnavailable
from tenants.guard import refuse_outdated, refuse_unsafe
from tenants.tables import SCHEMA

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy
    from sqlalchemy import Connection as SyncConnection

    from tenants.access import TenantId

MIGRATIONS = Path(__file__).resolve().parent.parent / "migrations"
QUOTA_ROLE = "pericarp_quota"
MIGRATION_LOCK = 0x70726301  # advisory locks: "prc", 1; 2 is in provisioning.py
CONNECT_S = 3.0
ACQUIRE_S = 3.0
CALL_S = 3.0
"""Client-side cap of one hot-path statement; the server's own is below it."""
CALL_STATEMENT_MS = 2_000
TRANSACTION_STATEMENT_MS = 10_000
LOCK_MS = 3_000
IDLE_IN_TRANSACTION_MS = 15_000

# What says that the connection or the server is gone, not that the statement was wrong. All retryable.
_LOST = (
    OSError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.ConnectionDoesNotExistError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
_BUSY = (
    TimeoutError,
    asyncpg.QueryCanceledError,
    asyncpg.LockNotAvailableError,
    asyncpg.TooManyConnectionsError,
    asyncpg.InsufficientResourcesError,
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
)


async def migrate(owner_url: str) -> None:
    """Bring the schema to this version's head, in one transaction: all of it or nothing.

    Idempotent. Two at once run one after the other. `owner_url` names the role that owns the schema.
    """
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=lambda: connect(owner_url, {}, command_timeout=None),
        poolclass=NullPool,
    )
    try:
        with translated():
            async with engine.begin() as connection:
                await connection.execute(
                    text("select pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK}
                )
                if not await connection.scalar(
                    text("select to_regnamespace(:schema)::text"), {"schema": SCHEMA}
                ):
                    await connection.execute(text(f"create schema {SCHEMA}"))
                await connection.run_sync(_upgrade)
    finally:
        await engine.dispose()


@dataclass(slots=True)
class Joint:
    """The one transaction of a `together` block, and the tenant that it is bound to at the moment."""

    database: Database
    connection: AsyncConnection
    task: asyncio.Task[Any] | None
    tenant: str = ""


_JOINT: ContextVar[Joint | None] = ContextVar("joint", default=None)


class Database:
    """The runtime role's way in. Build it, `open` it, `close` it; one per process and event loop."""

    def __init__(self, app_url: str, *, pool_size: int = 5, call_pool_size: int = 10) -> None:
        self._url = app_url
        self._pool_size = pool_size
        self._call_pool_size = call_pool_size
        self._engine: AsyncEngine | None = None
        self._calls: asyncpg.Pool[asyncpg.Record] | None = None

    async def open(self) -> None:
        """Check role and schema, then open the pools.

        Raises `UnsafeRole`, `SchemaOutdated`, `DatabaseUnavailable`; nothing stays open then.
        """
        with translated():
            connection = await connect(self._url, {}, command_timeout=CALL_S)
            try:
                await refuse_unsafe(connection)
                await refuse_outdated(connection, schema_head())
            finally:
                await connection.close(timeout=CONNECT_S)
            self._calls = await asyncpg.create_pool(
                _plain(self._url),
                min_size=0,  # else a task of the pool keeps logging tracebacks through an outage
                max_size=self._call_pool_size,
                reset=_keep_as_is,
                timeout=CONNECT_S,
                command_timeout=CALL_S,
                server_settings={
                    "application_name": "pericarp",
                    "role": QUOTA_ROLE,
                    "synchronous_commit": "off",
                    "statement_timeout": str(CALL_STATEMENT_MS),
                },
            )
        self._engine = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=lambda: connect(
                self._url,
                {
                    "statement_timeout": str(TRANSACTION_STATEMENT_MS),
                    "lock_timeout": str(LOCK_MS),
                    "idle_in_transaction_session_timeout": str(IDLE_IN_TRANSACTION_MS),
                },
                command_timeout=TRANSACTION_STATEMENT_MS / 1000 + 1,
            ),
            pool_size=self._pool_size,
            max_overflow=0,
            pool_timeout=ACQUIRE_S,
        )
        event.listen(self._engine.sync_engine, "checkout", _drop_closed)

    async def close(self) -> None:
        """Give every connection back. Idempotent; calls that still run are cut off."""
        calls, self._calls = self._calls, None
        engine, self._engine = self._engine, None
        if calls is not None:
            try:
                await asyncio.wait_for(calls.close(), CONNECT_S)
            except TimeoutError:
                calls.terminate()
        if engine is not None:
            await engine.dispose()

    @asynccontextmanager
    async def transaction(self, tenant: TenantId) -> AsyncIterator[AsyncConnection]:
        """One transaction that sees the rows of `tenant` alone. Commits at the end, rolls back on any error.

        Durable once the block is left, or the `together` around it. Raises `DatabaseUnavailable`; whether a lost
        commit happened is not known then. Never hold it across a worker's computation.
        """
        async with self._begin(str(tenant)) as connection:
            yield connection

    @asynccontextmanager
    async def together(self) -> AsyncIterator[None]:
        """Make one transaction of every `transaction` and `outside_tenants` inside: all is durable, or nothing.

        Each of them is a savepoint bound to its own tenant, whose rows alone it sees. Only the task that opened
        the block takes part; `call` never does. Blocks nest: the outermost commits.
        """
        if self._joint() is not None:
            yield
            return
        async with self._begin("") as connection:
            before = _JOINT.set(Joint(self, connection, asyncio.current_task()))
            try:
                yield
            finally:
                _JOINT.reset(before)

    @asynccontextmanager
    async def outside_tenants(self) -> AsyncIterator[AsyncConnection]:
        """One transaction with no tenant bound: every table is empty, only look-up functions answer."""
        async with self._begin("") as connection:
            yield connection

    async def call(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        """One function call on the hot path, committed when it returns.

        Repeated once where the connection was lost, so every function called here must be idempotent. Only
        `append_entry`, `settle` and `close_orphan` are durable on return; a crash may forget under a second
        of the others. Raises `DatabaseUnavailable` within a few seconds, whatever the database does.
        """
        with translated():
            for last in (False, True):
                try:
                    async with self._call_pool.acquire(timeout=ACQUIRE_S) as connection:
                        return await connection.fetch(statement, *arguments)
                except TimeoutError:
                    raise
                except _LOST as exc:
                    if last or not _is_outage(exc):
                        raise
        raise AssertionError("unreachable")

    @asynccontextmanager
    async def calls(self) -> AsyncIterator[PoolConnectionProxy[asyncpg.Record]]:
        """One transaction of function calls as `call` makes them. Commits at the end, rolls back on any error.

        Raises `DatabaseUnavailable`; whether a lost commit happened is not known then.
        """
        with translated():
            async with self._call_pool.acquire(timeout=ACQUIRE_S) as connection, connection.transaction():
                yield connection

    async def answers(self) -> bool:
        """True where the database answers now. Never raises."""
        try:
            await self.call("select 1")
        except DatabaseUnavailable:
            return False
        return True

    @property
    def joined(self) -> bool:
        """Whether the task that asks is inside a `together` block: what it reads may never become durable."""
        return self._joint() is not None

    def _joint(self) -> Joint | None:
        joint = _JOINT.get()
        # A child task inherits the variable, but two tasks must never share a connection.
        ours = joint is not None and joint.database is self and joint.task is asyncio.current_task()
        return joint if ours else None

    @asynccontextmanager
    async def _begin(self, tenant: str) -> AsyncIterator[AsyncConnection]:
        joint = self._joint()
        if joint is not None:
            async with _bound(joint, tenant) as connection:
                yield connection
            return
        with translated():
            connection = await self._bind(tenant)
            try:
                yield connection
                await connection.commit()
            finally:
                # Rolls back what was not committed. Shielded: a cancelled request gives its connection back too.
                await asyncio.shield(connection.close())

    async def _bind(self, tenant: str) -> AsyncConnection:
        """A connection in a transaction that is bound to `tenant`; once again where a pooled one proves dead."""
        if self._engine is None:
            raise DatabaseUnavailable("the database is not open")
        for last in (False, True):
            connection = await self._engine.connect()
            try:
                await _set_tenant(connection, tenant)
            except BaseException as exc:
                await asyncio.shield(connection.close())
                if last or not (isinstance(exc, DBAPIError) and isinstance(driver_error(exc), _LOST)):
                    raise
            else:
                return connection
        raise AssertionError("unreachable")

    @property
    def _call_pool(self) -> asyncpg.Pool[asyncpg.Record]:
        if self._calls is None:
            raise DatabaseUnavailable("the database is not open")
        return self._calls


@contextmanager
def translated() -> Iterator[None]:
    """Turn the driver's errors about the connection, the server or its load into `DatabaseUnavailable`.

    Others pass: a violated constraint means something to whoever made the statement, the rest is a bug.
    """
    try:
        yield
    except PoolTimeoutError as exc:
        raise DatabaseUnavailable("no connection became free in time") from exc
    except DBAPIError as exc:
        cause = driver_error(exc)
        if exc.connection_invalidated or _is_outage(cause):
            raise DatabaseUnavailable(f"{type(cause).__name__} from the database") from exc
        raise
    except (*_LOST, *_BUSY) as exc:
        if not _is_outage(exc):
            raise
        raise DatabaseUnavailable(f"{type(exc).__name__} from the database") from exc


def driver_error(exc: DBAPIError) -> BaseException:
    """The asyncpg error under SQLAlchemy's wrapping."""
    adapted = exc.orig
    return (adapted.__cause__ if adapted is not None else None) or adapted or exc


def _is_outage(exc: BaseException) -> bool:
    """A ValueError among asyncpg's own is a URL that cannot be read: no outage, and waiting does not mend it."""
    return isinstance(exc, (*_LOST, *_BUSY)) and not isinstance(exc, ValueError)


@asynccontextmanager
async def _bound(joint: Joint, tenant: str) -> AsyncIterator[AsyncConnection]:
    """A savepoint bound to `tenant`; rolling back to it unbinds as well, leaving it needs a word."""
    before = joint.tenant
    with translated():
        try:
            async with joint.connection.begin_nested():
                await _set_tenant(joint.connection, tenant)
                joint.tenant = tenant
                yield joint.connection
                await _set_tenant(joint.connection, before)
        finally:
            joint.tenant = before


async def _set_tenant(connection: AsyncConnection, tenant: str) -> None:
    await connection.execute(text("select set_config('app.tenant_id', :tenant, true)"), {"tenant": tenant})


def schema_head() -> str:
    """The revision of the schema that this version needs."""
    return ScriptDirectory.from_config(_alembic_config()).get_current_head() or ""


def _upgrade(connection: SyncConnection) -> None:
    config = _alembic_config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _alembic_config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


async def connect(
    url: str, settings: dict[str, str], *, command_timeout: float | None
) -> asyncpg.Connection[asyncpg.Record]:
    """One connection outside of any pool. Raises the driver's errors: see `translated`."""
    return await asyncpg.connect(
        _plain(url),
        timeout=CONNECT_S,
        command_timeout=command_timeout,
        server_settings={"application_name": "pericarp", **settings},
    )


def _plain(url: str) -> str:
    """The URL as asyncpg reads it; SQLAlchemy's spelling of the scheme is taken as well."""
    scheme, mark, rest = url.partition("://")
    return f"{scheme.partition('+')[0]}{mark}{rest}"


async def _keep_as_is(_connection: object) -> None:
    """Autocommit calls leave nothing behind; asyncpg's RESET ALL would cost a round trip for each."""


def _drop_closed(connection: Any, _record: object, _proxy: object) -> None:
    """A pooled connection that died while idle is replaced at once, without asking the server each time."""
    if connection.driver_connection.is_closed():
        raise DisconnectionError
