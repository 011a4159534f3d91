"""When and from where each key was last used: kept in memory, written in batches, never on the request path."""

from __future__ import annotations

import ipaddress
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tenants.access import TenantId
    from tenants.database import Database

MOST_KEPT = 10_000
BATCH = 500


class Uses:
    """Notes uses and writes them when told. One per gateway."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._latest: dict[str, tuple[TenantId, float, str]] = {}

    def note(self, tenant: TenantId, key_id: str, address: str) -> None:
        """Remember this use. Of one key only the last counts; of too many keys the oldest is forgotten."""
        self._latest.pop(key_id, None)
        if len(self._latest) >= MOST_KEPT:
            del self._latest[next(iter(self._latest))]
        self._latest[key_id] = (tenant, time.monotonic(), _plain(address))

    async def write(self) -> int:
        """Write what was noted since; how many keys. What could not be written is kept for the next time.

        Raises `DatabaseUnavailable`.
        """
        written = 0
        while self._latest:
            batch = dict(list(self._latest.items())[:BATCH])
            now = time.monotonic()
            await self._database.call(
                "select pericarp.note_key_uses($1, $2, $3, $4)",
                [tenant for tenant, _, _ in batch.values()],
                list(batch),
                [now - at_s for _, at_s, _ in batch.values()],
                [address for _, _, address in batch.values()],
            )
            for key_id, use in batch.items():
                if self._latest.get(key_id) == use:
                    del self._latest[key_id]
            written += len(batch)
        return written


def _plain(address: str) -> str:
    """The address as Postgres reads it; empty where it is none, as on a unix socket."""
    try:
        return str(ipaddress.ip_address(address.partition("%")[0]))
    except ValueError:
        return ""
