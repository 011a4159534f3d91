"""Takes bodies of entries away, never their leaves: each under a warrant, an entry of the log that says so first.

A warrant is written and put into the tree before the first of its bodies goes, so that whoever verifies the log finds
what was pruned, by whose word, and whether that was too early. The database lets no body go otherwise
(`migrations/versions/0019_erasure.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import select, text

from tenants.access import TenantId
from tenants.policy import Policy
from tenants.tables import audit_leaf

if TYPE_CHECKING:
    from tenants.database import Database

BODIES = 10_000
"""Bodies of one warrant of the daily step at most."""
BATCH = 100
"""Bodies of one statement, which has 2 s."""
BATCH_BYTES = 2**18
"""Of its bodies, but for the last: one of a thousand documents has 100 KB, and as many rows that it is looked up by."""
TENANTS = 1_000
WARRANTS = 100


@dataclass(frozen=True, slots=True)
class Due:
    """Bodies of one tenant whose time is over."""

    tenant: TenantId
    retention_days: int
    before_us: int
    """What was recorded before it goes; microseconds since 1970."""
    bodies: int


class Pruning:
    """Says which bodies are due, and takes them away under warrants. Any number of gateways may try at once."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def list_due(self) -> tuple[Due, ...]:
        """What is older, by whole days of UTC, than its tenant's policy keeps it and has no warrant yet."""
        async with self._database.outside_tenants() as connection:
            rows = await connection.execute(
                text("select * from pericarp.due_pruning(:days, :bodies, :most)"),
                {"days": Policy().retention_days, "bodies": BODIES, "most": TENANTS},
            )
            return tuple(
                Due(TenantId(UUID(int=row.tenant_id.int)), row.retention_days, row.before_us, row.bodies)
                for row in rows.all()
            )

    async def claim(self, due: Due) -> bool:
        """Whether it is ours to write the entry, inside the `together` block that does; else another gateway has."""
        async with self._database.transaction(due.tenant) as connection:
            ours: bool = await connection.scalar(
                text("select pericarp.claim_pruning(:tenant, :before)"),
                {"tenant": due.tenant, "before": due.before_us},
            )
        return ours

    async def issue(self, tenant: TenantId, entry_id: UUID) -> None:
        """Make a warrant of an entry, inside the `together` block that wrote it.

        Its operation is `admin.log_prune`, with `before_us` and `retention_days`, or `admin.subject_erase`, with the
        `entries` whose bodies go. Raises the driver's error where the tenant's policy does not allow it.
        """
        async with self._database.transaction(tenant) as connection:
            await connection.execute(
                text("select pericarp.issue_warrant(:tenant, :entry, :days)"),
                {"tenant": tenant, "entry": entry_id, "days": Policy().retention_days},
            )

    async def list_open(self) -> tuple[tuple[TenantId, UUID], ...]:
        """Warrants that are in the tree and not done, as tenant and entry."""
        rows = await self._database.call("select * from pericarp.open_warrants($1)", WARRANTS)
        return tuple((TenantId(UUID(int=row["tenant_id"].int)), UUID(int=row["id"].int)) for row in rows)

    async def is_in_tree(self, tenant: TenantId, warrant: UUID) -> bool:
        """Whether bodies may go under it."""
        columns = audit_leaf.c
        async with self._database.transaction(tenant) as connection:
            found = await connection.scalar(
                select(columns.id).where(columns.tenant_id == tenant, columns.id == warrant)
            )
        return found is not None

    async def prune(self, tenant: TenantId, warrant: UUID) -> int:
        """Take away every body that a warrant in the tree names; how many, less those that another gateway takes."""
        pruned = 0
        while True:
            rows = await self._database.call(
                "select pericarp.prune_bodies($1, $2, $3, $4)", tenant, warrant, BATCH, BATCH_BYTES
            )
            count: int | None = rows[0][0]
            if not count:
                return pruned
            pruned += count
