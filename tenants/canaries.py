"""Canaries: fixed items that must be stopped, by what they scored. A threshold gets looser only where they still are.

The items themselves stay with whoever has them: they are measured again whenever detectors change (`POST /v1/moderations`
tells scores), and a score counts for the version that measured it alone. Those of the installation are every tenant's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import delete, insert, select

from tenants.access import INSTALLATION
from tenants.errors import Fault, Invalid
from tenants.risk import Category, Mode
from tenants.tables import canary as table

if TYPE_CHECKING:
    from tenants.access import TenantId
    from tenants.database import Database

MOST_CANARIES = 1_000
"""Of one tenant."""
NAME_LENGTH = 100


@dataclass(frozen=True, slots=True)
class Canary:
    """One item."""

    category: Category
    mode: Mode
    name: str
    score: float
    detectors: str
    """The version that measured it."""


class Canaries:
    """Sets and reads them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def set(self, tenant: TenantId, canaries: Sequence[Canary]) -> None:
        """Replace all of the tenant's, or of the installation. Raises `Invalid` with every fault."""
        if faults := tuple(_faults(canaries)):
            raise Invalid(faults)
        async with self._database.transaction(tenant) as connection:
            await connection.execute(delete(table).where(table.c.tenant_id == tenant))
            if canaries:
                await connection.execute(
                    insert(table),
                    [
                        {
                            "tenant_id": tenant,
                            "category": str(each.category),
                            "mode": str(each.mode),
                            "name": each.name,
                            "score": each.score,
                            "detectors": each.detectors,
                        }
                        for each in canaries
                    ],
                )

    async def list(self, tenant: TenantId) -> tuple[Canary, ...]:
        """The tenant's own, or the installation's, by category, mode and name."""
        query = (
            select(table)
            .where(table.c.tenant_id == tenant)
            .order_by(table.c.category, table.c.mode, table.c.name)
        )
        async with self._database.transaction(tenant) as connection:
            rows = (await connection.execute(query)).all()
        return tuple(
            Canary(Category(row.category), Mode(row.mode), row.name, row.score, row.detectors) for row in rows
        )

    async def scores(
        self, tenant: TenantId, category: Category, mode: Mode, detectors: str
    ) -> tuple[float, ...]:
        """What those of the tenant and of everybody scored with these detectors."""
        query = select(table.c.score).where(
            table.c.category == category, table.c.mode == mode, table.c.detectors == detectors
        )
        scores: list[float] = []
        for whose in (INSTALLATION, tenant):
            async with self._database.transaction(whose) as connection:
                scores += (await connection.execute(query.where(table.c.tenant_id == whose))).scalars()
        return tuple(scores)


def _faults(canaries: Sequence[Canary]) -> Iterator[Fault]:
    if len(canaries) > MOST_CANARIES:
        yield Fault("canaries", f"must be at most {MOST_CANARIES}")
    for place, each in enumerate(canaries):
        if not (0 < len(each.name) <= NAME_LENGTH and each.name.isprintable()):
            yield Fault(f"canaries[{place}].name", f"must be 1 to {NAME_LENGTH} printable characters")
        if not 0 <= each.score <= 1:
            yield Fault(f"canaries[{place}].score", "must be a number from 0 to 1")
    named = Counter((each.category, each.mode, each.name) for each in canaries)
    for (category, mode, name), times in named.items():
        if times > 1:
            yield Fault("canaries", f"{name!r} is there {times} times in {category}, {mode}")
