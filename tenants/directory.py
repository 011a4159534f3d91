"""The life of tenants, their policies and their keys. Every change is durable when it returns.

`TenantId` is minted here, in `access.py`, `keys.py` and `lifecycle.py`, nowhere else.
"""

from __future__ import annotations

import re
import secrets
import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, insert, text, update
from sqlalchemy.exc import IntegrityError

from tenants import sealing, tables
from tenants.access import TenantId
from tenants.errors import InvalidName, TenantExists, TenantNotFound
from tenants.keys import Keys
from tenants.policies import Policies, Setter
from tenants.policy import Policy

if TYPE_CHECKING:
    from tenants.database import Database

TENANT_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
"""A DNS label: it goes into labels, paths and logs unchanged."""
AUDIT_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Tenant:
    """One tenant."""

    id: TenantId
    name: str
    created_at: datetime
    suspended_at: datetime | None
    contained_at: datetime | None = None
    deleted_at: datetime | None = None
    purge_after: datetime | None = None
    """When nothing brings it back any more."""

    @property
    def state(self) -> str:
        """active, suspended, contained or deleted; of several the last one."""
        if self.deleted_at is not None:
            return "deleted"
        if self.contained_at is not None:
            return "contained"
        return "active" if self.suspended_at is None else "suspended"


class Directory:
    """Creates and changes tenants, policies and keys."""

    def __init__(self, database: Database, *, pepper: bytes, master_key: bytes) -> None:
        self.keys = Keys(database, pepper=pepper)
        self._database = database
        self._master_key = master_key
        self.policies = Policies(database, self)

    async def create_tenant(
        self, name: str, policy: Policy | None = None, *, by: Setter | None = None
    ) -> Tenant:
        """A new tenant with its policy and its own audit key.

        Without a `policy` it has the default one, as far as the installation's ceiling allows that. Raises
        `InvalidName`, `TenantExists`, `InvalidPolicy`.
        """
        if TENANT_NAME.fullmatch(name) is None:
            raise InvalidName("a tenant's name is 1 to 63 of a-z, 0-9 and inner hyphens")
        tenant = TenantId(uuid.uuid4())
        wrapped = sealing.seal(self._master_key, tenant, secrets.token_bytes(AUDIT_KEY_BYTES))
        try:
            async with self._database.together():
                async with self._database.transaction(tenant) as connection:
                    row = (
                        await connection.execute(
                            insert(tables.tenant)
                            .values(id=tenant, name=name, audit_key=wrapped)
                            .returning(tables.tenant.c.created_at)
                        )
                    ).one()
                await self.policies.set_first(tenant, policy, by=by)
        except IntegrityError as exc:
            raise TenantExists from exc
        return Tenant(tenant, name, row.created_at, None)

    async def find_tenant(self, name: str) -> Tenant:
        """The tenant of that name. Raises `TenantNotFound`."""
        async with self._database.outside_tenants() as connection:
            row = (
                await connection.execute(text("select * from pericarp.find_tenant(:name)"), {"name": name})
            ).one_or_none()
        if row is None:
            raise TenantNotFound
        return read_tenant(row)

    async def list_tenants(
        self, *, after: str = "", most: int | None = None, state: str = ""
    ) -> tuple[Tenant, ...]:
        """Tenants by name, those after the name `after`, at most `most`, of one `state` or of all."""
        async with self._database.outside_tenants() as connection:
            rows = (
                await connection.execute(
                    text("select * from pericarp.page_tenants(:after, :most, :state)"),
                    {"after": after, "most": most, "state": state},
                )
            ).all()
        return tuple(read_tenant(row) for row in rows)

    async def suspend_tenant(self, tenant: TenantId) -> None:
        """Refuse every key of the tenant from the next request on. Idempotent. Raises `TenantNotFound`."""
        await self._set_suspended(tenant, suspended=True)

    async def resume_tenant(self, tenant: TenantId) -> None:
        """Let a suspended tenant in again. Idempotent. Raises `TenantNotFound`."""
        await self._set_suspended(tenant, suspended=False)

    async def find_policy(self, tenant: TenantId) -> Policy:
        """The policy in force. Raises `TenantNotFound`."""
        return (await self.policies.current(tenant)).policy

    async def set_policy(self, tenant: TenantId, policy: Policy) -> int:
        """Put `policy` in force from the next request on, as the operator; its version. Earlier ones are kept."""
        return (await self.policies.set(tenant, policy)).version

    async def _set_suspended(self, tenant: TenantId, *, suspended: bool) -> None:
        column = tables.tenant.c.suspended_at
        value = func.coalesce(column, func.clock_timestamp()) if suspended else None
        async with self._database.transaction(tenant) as connection:
            found = await connection.scalar(
                update(tables.tenant)
                .where(tables.tenant.c.id == tenant)
                .values(suspended_at=value)
                .returning(tables.tenant.c.id)
            )
        if found is None:
            raise TenantNotFound


def read_tenant(row: Any) -> Tenant:
    """A row of the tenant's columns."""
    return Tenant(
        TenantId(uuid.UUID(int=row.id.int)),
        row.name,
        row.created_at,
        row.suspended_at,
        row.contained_at,
        row.deleted_at,
        row.purge_after,
    )
