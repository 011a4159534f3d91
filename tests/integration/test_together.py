"""Changes of several tenants that stand or fall together, and the entry beside them."""

from __future__ import annotations

import asyncio
import uuid

import pytest
from sqlalchemy import select, text

from tenants import tables
from tenants.access import TenantId
from tenants.audit import Audit, Decision, Entry, decode
from tenants.database import Database
from tenants.directory import Directory
from tenants.errors import EntryInvalid, TenantExists, TenantNotFound
from tenants.policy import Policy

SEEN = text("select name from pericarp.tenant order by name")


def entry(tenant: TenantId, **details: object) -> Entry:
    return Entry(
        request_id=str(uuid.uuid4()),
        tenant=tenant,
        key_id="",
        role="operator",
        operation="admin.test",
        decision=Decision.ANSWERED,
        code="ok",
        status=200,
        details=details,
    )


async def test_a_change_and_its_entry_stand_together(
    database: Database, directory: Directory, audit: Audit
) -> None:
    async with database.together():
        tenant = await directory.create_tenant("together-1")
        written = entry(tenant.id, name="together-1", counts=[1, 2])
        receipt = await audit.append(tenant.id, written)
    assert await directory.find_tenant("together-1") == tenant
    (recorded,) = await audit.list_entries(tenant.id)
    assert recorded.id == receipt
    assert decode(recorded.body).details == {"name": "together-1", "counts": [1, 2]}


async def test_a_change_without_its_entry_does_not_stand(
    database: Database, directory: Directory, audit: Audit
) -> None:
    tenant = await directory.create_tenant("together-2")
    with pytest.raises(EntryInvalid):
        async with database.together():
            assert await directory.set_policy(tenant.id, Policy(text_length=5)) == 2
            await audit.append(tenant.id, entry(tenant.id, share=0.5))
    assert await directory.find_policy(tenant.id) == Policy()
    assert await audit.list_entries(tenant.id) == ()


async def test_each_part_sees_its_own_tenant_alone(database: Database, directory: Directory) -> None:
    first, second = [await directory.create_tenant(f"part-{number}") for number in (1, 2)]
    async with database.together():
        for tenant in (first, second, first):
            async with database.transaction(tenant.id) as connection:
                assert (await connection.execute(SEEN)).scalars().all() == [tenant.name]
        async with database.outside_tenants() as connection:
            assert (await connection.execute(SEEN)).scalars().all() == []
        async with database.transaction(first.id) as connection:
            async with database.transaction(second.id):
                assert (await connection.execute(SEEN)).scalars().all() == [second.name]
            assert (await connection.execute(SEEN)).scalars().all() == [first.name]


async def test_a_part_that_fails_takes_only_itself_where_somebody_catches_it(
    database: Database, directory: Directory
) -> None:
    await directory.create_tenant("taken")
    async with database.together():
        kept = await directory.create_tenant("kept")
        with pytest.raises(TenantExists):
            await directory.create_tenant("taken")
        with pytest.raises(TenantNotFound):
            await directory.set_policy(TenantId(uuid.uuid4()), Policy())
        async with database.outside_tenants() as connection:
            assert (await connection.execute(SEEN)).scalars().all() == []
    assert await directory.find_tenant("kept") == kept


async def test_blocks_nest_and_the_outermost_commits(database: Database, directory: Directory) -> None:
    with pytest.raises(ZeroDivisionError):
        async with database.together():
            async with database.together():
                await directory.create_tenant("nested")
            raise ZeroDivisionError
    with pytest.raises(TenantNotFound):
        await directory.find_tenant("nested")


async def test_another_task_takes_no_part(database: Database, directory: Directory) -> None:
    async def look() -> list[object]:
        async with database.transaction(tenant.id) as connection:
            return list((await connection.execute(select(tables.tenant.c.id))).scalars())

    async with database.together():
        tenant = await directory.create_tenant("own-task")
        assert await look() == [tenant.id]
        assert await asyncio.create_task(look()) == []
