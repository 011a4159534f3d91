"""What administrators do, and the entry that says so: a change and its entry are one transaction, or nothing is.

An `Actor` is a key at the API, or whoever may run commands on this host. The entry stands in the log of the tenant
that was changed, whoever changed it, so that its auditor reads of it.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tenants.access import INSTALLATION
from tenants.audit import Decision, Entry

if TYPE_CHECKING:
    from service.asks import Exchange
    from tenants.access import TenantId
    from tenants.audit import Audit
    from tenants.database import Database

OPERATOR = "operator"
"""The role in an entry of who ran a command on this host: no key says who it was."""
GATEWAY = "gateway"
"""The role in an entry of what the service did by itself."""


@dataclass(slots=True)
class Actor:
    """Who changes something."""

    role: str
    key_id: str = ""
    request_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    """A deed is told once for each request and tenant."""
    address: str = ""
    receipt: str | None = None
    """The id of the entry, once there is one."""


def actor_of(exchange: Exchange) -> Actor:
    """The caller of a request."""
    assert exchange.caller is not None, "the door lets nobody in without a caller"
    return Actor(
        role=exchange.caller.role,
        key_id=exchange.caller.key_id,
        request_id=exchange.request_id,
        address=exchange.client_address,
    )


@dataclass(slots=True)
class Deed:
    """One change under way: whom it is about, and what the entry will tell of it."""

    tenant: TenantId | None = None
    details: dict[str, object] = field(default_factory=dict)
    session: str = ""
    happened: bool = True
    """False: nothing was changed, so there is nothing to tell."""


class Deeds:
    """Lets changes happen, each with its entry."""

    def __init__(self, database: Database, audit: Audit) -> None:
        self._database = database
        self._audit = audit

    @asynccontextmanager
    async def deed(
        self, actor: Actor, operation: str, *, tenant: TenantId | None = None, status: int = 200
    ) -> AsyncIterator[Deed]:
        """Everything that is changed inside stands once the block is left, with its entry; or none of it does."""
        async with self._database.together():
            done = Deed(tenant)
            yield done
            if done.happened:
                assert done.tenant is not None, "a deed is about a tenant"
                entry = await self.entry(actor, operation, done, status=status)
                actor.receipt = str(await self._audit.append(done.tenant, entry))

    async def tell(self, actor: Actor, operation: str, deed: Deed) -> None:
        """One entry more, of what the deed around this did to another tenant."""
        assert deed.tenant is not None, "a deed is about a tenant"
        await self._audit.append(deed.tenant, await self.entry(actor, operation, deed))

    async def entry(
        self,
        actor: Actor,
        operation: str,
        deed: Deed,
        *,
        status: int = 200,
        decision: Decision = Decision.ANSWERED,
    ) -> Entry:
        """What the log will say."""
        assert deed.tenant is not None, "a deed is about a tenant"
        return Entry(
            request_id=actor.request_id,
            tenant=deed.tenant,
            key_id=actor.key_id,
            role=actor.role,
            operation=f"admin.{operation}",
            decision=decision,
            code="ok",
            status=status,
            client=await self._client(deed.tenant, actor.address),
            session=deed.session,
            details=deed.details,
        )

    async def _client(self, tenant: TenantId, address: str) -> str:
        """The address under the tenant's own key; the installation's log has none."""
        if not address or tenant == INSTALLATION:
            return ""
        return (await self._audit.fingerprints(tenant)).address(address)
