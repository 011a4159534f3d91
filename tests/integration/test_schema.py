"""What the migrations build, what a runtime role may not be, and what an outage looks like."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from tenants import embedded
from tenants.database import Database, migrate
from tenants.errors import DatabaseUnavailable, SchemaOutdated, UnsafeRole
from tenants.provisioning import Urls, provision, scram_verifier
from tenants.tables import SCHEMA, metadata
from tests.integration.conftest import MakeCaller, Proxy, Secrets, run_as_superuser

pytestmark = pytest.mark.timeout(120)

TENANTLESS = (
    *("gateway", "audit_waiting", "audit_tile", "audit_checkpoint"),
    *("audit_cosignature", "audit_witness", "backup", "backup_check"),
)
"""Tables with nothing of one tenant alone."""


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


async def refusal(url: str) -> str:
    database = Database(url)
    with pytest.raises(UnsafeRole) as caught:
        await database.open()
    await database.close()
    return str(caught.value)


# -- the schema -------------------------------------------------------------------------------------------------


async def test_the_migrations_build_what_the_code_expects(owner_url: str) -> None:
    def compare(connection: Connection) -> list[Any]:
        options = {
            "include_schemas": True,
            "version_table_schema": SCHEMA,
            "include_name": lambda name, kind, _parents: kind != "schema" or name == SCHEMA,
        }
        context = MigrationContext.configure(connection, opts=options)
        return list(compare_metadata(context, metadata))

    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(owner_url), poolclass=NullPool
    )
    async with engine.connect() as connection:
        assert await connection.run_sync(compare) == []
    await engine.dispose()


async def test_migrating_again_changes_nothing_and_two_at_once_agree(owner_url: str) -> None:
    await asyncio.gather(migrate(owner_url), migrate(owner_url))


async def test_provisioning_again_and_twice_at_once_changes_nothing(
    postgres_server: embedded.Server, template: Urls, installation_secrets: Secrets
) -> None:
    async def again() -> Urls:
        return await provision(
            postgres_server.superuser_url,
            owner_password=installation_secrets.owner_password,
            app_password=installation_secrets.app_password,
        )

    first, second = await asyncio.gather(again(), again())
    assert first == second == template


async def test_a_database_from_nothing_comes_up_whole(
    postgres_server: embedded.Server, installation_secrets: Secrets
) -> None:
    urls = await provision(
        postgres_server.superuser_url,
        owner_password=installation_secrets.owner_password,
        app_password=installation_secrets.app_password,
        database="from_nothing",
    )
    database = Database(urls.app_url)
    with pytest.raises(SchemaOutdated):
        await database.open()
    await asyncio.gather(migrate(urls.owner_url), migrate(urls.owner_url))
    await database.open()
    assert await database.answers()
    await database.close()


async def test_every_tenant_table_is_walled(superuser_url: str) -> None:
    async with connected(superuser_url) as connection:
        tables = await connection.fetch(
            "select c.oid, c.relname, c.relrowsecurity, c.relforcerowsecurity from pg_class c"
            " where c.relnamespace = 'pericarp'::regnamespace and c.relkind in ('r', 'p')"
            " and c.relname <> 'alembic_version'"
        )
        assert {table["relname"] for table in tables} == {table.name for table in metadata.tables.values()}
        for table in tables:
            if table["relname"] in TENANTLESS:
                continue
            assert table["relrowsecurity"], table["relname"]
            assert table["relforcerowsecurity"], table["relname"]
            policy = await connection.fetchrow(
                "select polcmd, pg_get_expr(polqual, polrelid) as sees, pg_get_expr(polwithcheck, polrelid) as writes"
                " from pg_policy where polrelid = $1 and 0 = any(polroles)",
                table["oid"],
            )
            assert policy is not None, table["relname"]
            column = "id" if table["relname"] == "tenant" else "tenant_id"
            wall = f"({column} = (NULLIF(current_setting('app.tenant_id'::text, true), ''::text))::uuid)"
            assert (policy["polcmd"], policy["sees"], policy["writes"]) == (b"*", wall, wall)


async def test_what_has_no_tenant_is_out_of_every_runtime_roles_reach(superuser_url: str) -> None:
    async with connected(superuser_url) as connection:
        for table in TENANTLESS:
            assert "tenant_id" not in metadata.tables[f"{SCHEMA}.{table}"].c
            for role in ("pericarp_app", "pericarp_quota"):
                assert not await connection.fetchval(
                    "select has_table_privilege($1, $2, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE')",
                    role,
                    f"{SCHEMA}.{table}",
                )


async def test_unique_constraints_lead_with_the_tenant(superuser_url: str) -> None:
    """A global one would tell a tenant what another has; `key.id` is made by us from 71 random bits."""
    async with connected(superuser_url) as connection:
        leading = await connection.fetch(
            "select i.indexrelid::regclass::text as name, a.attname as first from pg_index i"
            " join pg_class c on c.oid = i.indrelid"
            " join pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]"
            " where c.relnamespace = 'pericarp'::regnamespace and i.indisunique"
        )
    global_ones = {row["name"] for row in leading if row["first"] != "tenant_id"}
    assert global_ones == {
        "pericarp.alembic_version_pkc",
        "pericarp.tenant_pkey",
        "pericarp.tenant_name_key",
        "pericarp.key_id_key",
        "pericarp.gateway_pkey",
        "pericarp.audit_waiting_pkey",
        "pericarp.audit_leaf_index_key",  # made by the sequencer, never by a caller
        "pericarp.audit_tile_pkey",
        "pericarp.audit_checkpoint_pkey",
        "pericarp.audit_cosignature_pkey",
        "pericarp.audit_witness_pkey",
        "pericarp.backup_pkey",
        "pericarp.backup_check_pkey",
    }


async def test_functions_with_the_owners_rights_have_a_fixed_path_and_are_not_public(
    superuser_url: str,
) -> None:
    async with connected(superuser_url) as connection:
        functions = await connection.fetch(
            "select proname, proconfig, has_function_privilege('pericarp_app', oid, 'EXECUTE') as app,"
            " exists (select from aclexplode(coalesce(proacl, acldefault('f', proowner))) where grantee = 0) as public"
            " from pg_proc where pronamespace = 'pericarp'::regnamespace"
        )
    assert functions
    for function in functions:
        assert function["proconfig"] == ["search_path=pg_catalog, pg_temp"], function["proname"]
        assert not function["public"], function["proname"]
    assert {row["proname"] for row in functions if row["app"]} == {
        *("find_tenant", "page_tenants", "due_purges", "purge_tenant", "list_workers", "due_thresholds"),
        *("due_pruning", "claim_pruning", "issue_warrant", "forget_end_user"),
        *("note_backup", "note_backup_check", "note_backups_pruned"),
    }


async def test_the_quota_role_reaches_no_table(app_url: str) -> None:
    async with connected(app_url) as connection:
        await connection.execute("set role pericarp_quota")
        for table in metadata.tables:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.fetch(f"select * from {table}")


async def test_a_password_is_stored_as_a_verifier_that_lets_only_it_in(
    superuser_url: str, app_url: str
) -> None:
    async with connected(superuser_url) as connection:
        stored = await connection.fetchval("select rolpassword from pg_authid where rolname = 'pericarp_app'")
    assert stored.startswith("SCRAM-SHA-256$4096:")
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(make_url(app_url).set(password="wrong").render_as_string(hide_password=False))
    with pytest.raises(ValueError, match="ASCII"):
        scram_verifier("pässword")


# -- who may not run the service --------------------------------------------------------------------------------


async def test_a_superuser_is_refused(superuser_url: str) -> None:
    assert "is a superuser" in await refusal(superuser_url)


async def test_the_owner_is_refused(owner_url: str) -> None:
    assert "owns, or may become the owner of" in await refusal(owner_url)


@pytest.mark.parametrize(
    ("grant", "fault"),
    [
        ("alter role {role} bypassrls", "has BYPASSRLS"),
        ("alter role {role} createrole", "may make roles"),
        ("grant pericarp_owner to {role}", "may become the owner of"),
        ("grant pericarp_owner to {role} with inherit false", "may become the owner of"),
        ("grant bypasser to {role} with inherit false", "may become bypasser"),
        ("revoke pericarp_app from {role}; grant usage on schema pericarp to {role}", "may not set the role"),
        ("grant truncate on pericarp.slot to {role}", "can be truncated"),
        ("grant delete on pericarp.audit_inbox to {role}", "the log can be changed"),
        ("grant update (body) on pericarp.audit_inbox to {role}", "the log can be changed"),
        ("grant insert on pericarp.audit_warrant to {role}", "the log can be changed"),
        ("grant insert on pericarp.audit_leaf to {role}", "the log can be changed"),
        ("grant update (envelope) on pericarp.audit_leaf to {role}", "the log can be changed"),
        ("grant update on pericarp.audit_tile to {role}", "the log can be changed"),
    ],
)
async def test_a_role_that_could_see_past_row_security_is_refused(
    superuser_url: str, app_url: str, grant: str, fault: str
) -> None:
    role, password = f"role_{secrets.token_hex(4)}", secrets.token_hex(8)
    await run_as_superuser(
        superuser_url,
        "drop role if exists bypasser",
        "create role bypasser bypassrls",
        f"create role {role} login password '{password}'",
        f"grant pericarp_app to {role}",
        f"do $$ begin execute format('grant connect on database %I to {role}', current_database()); end $$",
    )
    url = make_url(app_url).set(username=role, password=password).render_as_string(hide_password=False)
    try:
        safe = Database(url)
        await safe.open()
        await safe.close()
        await run_as_superuser(superuser_url, grant.format(role=role))
        assert fault in await refusal(url)
    finally:
        await run_as_superuser(
            superuser_url, f"drop owned by {role}", f"drop role {role}", "drop role bypasser"
        )


@pytest.mark.parametrize(
    ("harm", "mend", "fault"),
    [
        (
            "create table pericarp.leak (tenant_id uuid)",
            "drop table pericarp.leak",
            "does not enable row security",
        ),
        (
            "alter table pericarp.key no force row level security",
            "alter table pericarp.key force row level security",
            "does not force row security",
        ),
        (
            "create policy everything on pericarp.key for select using (true)",
            "drop policy everything on pericarp.key",
            "does not ask for the tenant",
        ),
        (
            "create view pericarp.peek as select * from pericarp.key",
            "drop view pericarp.peek",
            "does not run with its reader's rights",
        ),
    ],
)
async def test_a_schema_with_a_hole_is_refused(
    owner_url: str, app_url: str, harm: str, mend: str, fault: str
) -> None:
    async with connected(owner_url) as owner:
        await owner.execute(harm)
        try:
            assert fault in await refusal(app_url)
        finally:
            await owner.execute(mend)


async def test_another_versions_schema_is_refused(owner_url: str, app_url: str) -> None:
    async with connected(owner_url) as owner:
        head = await owner.fetchval("select version_num from pericarp.alembic_version")
        await owner.execute("update pericarp.alembic_version set version_num = '0001'")
        try:
            with pytest.raises(SchemaOutdated, match="0001"):
                await Database(app_url).open()
        finally:
            await owner.execute("update pericarp.alembic_version set version_num = $1", head)


# -- outages ----------------------------------------------------------------------------------------------------


async def test_a_database_that_is_gone_is_reported_at_once_and_found_again(
    proxy: Proxy, make_caller: MakeCaller
) -> None:
    caller = await make_caller()
    database = Database(proxy.url)
    await database.open()
    try:
        async with database.transaction(caller.tenant) as connection:
            await connection.execute(text("select 1"))
        await proxy.cut()
        started = time.monotonic()
        with pytest.raises(DatabaseUnavailable):
            await database.call("select 1")
        with pytest.raises(DatabaseUnavailable):
            async with database.transaction(caller.tenant):
                pass
        assert not await database.answers()
        assert time.monotonic() - started < 1
        await proxy.resume()
        assert await database.answers()
        async with database.transaction(caller.tenant) as connection:
            assert (await connection.execute(text("select count(*) from pericarp.tenant"))).scalar_one() == 1
    finally:
        await database.close()


async def test_a_cut_while_the_service_idles_costs_no_request(proxy: Proxy, make_caller: MakeCaller) -> None:
    """The restart of a database leaves dead connections in the pools; nobody may notice."""
    caller = await make_caller()
    database = Database(proxy.url)
    await database.open()
    try:
        for _ in range(3):
            async with database.transaction(caller.tenant) as connection:
                await connection.execute(text("select 1"))
            assert await database.answers()
            await proxy.cut()
            await proxy.resume()
        async with database.transaction(caller.tenant) as connection:
            await connection.execute(text("select 1"))
        await database.call("select 1")
    finally:
        await database.close()


async def test_a_database_that_is_silent_hangs_nobody(proxy: Proxy, make_caller: MakeCaller) -> None:
    caller = await make_caller()
    database = Database(proxy.url)
    await database.open()
    try:
        await database.call("select 1")
        proxy.freeze()
        started = time.monotonic()
        with pytest.raises(DatabaseUnavailable):
            await database.call("select 1")
        assert time.monotonic() - started < 8
        started = time.monotonic()
        with pytest.raises(DatabaseUnavailable):
            async with database.transaction(caller.tenant):
                pass
        assert time.monotonic() - started < 8
        await proxy.resume()
        assert await database.answers()
    finally:
        await database.close()


async def test_no_database_at_all_is_reported_on_opening(tmp_path: Any) -> None:
    with pytest.raises(DatabaseUnavailable):
        await Database(f"postgresql://pericarp_app@/pericarp?host={tmp_path}").open()


async def test_a_statement_that_runs_too_long_is_cut(database: Database) -> None:
    started = time.monotonic()
    with pytest.raises(DatabaseUnavailable):
        await database.call("select pg_sleep(30)")
    assert time.monotonic() - started < 5
    assert await database.answers()


async def test_a_wrong_argument_is_our_bug_and_not_an_outage(database: Database) -> None:
    with pytest.raises(asyncpg.DataError):
        await database.call("select $1::int", "no number")


async def test_closing_twice_is_harmless(app_url: str) -> None:
    database = Database(app_url)
    await database.open()
    await database.close()
    await database.close()
    with pytest.raises(DatabaseUnavailable):
        await database.call("select 1")
