"""Silences of alerts, kept until they end and beyond: who silenced what, when, and why. The installation's own rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import func, insert, select, update

from tenants.access import INSTALLATION
from tenants.errors import Fault, Invalid, SilenceNotFound
from tenants.tables import alert_silence as table

if TYPE_CHECKING:
    from tenants.database import Database

MOST_MATCHERS = 20
MOST_SILENCES = 500
"""Open ones."""
TEXT_LENGTH = 256
LONGEST_S = 365 * 86_400.0


@dataclass(frozen=True, slots=True)
class KeptSilence:
    """One silence. Its matchers are texts here; `service.watch.alerts` reads them."""

    id: UUID
    matchers: tuple[str, ...]
    created_at: datetime
    ends_at: datetime
    created_by: str
    comment: str


class Silences:
    """Adds, lists and ends them. Every change is durable when it returns."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(
        self, matchers: Sequence[str], *, lasts_s: float, by: str, comment: str = ""
    ) -> KeptSilence:
        """From now on, for `lasts_s` seconds. Raises `Invalid` with every fault."""
        faults = []
        if not 0 < len(matchers) <= MOST_MATCHERS:
            faults.append(Fault("matchers", f"must be 1 to {MOST_MATCHERS}"))
        if not 0 < lasts_s <= LONGEST_S:
            faults.append(Fault("lasts_s", f"must be more than 0 and at most {LONGEST_S:g}"))
        for name, value in (("by", by), ("comment", comment), *(("matchers", each) for each in matchers)):
            if len(value) > TEXT_LENGTH or not value.isprintable():
                faults.append(Fault(name, f"must be at most {TEXT_LENGTH} printable characters"))
        if not faults and len(await self.list_open()) >= MOST_SILENCES:
            faults.append(Fault("", f"would be one more than {MOST_SILENCES} silences; end some"))
        if faults:
            raise Invalid(tuple(faults))
        statement = (
            insert(table)
            .values(
                tenant_id=INSTALLATION,
                matchers=list(matchers),
                ends_at=func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, lasts_s),
                created_by=by,
                comment=comment,
            )
            .returning(table)
        )
        async with self._database.transaction(INSTALLATION) as connection:
            return _read((await connection.execute(statement)).one())

    async def list_open(self) -> tuple[KeptSilence, ...]:
        """Those that are in force, by their end."""
        return await self._list(table.c.ends_at > func.clock_timestamp())

    async def list_all(self) -> tuple[KeptSilence, ...]:
        """Those that are over too."""
        return await self._list()

    async def end(self, silence: UUID) -> KeptSilence:
        """End one now. Raises `SilenceNotFound`, also where it is over."""
        statement = (
            update(table)
            .where(
                table.c.tenant_id == INSTALLATION,
                table.c.id == silence,
                table.c.ends_at > func.clock_timestamp(),
            )
            .values(ends_at=func.clock_timestamp())
            .returning(table)
        )
        async with self._database.transaction(INSTALLATION) as connection:
            row = (await connection.execute(statement)).one_or_none()
        if row is None:
            raise SilenceNotFound
        return _read(row)

    async def _list(self, *conditions: Any) -> tuple[KeptSilence, ...]:
        query = (
            select(table)
            .where(table.c.tenant_id == INSTALLATION, *conditions)
            .order_by(table.c.ends_at, table.c.id)
        )
        async with self._database.transaction(INSTALLATION) as connection:
            return tuple(map(_read, (await connection.execute(query)).all()))


def _read(row: Any) -> KeptSilence:
    return KeptSilence(
        UUID(int=row.id.int), tuple(row.matchers), row.created_at, row.ends_at, row.created_by, row.comment
    )
