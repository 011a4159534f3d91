"""Usage by day and key, as it was counted when requests ended. Days are UTC, by the database's clock.

What ended is counted by the tenant's next decision, so whoever reads looks first (`Quotas.usage`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

from sqlalchemy import Date, Row, cast, func, select, text

from tenants.tables import usage as table

if TYPE_CHECKING:
    from tenants.access import TenantId
    from tenants.database import Database

MOST_ROWS = 10_000
"""Of one answer: more than a year of 25 keys."""


@dataclass(frozen=True, slots=True)
class Use:
    """What was used: of one key and day, or summed."""

    requests: int = 0
    """Requests that were let in and have ended, however they ended."""
    images: int = 0
    tokens: int = 0
    refused: int = 0
    """Requests that a limit refused; nothing else of them is counted."""
    shadowed: int = 0
    """Requests, among `requests`, that a limit in shadow would have refused."""

    def __add__(self, other: Use) -> Use:
        return Use(
            self.requests + other.requests,
            self.images + other.images,
            self.tokens + other.tokens,
            self.refused + other.refused,
            self.shadowed + other.shadowed,
        )


@dataclass(frozen=True, slots=True)
class DayUse:
    """What one key used on one day."""

    day: date
    key_id: str
    use: Use


async def today(database: Database, tenant: TenantId) -> date:
    """The day that counts now, by the database's clock."""
    async with database.transaction(tenant) as connection:
        found = await connection.scalar(select(cast(func.timezone("UTC", func.clock_timestamp()), Date)))
    assert isinstance(found, date)
    return found


async def read(
    database: Database,
    tenant: TenantId,
    *,
    since: date,
    until: date,
    key_id: str | None = None,
    most: int = MOST_ROWS,
) -> tuple[DayUse, ...]:
    """The tenant's use from `since` to `until`, both included, newest day first; of one key where it is named."""
    columns = table.c
    query = (
        select(table)
        .where(columns.tenant_id == tenant, columns.day >= since, columns.day <= until)
        .order_by(columns.day.desc(), columns.key_id)
        .limit(most)
    )
    if key_id is not None:
        query = query.where(columns.key_id == key_id)
    async with database.transaction(tenant) as connection:
        rows = (await connection.execute(query)).all()
    return tuple(DayUse(row.day, row.key_id, _use(row)) for row in rows)


async def read_sums(database: Database, tenant: TenantId, *, since: date, until: date) -> dict[str, Use]:
    """What each key of the tenant used from `since` to `until`, both included."""
    columns = table.c
    counts = (columns.requests, columns.images, columns.tokens, columns.refused, columns.shadowed)
    query = (
        select(columns.key_id, *(cast(func.sum(each), each.type).label(each.name) for each in counts))
        .where(columns.tenant_id == tenant, columns.day >= since, columns.day <= until)
        .group_by(columns.key_id)
        .order_by(text("key_id"))
    )
    async with database.transaction(tenant) as connection:
        rows = (await connection.execute(query)).all()
    return {row.key_id: _use(row) for row in rows}


def _use(row: Row[Any]) -> Use:
    return Use(row.requests, row.images, row.tokens, row.refused, row.shadowed)
