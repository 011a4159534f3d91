"""Quotas: `hold` before the work, then `settle` with the log's entry, or `release`.

`hold` is one SQL statement on an autocommit connection: every limit of the tenant and of the key passes, or none is
charged, by the database's clock, exact across any number of gateways. It reserves the worst case; `settle` says what
was really used. What a crash leaves behind ends by itself: a gateway's slots with its lease, holds by `reap`, which
writes that they were orphaned.
"""

from __future__ import annotations

import asyncio
import calendar
import time
import uuid
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from tenants import usage
from tenants.audit import SCHEMA_VERSION, Decision, Entry, encode
from tenants.errors import DatabaseUnavailable, QuotaExceeded, RequestTooCostly
from tenants.limits import Limits, Standing, limits_of
from tenants.policy import Policy
from tenants.usage import DayUse, Use

if TYPE_CHECKING:
    from asyncpg import Record

    from tenants.access import Caller, TenantId
    from tenants.database import Database

MOST_S = 120.0
"""How long a slot stays taken at most without settle or release: above any request's deadline."""
LEASE_S = 10.0
"""How long a gateway's slots outlive it. It has to say that it lives more often than that."""


@dataclass(frozen=True, slots=True)
class Hold:
    """What one admitted request has reserved."""

    tenant: TenantId
    request_id: str
    key_id: str
    images: int
    tokens: int
    slot: int
    token: int
    """Fencing: the slot's later holders have higher ones, so a late settle frees nobody else's slot."""
    expires_at: datetime
    standings: tuple[Standing, ...]
    shadowed: tuple[str, ...]
    """Limits in shadow that would have refused this request."""


@dataclass(frozen=True, slots=True)
class Usage:
    """A tenant's use at one moment."""

    day: date
    today: dict[str, Use]
    """By key."""
    month: dict[str, Use]
    """By key, since the first of the month."""
    standings: tuple[Standing, ...]


class Quotas:
    """Admission of requests under their tenant's policy and their key's limits, by one gateway."""

    def __init__(self, database: Database, *, lease_s: float = LEASE_S) -> None:
        self._database = database
        self._lease_ms = round(lease_s * 1000)
        self._gateway = uuid.uuid4()
        self._leasing = asyncio.Lock()

    @property
    def beat_s(self) -> float:
        """How often `extend_lease` should be called: two may fail."""
        return self._lease_ms / 3000

    async def extend_lease(self) -> bool:
        """Say that this gateway lives: its slots stay taken for another lease.

        False where the lease had run out: its slots may be others' by now, so it goes on as a new gateway. Raises
        `DatabaseUnavailable`.
        """
        async with self._leasing:
            return await self._extend()

    async def hold(
        self, caller: Caller, request_id: str, *, images: int, tokens: int = 0, most_s: float = MOST_S
    ) -> Hold:
        """Reserve a request, its images and tokens at most, and a concurrency slot, or nothing.

        Committed when it returns (a crash of the database may forget the last moments of use, never more).
        The same `request_id` again, while held, returns the same hold. A cancelled call may have held: the end of
        `most_s`, and `reap`, end that. Raises `RequestTooCostly` (never passes), `QuotaExceeded`,
        `DatabaseUnavailable`.
        """
        limits = limits_of(caller)
        for name, cost in (("images", images), ("tokens", tokens)):
            at_once = limits.at_once(name)
            if at_once is not None and cost > at_once and name not in caller.policy.shadow:
                raise RequestTooCostly(limit=name, cost=cost, at_once=at_once)
        row = await self._ask(caller, request_id, limits, images, tokens, most_s)
        standings = limits.standings(row["remaining"], row["more_ms"], _month_s())
        if row["violated"]:
            raise QuotaExceeded(
                violated=tuple(map(limits.name, row["violated"])),
                retry_after_s=max(1, _ceil_s(row["retry_after_ms"])),
                standings=standings,
            )
        return Hold(
            tenant=caller.tenant,
            request_id=request_id,
            key_id=caller.key_id,
            images=images,
            tokens=tokens,
            slot=row["held_slot"],
            token=row["held_token"],
            expires_at=row["held_until"],
            standings=standings,
            shadowed=tuple(map(limits.name, row["shadowed"])),
        )

    async def settle(
        self, hold: Hold, entry: Entry, *, images: int | None = None, tokens: int | None = None
    ) -> UUID:
        """Free the slot, say what of the reservation was used, and write the entry: all or nothing.

        Durable when it returns the entry's id (the receipt). Idempotent by request id: again, it changes
        nothing and returns the first receipt. Also after the hold expired: the entry is written, nobody
        else's slot is freed. `images` and `tokens` were used; unset, all that were reserved. A cancelled call may
        have settled: shield it.
        """
        if entry.tenant != hold.tenant or entry.request_id != hold.request_id:
            raise ValueError("the entry tells of another request than the hold")
        (row,) = await self._database.call(
            "select pericarp.settle($1, $2, $3, $4, $5, $6, $7, $8)",
            hold.tenant,
            hold.request_id,
            hold.slot,
            hold.token,
            hold.images if images is None else images,
            hold.tokens if tokens is None else tokens,
            SCHEMA_VERSION,
            encode(entry),
        )
        return UUID(int=row[0].int)

    async def release(self, hold: Hold) -> bool:
        """Free the slot and give back all images and tokens, without an entry: for work that never began.

        False where the hold was settled, released or reaped before. Idempotent. The request itself stays
        charged.
        """
        (row,) = await self._database.call(
            "select pericarp.release($1, $2, $3, $4)", hold.tenant, hold.request_id, hold.slot, hold.token
        )
        return bool(row[0])

    async def look(self, caller: Caller) -> tuple[Standing, ...]:
        """Where the caller's limits stand now. Charges nothing. Raises `DatabaseUnavailable`."""
        limits = limits_of(caller)
        row = await self._ask(caller, None, limits, 0, 0, 0.0)
        return limits.standings(row["remaining"], row["more_ms"], _month_s())

    async def usage(self, caller: Caller) -> Usage:
        """What the caller's tenant used today and this month, by key, and where the caller's limits stand."""
        standings = await self.look(caller)
        day = await usage.today(self._database, caller.tenant)
        today = await usage.read_sums(self._database, caller.tenant, since=day, until=day)
        month = await usage.read_sums(self._database, caller.tenant, since=day.replace(day=1), until=day)
        return Usage(day, today, month, standings)

    async def usage_by_day(
        self,
        caller: Caller,
        *,
        since: date | None = None,
        until: date | None = None,
        key_id: str | None = None,
    ) -> tuple[DayUse, ...]:
        """What the caller's tenant used by day and key, newest day first; unset, the last 31 days.

        At most `usage.MOST_ROWS` rows, the newest.
        """
        await self.look(caller)
        until = until or await usage.today(self._database, caller.tenant)
        since = since or until - timedelta(days=30)
        return await usage.read(self._database, caller.tenant, since=since, until=until, key_id=key_id)

    async def reap(self, *, most: int = 100) -> int:
        """Close up to `most` holds whose time, or whose gateway's lease, is over, each with an entry `orphaned`.

        Returns how many were closed. What they reserved counts as used. Any number of reapers may run at once: each
        orphan is closed by one. Durable hold by hold.
        """
        closed = 0
        for row in await self._database.call("select * from pericarp.expired_holds($1)", most):
            entry = Entry(
                request_id=str(row["request_id"]),
                tenant=row["tenant_id"],
                key_id=row["key_id"],
                role="",
                operation="reap",
                decision=Decision.ORPHANED,
                code="orphaned",
                status=0,
                at_us=time.time_ns() // 1000,
                image_count=row["images"],
            )
            (done,) = await self._database.call(
                "select pericarp.close_orphan($1, $2, $3, $4, $5, $6)",
                entry.tenant,
                entry.request_id,
                row["slot"],
                row["token"],
                SCHEMA_VERSION,
                encode(entry),
            )
            closed += bool(done[0])
        return closed

    async def forget_usage(self, *, most: int = 1_000) -> int:
        """Delete up to `most` days of keys that are older than their tenant keeps usage; how many there were."""
        (row,) = await self._database.call(
            "select pericarp.forget_usage($1, $2)", Policy().retention_days, most
        )
        return int(row[0])

    async def _ask(
        self,
        caller: Caller,
        request_id: str | None,
        limits: Limits,
        images: int,
        tokens: int,
        most_s: float,
    ) -> Record:
        for _ in range(3):
            gateway = self._gateway
            (row,) = await self._database.call(
                "select * from pericarp.hold($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
                caller.tenant,
                caller.key_id,
                request_id,
                gateway,
                round(most_s * 1000),
                images,
                tokens,
                limits.most,
                limits.bursts,
                limits.shadow,
            )
            if not row["lapsed"]:
                return row
            async with self._leasing:
                if gateway == self._gateway:  # else another request has done it already
                    await self._extend()
        raise DatabaseUnavailable("this gateway's lease runs out faster than it is extended")

    async def _extend(self) -> bool:
        lived = await self._call_extend()
        if not lived:
            self._gateway = uuid.uuid4()
            await self._call_extend()
        return lived

    async def _call_extend(self) -> bool:
        (row,) = await self._database.call(
            "select pericarp.extend_lease($1, $2)", self._gateway, self._lease_ms
        )
        return bool(row[0])


def _month_s() -> int:
    """Seconds of this calendar month; only told, never counted with."""
    now = time.gmtime()
    return calendar.monthrange(now.tm_year, now.tm_mon)[1] * 86_400


def _ceil_s(milliseconds: int) -> int:
    return -(-milliseconds // 1000)
