"""The tree over the log: every entry is in it exactly once, whoever integrates, whenever it breaks off."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import signal
import sys
import uuid
from collections.abc import AsyncIterator

import asyncpg
import pytest

from tenants import merkle
from tenants.access import Caller, TenantId
from tenants.audit import Audit, encode
from tenants.checkpoint import Signer, open_checkpoint
from tenants.database import Database, migrate
from tenants.envelope import Envelope
from tenants.errors import LogBroken
from tenants.sequencer import Sequencer, Step, log_signer
from tests.integration.conftest import MakeCaller, go_back, run_as_superuser
from tests.integration.test_audit import entry_for

SEED = secrets.token_bytes(32)


@pytest.fixture
def signer() -> Signer:
    """One key for all tests of this module: they share a log."""
    return log_signer(SEED)


@pytest.fixture
def sequencer(database: Database, signer: Signer) -> Sequencer:
    return Sequencer(database, signer)


@pytest.fixture
async def plain(superuser_url: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """The superuser, who sees everything."""
    connection = await asyncpg.connect(superuser_url)
    yield connection
    await connection.close()


async def record(audit: Audit, tenant: TenantId, count: int) -> list[uuid.UUID]:
    return [await audit.record(entry_for(tenant)) for _ in range(count)]


async def drain(sequencer: Sequencer) -> Step:
    while (step := await sequencer.step()).integrated:
        pass
    return step


async def check_whole(plain: asyncpg.Connection[asyncpg.Record], signer: Signer) -> None:
    """Every entry is a leaf once, every tile follows from the leaves, every checkpoint is a beginning of them."""
    leaves = await plain.fetch("select * from pericarp.audit_leaf order by index")
    assert [leaf["index"] for leaf in leaves] == list(range(len(leaves)))
    entries = {
        (row["tenant_id"], row["id"]): row for row in await plain.fetch("select * from pericarp.audit_inbox")
    }
    assert {(leaf["tenant_id"], leaf["id"]) for leaf in leaves} == set(entries)
    for leaf in leaves:
        envelope = Envelope.parse(leaf["envelope"])
        entry = entries[leaf["tenant_id"], leaf["id"]]
        assert envelope.pack() == leaf["envelope"]
        assert envelope.covers(entry["body"])
        assert (envelope.tenant, envelope.id) == (entry["tenant_id"], entry["id"])
        assert (envelope.request_id, envelope.orphan) == (entry["request_id"], entry["orphan"])
        assert envelope.schema_version == entry["schema_version"]
        moment = entry["recorded_at"]
        assert envelope.recorded_at_us == round(moment.timestamp() * 1_000_000)
    hashes = [merkle.hash_leaf(leaf["envelope"]) for leaf in leaves]
    tiles = merkle.grow(0, hashes, lambda level, number: b"")
    stored = await plain.fetch("select * from pericarp.audit_tile")
    assert {(row["level"], row["number"]): row["hashes"] for row in stored} == tiles
    for row in await plain.fetch("select * from pericarp.audit_checkpoint"):
        checkpoint = open_checkpoint(row["note"], [signer.key], origin=signer.key.name).checkpoint
        assert (checkpoint.size, checkpoint.root) == (row["size"], row["root"])
        assert checkpoint.root == merkle.root(row["size"], lambda level, number: tiles[level, number])


async def leaves(plain: asyncpg.Connection[asyncpg.Record], caller: Caller) -> list[uuid.UUID]:
    """Ids of the tenant's entries in the tree, in its order."""
    found = await plain.fetch(
        "select id from pericarp.audit_leaf where tenant_id = $1 order by index", caller.tenant
    )
    return [row["id"] for row in found]


async def test_entries_become_leaves_in_the_order_of_the_queue(
    audit: Audit,
    sequencer: Sequencer,
    signer: Signer,
    make_caller: MakeCaller,
    plain: asyncpg.Connection[asyncpg.Record],
) -> None:
    first, second = await make_caller(), await make_caller()
    made = []
    for _ in range(3):
        made += await record(audit, first.tenant, 1)
        made += await record(audit, second.tenant, 1)
    before = await plain.fetchval("select count(*) from pericarp.audit_leaf")
    step = await sequencer.step()
    assert (step.integrated, step.size) == (6, before + 6)
    assert (await sequencer.step()).integrated == 0
    found = await plain.fetch("select id from pericarp.audit_leaf where index >= $1 order by index", before)
    assert [row["id"] for row in found] == made
    await check_whole(plain, signer)


async def test_a_clock_that_was_set_back_changes_no_order(
    audit: Audit,
    sequencer: Sequencer,
    signer: Signer,
    make_caller: MakeCaller,
    plain: asyncpg.Connection[asyncpg.Record],
) -> None:
    caller = await make_caller()
    made = await record(audit, caller.tenant, 2)
    for hours in (1, 2):  # what a later entry looks like whose clock was set back
        made.append(
            await plain.fetchval(
                "insert into pericarp.audit_inbox (tenant_id, request_id, recorded_at, schema_version, body)"
                " values ($1, gen_random_uuid(), clock_timestamp() - interval '1 hour' * $2, 1, $3) returning id",
                caller.tenant,
                hours,
                encode(entry_for(caller.tenant)),
            )
        )
    await drain(sequencer)
    assert await leaves(plain, caller) == made
    await check_whole(plain, signer)


async def test_a_rolled_back_entry_leaves_no_leaf_and_no_gap(
    audit: Audit,
    database: Database,
    sequencer: Sequencer,
    signer: Signer,
    make_caller: MakeCaller,
    plain: asyncpg.Connection[asyncpg.Record],
) -> None:
    caller = await make_caller()
    with pytest.raises(ZeroDivisionError):
        async with database.together():
            await audit.append(caller.tenant, entry_for(caller.tenant))
            raise ZeroDivisionError
    (kept,) = await record(audit, caller.tenant, 1)
    await drain(sequencer)
    assert await leaves(plain, caller) == [kept]
    await check_whole(plain, signer)


async def test_many_sequencers_and_writers_at_once_put_every_entry_in_once(
    app_url: str,
    audit: Audit,
    sequencer: Sequencer,
    signer: Signer,
    make_caller: MakeCaller,
    plain: asyncpg.Connection[asyncpg.Record],
) -> None:
    caller = await make_caller()
    writing = True

    async def integrate() -> int:
        database = Database(app_url, pool_size=1, call_pool_size=2)
        await database.open()
        try:
            own, done = Sequencer(database, signer), 0
            while writing:
                done += (await own.step()).integrated
                await asyncio.sleep(0)
            return done
        finally:
            await database.close()

    integrating = [asyncio.create_task(integrate()) for _ in range(3)]
    await asyncio.gather(*(record(audit, caller.tenant, 60) for _ in range(8)))
    writing = False
    counts = await asyncio.gather(*integrating)
    await drain(sequencer)
    assert sum(counts) > 0
    found = await plain.fetchval(
        "select count(*) from pericarp.audit_leaf where tenant_id = $1", caller.tenant
    )
    assert found == 480
    await check_whole(plain, signer)


async def test_a_step_that_breaks_off_has_not_happened(
    app_url: str,
    audit: Audit,
    sequencer: Sequencer,
    signer: Signer,
    make_caller: MakeCaller,
    plain: asyncpg.Connection[asyncpg.Record],
) -> None:
    """The connection is cut before, between and after the two calls of a step, as a kill of the gateway cuts it."""
    caller = await make_caller()
    await record(audit, caller.tenant, 5)
    before = await plain.fetchval("select coalesce(max(size), 0) from pericarp.audit_checkpoint")
    victim = await asyncpg.connect(app_url)
    await victim.execute("set role pericarp_quota")
    row = None
    for done in range(3):
        transaction = victim.transaction()
        await transaction.start()
        if done >= 1:
            row = await victim.fetchrow("select * from pericarp.begin_integration(10)")
            assert row is not None and row["locked"]
            await victim.execute("set local idle_in_transaction_session_timeout = 0")
            assert (await sequencer.step()).size is None  # another has the lock
        if done >= 2:
            assert row is not None
            await victim.execute(
                "select pericarp.integrate($1, $2, '{0}', '{999}', $3, $4, 'note')",
                before,
                row["positions"],
                [bytes(32)],
                bytes(32),
            )
        victim.terminate()
        victim = await asyncpg.connect(app_url)
        await victim.execute("set role pericarp_quota")
    await victim.close()
    while (
        step := await sequencer.step()
    ).size is None:  # until the server has noticed that the victim is gone
        await asyncio.sleep(0.01)
    await drain(sequencer)
    assert step.size == before + 5
    await check_whole(plain, signer)


async def test_leaves_that_were_queued_twice_are_in_the_tree_once(
    audit: Audit,
    sequencer: Sequencer,
    signer: Signer,
    make_caller: MakeCaller,
    plain: asyncpg.Connection[asyncpg.Record],
) -> None:
    """As after a restore of rows alone, whose triggers fire."""
    caller = await make_caller()
    await record(audit, caller.tenant, 3)
    await drain(sequencer)
    await plain.execute(
        "insert into pericarp.audit_waiting (envelope) select envelope from pericarp.audit_leaf where tenant_id = $1",
        caller.tenant,
    )
    await record(audit, caller.tenant, 2)
    assert (await sequencer.step()).integrated == 0
    assert (await sequencer.step()).integrated == 2
    assert await plain.fetchval("select count(*) from pericarp.audit_waiting") == 0
    await check_whole(plain, signer)


async def test_the_tree_of_another_key_is_not_grown(
    audit: Audit, database: Database, sequencer: Sequencer, make_caller: MakeCaller
) -> None:
    caller = await make_caller()
    await record(audit, caller.tenant, 1)
    await drain(sequencer)
    with pytest.raises(LogBroken, match="not signed by"):
        await Sequencer(database, log_signer(bytes(32))).step()


@pytest.mark.parametrize("moment", range(5))
async def test_a_kill_at_any_moment_of_a_step_loses_and_doubles_nothing(
    app_url: str,
    audit: Audit,
    sequencer: Sequencer,
    signer: Signer,
    make_caller: MakeCaller,
    plain: asyncpg.Connection[asyncpg.Record],
    moment: int,
) -> None:
    caller = await make_caller()
    made = await record(audit, caller.tenant, 3)
    await drain(sequencer)
    made += await record(audit, caller.tenant, 4)
    before = await plain.fetchval("select max(size) from pericarp.audit_checkpoint")
    killed = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.integration.dying_sequencer", app_url, SEED.hex(), str(moment))
    )
    assert await killed.wait() == -signal.SIGKILL
    while (step := await sequencer.step()).size is None:  # until the server has noticed that it is gone
        await asyncio.sleep(0.01)
    assert (step.integrated, step.size) == (0 if moment == 4 else 4, before + 4)
    assert await leaves(plain, caller) == made
    await check_whole(plain, signer)


async def test_entries_from_before_the_tree_are_queued_by_the_migration(
    audit: Audit,
    make_caller: MakeCaller,
    owner_url: str,
    database: Database,
    signer: Signer,
    plain: asyncpg.Connection[asyncpg.Record],
) -> None:
    caller = await make_caller()
    made = await record(audit, caller.tenant, 3)
    await go_back(owner_url, "0013")
    made += await record(audit, caller.tenant, 2)
    await migrate(owner_url)
    made += await record(audit, caller.tenant, 1)
    await drain(Sequencer(database, signer))
    assert await leaves(plain, caller) == made
    assert await plain.fetchval(
        "select relforcerowsecurity from pg_class where oid = 'pericarp.audit_inbox'::regclass"
    )
    await check_whole(plain, signer)


async def test_a_purged_tenants_leaves_stay(
    audit: Audit,
    sequencer: Sequencer,
    signer: Signer,
    make_caller: MakeCaller,
    superuser_url: str,
    plain: asyncpg.Connection[asyncpg.Record],
) -> None:
    caller = await make_caller()
    await record(audit, caller.tenant, 2)
    await drain(sequencer)
    await run_as_superuser(
        superuser_url,
        f"update pericarp.tenant set deleted_at = now(), purge_after = now() where id = '{caller.tenant}'",
    )
    await plain.fetch("select * from pericarp.purge_tenant($1)", caller.tenant)
    assert await plain.fetchval("select count(*) from pericarp.tenant where id = $1", caller.tenant) == 0
    await check_whole(plain, signer)


def test_an_origin_is_made_from_the_key() -> None:
    one, other = log_signer(bytes(32)), log_signer(b"x" * 32)
    assert one.key.name != other.key.name
    assert one.key.name == f"pericarp/log/{hashlib.sha256(one.key.public).hexdigest()[:32]}"
