"""A database of the time before keys had kinds: what becomes of the keys in it."""

from __future__ import annotations

import uuid

import asyncpg

from tenants.access import Access, Role, Scope
from tenants.database import Database, migrate
from tenants.key_text import digest_secret, make_key
from tenants.keys import Keys
from tests.integration.conftest import Secrets, go_back


async def test_old_search_keys_go_on_and_old_administrators_keys_are_revoked(
    owner_url: str, app_url: str, superuser_url: str, installation_secrets: Secrets
) -> None:
    await go_back(owner_url, "0010")
    tenant = uuid.uuid4()
    old = {role: make_key() for role in Role}
    superuser = await asyncpg.connect(superuser_url)
    try:
        await superuser.execute("insert into pericarp.tenant (id, name) values ($1, 'old')", tenant)
        await superuser.execute(
            "insert into pericarp.policy (tenant_id, version, body) values ($1, 1, '{}')", tenant
        )
        for role, (key_id, secret, _) in old.items():
            await superuser.execute(
                "insert into pericarp.key (tenant_id, id, role) values ($1, $2, $3)",
                tenant,
                key_id,
                role.value,
            )
            await superuser.execute(
                "insert into pericarp.key_secret (tenant_id, key_id, digest, pepper_version) values ($1, $2, $3, 1)",
                tenant,
                key_id,
                digest_secret(installation_secrets.pepper, secret),
            )
    finally:
        await superuser.close()
    await migrate(owner_url)

    database = Database(app_url)
    await database.open()
    try:
        caller = await Access(database, pepper=installation_secrets.pepper).authenticate(old[Role.SEARCH][2])
        assert caller.scopes == {Scope.RERANK, Scope.SESSIONS, Scope.USAGE}
        keys = {
            key.role: key
            for key in await Keys(database, pepper=installation_secrets.pepper).list(caller.tenant)
        }
    finally:
        await database.close()
    assert keys.pop(Role.SEARCH).revoked_at is None
    assert len(keys) == 3
    assert {key.revoked_reason for key in keys.values()} == {"old_form"}
    assert all(key.revoked_at is not None for key in keys.values())
