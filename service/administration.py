"""What an administrator may do to a tenant, its policy, its keys and its sessions: one set of functions for the API
and the command line.

Every change is one transaction with its entry. Who may do what, the callers of this decide: nothing here asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import orjson

from service.deeds import GATEWAY, Actor, Deed, Deeds
from tenants.key_limits import NO_LIMITS, KeyLimits
from tenants.policies import Setter
from tenants.policy import Policy

if TYPE_CHECKING:
    from service.present_use import PresentUse
    from tenants.access import Caller, Role, Scope, TenantId
    from tenants.ceiling import Ceiling
    from tenants.denials import Denial, Denials
    from tenants.directory import Directory, Tenant
    from tenants.keys import Changes, Key, Keys
    from tenants.lifecycle import Lifecycle
    from tenants.policies import CeilingVersion, PolicyVersion
    from tenants.sessions import Sessions

DEFAULT_GRACE_DAYS = 30
DEFAULT_OVERLAP_S = 86_400


class Administration:
    """Changes tenants, their keys and their sessions, each change with its entry."""

    def __init__(
        self,
        *,
        deeds: Deeds,
        directory: Directory,
        lifecycle: Lifecycle,
        keys: Keys,
        denials: Denials,
        sessions: Sessions,
        use: PresentUse,
    ) -> None:
        self._deeds = deeds
        self._directory = directory
        self._lifecycle = lifecycle
        self._keys = keys
        self._denials = denials
        self._sessions = sessions
        self._use = use

    # -- tenants ------------------------------------------------------------------------------------------------

    async def create_tenant(self, actor: Actor, name: str, policy: Policy | None = None) -> Tenant:
        """A new tenant. Raises `InvalidName`, `TenantExists`, `InvalidPolicy`."""
        async with self._deeds.deed(actor, "tenant_create", status=201) as deed:
            tenant = await self._directory.create_tenant(name, policy, by=_setter(actor))
            deed.tenant, deed.details = tenant.id, {"name": name}
        return tenant

    async def suspend(self, actor: Actor, tenant: TenantId) -> Tenant:
        """Refuse every key of the tenant; what runs may end. Idempotent. Raises `TenantNotFound`."""
        async with self._deeds.deed(actor, "tenant_suspend", tenant=tenant):
            await self._directory.suspend_tenant(tenant)
            return await self._lifecycle.find(tenant)

    async def resume(self, actor: Actor, tenant: TenantId) -> Tenant:
        """Let a suspended tenant in again. Idempotent. Raises `TenantNotFound`."""
        async with self._deeds.deed(actor, "tenant_resume", tenant=tenant):
            await self._directory.resume_tenant(tenant)
            return await self._lifecycle.find(tenant)

    async def delete(self, actor: Actor, tenant: TenantId, grace_days: int = DEFAULT_GRACE_DAYS) -> Tenant:
        """Refuse the tenant at once, and purge it once the grace is over. Raises `TenantNotFound`."""
        async with self._deeds.deed(actor, "tenant_delete", tenant=tenant, status=202) as deed:
            deed.details = {"grace_days": grace_days}
            return await self._lifecycle.delete(tenant, timedelta(days=grace_days))

    async def restore(self, actor: Actor, tenant: TenantId) -> Tenant:
        """Undo a deletion, as long as nothing was purged. Idempotent. Raises `TenantNotFound`."""
        async with self._deeds.deed(actor, "tenant_restore", tenant=tenant):
            return await self._lifecycle.restore(tenant)

    async def purge(self, tenant: Tenant, actor: Actor | None = None) -> dict[str, int]:
        """Remove a deleted tenant whose grace is over, but for its entries; how many rows of which table.

        Empty where there was nothing to do: any number of gateways may try at once, and one does it.
        """
        async with self._deeds.deed(actor or Actor(GATEWAY), "tenant_purge", tenant=tenant.id) as deed:
            removed = await self._lifecycle.purge(tenant.id)
            deed.details = {"name": tenant.name, "removed": removed}
            deed.happened = bool(removed)
        return removed

    async def purge_due(self, told: Callable[[Tenant, dict[str, int]], None] | None = None) -> int:
        """Purge every deleted tenant whose grace is over; how many there were."""
        purged = 0
        for tenant in await self._lifecycle.list_due():
            if removed := await self.purge(tenant):
                purged += 1
                if told is not None:
                    told(tenant, removed)
        return purged

    # -- policies -----------------------------------------------------------------------------------------------

    async def change_policy(
        self, actor: Actor, tenant: Tenant, policy: Policy, *, expected: int | None = None
    ) -> tuple[PolicyVersion, tuple[str, ...]]:
        """Put a policy in force, and tell what of the present use is above it.

        Raises `InvalidPolicy`, `PolicyChanged`, `TenantNotFound`; nothing has changed then.
        """
        before = await self._directory.policies.current(tenant.id)
        async with self._deeds.deed(actor, "policy_change", tenant=tenant.id) as deed:
            version = await self._directory.policies.set(
                tenant.id, policy, by=_setter(actor), expected=expected
            )
            deed.details = {
                "version": version.version,
                "changed": [
                    field.name
                    for field in fields(Policy)
                    if getattr(policy, field.name) != getattr(before.policy, field.name)
                ],
            }
        return version, await self._use.above(tenant, before.policy, policy)

    async def set_ceiling(
        self,
        actor: Actor,
        tenant: TenantId,
        ceiling: Ceiling,
        *,
        expected: int | None = None,
    ) -> tuple[CeilingVersion, tuple[TenantId, ...]]:
        """Set a tenant's ceiling, or the installation's, and lower the policies above it; whose they were.

        The entry of the installation's stands in its own log, under the nil id, and one of each lowered policy in
        that tenant's. Raises `InvalidPolicy`,
        `PolicyChanged`, `TenantNotFound`.
        """
        async with self._deeds.deed(actor, "ceiling_change", tenant=tenant) as deed:
            version, lowered = await self._directory.policies.set_ceiling(
                ceiling, tenant=tenant, by=_setter(actor), expected=expected
            )
            deed.details = {"version": version.version, "lowered": [str(each) for each in lowered]}
            for each in lowered:
                if each != tenant:
                    details: dict[str, object] = {"ceiling": version.version}
                    await self._deeds.tell(actor, "policy_lower", Deed(each, details))
        return version, lowered

    # -- keys ---------------------------------------------------------------------------------------------------

    async def create_key(
        self,
        actor: Actor,
        tenant: TenantId,
        role: Role,
        *,
        name: str | None = None,
        expires_at: datetime | None = None,
        scopes: Iterable[Scope] | None = None,
        allowed_cidrs: Iterable[str] = (),
        limits: KeyLimits = NO_LIMITS,
        creator: Caller | None = None,
    ) -> tuple[Key, str]:
        """A new key and its text, told once. Raises what `Keys.create` raises."""
        async with self._deeds.deed(actor, "key_create", tenant=tenant, status=201) as deed:
            key, text = await self._keys.create(
                tenant,
                role,
                name=name,
                expires_at=expires_at,
                scopes=scopes,
                allowed_cidrs=allowed_cidrs,
                limits=limits,
                creator=creator,
            )
            deed.details = {
                "key": key.id,
                "role": str(key.role),
                "scopes": [str(each) for each in key.scopes],
            }
        return key, text

    async def change_key(
        self, actor: Actor, tenant: TenantId, key_id: str, changes: Changes, creator: Caller | None = None
    ) -> Key:
        """Change a key's name, expiry, scopes, addresses or limits. Raises what `Keys.change` raises."""
        async with self._deeds.deed(actor, "key_change", tenant=tenant) as deed:
            key = await self._keys.change(tenant, key_id, changes, creator=creator)
            deed.details = {"key": key_id, "changed": _changed(changes)}
        return key

    async def rotate_key(
        self,
        actor: Actor,
        tenant: TenantId,
        key_id: str,
        *,
        overlap_s: int = DEFAULT_OVERLAP_S,
        creator: Caller | None = None,
    ) -> tuple[Key, str, datetime | None]:
        """A new secret of the same key; the old one ends after `overlap_s`. Raises what `Keys.rotate` raises."""
        async with self._deeds.deed(actor, "key_rotate", tenant=tenant) as deed:
            deed.details = {"key": key_id, "overlap_s": overlap_s}
            return await self._keys.rotate(tenant, key_id, overlap_s=overlap_s, creator=creator)

    async def revoke_key(self, actor: Actor, tenant: TenantId, key_id: str) -> Key:
        """Refuse a key for good. Idempotent: the first time stands. Raises `KeyNotFound`."""
        async with self._deeds.deed(actor, "key_revoke", tenant=tenant) as deed:
            deed.details = {"key": key_id}
            return await self._keys.revoke(tenant, key_id)

    # -- sessions -----------------------------------------------------------------------------------------------

    async def deny_token(self, actor: Actor, tenant: TenantId, issuer: str, jti: str) -> Denial:
        """Refuse a token or certificate everywhere within 2 s. Idempotent. Raises `InvalidName`, `TenantNotFound`."""
        async with self._deeds.deed(actor, "token_deny", tenant=tenant) as deed:
            deed.details = {"issuer": issuer, "jti": jti}
            return await self._denials.deny(tenant, issuer, jti)

    async def close_session(self, actor: Actor, tenant: TenantId, session_id: str) -> None:
        """End a session; gateways wipe what their workers keep of it. Raises `SessionNotFound`."""
        deed = Deed(tenant, session=session_id)
        entry = await self._deeds.entry(actor, "session_close", deed, status=204)
        actor.receipt = str(await self._sessions.close(tenant, session_id, entry))


def state_of(key: Key) -> str:
    """active, expired, contained or revoked, by our clock; whether it opens the door, the database decides."""
    if key.revoked_at is not None:
        return "revoked"
    if key.contained_at is not None:
        return "contained"
    expired = key.expires_at is not None and key.expires_at <= datetime.now(UTC)
    return "expired" if expired else "active"


def amend(policy: Policy, changes: Mapping[str, object]) -> Policy:
    """`policy` with some fields changed, None being the default. Raises `InvalidPolicy` with all that is wrong."""
    sent = orjson.loads(policy.to_json())
    for name, value in changes.items():
        if value is None:
            sent.pop(name, None)
        else:
            sent[name] = value
    return Policy.from_json(orjson.dumps(sent))


def _setter(actor: Actor) -> Setter:
    return Setter(actor.role, actor.key_id)


def _changed(changes: Changes) -> list[str]:
    names = [
        field.name
        for field in fields(changes)
        if field.name != "never_expires" and getattr(changes, field.name) is not None
    ]
    return sorted({*names, "expires_at"}) if changes.never_expires else sorted(names)
