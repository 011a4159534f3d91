"""What gateways tell of their workers, so that any of them, and the command line, can tell of all.

A gateway's word counts for a minute: one that is gone is forgotten by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import func, select, text

from tenants.tables import worker as table

if TYPE_CHECKING:
    from tenants.access import TenantId
    from tenants.database import Database

COUNTS_S = 60
"""How long a report counts; also in the SQL."""


@dataclass(frozen=True, slots=True)
class Presence:
    """One worker as its own gateway sees it."""

    tenant: str
    pid: int
    running: int
    jobs: int
    age_s: float
    """Since it was given to its tenant."""


@dataclass(frozen=True, slots=True)
class ToldWorker:
    """One worker of any gateway, as that told of it."""

    tenant: UUID
    """Told, not proven: reading a report mints no TenantId."""
    gateway: UUID
    pid: int
    running: int
    jobs: int
    since: datetime
    reported_at: datetime


class Presences:
    """Reports, and what they say together."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def report(self, gateway: UUID, workers: Sequence[Presence]) -> None:
        """All workers that this gateway has given to tenants; those of before are forgotten. One statement."""
        await self._database.call(
            "select pericarp.report_workers($1, $2, $3, $4, $5, $6)",
            gateway,
            [UUID(each.tenant) for each in workers],
            [each.pid for each in workers],
            [each.running for each in workers],
            [each.jobs for each in workers],
            [round(each.age_s * 1000) for each in workers],
        )

    async def list(self, tenant: TenantId) -> tuple[ToldWorker, ...]:
        """The tenant's workers, of all gateways."""
        query = (
            select(table)
            .where(
                table.c.tenant_id == tenant,
                table.c.reported_at
                >= func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, COUNTS_S),
            )
            .order_by(table.c.gateway, table.c.pid)
        )
        async with self._database.transaction(tenant) as connection:
            return tuple(_read(row) for row in (await connection.execute(query)).all())

    async def list_all(self) -> tuple[ToldWorker, ...]:
        """Every tenant's workers, of all gateways, by tenant."""
        async with self._database.outside_tenants() as connection:
            rows = await connection.execute(text("select * from pericarp.list_workers()"))
            return tuple(_read(row) for row in rows.all())


def _read(row: Any) -> ToldWorker:
    return ToldWorker(
        UUID(int=row.tenant_id.int),
        UUID(int=row.gateway.int),
        row.pid,
        row.running,
        row.jobs,
        row.since,
        row.reported_at,
    )
