"""What gateways tell of the alerts that fire, so that the command line can tell of all. The installation's own rows.

A gateway's word counts for two minutes: one that is gone is forgotten by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import delete, func, insert, or_, select

from tenants.access import INSTALLATION
from tenants.tables import alert_told as table

if TYPE_CHECKING:
    from tenants.database import Database

COUNTS_S = 120.0


@dataclass(frozen=True, slots=True)
class ToldAlert:
    """One alert of one gateway, as Alertmanager's API v2 has it."""

    gateway: UUID
    alert: Mapping[str, Any]
    told_at: datetime


class ToldAlerts:
    """Reports, and what they say together."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def tell(self, gateway: UUID, alerts: Sequence[Mapping[str, Any]]) -> None:
        """All that fire at this gateway; those of before, and what counts no longer, are forgotten."""
        old = func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, COUNTS_S)
        async with self._database.transaction(INSTALLATION) as connection:
            await connection.execute(
                delete(table).where(
                    table.c.tenant_id == INSTALLATION, or_(table.c.gateway == gateway, table.c.told_at < old)
                )
            )
            if alerts:
                await connection.execute(
                    insert(table),
                    [
                        {
                            "tenant_id": INSTALLATION,
                            "gateway": gateway,
                            "fingerprint": alert["fingerprint"],
                            "alert": dict(alert),
                        }
                        for alert in alerts
                    ],
                )

    async def list(self) -> tuple[ToldAlert, ...]:
        """Those of every gateway, by when they began."""
        query = select(table).where(
            table.c.tenant_id == INSTALLATION,
            table.c.told_at > func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, COUNTS_S),
        )
        async with self._database.transaction(INSTALLATION) as connection:
            rows = (await connection.execute(query)).all()
        told = [ToldAlert(UUID(int=row.gateway.int), row.alert, row.told_at) for row in rows]
        return tuple(sorted(told, key=lambda each: (each.alert["startsAt"], each.alert["fingerprint"])))
