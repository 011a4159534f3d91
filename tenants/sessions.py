"""Sessions: `open`, then `use` with each request that names it, until it is closed or its time is over.

A session is a promise that work may be kept for the requests to come; what is kept lies in workers and is lost
with them, the session is not. A use moves its expiry by its time to live, up to a longest age. Whatever ends a
session deletes its row, for good: there is no way back from `SessionNotFound`. Opening, closing and expiring
leave an entry in the same transaction. The time is the database's own.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import func, select

from tenants.audit import SCHEMA_VERSION, Decision, Entry, encode
from tenants.errors import QuotaExceeded, RequestTooCostly, SessionNotFound
from tenants.key_text import random_base62
from tenants.limits import Standing
from tenants.tables import session as table

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement

    from tenants.access import Caller, TenantId
    from tenants.database import Database

SESSION_PREFIX = "ses_"
SESSION_PATTERN = re.compile(r"ses_[0-9A-Za-z]{22}")
"""131 random bits behind a prefix: nobody guesses one, and it opens nothing without its tenant's key."""
DEFAULT_TTL_S = 900
LONGEST_S = 86_400
"""The longest time to live, and the longest age of a session however often it is used."""

_COLUMNS = (
    table.c.id,
    table.c.created_at,
    table.c.ttl_s,
    table.c.expires_at,
    table.c.ends_at,
    table.c.last_used_at,
    table.c.requests,
)


@dataclass(frozen=True, slots=True)
class Session:
    """One open session of a tenant."""

    id: str
    created_at: datetime
    ttl_s: int
    expires_at: datetime
    """`ttl_s` after the last use, but never later than `ends_at`."""
    ends_at: datetime
    last_used_at: datetime | None
    requests: int
    """How many requests named it; a connection that breaks may count one twice."""


class Sessions:
    """The sessions of every tenant. Keeps nothing: what another gateway did is in force for the next call."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def open(
        self, caller: Caller, session_id: str, entry: Entry, *, ttl_s: int = DEFAULT_TTL_S
    ) -> tuple[Session, UUID]:
        """A new session of the caller's tenant, and the id of its entry, both durable.

        The same `session_id` again, because the first answer was lost, opens nothing new. Raises
        `QuotaExceeded` where `policy.sessions` are open, `RequestTooCostly` where none may be,
        `DatabaseUnavailable`.
        """
        if not 1 <= ttl_s <= LONGEST_S:
            raise ValueError(f"ttl_s is 1 to {LONGEST_S} seconds")
        most = caller.policy.sessions
        if most < 1:
            raise RequestTooCostly(limit="sessions", cost=1, at_once=most)
        _check_entry(entry, caller.tenant, session_id)
        (row,) = await self._database.call(
            "select * from pericarp.open_session($1, $2, $3, $4, $5, $6, $7, $8, $9)",
            caller.tenant,
            session_id,
            caller.key_id,
            ttl_s,
            LONGEST_S,
            most,
            entry.request_id,
            SCHEMA_VERSION,
            encode(entry),
        )
        if not row["opened"]:
            retry_after_s = max(1, -(-row["retry_after_ms"] // 1000))
            full = Standing("sessions", most, None, remaining=0, more_in_s=retry_after_s, per_window=most)
            raise QuotaExceeded(violated=("sessions",), retry_after_s=retry_after_s, standings=(full,))
        opened = Session(
            session_id, row["created_at"], ttl_s, row["expires_at"], row["ends_at"], None, requests=0
        )
        return opened, UUID(int=row["receipt"].int)

    async def use(self, tenant: TenantId, session_id: str) -> float:
        """Count a use and move the expiry; the seconds until then. One statement.

        Raises `SessionNotFound`, `DatabaseUnavailable`.
        """
        _check_id(session_id)
        (row,) = await self._database.call("select pericarp.use_session($1, $2)", tenant, session_id)
        if row[0] is None:
            raise SessionNotFound
        return float(row[0]) / 1000

    async def close(self, tenant: TenantId, session_id: str, entry: Entry) -> UUID:
        """End a session; the id of its entry. Durable. Raises `SessionNotFound`, `DatabaseUnavailable`."""
        _check_id(session_id)
        _check_entry(entry, tenant, session_id)
        (row,) = await self._database.call(
            "select pericarp.close_session($1, $2, $3, $4, $5)",
            tenant,
            session_id,
            entry.request_id,
            SCHEMA_VERSION,
            encode(entry),
        )
        if row[0] is None:
            raise SessionNotFound
        return UUID(int=row[0].int)

    async def find(self, tenant: TenantId, session_id: str) -> Session:
        """An open session. Raises `SessionNotFound`, `DatabaseUnavailable`."""
        _check_id(session_id)
        found = await self._select(tenant, table.c.id == session_id)
        if not found:
            raise SessionNotFound
        return found[0]

    async def list_open(self, tenant: TenantId) -> tuple[Session, ...]:
        """The tenant's open sessions, newest first."""
        return await self._select(tenant)

    async def expire(self, *, most: int = 100) -> int:
        """Delete up to `most` sessions whose time is over, each with its entry; how many there were.

        Any number of gateways may do it at once: each session is closed by one. Durable one by one.
        """
        closed = 0
        for row in await self._database.call("select * from pericarp.expired_sessions($1)", most):
            entry = Entry(
                request_id=str(uuid.uuid4()),
                tenant=row["tenant_id"],
                key_id=row["key_id"],
                role="",
                operation="session_close",
                decision=Decision.EXPIRED,
                code="expired",
                status=0,
                session=row["id"],
            )
            (done,) = await self._database.call(
                "select pericarp.close_expired_session($1, $2, $3, $4, $5)",
                entry.tenant,
                entry.session,
                entry.request_id,
                SCHEMA_VERSION,
                encode(entry),
            )
            closed += bool(done[0])
        return closed

    async def gone(self, asked: Sequence[tuple[TenantId, str]]) -> list[tuple[TenantId, str]]:
        """Those of the sessions `asked` about that are not open: closed or expired, whoever did it."""
        if not asked:
            return []
        tenants, ids = zip(*asked, strict=True)
        rows = await self._database.call(
            "select place from pericarp.gone_sessions($1, $2)", list(tenants), list(ids)
        )
        return [asked[row["place"] - 1] for row in rows]

    async def _select(self, tenant: TenantId, *conditions: ColumnElement[bool]) -> tuple[Session, ...]:
        query = (
            select(*_COLUMNS)
            .where(table.c.tenant_id == tenant, table.c.expires_at > func.clock_timestamp(), *conditions)
            .order_by(table.c.created_at.desc(), table.c.id)
        )
        async with self._database.transaction(tenant) as connection:
            rows = (await connection.execute(query)).all()
        return tuple(_session(row) for row in rows)


def make_session_id() -> str:
    """An id that no session has had."""
    return SESSION_PREFIX + random_base62(22)


def _check_id(session_id: str) -> None:
    """What cannot be an id is not looked for: whoever sent it knows that already."""
    if SESSION_PATTERN.fullmatch(session_id) is None:
        raise SessionNotFound


def _check_entry(entry: Entry, tenant: TenantId, session_id: str) -> None:
    if entry.tenant != tenant or entry.session != session_id:
        raise ValueError("the entry tells of another session")


def _session(row: Any) -> Session:
    return Session(
        row.id, row.created_at, row.ttl_s, row.expires_at, row.ends_at, row.last_used_at, row.requests
    )
