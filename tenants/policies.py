"""Every version of every tenant's Policy and Ceiling: who set it, when, and what may be set now.

The highest version is in force, from the next request on. Nobody sets a policy above the ceiling: the tenant's own
where it speaks, else the installation's. A tenant's administrator is further bounded by what the platform has granted,
the last policy that it set: whatever they lowered they may raise again, up to there.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import orjson
from sqlalchemy import Select, Table, Text, cast, insert, select, text

from tenants import tables
from tenants.access import INSTALLATION, Role, TenantId
from tenants.ceiling import Ceiling
from tenants.errors import Forbidden, InvalidPolicy, PolicyChanged, TenantNotFound
from tenants.policy import Policy

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from tenants.database import Database
    from tenants.directory import Directory

OPERATOR = "operator"
"""The role of who runs a command on this host."""
BY_CEILING = "ceiling"
"""The role of a version that a new ceiling made of the one before."""
CEILING_LOCK = 0x70726303
"""Advisory: "prc", 3. Shared by who sets a policy, alone for who sets a ceiling."""
PAGE = 100


@dataclass(frozen=True, slots=True)
class Setter:
    """Who sets: a key's role and id, or the operator, who has none."""

    role: str = OPERATOR
    name: str = ""


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """One version of a tenant's policy."""

    version: int
    policy: Policy
    set_at: datetime
    set_by: Setter


@dataclass(frozen=True, slots=True)
class CeilingVersion:
    """One version of a ceiling; version 0, which bounds nothing, is before any was set."""

    version: int
    ceiling: Ceiling
    set_at: datetime | None
    set_by: Setter


class Policies:
    """Reads and sets policies and ceilings. Every change is durable when it returns."""

    def __init__(self, database: Database, directory: Directory) -> None:
        self._database = database
        self._directory = directory

    async def current(self, tenant: TenantId) -> PolicyVersion:
        """The version in force. Raises `TenantNotFound`."""
        async with self._database.transaction(tenant) as connection:
            return await _current(connection, tenant)

    async def history(
        self, tenant: TenantId, *, most: int = PAGE, before: int | None = None
    ) -> tuple[PolicyVersion, ...]:
        """Versions, the newest first, `before` the one of that number. Raises `TenantNotFound`."""
        columns = tables.policy.c
        query = _versions(tables.policy, tenant).limit(most)
        if before is not None:
            query = query.where(columns.version < before)
        async with self._database.transaction(tenant) as connection:
            rows = (await connection.execute(query)).all()
            if not rows:
                await _current(connection, tenant)  # none at all: there is no such tenant
        return tuple(map(_policy_version, rows))

    async def set(
        self, tenant: TenantId, policy: Policy, *, by: Setter | None = None, expected: int | None = None
    ) -> PolicyVersion:
        """Put `policy` in force from the next request on.

        `expected` is the version that the caller has seen. Raises `PolicyChanged` where another is in force now,
        `InvalidPolicy` with every field that is above what `by` may set, `TenantNotFound`.
        """
        by = by or Setter()
        async with self._database.together():
            await self._hold_ceilings()
            bounds = await self._bounds(tenant, by.role)
            async with self._database.transaction(tenant) as connection:
                await _lock(connection, tenant)
                now = await _current(connection, tenant)
                if expected is not None and expected != now.version:
                    raise PolicyChanged(now.version)
                if faults := bounds.faults(policy):
                    raise InvalidPolicy(faults)
                return await _add_policy(connection, tenant, now.version + 1, policy, by)

    async def set_first(self, tenant: TenantId, policy: Policy | None, *, by: Setter | None = None) -> None:
        """The policy of a tenant that is being made, in the transaction that makes it: the default, as far as the
        installation's ceiling allows it, unless `policy` is given. Raises `InvalidPolicy`."""
        await self._hold_ceilings()
        everyone = (await self.ceiling()).ceiling
        if policy is not None and (faults := everyone.faults(policy)):
            raise InvalidPolicy(faults)
        async with self._database.transaction(tenant) as connection:
            await _add_policy(connection, tenant, 1, policy or everyone.lower(Policy()), by or Setter())

    async def ceiling(self, tenant: TenantId = INSTALLATION) -> CeilingVersion:
        """The tenant's own ceiling, or the installation's."""
        async with self._database.transaction(tenant) as connection:
            return await _ceiling(connection, tenant)

    async def bounds(self, tenant: TenantId, role: str) -> Ceiling:
        """All that bounds what `role` may set for the tenant. Raises `TenantNotFound`."""
        async with self._database.together():
            return await self._bounds(tenant, role)

    async def set_ceiling(
        self,
        ceiling: Ceiling,
        *,
        tenant: TenantId = INSTALLATION,
        by: Setter | None = None,
        expected: int | None = None,
    ) -> tuple[CeilingVersion, tuple[TenantId, ...]]:
        """Set the tenant's ceiling, or the installation's, and lower every policy that is above it now.

        All in one transaction. Also tells the tenants whose policies were lowered. Raises `Forbidden` for a tenant's
        administrator, `PolicyChanged`, `TenantNotFound`, and `InvalidPolicy` where a policy allows none of the
        ceiling's models.
        """
        by = by or Setter()
        if by.role == Role.TENANT_ADMIN:
            raise Forbidden
        everyone = tenant == INSTALLATION
        async with self._database.together():
            async with self._database.transaction(tenant) as connection:
                await connection.execute(text("select pg_advisory_xact_lock(:lock)"), {"lock": CEILING_LOCK})
                if not everyone:
                    await _lock(connection, tenant)
                now = await _ceiling(connection, tenant)
                if expected is not None and expected != now.version:
                    raise PolicyChanged(now.version)
                columns = tables.ceiling.c
                values = {"body": orjson.loads(ceiling.to_json()), "set_by": by.name, "set_role": by.role}
                created_at = await connection.scalar(
                    insert(tables.ceiling)
                    .values(tenant_id=tenant, version=now.version + 1, **values)
                    .returning(columns.created_at)
                )
            tenants = [each.id for each in await self._directory.list_tenants()] if everyone else [tenant]
            lowered = [each for each in tenants if await self._lower(each)]
        return CeilingVersion(now.version + 1, ceiling, created_at, by), tuple(lowered)

    async def _lower(self, tenant: TenantId) -> bool:
        """Lower the tenant's policy to its ceiling. False where it is below."""
        top = await self._bounds(tenant, BY_CEILING)
        async with self._database.transaction(tenant) as connection:
            await _lock(connection, tenant)
            now = await _current(connection, tenant)
            lowered = top.lower(now.policy)
            if lowered != now.policy:
                await _add_policy(connection, tenant, now.version + 1, lowered, Setter(BY_CEILING))
        return lowered != now.policy

    async def _bounds(self, tenant: TenantId, role: str) -> Ceiling:
        """The tenant's ceiling over the installation's; for its own administrator, over what was granted as well."""
        everyone = (await self.ceiling()).ceiling
        async with self._database.transaction(tenant) as connection:
            top = (await _ceiling(connection, tenant)).ceiling.over(everyone)
            if role != Role.TENANT_ADMIN:
                return top
            return top.over(Ceiling.granted(top.lower(await _granted(connection, tenant))))

    async def _hold_ceilings(self) -> None:
        """Let no ceiling change before the transaction that we are in ends."""
        async with self._database.outside_tenants() as connection:
            await connection.execute(
                text("select pg_advisory_xact_lock_shared(:lock)"), {"lock": CEILING_LOCK}
            )


def _versions(table: Table, tenant: TenantId) -> Select[Any]:
    """Versions of a tenant, the newest first, the body as text: `jsonb` would come back parsed by another reader."""
    columns = table.c
    return (
        select(
            columns.version,
            columns.created_at,
            columns.set_by,
            columns.set_role,
            cast(columns.body, Text).label("body"),
        )
        .where(columns.tenant_id == tenant)
        .order_by(columns.version.desc())
    )


async def _current(connection: AsyncConnection, tenant: TenantId) -> PolicyVersion:
    row = (await connection.execute(_versions(tables.policy, tenant).limit(1))).one_or_none()
    if row is None:
        raise TenantNotFound
    return _policy_version(row)


async def _granted(connection: AsyncConnection, tenant: TenantId) -> Policy:
    """The last policy that the platform set."""
    columns = tables.policy.c
    query = _versions(tables.policy, tenant).where(columns.set_role.not_in([Role.TENANT_ADMIN, BY_CEILING]))
    row = (await connection.execute(query.limit(1))).one_or_none()
    if row is None:
        raise TenantNotFound
    return Policy.from_json(row.body)


async def _ceiling(connection: AsyncConnection, tenant: TenantId) -> CeilingVersion:
    row = (await connection.execute(_versions(tables.ceiling, tenant).limit(1))).one_or_none()
    if row is None:
        return CeilingVersion(0, Ceiling(), None, Setter())
    setter = Setter(row.set_role, row.set_by)
    return CeilingVersion(row.version, Ceiling.from_json(row.body), row.created_at, setter)


async def _add_policy(
    connection: AsyncConnection, tenant: TenantId, version: int, policy: Policy, by: Setter
) -> PolicyVersion:
    values = {"body": orjson.loads(policy.to_json()), "set_by": by.name, "set_role": by.role}
    created_at = await connection.scalar(
        insert(tables.policy)
        .values(tenant_id=tenant, version=version, **values)
        .returning(tables.policy.c.created_at)
    )
    return PolicyVersion(version, policy, created_at, by)


async def _lock(connection: AsyncConnection, tenant: TenantId) -> None:
    """Two who set a policy at once take versions one after the other. Raises `TenantNotFound`."""
    columns = tables.tenant.c
    if await connection.scalar(select(columns.id).where(columns.id == tenant).with_for_update()) is None:
        raise TenantNotFound


def _policy_version(row: Any) -> PolicyVersion:
    setter = Setter(row.set_role, row.set_by)
    return PolicyVersion(row.version, Policy.from_json(row.body), row.created_at, setter)
