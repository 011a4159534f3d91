"""No tenant sees or touches another's rows: by row security itself, and through every method there is."""

from __future__ import annotations

import ast
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from tenants.access import INSTALLATION, Access, Caller, Role, TenantId
from tenants.audit import Audit, Decision, Entry, ItemPrint
from tenants.canaries import Canaries, Canary
from tenants.ceiling import Ceiling
from tenants.database import Database
from tenants.denials import Denials
from tenants.directory import Directory
from tenants.envelope import Envelope
from tenants.errors import (
    EntryNotFound,
    KeyNotFound,
    QuotaExceeded,
    ReceiptNotFound,
    SearchNotFound,
    SessionNotFound,
)
from tenants.evidence import Evidence, Measure, Screened
from tenants.keys import Key
from tenants.policies import Setter
from tenants.policy import Policy
from tenants.presence import Presence, Presences
from tenants.proofs import Proofs
from tenants.quotas import Hold, Quotas
from tenants.repeats import Kept, Repeats
from tenants.reviews import Place, Reviews, Verdict
from tenants.risk import Category, Mode
from tenants.search import Filter, Search
from tenants.searches import Searches
from tenants.sequencer import Sequencer, log_signer
from tenants.sessions import Session, Sessions, make_session_id
from tenants.silences import Silences
from tenants.tables import metadata
from tenants.thresholds import Thresholds
from tenants.told_alerts import ToldAlerts
from tests.integration.conftest import MakeCaller
from tests.integration.test_schema import TENANTLESS

ROOT = Path(__file__).resolve().parents[2]
CLOSED = ("audit_retention", "audit_warrant")
"""What the runtime role may not even read: functions alone do."""
THE_INSTALLATION_S = ("alert_silence", "alert_told")
"""Whose rows no tenant has."""
TABLES = sorted(
    (
        table
        for table in metadata.tables.values()
        if table.name not in {*TENANTLESS, *CLOSED, *THE_INSTALLATION_S}
    ),
    key=lambda table: table.name,
)


@dataclass(frozen=True, slots=True)
class Resident:
    """A tenant with at least one row in every table."""

    caller: Caller
    key: Key
    hold: Hold
    receipt: uuid.UUID
    session: Session


@pytest.fixture
async def residents(
    database: Database,
    directory: Directory,
    quotas: Quotas,
    audit: Audit,
    sessions: Sessions,
    denials: Denials,
    presences: Presences,
    repeats: Repeats,
    make_caller: MakeCaller,
) -> AsyncIterator[tuple[Resident, Resident]]:
    async def settle_in() -> Resident:
        caller = await make_caller(Policy(concurrent_requests=1))
        (key,) = await directory.keys.list(caller.tenant)
        await directory.policies.set_ceiling(Ceiling(sessions=1000), tenant=caller.tenant)
        session_id = make_session_id()
        opening = replace(
            entry_for(caller, str(uuid.uuid4())),
            session=session_id,
            query=ItemPrint("x" * 43, 1),
            details={"screening": {"action": "flag", "risks": {"text": {"hate": [900_000, 600_000]}}}},
        )
        session, receipt = await sessions.open(caller, session_id, opening)
        hold = await quotas.hold(caller, str(uuid.uuid4()), images=1)
        with pytest.raises(QuotaExceeded):
            await quotas.hold(caller, str(uuid.uuid4()), images=0)
        await denials.deny(caller.tenant, "jwt:test", str(uuid.uuid4()))
        await presences.report(uuid.uuid4(), [Presence(str(caller.tenant), 1, 0, 0, 0.0)])
        await repeats.keep(caller.tenant, caller.key_id, "once", bytes(32), Kept(b"{}", None))
        await learn(database, directory, caller.tenant)
        await Searches(database).save(caller.tenant, "mine", {}, by="")
        assert (await Sequencer(database, log_signer(bytes(32))).step()).integrated
        return Resident(caller, key, hold, receipt, session)

    first, second = await settle_in(), await settle_in()
    yield first, second
    for resident in (first, second):
        await quotas.release(resident.hold)


async def learn(database: Database, directory: Directory, tenant: TenantId) -> None:
    """A threshold that was moved and rolled back, with what it learnt from."""
    place = Place(uuid.uuid4(), "query", Category.HATE, Mode.TEXT)
    evidence, reviews = Evidence(database), Reviews(database)
    measures = [Measure(place.category, 0.9, 0.6, for_review=True)]
    evidence.note(tenant, [Screened(place.entry_id, place.item, place.mode, "user", "1", measures)])
    await evidence.write()
    await reviews.decide(tenant, place, Verdict.HARMFUL, by=Setter())
    thresholds = Thresholds(database, directory.policies)
    await thresholds.tighten(tenant, place.category, place.mode)
    async with database.transaction(tenant) as connection:
        await connection.execute(text("update pericarp.threshold set threshold = 0.55"))
    await thresholds.roll_back(tenant, place.category, place.mode, by=Setter())
    await Canaries(database).set(tenant, [Canary(place.category, place.mode, "fixed", 0.9, "1")])


@pytest.fixture
async def plain(app_url: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """The runtime role on a connection without our code around it."""
    connection = await asyncpg.connect(app_url)
    yield connection
    await connection.close()


def entry_for(caller: Caller, request_id: str) -> Entry:
    return Entry(
        request_id, caller.tenant, caller.key_id, caller.role, "rerank", Decision.ANSWERED, "ok", 200
    )


# -- row security itself (facts/tenancy.md §4; the row of the experiment in brackets) -----------------------------


async def test_the_owner_without_a_tenant_sees_nothing(
    owner_url: str, residents: tuple[Resident, Resident]
) -> None:
    """[2] FORCE holds for the owner; only the look-up functions' tables have a policy of its own."""
    connection = await asyncpg.connect(owner_url)
    try:
        for table in ("quota", "audit_inbox"):
            assert await connection.fetchval(f"select count(*) from pericarp.{table}") == 0
        assert await connection.execute("update pericarp.key set name = 'taken'") == "UPDATE 0"
        assert await connection.execute("update pericarp.tenant set name = 'taken'") == "UPDATE 0"
    finally:
        await connection.close()


@pytest.mark.parametrize("table", TABLES, ids=lambda table: str(table.name))
async def test_without_a_tenant_there_are_no_rows(
    plain: asyncpg.Connection[asyncpg.Record], residents: tuple[Resident, Resident], table: object
) -> None:
    """[5, 9, 10] Also on a connection that was bound before: the variable is then '' and not NULL."""
    count = f"select count(*) from {table}"
    if str(table) == "pericarp.key_secret":
        count = f"select count(key_id) from {table}"
    assert await plain.fetchval(count) == 0
    for resident in residents:
        async with plain.transaction():
            await plain.execute("select set_config('app.tenant_id', $1, true)", str(resident.caller.tenant))
            assert await plain.fetchval(count) > 0
        assert await plain.fetchval("select current_setting('app.tenant_id', true)") == ""
        assert await plain.fetchval(count) == 0


async def test_what_is_the_installation_s_own_no_tenant_sees(
    database: Database, residents: tuple[Resident, Resident]
) -> None:
    await Silences(database).add(["alertname=Any"], lasts_s=60, by="operator")
    await ToldAlerts(database).tell(uuid.uuid4(), [{"fingerprint": "f", "startsAt": "2026-01-01T00:00:00Z"}])
    for table in THE_INSTALLATION_S:
        seen = []
        for tenant in (INSTALLATION, residents[0].caller.tenant):
            async with database.transaction(tenant) as connection:
                rows = await connection.execute(text(f"select count(*) from pericarp.{table}"))
                seen.append(rows.scalar_one())
        assert seen[0] > 0 and seen[1] == 0, table


@pytest.mark.parametrize("table", CLOSED)
async def test_what_only_functions_read_is_closed(
    plain: asyncpg.Connection[asyncpg.Record], residents: tuple[Resident, Resident], table: str
) -> None:
    async with plain.transaction():
        await plain.execute("select set_config('app.tenant_id', $1, true)", str(residents[0].caller.tenant))
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with plain.transaction():
                await plain.fetchval(f"select count(*) from pericarp.{table}")


@pytest.mark.parametrize("table", TABLES, ids=lambda table: str(table.name))
async def test_a_bound_transaction_sees_its_own_rows_alone(
    database: Database, residents: tuple[Resident, Resident], table: object
) -> None:
    """[6]"""
    assert hasattr(table, "c")
    column = table.c.id if table.name == "tenant" else table.c.tenant_id  # type: ignore[attr-defined]
    for resident in residents:
        async with database.transaction(resident.caller.tenant) as connection:
            seen = set((await connection.execute(select(column))).scalars())
        assert seen == {resident.caller.tenant}
    async with database.outside_tenants() as connection:
        assert (await connection.execute(select(column))).all() == []


@pytest.mark.parametrize(
    "statement",
    [
        "insert into pericarp.key (tenant_id, id, role, kind) values (:other, 'AAAAAAAAAAAA', 'search', 'data')",
        "insert into pericarp.policy (tenant_id, version, body) values (:other, 99, '{}')",
        "insert into pericarp.ceiling (tenant_id, version, set_by, set_role, body) values (:other, 9, '', '', '{}')",
        "insert into pericarp.tenant (id, name) values (:other, 'taken')",
        "insert into pericarp.key_secret (tenant_id, key_id, digest, pepper_version)"
        " values (:other, 'AAAAAAAAAAAA', sha256('x'), 1)",
        "insert into pericarp.audit_inbox (tenant_id, request_id, schema_version, body)"
        " values (:other, gen_random_uuid(), 1, '{}')",
        "insert into pericarp.denied_token (tenant_id, issuer, jti, until) values (:other, 'i', 'j', now())",
        "insert into pericarp.threshold (tenant_id, category, mode, threshold, anchor, day, day_began_at, stepped_on)"
        " values (:other, 'gore', 'text', 0.5, 0.5, now(), 0.5, now())",
        "insert into pericarp.threshold_change (tenant_id, category, mode, version, before, after, anchor, reason,"
        " evidence, set_by, set_role) values (:other, 'gore', 'text', 9, 0.5, 0.5, 0.5, '', '{}', '', '')",
        "insert into pericarp.review (tenant_id, entry_id, item, category, mode, score, stopped, end_user, detectors,"
        " day) values (:other, gen_random_uuid(), 'query', 'gore', 'text', 1, true, '', '', now())",
        "insert into pericarp.traffic_user (tenant_id, day, mode, end_user, items) values (:other, now(), 'text', '', 1)",
        "insert into pericarp.saved_search (tenant_id, name, filters, saved_by) values (:other, 'x', '{}', '')",
        "insert into pericarp.canary (tenant_id, category, mode, name, detectors, score)"
        " values (:other, 'gore', 'text', 'x', '', 1)",
    ],
)
async def test_nothing_is_written_for_another_tenant(
    database: Database, residents: tuple[Resident, Resident], statement: str
) -> None:
    """[7]"""
    first, second = residents
    with pytest.raises(DBAPIError, match="row-level security"):
        async with database.transaction(first.caller.tenant) as connection:
            await connection.execute(text(statement), {"other": second.caller.tenant})


@pytest.mark.parametrize(
    "table",
    [
        "key",
        "key_secret",
        "policy",
        "tenant",
        "quota",
        "slot",
        "usage",
        "session",
        "denied_token",
        "repeat",
        "worker",
        "threshold",
        "threshold_change",
        "review",
        "traffic",
        "traffic_user",
        "canary",
        "saved_search",
    ],
)
async def test_no_row_moves_to_another_tenant(
    database: Database, residents: tuple[Resident, Resident], table: str
) -> None:
    """[8] The column is not even granted for updates."""
    column = "id" if table == "tenant" else "tenant_id"
    with pytest.raises(DBAPIError, match="permission denied"):
        async with database.transaction(residents[0].caller.tenant) as connection:
            await connection.execute(
                text(f"update pericarp.{table} set {column} = :other"), {"other": residents[1].caller.tenant}
            )


async def test_nothing_leaks_through_a_pooled_connection(
    app_url: str, residents: tuple[Resident, Resident]
) -> None:
    """[11, 12] One connection, bound by turns and left unbound between."""
    single = Database(app_url, pool_size=1, call_pool_size=1)
    await single.open()
    try:
        for resident in residents * 3:
            async with single.transaction(resident.caller.tenant) as connection:
                seen = (await connection.execute(text("select id from pericarp.tenant"))).scalars().all()
                assert seen == [resident.caller.tenant]
            with pytest.raises(ZeroDivisionError):
                async with single.transaction(resident.caller.tenant):
                    raise ZeroDivisionError
            async with single.outside_tenants() as connection:
                assert (await connection.execute(text("select id from pericarp.tenant"))).all() == []
            await single.call(
                "select pericarp.release($1, $2, 1, 1)", resident.caller.tenant, str(uuid.uuid4())
            )
            assert not (await single.call("select current_setting('app.tenant_id', true)"))[0][0]
    finally:
        await single.close()


async def test_what_fails_is_rolled_back(database: Database, make_caller: MakeCaller) -> None:
    caller = await make_caller()
    with pytest.raises(ZeroDivisionError):
        async with database.transaction(caller.tenant) as connection:
            await connection.execute(
                text("update pericarp.key set revoked_at = now(), revoked_reason = 'revoked'")
            )
            raise ZeroDivisionError
    async with database.transaction(caller.tenant) as connection:
        assert (await connection.execute(text("select revoked_at from pericarp.key"))).scalars().all() == [
            None
        ]


def test_tenant_ids_are_minted_in_five_places() -> None:
    """Whoever holds a TenantId got it from a proof, a key, the directory or the work list of pruning."""
    minted = {
        path.relative_to(ROOT).as_posix()
        for folder in ("service", "tenants", "models")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "TenantId"
    }
    assert minted == {
        f"tenants/{name}.py" for name in ("access", "directory", "lifecycle", "keys", "pruning")
    }


def test_only_the_database_module_commits() -> None:
    committing = {
        path.name
        for path in (ROOT / "tenants").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in {"commit", "begin"}
    }
    assert committing == {"database.py"}


# -- through every method ---------------------------------------------------------------------------------------


async def test_the_directory_keeps_tenants_apart(
    directory: Directory, residents: tuple[Resident, Resident]
) -> None:
    for mine, theirs in (residents, residents[::-1]):
        with pytest.raises(KeyNotFound):
            await directory.keys.revoke(mine.caller.tenant, theirs.key.id)
        assert await directory.keys.list(mine.caller.tenant) == (mine.key,)
        await directory.set_policy(mine.caller.tenant, Policy(text_length=7))
        assert await directory.find_policy(theirs.caller.tenant) == theirs.caller.policy
        await directory.set_policy(mine.caller.tenant, mine.caller.policy)
        await directory.suspend_tenant(mine.caller.tenant)
        assert (await directory.find_tenant(theirs.caller.tenant_name)).suspended_at is None
        await directory.resume_tenant(mine.caller.tenant)


async def test_a_key_is_its_own_tenants_alone(directory: Directory, access: Access) -> None:
    tenants = [await directory.create_tenant(f"keyed-{number}") for number in range(5)]
    tokens = {tenant.id: (await directory.keys.create(tenant.id, Role.SEARCH))[1] for tenant in tenants}
    for tenant, token in tokens.items():
        assert (await access.authenticate(token)).tenant == tenant


async def test_quotas_keep_tenants_apart(
    quotas: Quotas, audit: Audit, residents: tuple[Resident, Resident]
) -> None:
    for mine, theirs in (residents, residents[::-1]):
        posing = replace(theirs.hold, tenant=mine.caller.tenant)  # my tenant, their request
        assert not await quotas.release(posing)
        await quotas.settle(posing, entry_for(mine.caller, theirs.hold.request_id))
        with pytest.raises(QuotaExceeded):  # their one slot is still theirs
            await quotas.hold(theirs.caller, str(uuid.uuid4()), images=0)
        assert {entry.id for entry in await audit.list_entries(theirs.caller.tenant)} >= {theirs.receipt}
    again = await quotas.hold(residents[0].caller, residents[0].hold.request_id, images=1)
    assert (again.slot, again.token) == (residents[0].hold.slot, residents[0].hold.token)


async def test_the_same_request_id_of_two_tenants_is_two_requests(
    quotas: Quotas, make_caller: MakeCaller
) -> None:
    """[13] No unique constraint tells one tenant what another has."""
    request_id = str(uuid.uuid4())
    first, second = await make_caller(), await make_caller()
    holds = [await quotas.hold(caller, request_id, images=0) for caller in (first, second)]
    receipts = [
        await quotas.settle(hold, entry_for(caller, request_id))
        for hold, caller in zip(holds, (first, second), strict=True)
    ]
    assert receipts[0] != receipts[1]


async def test_sessions_keep_tenants_apart(sessions: Sessions, residents: tuple[Resident, Resident]) -> None:
    for mine, theirs in (residents, residents[::-1]):
        tenant, session_id = mine.caller.tenant, theirs.session.id
        closing = replace(entry_for(mine.caller, str(uuid.uuid4())), session=session_id)
        with pytest.raises(SessionNotFound):
            await sessions.find(tenant, session_id)
        with pytest.raises(SessionNotFound):
            await sessions.use(tenant, session_id)
        with pytest.raises(SessionNotFound):
            await sessions.close(tenant, session_id, closing)
        assert await sessions.list_open(tenant) == (mine.session,)
        assert await sessions.gone([(tenant, session_id)]) == [(tenant, session_id)]
        assert await sessions.find(theirs.caller.tenant, session_id) == theirs.session


async def test_the_log_keeps_tenants_apart(
    database: Database, audit: Audit, residents: tuple[Resident, Resident]
) -> None:
    proofs = Proofs(database, log_signer(bytes(32)).key)
    for mine, theirs in (residents, residents[::-1]):
        assert [entry.id for entry in await audit.list_entries(mine.caller.tenant)] == [mine.receipt]
        assert await audit.list_entries(mine.caller.tenant, before=theirs.receipt) == ()
        proof = await proofs.prove(mine.caller.tenant, str(mine.receipt))
        assert Envelope.parse(proof.extra).id == mine.receipt
        with pytest.raises(ReceiptNotFound):
            await proofs.prove(mine.caller.tenant, str(theirs.receipt))
    assert await audit.list_entries(TenantId(uuid.uuid4())) == ()


async def test_the_search_keeps_tenants_apart(
    database: Database, residents: tuple[Resident, Resident]
) -> None:
    search = Search(database)
    for mine, theirs in (residents, residents[::-1]):
        tenant = mine.caller.tenant
        for asked in (Filter(), Filter(fingerprint="x" * 43), Filter(risk_above=0.5), Filter(action="flag")):
            page = await search.page(tenant, asked, most=9)
            assert [entry.id for entry in page.found] == [mine.receipt]
            assert sum(each.count for each in await search.count(tenant, asked)) == 1
        with pytest.raises(EntryNotFound):
            await search.find(tenant, theirs.receipt)


async def test_saved_searches_keep_tenants_apart(
    database: Database, residents: tuple[Resident, Resident]
) -> None:
    searches = Searches(database)
    first, second = (resident.caller.tenant for resident in residents)
    await searches.save(first, "only-mine", {"decision": "denied"}, by="")
    with pytest.raises(SearchNotFound):
        await searches.find(second, "only-mine")
    with pytest.raises(SearchNotFound):
        await searches.delete(second, "only-mine")
    assert [each.name for each in await searches.list(second)] == ["mine"]
    assert (await searches.save(second, "only-mine", {}, by="")).filters == {}
    assert (await searches.find(first, "only-mine")).filters == {"decision": "denied"}
