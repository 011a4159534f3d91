"""Quotas: `hold` before the work, then `settle` with the log's entry, or `release`.

`hold` is one SQL statement on an autocommit connection: every limit passes or none is charged, by the
database's clock, exact across any number of gateways. What a crash leaves behind ends by itself: slots by
their expiry, holds by `reap`, which writes that they were orphaned.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

from tenants.audit import SCHEMA_VERSION, Decision, Entry, encode
from tenants.errors import QuotaExceeded, RequestTooCostly

if TYPE_CHECKING:
    from asyncpg import Record

    from tenants.access import Caller, TenantId
    from tenants.database import Database
    from tenants.policy import Policy

LEASE_S = 120.0
"""How long a slot stays taken without settle or release: above any request's deadline."""
WINDOW_S = 60


@dataclass(frozen=True, slots=True)
class Standing:
    """One limit right after a decision."""

    name: str
    """requests, images or concurrency."""
    limit: int
    """What fits at once; for requests and images what comes back over `window_s` is the policy's rate."""
    window_s: int | None
    remaining: int
    more_in_s: int
    """Seconds, rounded up, until one more comes back; 0 where nothing is used, or no time is known."""


@dataclass(frozen=True, slots=True)
class Hold:
    """What one admitted request has reserved."""

    tenant: TenantId
    request_id: str
    key_id: str
    images: int
    slot: int
    token: int
    """Fencing: the slot's later holders have higher ones, so a late settle frees nobody else's slot."""
    expires_at: datetime
    standings: tuple[Standing, ...]


class Quotas:
    """Admission of requests under their tenant's policy."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def hold(self, caller: Caller, request_id: str, *, images: int, lease_s: float = LEASE_S) -> Hold:
        """Charge a request and its images to the caller's tenant and take a concurrency slot, or nothing.

        Committed when it returns (a crash of the database may forget the last moments of use, never more).
        The same `request_id` again, while held, returns the same hold. A cancelled call may have held: the
        slot's expiry and `reap` end that. Raises `RequestTooCostly` (never passes), `QuotaExceeded`,
        `DatabaseUnavailable`.
        """
        policy = caller.policy
        if images > policy.images_at_once:
            raise RequestTooCostly(limit="images", cost=images, at_once=policy.images_at_once)
        (row,) = await self._database.call(
            "select * from pericarp.hold($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
            caller.tenant,
            caller.key_id,
            request_id,
            images,
            round(lease_s * 1000),
            policy.requests_per_minute,
            policy.requests_at_once,
            policy.images_per_minute,
            policy.images_at_once,
            policy.concurrent_requests,
        )
        standings = _standings(row, policy)
        if row["violated"]:
            raise QuotaExceeded(
                violated=tuple(row["violated"]),
                retry_after_s=max(1, _ceil_s(row["retry_after_ms"])),
                standings=standings,
            )
        return Hold(
            tenant=caller.tenant,
            request_id=request_id,
            key_id=caller.key_id,
            images=images,
            slot=row["held_slot"],
            token=row["held_token"],
            expires_at=row["held_until"],
            standings=standings,
        )

    async def settle(self, hold: Hold, entry: Entry, *, images: int | None = None) -> UUID:
        """Free the slot, give back images that were held and not used, and write the entry: all or nothing.

        Durable when it returns the entry's id (the receipt). Idempotent by request id: again, it changes
        nothing and returns the first receipt. Also after the hold expired: the entry is written, nobody
        else's slot is freed. `images` were used; unset, all that were held. A cancelled call may have
        settled: shield it.
        """
        if entry.tenant != hold.tenant or entry.request_id != hold.request_id:
            raise ValueError("the entry tells of another request than the hold")
        (row,) = await self._database.call(
            "select pericarp.settle($1, $2, $3, $4, $5)",
            hold.tenant,
            hold.request_id,
            hold.images if images is None else images,
            SCHEMA_VERSION,
            encode(entry),
        )
        return UUID(int=row[0].int)

    async def release(self, hold: Hold) -> bool:
        """Free the slot and give back all images, without an entry: for work that never began.

        False where the hold was settled, released or reaped before. Idempotent. The request itself stays
        charged.
        """
        (row,) = await self._database.call("select pericarp.release($1, $2)", hold.tenant, hold.request_id)
        return bool(row[0])

    async def reap(self, *, most: int = 100) -> int:
        """Close up to `most` expired holds, each with an entry `orphaned`; the number that were closed.

        Any number of reapers may run at once: each orphan is closed by one. Durable hold by hold.
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
                "select pericarp.close_orphan($1, $2, $3, $4)",
                entry.tenant,
                entry.request_id,
                SCHEMA_VERSION,
                encode(entry),
            )
            closed += bool(done[0])
        return closed


def _standings(row: Record, policy: Policy) -> tuple[Standing, ...]:
    return (
        Standing(
            "requests",
            policy.requests_at_once,
            WINDOW_S,
            row["requests_left"],
            _ceil_s(row["requests_more_ms"]),
        ),
        Standing(
            "images", policy.images_at_once, WINDOW_S, row["images_left"], _ceil_s(row["images_more_ms"])
        ),
        Standing("concurrency", policy.concurrent_requests, None, row["slots_left"], 0),
    )


def _ceil_s(milliseconds: int) -> int:
    return -(-milliseconds // 1000)
