"""Two gateways on one database: what one changes, the other soon no longer keeps, also where it cannot hear it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import asyncpg
import pytest

from tenants.access import Access, Caller, Identity, Means, Role, Scope
from tenants.changes import APPLICATION, Changes
from tenants.database import Database
from tenants.denials import Denials
from tenants.directory import Directory
from tenants.errors import KeyUnknown, TenantSuspended
from tenants.key_text import Plane
from tenants.keys import Changes as KeyChanges
from tenants.keys import Keys
from tenants.policy import Policy
from tests.integration.conftest import Proxy, Secrets

ENDLESS_S = 3600.0
"""A gateway that keeps for so long forgets in a test only what it was told to forget."""


@dataclass
class Listening:
    """Another gateway's access, which hears of changes."""

    access: Access
    changes: Changes
    heard: list[str]
    missed: int = 0

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not holds():
                await asyncio.sleep(0.01)

    async def until_refused(self, ask: Callable[[], Awaitable[Caller]]) -> str:
        async with asyncio.timeout(60):
            while True:
                try:
                    await ask()
                except KeyUnknown as refused:
                    return refused.reason
                except TenantSuspended:
                    return "suspended"
                await asyncio.sleep(0.01)


@pytest.fixture
async def other(database: Database, proxy: Proxy, installation_secrets: Secrets) -> AsyncIterator[Listening]:
    access = Access(database, pepper=installation_secrets.pepper, kept_s=ENDLESS_S)
    found: Listening

    def changed(change: str) -> None:
        found.heard.append(change)
        access.forget(change)

    def missed() -> None:
        found.missed += 1
        access.forget_all()

    changes = Changes(proxy.url, changed=changed, missed=missed)
    found = Listening(access, changes, [])
    listening = asyncio.create_task(changes.listen())
    await found.until(lambda: changes.listening)
    yield found
    listening.cancel()
    with suppress(asyncio.CancelledError):
        await listening


async def test_what_is_kept_is_not_asked_again(
    other: Listening, directory: Directory, keys: Keys, superuser_url: str
) -> None:
    tenant = await directory.create_tenant("kept")
    key, token = await keys.create(tenant.id, Role.SEARCH)
    await other.until(lambda: f"key:{key.id}" in other.heard)
    await other.access.authenticate(token)
    connection = await asyncpg.connect(superuser_url)
    try:
        await connection.execute("alter table pericarp.key disable trigger key_told")
        await keys.revoke(tenant.id, key.id)
        await connection.execute("alter table pericarp.key enable trigger key_told")
    finally:
        await connection.close()
    await other.access.authenticate(
        token
    )  # nobody told, and its time is not over: this is what keeping means


async def test_a_revocation_is_heard(other: Listening, directory: Directory, keys: Keys) -> None:
    tenant = await directory.create_tenant("heard-revoked")
    key, token = await keys.create(tenant.id, Role.SEARCH)
    await other.access.authenticate(token)
    await keys.revoke(tenant.id, key.id)
    assert await other.until_refused(lambda: other.access.authenticate(token)) == "revoked"


async def test_a_rotation_without_overlap_is_heard(
    other: Listening, directory: Directory, keys: Keys
) -> None:
    tenant = await directory.create_tenant("heard-rotated")
    key, token = await keys.create(tenant.id, Role.SEARCH)
    await other.access.authenticate(token)
    await keys.rotate(tenant.id, key.id, overlap_s=0)
    assert await other.until_refused(lambda: other.access.authenticate(token)) == "rotated"


async def test_an_allow_list_is_heard(other: Listening, directory: Directory, keys: Keys) -> None:
    tenant = await directory.create_tenant("heard-cidr")
    key, token = await keys.create(tenant.id, Role.SEARCH)
    await other.access.authenticate(token)
    await keys.change(tenant.id, key.id, KeyChanges(allowed_cidrs=("192.0.2.0/24",)))
    assert await other.until_refused(lambda: other.access.authenticate(token)) == "address"


async def test_a_suspension_and_its_end_are_heard(other: Listening, directory: Directory, keys: Keys) -> None:
    tenant = await directory.create_tenant("heard-suspended")
    _, token = await keys.create(tenant.id, Role.SEARCH)
    await other.access.authenticate(token)
    await directory.suspend_tenant(tenant.id)
    assert await other.until_refused(lambda: other.access.authenticate(token)) == "suspended"
    before = len(other.heard)
    await directory.resume_tenant(tenant.id)
    await other.until(lambda: len(other.heard) > before)
    await other.access.authenticate(token)


async def test_a_policy_is_heard(other: Listening, directory: Directory, keys: Keys) -> None:
    tenant = await directory.create_tenant("heard-policy")
    _, token = await keys.create(tenant.id, Role.SEARCH)
    assert (await other.access.authenticate(token)).policy == Policy()
    before = len(other.heard)
    await directory.set_policy(tenant.id, Policy(text_length=5))
    await other.until(lambda: len(other.heard) > before)
    assert (await other.access.authenticate(token)).policy == Policy(text_length=5)


async def test_a_denial_is_heard(other: Listening, directory: Directory, denials: Denials) -> None:
    tenant = await directory.create_tenant("heard-denied")
    identity = Identity(
        Means.JWT, "corp", tenant.name, Role.SEARCH, frozenset({Scope.RERANK}), "alice", "token-1"
    )
    await other.access.admit(identity, plane=Plane.DATA)
    await denials.deny(tenant.id, "jwt:corp", "token-1")
    assert await other.until_refused(lambda: other.access.admit(identity, plane=Plane.DATA)) == "denied"


async def test_a_new_key_and_a_new_tenant_are_found_although_they_were_unknown(
    other: Listening, directory: Directory, keys: Keys
) -> None:
    identity = Identity(Means.MTLS, "pod", "heard-new", Role.SEARCH, frozenset(), "pod", "00")
    with pytest.raises(KeyUnknown):
        await other.access.admit(identity, plane=Plane.DATA)
    tenant = await directory.create_tenant("heard-new")
    await other.until(lambda: f"tenant:{tenant.id}" in other.heard)
    assert (await other.access.admit(identity, plane=Plane.DATA)).tenant == tenant.id


async def test_a_lost_connection_is_made_again_and_everything_is_read_anew(
    other: Listening, directory: Directory, keys: Keys, superuser_url: str
) -> None:
    tenant = await directory.create_tenant("gap")
    key, token = await keys.create(tenant.id, Role.SEARCH)
    await other.access.authenticate(token)
    connection = await asyncpg.connect(superuser_url)
    try:
        before = other.missed
        ended = await connection.fetchval(
            "select count(pg_terminate_backend(pid)) from pg_stat_activity"
            " where application_name = $1 and datname = current_database()",
            APPLICATION,
        )
        assert ended == 1
    finally:
        await connection.close()
    await keys.revoke(tenant.id, key.id)  # perhaps while nobody listens
    await other.until(lambda: other.missed >= before + 2 and other.changes.listening)
    assert await other.until_refused(lambda: other.access.authenticate(token)) == "revoked"


async def test_a_connection_that_went_silent_is_found_and_made_again(
    other: Listening, directory: Directory, keys: Keys, proxy: Proxy
) -> None:
    tenant = await directory.create_tenant("silent")
    key, token = await keys.create(tenant.id, Role.SEARCH)
    await other.access.authenticate(token)
    proxy.freeze()
    await other.until(lambda: not other.changes.listening)
    await keys.revoke(tenant.id, key.id)
    assert await other.until_refused(lambda: other.access.authenticate(token)) == "revoked"
    await proxy.cut()
    await proxy.resume()
    await other.until(lambda: other.changes.listening)
