"""Answers that are kept for whoever sends the same POST twice, because the first answer was lost.

A caller names its request by an idempotency key. The answer is kept in the same transaction as what was done, so
whoever repeats the request gets that answer and nothing is done again. The answer is wrapped under the master key,
for it may hold a new key's text; it is forgotten after a day.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import delete, func, insert, select, text

from tenants import sealing
from tenants.errors import RepeatDiffers, RepeatUnderWay
from tenants.tables import repeat as table

if TYPE_CHECKING:
    from tenants.access import TenantId
    from tenants.database import Database

IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
"""Printable ASCII without spaces."""
KEPT_S = 86_400


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer as it was given."""

    answer: bytes
    receipt: UUID | None


class Repeats:
    """Keeps answers. Use both methods inside one `Database.together`, around what is to be done once."""

    def __init__(self, database: Database, *, master_key: bytes) -> None:
        self._database = database
        self._master_key = master_key

    async def find(self, tenant: TenantId, key_id: str, idempotency_key: str, digest: bytes) -> Kept | None:
        """The answer of that caller's request, where it was given before; else its name is taken until the end.

        Raises `RepeatDiffers` where it named another request (by its SHA-256), `RepeatUnderWay` where the first
        is not done yet.
        """
        columns = table.c
        async with self._database.transaction(tenant) as connection:
            taken = await connection.scalar(
                text("select pg_try_advisory_xact_lock(hashtextextended(:name, 0))"),
                {"name": f"{tenant}/{key_id}/{idempotency_key}"},
            )
            if not taken:
                raise RepeatUnderWay
            mine = (
                columns.tenant_id == tenant,
                columns.key_id == key_id,
                columns.idempotency_key == idempotency_key,
            )
            await connection.execute(delete(table).where(*mine, columns.expires_at <= func.clock_timestamp()))
            row = (
                await connection.execute(select(columns.digest, columns.answer, columns.receipt).where(*mine))
            ).one_or_none()
        if row is None:
            return None
        if bytes(row.digest) != digest:
            raise RepeatDiffers
        return Kept(sealing.unseal(self._master_key, tenant, bytes(row.answer)), row.receipt)

    async def keep(
        self,
        tenant: TenantId,
        key_id: str,
        idempotency_key: str,
        digest: bytes,
        kept: Kept,
        *,
        kept_s: float = KEPT_S,
    ) -> None:
        """Keep an answer for `kept_s` seconds."""
        async with self._database.transaction(tenant) as connection:
            await connection.execute(
                insert(table).values(
                    tenant_id=tenant,
                    key_id=key_id,
                    idempotency_key=idempotency_key,
                    digest=digest,
                    answer=sealing.seal(self._master_key, tenant, kept.answer),
                    receipt=kept.receipt,
                    expires_at=func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, kept_s),
                )
            )

    async def forget(self) -> int:
        """Remove the answers of every tenant that are kept no longer; how many."""
        (row,) = await self._database.call("select pericarp.forget_repeats()")
        return int(row[0])
