"""How tenants end, and how they and their keys are stopped and let go again."""

from __future__ import annotations

import uuid
from datetime import timedelta

import asyncpg
import pytest

from tenants.access import Access, Role, TenantId
from tenants.audit import Audit, Decision, Entry
from tenants.database import Database
from tenants.directory import Directory
from tenants.errors import KeyNotFound, KeyUnknown, TenantExists, TenantNotFound, TenantSuspended
from tenants.lifecycle import Lifecycle
from tenants.presence import Presence, Presences
from tenants.repeats import Kept, Repeats
from tenants.tables import metadata
from tests.integration.conftest import MakeCaller
from tests.integration.test_isolation import Resident, residents

__all__ = ["residents"]
NOBODY = TenantId(uuid.uuid4())


async def test_a_contained_tenant_is_refused_until_it_is_released(
    directory: Directory, lifecycle: Lifecycle, access: Access
) -> None:
    tenant = await directory.create_tenant("contained")
    _, token = await directory.keys.create(tenant.id, Role.SEARCH)
    contained = await lifecycle.contain(tenant.id)
    assert (contained.state, contained.suspended_at) == ("contained", None)
    assert (await lifecycle.contain(tenant.id)).contained_at == contained.contained_at
    with pytest.raises(TenantSuspended):
        await access.authenticate(token)
    assert await lifecycle.halted([str(tenant.id), str(NOBODY)], []) == (
        frozenset({tenant.id, NOBODY}),
        frozenset(),
    )
    released = await lifecycle.release(tenant.id)
    assert released == tenant
    assert (await access.authenticate(token)).tenant == tenant.id
    assert await lifecycle.halted([str(tenant.id)], []) == (frozenset(), frozenset())


async def test_releasing_does_not_undo_a_suspension(directory: Directory, lifecycle: Lifecycle) -> None:
    tenant = await directory.create_tenant("both")
    await directory.suspend_tenant(tenant.id)
    await lifecycle.contain(tenant.id)
    assert (await lifecycle.release(tenant.id)).state == "suspended"


async def test_a_contained_key_is_refused_alone_until_it_is_released(
    directory: Directory, lifecycle: Lifecycle, access: Access
) -> None:
    tenant = await directory.create_tenant("one-key")
    key, token = await directory.keys.create(tenant.id, Role.SEARCH)
    _, other = await directory.keys.create(tenant.id, Role.SEARCH)
    contained = await lifecycle.contain_key(tenant.id, key.id)
    assert contained.contained_at is not None and contained.revoked_at is None
    with pytest.raises(KeyUnknown):
        await access.authenticate(token)
    assert await access.authenticate(other)
    assert await lifecycle.halted([], [key.id, "AAAAAAAAAAAA"]) == (frozenset(), frozenset({key.id}))
    assert await lifecycle.release_key(tenant.id, key.id) == key
    assert await access.authenticate(token)


async def test_a_deleted_tenant_is_refused_and_can_be_restored(
    directory: Directory, lifecycle: Lifecycle, access: Access
) -> None:
    tenant = await directory.create_tenant("regretted")
    _, token = await directory.keys.create(tenant.id, Role.SEARCH)
    deleted = await lifecycle.delete(tenant.id, timedelta(days=30))
    assert deleted.state == "deleted"
    assert deleted.deleted_at is not None and deleted.purge_after is not None
    assert deleted.purge_after - deleted.deleted_at >= timedelta(days=30)
    with pytest.raises(TenantSuspended):
        await access.authenticate(token)
    with pytest.raises(TenantExists):
        await directory.create_tenant("regretted")
    assert tenant.id not in {each.id for each in await lifecycle.list_due()}
    assert await lifecycle.purge(tenant.id) == {}, "its grace is not over"
    assert await lifecycle.restore(tenant.id) == tenant
    assert await access.authenticate(token)
    assert await lifecycle.purge(tenant.id) == {}, "nobody deleted it"


async def test_a_purge_removes_every_row_but_the_entries(
    residents: tuple[Resident, Resident],
    directory: Directory,
    lifecycle: Lifecycle,
    database: Database,
    audit: Audit,
    superuser_url: str,
) -> None:
    gone, stays = residents[0].caller, residents[1].caller
    before = await audit.list_entries(gone.tenant)
    assert before
    await lifecycle.delete(gone.tenant, timedelta(0))
    assert gone.tenant in {each.id for each in await lifecycle.list_due()}
    async with database.together():
        removed = await lifecycle.purge(gone.tenant)
        receipt = await audit.append(gone.tenant, _purged(gone.tenant))
    walled = {
        table.name
        for table in metadata.tables.values()
        if ("tenant_id" in table.c or table.name == "tenant") and not table.name.startswith("audit_")
    }
    assert set(removed) == walled
    assert removed["key"] == removed["session"] == removed["tenant"] == 1
    assert await lifecycle.purge(gone.tenant) == {}
    connection = await asyncpg.connect(superuser_url)
    try:
        for table in sorted(walled):
            column = "id" if table == "tenant" else "tenant_id"
            count = f"select count(*) from pericarp.{table} where {column} = $1"
            assert await connection.fetchval(count, gone.tenant) == 0, table
            assert (
                table in ("ceiling", "alert_silence", "alert_told")
                or await connection.fetchval(count, stays.tenant) > 0
            ), table
    finally:
        await connection.close()
    after = await audit.list_entries(gone.tenant)
    assert [each.id for each in after] == [receipt, *(each.id for each in before)]
    with pytest.raises(TenantNotFound):
        await lifecycle.find(gone.tenant)
    with pytest.raises(TenantNotFound):
        await Audit(database, master_key=bytes(32)).fingerprints(gone.tenant)
    assert (await directory.create_tenant(gone.tenant_name)).id != gone.tenant


def _purged(tenant: TenantId) -> Entry:
    return Entry(str(uuid.uuid4()), tenant, "", "gateway", "admin.tenant_purge", Decision.ANSWERED, "ok", 200)


async def test_what_is_not_there_is_reported(directory: Directory, lifecycle: Lifecycle) -> None:
    tenant = await directory.create_tenant("keyless")
    for change in (lifecycle.find, lifecycle.contain, lifecycle.release, lifecycle.restore):
        with pytest.raises(TenantNotFound):
            await change(NOBODY)
    with pytest.raises(TenantNotFound):
        await lifecycle.delete(NOBODY, timedelta(days=1))
    with pytest.raises(KeyNotFound):
        await lifecycle.contain_key(tenant.id, "AAAAAAAAAAAA")
    with pytest.raises(ValueError, match="grace"):
        await lifecycle.delete(tenant.id, timedelta(days=-1))


async def test_tenants_come_in_pages_by_name_and_state(directory: Directory, lifecycle: Lifecycle) -> None:
    made = [await directory.create_tenant(f"paged-{number}") for number in range(5)]
    await lifecycle.contain(made[2].id)
    first = await directory.list_tenants(after="paged", most=2)
    assert [tenant.name for tenant in first] == ["paged-0", "paged-1"]
    rest = await directory.list_tenants(after="paged-1", most=3)
    assert [tenant.name for tenant in rest] == ["paged-2", "paged-3", "paged-4"]
    contained = await directory.list_tenants(state="contained")
    assert "paged-2" in {tenant.name for tenant in contained}
    assert {tenant.state for tenant in contained} == {"contained"}


async def test_workers_are_told_by_their_gateways(
    database: Database, presences: Presences, make_caller: MakeCaller
) -> None:
    first, second = (await make_caller()).tenant, (await make_caller()).tenant
    one, other = uuid.uuid4(), uuid.uuid4()
    await presences.report(one, [Presence(str(first), 7, 2, 30, 60.0), Presence(str(second), 8, 0, 1, 1.0)])
    await presences.report(other, [Presence(str(first), 7, 0, 0, 0.5)])
    told = await presences.list(first)
    assert {(each.gateway, each.pid, each.running, each.jobs) for each in told} == {
        (one, 7, 2, 30),
        (other, 7, 0, 0),
    }
    assert {each.tenant for each in await presences.list_all()} >= {first, second}
    await presences.report(one, [Presence(str(NOBODY), 9, 0, 0, 0.0)])  # purged meanwhile: no reason to fail
    assert [each.gateway for each in await presences.list(first)] == [other]
    assert await presences.list(second) == ()


async def test_an_answer_is_forgotten_in_time(
    repeats: Repeats, database: Database, make_caller: MakeCaller
) -> None:
    caller = await make_caller()
    await repeats.keep(caller.tenant, caller.key_id, "past", bytes(32), Kept(b"1", None), kept_s=0)
    await repeats.keep(caller.tenant, caller.key_id, "kept", bytes(32), Kept(b"2", None))
    async with database.together():
        assert await repeats.find(caller.tenant, caller.key_id, "past", bytes(32)) is None
        assert await repeats.find(caller.tenant, caller.key_id, "kept", bytes(32)) == Kept(b"2", None)
    await repeats.keep(caller.tenant, caller.key_id, "past again", bytes(32), Kept(b"1", None), kept_s=0)
    assert await repeats.forget() >= 1
