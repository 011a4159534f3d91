"""The life of tenants, policies and keys."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from tenants import sealing
from tenants.access import Access, Role, TenantId
from tenants.directory import Directory
from tenants.errors import InvalidName, KeyNotFound, SealBroken, TenantExists, TenantNotFound
from tenants.policy import Policy
from tests.integration.conftest import Secrets

NOBODY = TenantId(uuid.uuid4())


async def test_a_tenant_is_found_by_its_name_and_listed(directory: Directory) -> None:
    created = await directory.create_tenant("acme", Policy(concurrent_requests=2))
    assert await directory.find_tenant("acme") == created
    assert created in await directory.list_tenants()
    assert await directory.find_policy(created.id) == Policy(concurrent_requests=2)


async def test_a_name_is_taken_once_also_at_once(directory: Directory) -> None:
    outcomes = await asyncio.gather(
        *(directory.create_tenant("twin") for _ in range(4)), return_exceptions=True
    )
    assert sum(isinstance(outcome, TenantExists) for outcome in outcomes) == 3
    assert [tenant.name for tenant in await directory.list_tenants()].count("twin") == 1


@pytest.mark.parametrize(
    "name", ["", "A", "a_b", "-a", "a-", "a b", "ä", "a" * 64, "a\n", "../a", "a'; drop table"]
)
async def test_other_names_are_refused(directory: Directory, name: str) -> None:
    with pytest.raises(InvalidName):
        await directory.create_tenant(name)


async def test_a_policy_is_in_force_from_the_next_request_on(directory: Directory, access: Access) -> None:
    tenant = await directory.create_tenant("changing")
    _, token = await directory.keys.create(tenant.id, Role.SEARCH)
    assert (await access.authenticate(token)).policy == Policy()
    assert await directory.set_policy(tenant.id, Policy(text_length=5)) == 2
    assert (await access.authenticate(token)).policy == Policy(text_length=5)


async def test_every_version_of_a_policy_is_kept(directory: Directory, superuser_url: str) -> None:
    tenant = await directory.create_tenant("history")
    versions = await asyncio.gather(
        *(directory.set_policy(tenant.id, Policy(text_length=length)) for length in range(1, 6))
    )
    assert sorted(versions) == [2, 3, 4, 5, 6]
    connection = await asyncpg.connect(superuser_url)
    try:
        bodies = await connection.fetch(
            "select body::text from pericarp.policy where tenant_id = $1 order by version", tenant.id
        )
    finally:
        await connection.close()
    assert len(bodies) == 6
    assert Policy.from_json(bodies[0][0]) == Policy()
    assert await directory.find_policy(tenant.id) == Policy.from_json(bodies[-1][0])


async def test_keys_are_listed_without_secrets_and_stay_after_revocation(directory: Directory) -> None:
    tenant = await directory.create_tenant("keys")
    until = datetime.now(UTC) + timedelta(days=1)
    first, token = await directory.keys.create(tenant.id, Role.SEARCH, name="shop", expires_at=until)
    second, _ = await directory.keys.create(tenant.id, Role.AUDITOR)
    assert await directory.keys.list(tenant.id) == (first, second)
    assert (first.name, first.expires_at, first.revoked_at) == ("shop", until, None)
    assert first.id in token
    assert token[-49:] not in repr(await directory.keys.list(tenant.id))
    revoked = await directory.keys.revoke(tenant.id, first.id)
    assert revoked.revoked_at is not None
    assert await directory.keys.revoke(tenant.id, first.id) == revoked
    assert await directory.keys.list(tenant.id) == (revoked, second)


async def test_what_is_not_there_is_reported(directory: Directory) -> None:
    with pytest.raises(TenantNotFound):
        await directory.find_tenant("nobody")
    with pytest.raises(TenantNotFound):
        await directory.find_policy(NOBODY)
    with pytest.raises(TenantNotFound):
        await directory.set_policy(NOBODY, Policy())
    with pytest.raises(TenantNotFound):
        await directory.keys.create(NOBODY, Role.SEARCH)
    with pytest.raises(TenantNotFound):
        await directory.suspend_tenant(NOBODY)
    with pytest.raises(KeyNotFound):
        await directory.keys.revoke(NOBODY, "unknown")
    assert await directory.keys.list(NOBODY) == ()


async def test_wrong_key_details_are_refused(directory: Directory) -> None:
    tenant = await directory.create_tenant("details")
    for name in ("", "x" * 101, "line\nbreak"):
        with pytest.raises(InvalidName):
            await directory.keys.create(tenant.id, Role.SEARCH, name=name)
    with pytest.raises(ValueError, match="time zone"):
        await directory.keys.create(tenant.id, Role.SEARCH, expires_at=datetime(2030, 1, 1))


async def test_each_tenant_has_its_own_audit_key_that_only_the_master_key_opens(
    directory: Directory, superuser_url: str, installation_secrets: Secrets
) -> None:
    first, second = await directory.create_tenant("sealed-1"), await directory.create_tenant("sealed-2")
    connection = await asyncpg.connect(superuser_url)
    try:
        wrapped = {
            tenant.id: await connection.fetchval(
                "select audit_key from pericarp.tenant where id = $1", tenant.id
            )
            for tenant in (first, second)
        }
    finally:
        await connection.close()
    master_key = installation_secrets.master_key
    opened = [sealing.unseal(master_key, tenant, sealed) for tenant, sealed in wrapped.items()]
    assert len(set(opened)) == 2
    assert {len(key) for key in opened} == {32}
    broken = [
        (bytes(32), first.id, wrapped[first.id]),
        (b"short", first.id, wrapped[first.id]),
        (master_key, second.id, wrapped[first.id]),  # copied into another tenant's row
        (master_key, first.id, wrapped[first.id][:-1] + bytes([wrapped[first.id][-1] ^ 1])),
        (master_key, first.id, b"\x02" + wrapped[first.id][1:]),
        (master_key, first.id, b""),
    ]
    for key, tenant, sealed in broken:
        with pytest.raises(SealBroken):
            sealing.unseal(key, tenant, sealed)
