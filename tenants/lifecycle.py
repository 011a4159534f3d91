"""The end of a tenant, and the switch for an incident.

A deleted tenant is refused at once and may be restored until its grace is over; then a purge removes every row of
it but its entries of the log. The key of its fingerprints goes with it, so nothing ties an entry to an input any
more. A contained tenant or key is refused at once, everywhere, until it is released: its rows stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import func, or_, select, text, update

from tenants import tables
from tenants.access import Role, TenantId
from tenants.directory import Tenant, read_tenant
from tenants.errors import KeyNotFound, TenantNotFound
from tenants.keys import Key, read_key

if TYPE_CHECKING:
    from sqlalchemy.sql.dml import ReturningUpdate

    from tenants.database import Database

LONGEST_GRACE = timedelta(days=3650)
_TENANT = tables.tenant.c
_COLUMNS = (
    _TENANT.id,
    _TENANT.name,
    _TENANT.created_at,
    _TENANT.suspended_at,
    _TENANT.contained_at,
    _TENANT.deleted_at,
    _TENANT.purge_after,
)


class Lifecycle:
    """Finds, contains, deletes and purges tenants. Every change is durable when it returns; all are idempotent."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find(self, tenant: UUID) -> Tenant:
        """The tenant of that id, deleted ones too until they are purged. Raises `TenantNotFound`."""
        async with self._database.transaction(TenantId(tenant)) as connection:
            row = (await connection.execute(select(*_COLUMNS).where(_TENANT.id == tenant))).one_or_none()
        if row is None:
            raise TenantNotFound
        return read_tenant(row)

    async def in_log(self) -> tuple[TenantId, ...]:
        """Every tenant that the log tells of, purged ones too, and `INSTALLATION`."""
        rows = await self._database.call("select pericarp.log_tenants()")
        return tuple(TenantId(UUID(int=row[0].int)) for row in rows)

    async def contain(self, tenant: TenantId) -> Tenant:
        """Refuse every key of the tenant, and stop what runs. The first time stands. Raises `TenantNotFound`."""
        return await self._change(
            tenant, contained_at=func.coalesce(_TENANT.contained_at, func.clock_timestamp())
        )

    async def release(self, tenant: TenantId) -> Tenant:
        """Undo `contain`. Raises `TenantNotFound`."""
        return await self._change(tenant, contained_at=None)

    async def contain_key(self, tenant: TenantId, key_id: str) -> Key:
        """Refuse the key until it is released, and stop what it runs. The first time stands. Raises `KeyNotFound`."""
        column = tables.key.c.contained_at
        return await self._change_key(tenant, key_id, func.coalesce(column, func.clock_timestamp()))

    async def suspend_key(self, tenant: TenantId, key_id: str, *, lasts_s: float) -> Key | None:
        """Refuse a search key for `lasts_s` seconds from now, and stop what it runs.

        None, and nothing is changed, where somebody contained it, where it is revoked, and where it is an administrator's.
        Raises `KeyNotFound`.
        """
        columns = tables.key.c
        now = func.clock_timestamp()
        try:
            return await self._change_key(
                tenant,
                key_id,
                func.coalesce(columns.contained_at, now),
                now + func.make_interval(0, 0, 0, 0, 0, 0, lasts_s),
                columns.role == Role.SEARCH,
                columns.revoked_at.is_(None),
                or_(columns.contained_at.is_(None), columns.contained_until.is_not(None)),
            )
        except KeyNotFound:
            async with self._database.transaction(tenant) as connection:
                found = select(columns.id).where(columns.tenant_id == tenant, columns.id == key_id)
                if await connection.scalar(found) is None:
                    raise
            return None

    async def list_due_releases(self, *, most: int = 100) -> tuple[tuple[TenantId, str], ...]:
        """Keys whose suspension is over, by tenant and id, the one that waits longest first."""
        rows = await self._database.call("select * from pericarp.due_releases($1)", most)
        return tuple((TenantId(UUID(int=row["tenant_id"].int)), row["key_id"]) for row in rows)

    async def resume_key(self, tenant: TenantId, key_id: str) -> Key | None:
        """Undo `suspend_key` once its time is over; None where it is not, or where another has."""
        due = tables.key.c.contained_until <= func.clock_timestamp()
        try:
            return await self._change_key(tenant, key_id, None, None, due)
        except KeyNotFound:
            return None

    async def release_key(self, tenant: TenantId, key_id: str) -> Key:
        """Undo `contain_key`. Raises `KeyNotFound`."""
        return await self._change_key(tenant, key_id, None)

    async def delete(self, tenant: TenantId, grace: timedelta) -> Tenant:
        """Refuse every key of the tenant; after `grace` it may be purged.

        Again, the first deletion's time stands and the end moves to `grace` from now. Raises `TenantNotFound`.
        """
        if not timedelta(0) <= grace <= LONGEST_GRACE:
            raise ValueError(f"the grace is at most {LONGEST_GRACE.days} days")
        return await self._change(
            tenant,
            deleted_at=func.coalesce(_TENANT.deleted_at, func.clock_timestamp()),
            purge_after=func.clock_timestamp() + grace,
        )

    async def restore(self, tenant: TenantId) -> Tenant:
        """Undo `delete`, also after the grace as long as nothing was purged. Raises `TenantNotFound`."""
        return await self._change(tenant, deleted_at=None, purge_after=None)

    async def list_due(self, *, most: int = 100) -> tuple[Tenant, ...]:
        """Deleted tenants whose grace is over, the one that waits longest first."""
        async with self._database.outside_tenants() as connection:
            rows = await connection.execute(text("select * from pericarp.due_purges(:most)"), {"most": most})
            return tuple(read_tenant(row) for row in rows.all())

    async def purge(self, tenant: TenantId) -> dict[str, int]:
        """Remove every row of the tenant but its entries of the log: how many of which table.

        Empty where there was nothing to do: restored, purged by another, or its grace is not over.
        """
        async with self._database.transaction(tenant) as connection:
            rows = await connection.execute(
                text("select * from pericarp.purge_tenant(:tenant)"), {"tenant": tenant}
            )
            return {row.of_table: row.removed for row in rows.all()}

    async def halted(
        self, tenants: Sequence[str], key_ids: Sequence[str]
    ) -> tuple[frozenset[TenantId], frozenset[str]]:
        """Which of these tenants (contained, deleted or gone) and keys (contained) must not run. One statement."""
        rows = await self._database.call(
            "select * from pericarp.halted($1, $2)", [UUID(tenant) for tenant in tenants], list(key_ids)
        )
        return (
            frozenset(TenantId(UUID(int=row["tenant_id"].int)) for row in rows if not row["key_id"]),
            frozenset(row["key_id"] for row in rows if row["key_id"]),
        )

    async def _change(self, tenant: TenantId, **values: Any) -> Tenant:
        statement: ReturningUpdate[Any] = (
            update(tables.tenant).where(_TENANT.id == tenant).values(**values).returning(*_COLUMNS)
        )
        async with self._database.transaction(tenant) as connection:
            row = (await connection.execute(statement)).one_or_none()
        if row is None:
            raise TenantNotFound
        return read_tenant(row)

    async def _change_key(
        self, tenant: TenantId, key_id: str, contained_at: Any, until: Any = None, *conditions: Any
    ) -> Key:
        columns = tables.key.c
        statement = (
            update(tables.key)
            .where(columns.tenant_id == tenant, columns.id == key_id, *conditions)
            .values(contained_at=contained_at, contained_until=until)
            .returning(tables.key)
        )
        async with self._database.transaction(tenant) as connection:
            row = (await connection.execute(statement)).one_or_none()
        if row is None:
            raise KeyNotFound
        return read_key(row)
