"""Who a key proves to be, and what every other token learns: nothing."""

from __future__ import annotations

import hmac
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from tenants import access as access_module
from tenants import key_text
from tenants.access import Access, Role, plane_of
from tenants.database import Database
from tenants.directory import Directory
from tenants.errors import DatabaseUnavailable, Forbidden, KeyUnknown, TenantSuspended
from tenants.key_text import checksum, make_key
from tenants.keys import Changes, Keys
from tenants.policy import Policy
from tests.integration.conftest import Secrets


async def failure(access: Access, token: str) -> KeyUnknown:
    with pytest.raises(KeyUnknown) as caught:
        await access.authenticate(token)
    assert str(caught.value) == "The API key is missing or not valid."
    return caught.value


@pytest.mark.parametrize("role", list(Role))
async def test_a_key_proves_tenant_role_and_policy(directory: Directory, access: Access, role: Role) -> None:
    policy = Policy(concurrent_requests=3, keep_warm=True)
    tenant = await directory.create_tenant(f"access-{role.value.replace('_', '-')}", policy)
    key, token = await directory.keys.create(tenant.id, role, name="production")
    caller = await access.authenticate(token, plane=plane_of(role))
    assert (caller.tenant, caller.tenant_name, caller.key_id) == (tenant.id, tenant.name, key.id)
    assert (caller.role, caller.policy) == (role, policy)


async def test_an_unknown_key_and_a_wrong_secret_look_alike(directory: Directory, access: Access) -> None:
    tenant = await directory.create_tenant("alike")
    key, token = await directory.keys.create(tenant.id, Role.SEARCH)
    unknown = await failure(access, make_key()[2])
    assert (unknown.reason, unknown.tenant, unknown.key_id) == ("unknown", None, None)
    head = token[: len("prc_live_") + 13] + make_key()[1]
    wrong = await failure(access, head + checksum(head))
    assert (wrong.reason, wrong.tenant, wrong.key_id) == ("wrong_secret", tenant.id, key.id)


async def test_an_unknown_key_costs_the_work_of_a_wrong_secret(
    directory: Directory, access: Access, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = await directory.create_tenant("work")
    _, token = await directory.keys.create(tenant.id, Role.SEARCH)
    head = token[: len("prc_live_") + 13] + make_key()[1]
    done: list[str] = []

    class Counting:
        @staticmethod
        def compare_digest(first: bytes, second: bytes) -> bool:
            done.append(f"compare {len(first)} {len(second)}")
            return hmac.compare_digest(first, second)

        @staticmethod
        def digest(key: bytes, message: bytes, digest: str) -> bytes:
            done.append(f"digest {len(message)}")
            return hmac.digest(key, message, digest)

    monkeypatch.setattr(access_module, "hmac", Counting)
    monkeypatch.setattr(key_text, "hmac", Counting)
    work: list[list[str]] = []
    for spoiled in (make_key()[2], head + checksum(head)):
        await failure(access, spoiled)
        work.append(done.copy())
        done.clear()
    assert work[0] == work[1] == ["digest 43", "compare 32 32"]


async def test_a_revoked_key_fails_from_the_next_request_on(directory: Directory, access: Access) -> None:
    tenant = await directory.create_tenant("revoked")
    key, token = await directory.keys.create(tenant.id, Role.SEARCH)
    _, other = await directory.keys.create(tenant.id, Role.SEARCH)
    await access.authenticate(token)
    await directory.keys.revoke(tenant.id, key.id)
    refused = await failure(access, token)
    assert (refused.reason, refused.tenant, refused.key_id) == ("revoked", tenant.id, key.id)
    await access.authenticate(other)


async def test_a_key_expires(directory: Directory, keys: Keys, access: Access) -> None:
    tenant = await directory.create_tenant("expired")
    now = datetime.now(UTC)
    key, token = await keys.create(tenant.id, Role.SEARCH, expires_at=now + timedelta(hours=1))
    await access.authenticate(token)
    await keys.change(tenant.id, key.id, Changes(expires_at=now - timedelta(hours=1)))
    assert (await failure(access, token)).reason == "expired"


async def test_a_suspended_tenant_is_told_so_and_let_in_again(directory: Directory, access: Access) -> None:
    tenant = await directory.create_tenant("suspended")
    _, token = await directory.keys.create(tenant.id, Role.SEARCH)
    await directory.suspend_tenant(tenant.id)
    with pytest.raises(TenantSuspended) as caught:
        await access.authenticate(token)
    assert isinstance(caught.value, Forbidden)
    await directory.resume_tenant(tenant.id)
    await access.authenticate(token)


async def test_another_pepper_lets_nobody_in(directory: Directory, database: Database) -> None:
    tenant = await directory.create_tenant("pepper")
    _, token = await directory.keys.create(tenant.id, Role.SEARCH)
    assert (await failure(Access(database, pepper=bytes(32)), token)).reason == "wrong_secret"


async def test_no_secret_is_stored(directory: Directory, superuser_url: str) -> None:
    tenant = await directory.create_tenant("stored")
    _, token = await directory.keys.create(tenant.id, Role.SEARCH)
    secret = token[len("prc_live_") + 13 : -6].encode()
    connection = await asyncpg.connect(superuser_url)
    try:
        rows: list[Any] = []
        for table in ("key", "key_secret", "tenant"):
            rows += await connection.fetch(f"select t::text as told, t.* from pericarp.{table} t")
    finally:
        await connection.close()
    assert rows
    for row in rows:
        assert not any(
            secret in (value if isinstance(value, bytes) else str(value).encode()) for value in row.values()
        )


async def test_an_outage_is_not_a_wrong_key(
    app_url: str, directory: Directory, installation_secrets: Secrets
) -> None:
    tenant = await directory.create_tenant("outage")
    _, token = await directory.keys.create(tenant.id, Role.SEARCH)
    closed = Access(Database(app_url), pepper=installation_secrets.pepper)
    with pytest.raises(DatabaseUnavailable):
        await closed.authenticate(token)
