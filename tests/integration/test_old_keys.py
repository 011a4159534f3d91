"""A database of the time before keys had kinds: what becomes of the keys in it."""

from __future__ import annotations

import uuid

import asyncpg
from alembic import command
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from tenants.access import Access, Role, Scope
from tenants.database import Database, _alembic_config, connect, migrate
from tenants.key_text import digest_secret, make_key
from tenants.keys import Keys
from tests.integration.conftest import Secrets


async def test_old_search_keys_go_on_and_old_administrators_keys_are_revoked(
    owner_url: str, app_url: str, superuser_url: str, installation_secrets: Secrets
) -> None:
    def go_back(connection: Connection) -> None:
        config = _alembic_config()
        config.attributes["connection"] = connection
        command.downgrade(config, "0010")

    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=lambda: connect(owner_url, {}, command_timeout=60),
        poolclass=NullPool,
    )
    async with engine.begin() as connection:
        await connection.run_sync(go_back)
        assert await connection.scalar(text("select version_num from pericarp.alembic_version")) == "0010"
    await engine.dispose()

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
