"""Ends what ties entries of the log to people, and leaves every proof whole.

A tenant: its audit key is replaced by a new one, so that no fingerprint of before can be recomputed or compared again.
A subject: its entries are found by the fingerprint, for `tenants.pruning` to take their bodies away.
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import text, update

from tenants import sealing
from tenants.database import connect, translated
from tenants.directory import AUDIT_KEY_BYTES
from tenants.errors import TenantNotFound
from tenants.tables import tenant as tenant_table

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from tenants.access import TenantId
    from tenants.database import Database

PAGE = 2_000
"""Entries that are looked at in one statement."""
_FIRST = (datetime(1, 1, 1, tzinfo=UTC), UUID(int=0))
_FIND = text(
    """
    select page.recorded_at, page.id,
           exists (select from unnest(cast(:prints as bytea[])) p (print) where position(p.print in page.body) > 0) as found
      from (select i.recorded_at, i.id, i.body from pericarp.audit_inbox i
             where i.tenant_id = :tenant and (i.recorded_at, i.id) > (:recorded_at, :id) and i.body is not null
             order by i.recorded_at, i.id limit :most) page
     order by page.recorded_at, page.id
    """
)


class Erasure:
    """Replaces audit keys, and finds what is a subject's."""

    def __init__(self, database: Database, *, master_key: bytes) -> None:
        self._database = database
        self._master_key = master_key

    async def replace_key(self, tenant: TenantId) -> None:
        """Destroy the tenant's audit key: a new one stands in its place. Raises `TenantNotFound`.

        Every gateway hears of it; one that cannot forgets it within `tenants.audit.FINGERPRINTS_S`.
        """
        wrapped = sealing.seal(self._master_key, tenant, secrets.token_bytes(AUDIT_KEY_BYTES))
        columns = tenant_table.c
        async with self._database.transaction(tenant) as connection:
            replaced = await connection.scalar(
                update(tenant_table)
                .where(columns.id == tenant)
                .values(audit_key=wrapped)
                .returning(columns.id)
            )
        if replaced is None:
            raise TenantNotFound

    async def find(self, tenant: TenantId, fingerprints: Sequence[str]) -> AsyncIterator[tuple[UUID, ...]]:
        """The ids of entries that hold any of `fingerprints`, oldest first, as they are found: at most `PAGE` at once."""
        recorded_at, last = _FIRST
        while True:
            async with self._database.transaction(tenant) as connection:
                rows = (
                    await connection.execute(
                        _FIND,
                        {
                            "prints": [each.encode() for each in fingerprints],
                            "tenant": tenant,
                            "recorded_at": recorded_at,
                            "id": last,
                            "most": PAGE,
                        },
                    )
                ).all()
            if not rows:
                return
            recorded_at, last = rows[-1].recorded_at, rows[-1].id
            if found := tuple(UUID(int=row.id.int) for row in rows if row.found):
                yield found

    async def forget_end_user(self, tenant: TenantId, fingerprints: Sequence[str]) -> int:
        """Delete what thresholds have learnt of the end user of any of these fingerprints; how many rows."""
        async with self._database.transaction(tenant) as connection:
            removed: int = await connection.scalar(
                text("select pericarp.forget_end_user(:tenant, cast(:prints as text[]))"),
                {"tenant": tenant, "prints": list(fingerprints)},
            )
        return removed


async def rewrite_keys(owner_url: str) -> None:
    """Write the table of tenants anew, so that no replaced key is left in its file. Waits for nobody longer than 5 s.

    As the database's owner. Raises `DatabaseUnavailable`.
    """
    with translated():
        connection = await connect(owner_url, {"lock_timeout": "5s"}, command_timeout=None)
        try:
            await connection.execute("vacuum (full) pericarp.tenant")
        finally:
            await connection.close(timeout=3)
