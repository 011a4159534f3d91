"""What goes out of the log, and that every proof of it still holds: erased keys, erased subjects, pruned bodies.

Entries of long ago are written with their time by the database's superuser, and are of an honest log otherwise: the
trigger makes their leaves of it.
"""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError

from service import erasing
from service.deeds import OPERATOR, Actor
from service.desk import Desk, build_desk
from service.erasing import Erasing
from service.installation import Installation
from tenants import embedded, pruning
from tenants.access import INSTALLATION, TenantId
from tenants.audit import Entry, decode, encode
from tenants.database import Database
from tenants.erasure import Erasure, rewrite_keys
from tenants.errors import EntryNotFound, TenantNotFound
from tenants.log_export import export_log
from tenants.policy import Policy
from tenants.provisioning import Urls
from tenants.pruning import Pruning
from tenants.search import Filter, Search
from tenants.sequencer import log_signer
from tests.integration.conftest import Secrets, run_as_superuser, with_database
from tests.integration.served import Served, serve, until
from tests.integration.test_audit import entry_for
from tests.integration.test_receipts import VERIFY
from tests.integration.test_tampering import DISARM

REASON = "request 17 of 2026"
DAYS = 30


@dataclass
class Log:
    """A log of its own database, its administrators' desk, and whoever checks it."""

    desk: Desk
    urls: Urls
    superuser: asyncpg.Connection[asyncpg.Record]
    vkey: str
    folder: Path

    async def tenant(self, **policy: Any) -> TenantId:
        name = f"tenant-{secrets.token_hex(6)}"
        return (await self.desk.directory.create_tenant(name, Policy(**policy))).id

    async def record(self, tenant: TenantId, *, days: float = 0, **changes: Any) -> uuid.UUID:
        """An entry as it is written, so many days ago."""
        entry = entry_for(tenant, **changes)
        if not days:
            return await self.desk.audit.record(entry)
        found: uuid.UUID = await self.superuser.fetchval(
            "insert into pericarp.audit_inbox (tenant_id, request_id, recorded_at, schema_version, body)"
            " values ($1, $2, clock_timestamp() - $3::interval, 1, $4) returning id",
            tenant,
            uuid.UUID(entry.request_id),
            timedelta(days=days),
            encode(entry),
        )
        return uuid.UUID(int=found.int)

    async def body(self, tenant: TenantId, entry: uuid.UUID) -> bytes | None:
        found: bytes | None = await self.superuser.fetchval(
            "select body from pericarp.audit_inbox where tenant_id = $1 and id = $2", tenant, entry
        )
        return found

    async def kept(self, tenant: TenantId, *entries: uuid.UUID) -> list[bool]:
        return [await self.body(tenant, entry) is not None for entry in entries]

    async def told(self, tenant: TenantId, operation: str) -> list[Entry]:
        """The tenant's entries of that operation, newest first."""
        recorded = await self.desk.audit.list_entries(tenant, limit=1_000)
        entries = [decode(each.body) for each in recorded if each.body]
        return [entry for entry in entries if entry.operation == operation]

    async def step(self) -> None:
        while (await self.desk.sequencer.step()).integrated:
            pass

    async def prune(self) -> dict[TenantId, int]:
        """As gateways do it day by day, until nothing is left to do; how many bodies of whom went."""
        gone: dict[TenantId, int] = {}

        def told(tenant: TenantId, bodies: int) -> None:
            gone[tenant] = gone.get(tenant, 0) + bodies

        pruned = Pruning(self.desk.database)
        while True:
            await erasing_of(self.desk).prune_due(told)
            await self.step()
            if not await pruned.list_open() and not await pruned.list_due():
                return gone

    async def verify(self, *more: object, tenant: str | None = None) -> subprocess.CompletedProcess[str]:
        """What `tools/verify.py` says of a fresh export."""
        file = self.folder / f"{secrets.token_hex(4)}.jsonl"
        with file.open("wb") as out:
            async for line in export_log(self.urls.owner_url, tenant=tenant):
                out.write(line)
        return self.checked("export", file, *more)

    def checked(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-I", VERIFY, *map(str, arguments), "--key", self.vkey],
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
        )

    async def receipt(self, tenant: TenantId, entry: uuid.UUID) -> Path:
        """An entry's receipt, as whoever got the answer keeps it."""
        file = self.folder / f"{entry}.tlog-proof"
        file.write_text((await self.desk.proofs.prove(tenant, str(entry))).text)
        return file


def erasing_of(desk: Desk) -> Erasing:
    """Another gateway's: the day's work is to be done by it as well."""
    return Erasing(
        database=desk.database,
        deeds=desk.deeds,
        audit=desk.audit,
        erasure=Erasure(desk.database, master_key=bytes(32)),
        pruning=Pruning(desk.database),
        sequencer=desk.sequencer,
    )


def operator() -> Actor:
    return Actor(OPERATOR)


@pytest.fixture
async def log(
    postgres_server: embedded.Server, template: Urls, installation_secrets: Secrets, tmp_path: Path
) -> AsyncIterator[Log]:
    name = f"erasure_{secrets.token_hex(6)}"
    await run_as_superuser(
        postgres_server.superuser_url,
        f"create database {name} template {make_url(template.app_url).database} owner pericarp_owner",
        f"grant connect on database {name} to pericarp_app",
    )
    urls = Urls(with_database(template.owner_url, name), with_database(template.app_url, name))
    database = Database(urls.app_url)
    await database.open()
    superuser = await asyncpg.connect(with_database(postgres_server.superuser_url, name))
    desk = build_desk(database, Installation(urls.app_url, urls.owner_url, *installation_secrets.keys))
    yield Log(desk, urls, superuser, log_signer(installation_secrets.log_key).key.text, tmp_path)
    await superuser.close()
    await database.close()
    await run_as_superuser(postgres_server.superuser_url, f"drop database {name} with (force)")


# -- a tenant's key ---------------------------------------------------------------------------------------------


async def test_after_a_tenants_erasure_nothing_ties_an_entry_to_its_input_and_every_proof_holds(
    log: Log,
) -> None:
    tenant = await log.tenant()
    before = (await log.desk.audit.fingerprints(tenant)).item("the input", b"pixels")
    entry = await log.record(tenant, query=before)
    await log.step()
    receipt, body = await log.receipt(tenant, entry), await log.body(tenant, entry)
    assert await found_by(log, tenant, before.text, before.image) == [entry]
    actor = operator()
    await log.desk.erasing.erase(actor, tenant, reason=REASON)
    after = (await log.desk.audit.fingerprints(tenant)).item("the input", b"pixels")
    assert after.text != before.text and after.image != before.image
    assert await log.body(tenant, entry) == body, "an entry is never changed"
    assert await found_by(log, tenant, after.text, after.image) == [], "an auditor's recomputation"
    await log.step()
    assert (await log.verify()).returncode == 0
    for file in (receipt, await log.receipt(tenant, entry)):
        done = log.checked("receipt", file, "--id", entry)
        assert done.returncode == 0, done.stderr
    (told,) = await log.told(tenant, "admin.audit_erase")
    assert (told.role, told.details, told.status) == (OPERATOR, {"reason": REASON}, 200)
    assert actor.receipt is not None


async def found_by(log: Log, tenant: TenantId, *fingerprints: str) -> list[uuid.UUID]:
    erasure = Erasure(log.desk.database, master_key=b"")
    return [each async for page in erasure.find(tenant, fingerprints) for each in page]


async def test_the_key_goes_with_its_entry_or_stays(log: Log) -> None:
    tenant = await log.tenant()
    before = (await log.desk.audit.fingerprints(tenant)).text("x")
    entry = await log.record(tenant)
    request = await log.superuser.fetchval("select request_id from pericarp.audit_inbox where id = $1", entry)
    actor = Actor(OPERATOR, request_id=str(request), address="192.0.2.1")
    with pytest.raises(IntegrityError):  # the request has its entry already
        await log.desk.erasing.erase(actor, tenant, reason=REASON)
    log.desk.audit.forget_all()
    assert (await log.desk.audit.fingerprints(tenant)).text("x") == before
    with pytest.raises(TenantNotFound):
        await log.desk.erasing.erase(operator(), TenantId(uuid.uuid4()), reason=REASON)


async def test_who_erases_is_told_under_the_new_key(log: Log) -> None:
    tenant = await log.tenant()
    await log.desk.audit.fingerprints(tenant)
    await log.desk.erasing.erase(Actor(OPERATOR, address="192.0.2.1"), tenant, reason=REASON)
    (told,) = await log.told(tenant, "admin.audit_erase")
    assert told.client == (await log.desk.audit.fingerprints(tenant)).address("192.0.2.1")


async def test_a_replaced_key_is_left_in_no_file_of_its_table(log: Log) -> None:
    tenant = await log.tenant()
    wrapped = await log.superuser.fetchval("select audit_key from pericarp.tenant where id = $1", tenant)

    async def in_file() -> bool:
        await log.superuser.execute("checkpoint")
        found: bool = await log.superuser.fetchval(
            "select position($1::bytea in pg_read_binary_file(pg_relation_filepath('pericarp.tenant'))) > 0",
            wrapped,
        )
        return found

    await log.desk.erasing.erase(operator(), tenant, reason=REASON)
    assert await in_file(), "a row that was replaced stays in its page for a while"
    await rewrite_keys(log.urls.owner_url)
    assert not await in_file()


def test_every_gateway_drops_an_erased_key(
    service: Served, app_url: str, installation_secrets: Secrets
) -> None:
    """What one keeps for a minute it forgets within seconds, whoever erased it."""
    name, key = service.search_key()
    ask = {"query": "the same", "documents": ["a"]}

    def printed() -> str:
        return str(service.entries(name)[0]["query"]["text"])

    with serve(app_url, *installation_secrets.keys) as other:
        assert service.rerank(ask, key).status_code == 200
        before = printed()
        assert other.rerank(ask, key).status_code == 200
        assert printed() == before

        async def erase() -> None:
            tenant = await service.desk.directory.find_tenant(name)
            await service.desk.erasing.erase(operator(), tenant.id, reason=REASON)

        service.wait(erase())

        def dropped(gateway: Served) -> Callable[[], bool]:
            def look() -> bool:
                assert gateway.rerank(ask, key).status_code == 200
                return printed() != before

            return look

        for gateway in (other, service):
            until(dropped(gateway), within_s=20)
            after = printed()
            assert gateway.rerank(ask, key).status_code == 200
            assert printed() == after, "one key for all of them"


# -- a subject --------------------------------------------------------------------------------------------------


async def test_a_subjects_entries_lose_their_bodies_and_no_one_elses_do(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasing, "ENTRIES", 2)
    tenant, other = await log.tenant(), await log.tenant()
    prints = await log.desk.audit.fingerprints(tenant)
    anna = {"subject": prints.subject("anna")}
    theirs = [await log.record(tenant, details=anna) for _ in range(3)]
    theirs += [await log.record(tenant, details={"end_user": prints.end_user("anna")}) for _ in range(2)]
    ben = await log.record(tenant, details={"subject": prints.subject("ben")})
    elsewhere = (await log.desk.audit.fingerprints(other)).subject("anna")
    stays = await log.record(other, details={"subject": elsewhere})
    for whose, print_ in (
        (tenant, prints.subject("anna")),
        (tenant, prints.end_user("anna")),
        (tenant, prints.subject("ben")),
        (other, elsewhere),
    ):
        await learn(log, whose, print_)
    await log.step()
    receipt = await log.receipt(tenant, theirs[0])
    erased = await log.desk.erasing.erase_subject(operator(), tenant, "anna", reason=REASON)
    assert (erased.entries, erased.rows, len(erased.warrants)) == (5, 4, 3)
    assert await log.kept(tenant, *theirs, ben) == [False] * 5 + [True]
    assert await log.kept(other, stays) == [True]
    assert await learnt(log) == {(tenant, prints.subject("ben")), (other, elsewhere)}
    done = await log.verify()
    assert done.returncode == 0, done.stderr
    assert "5 erased for a person" in done.stdout
    done = log.checked("receipt", receipt, "--id", theirs[0])
    assert done.returncode == 0, done.stderr
    told = await log.told(tenant, "admin.subject_erase")
    assert sorted(each for entry in told for each in entry.details["entries"]) == sorted(map(str, theirs))  # type: ignore[attr-defined]
    assert prints.subject("anna") not in str(told), "the word that erases does not tie them to a person again"

    again = await log.desk.erasing.erase_subject(operator(), tenant, "anna", reason=REASON)
    assert (again.entries, again.rows, len(again.warrants)) == (0, 0, 1)
    later = await log.record(tenant, details=anna)
    await log.step()
    assert await log.kept(tenant, later) == [True]
    assert (await log.verify()).returncode == 0


async def learn(log: Log, tenant: TenantId, end_user: str) -> None:
    """A row of each table that thresholds keep of end users."""
    await log.superuser.execute(
        "insert into pericarp.traffic_user (tenant_id, day, mode, end_user, items)"
        " values ($1, current_date, 'text', $2, 1)",
        tenant,
        end_user,
    )
    await log.superuser.execute(
        "insert into pericarp.review (tenant_id, entry_id, item, category, mode, score, stopped, end_user, detectors, day)"
        " values ($1, gen_random_uuid(), 'query', 'violence', 'text', 0.9, true, $2, '', current_date)",
        tenant,
        end_user,
    )


async def learnt(log: Log) -> set[tuple[TenantId, str]]:
    rows = await log.superuser.fetch(
        "select tenant_id, end_user from pericarp.traffic_user union select tenant_id, end_user from pericarp.review"
    )
    return {(TenantId(uuid.UUID(int=row["tenant_id"].int)), row["end_user"]) for row in rows}


# -- retention --------------------------------------------------------------------------------------------------


async def test_bodies_go_when_their_policys_time_is_over_and_every_proof_holds(log: Log) -> None:
    short, long = await log.tenant(retention_days=DAYS), await log.tenant(retention_days=400)
    old, due, young = [await log.record(short, days=days) for days in (300, DAYS + 1.5, DAYS - 1)]
    theirs = await log.record(long, days=300)
    await log.step()
    receipt = await log.receipt(short, old)
    assert (await log.prune())[short] == 2
    assert await log.kept(short, old, due, young) == [False, False, True]
    assert await log.kept(long, theirs) == [True]
    (told,) = await log.told(short, "admin.log_prune")
    assert (told.role, told.details["bodies"], told.details["retention_days"]) == ("gateway", 2, DAYS)
    assert await log.told(long, "admin.log_prune") == []
    done = await log.verify("--retention-days", DAYS)
    assert done.returncode == 0, done.stderr
    assert "2 pruned after 30 days or more" in done.stdout
    done = await log.verify("--retention-days", DAYS + 1)
    assert done.returncode == 1 and "bodies are pruned after 30 days, not 31" in done.stderr
    for file in (receipt, await log.receipt(short, old)):
        done = log.checked("receipt", file, "--id", old)
        assert done.returncode == 0, done.stderr
    assert await log.prune() == {}, "nothing is due twice"
    listed = {each.id: each.body for each in await log.desk.audit.list_entries(short)}
    assert listed[old] == b"" and listed[young]


async def test_no_body_goes_before_the_word_for_it_is_in_the_tree(log: Log) -> None:
    tenant = await log.tenant(retention_days=DAYS)
    entry = await log.record(tenant, days=DAYS + 2)
    await log.step()
    gateway = erasing_of(log.desk)
    for _ in range(3):
        await gateway.prune_due(lambda *_: pytest.fail("nothing may go"))
    assert await log.kept(tenant, entry) == [True]
    assert len(await log.told(tenant, "admin.log_prune")) == 1
    assert (await log.prune())[tenant] == 1
    assert await log.kept(tenant, entry) == [False]


async def test_many_bodies_go_in_parts_each_with_its_word(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "BODIES", 4)
    monkeypatch.setattr(pruning, "BATCH", 3)
    tenant = await log.tenant(retention_days=DAYS)
    entries = [await log.record(tenant, days=DAYS + 40 - number) for number in range(10)]
    stays = await log.record(tenant)
    await log.step()
    assert (await log.prune())[tenant] == 10
    assert await log.kept(tenant, *entries, stays) == [False] * 10 + [True]
    assert [each.details["bodies"] for each in await log.told(tenant, "admin.log_prune")] == [2, 4, 4]
    assert (await log.verify()).returncode == 0


async def test_gateways_at_once_prune_once(log: Log) -> None:
    tenant = await log.tenant(retention_days=DAYS)
    for _ in range(20):
        await log.record(tenant, days=DAYS + 2)
    await log.step()
    gone: list[int] = []

    def told(of: TenantId, bodies: int) -> None:
        if of == tenant:
            gone.append(bodies)

    for _ in range(2):
        await asyncio.gather(*(erasing_of(log.desk).prune_due(told) for _ in range(4)))
        await log.step()
    assert sum(gone) == 20
    assert len(await log.told(tenant, "admin.log_prune")) == 1


async def test_a_purged_tenants_entries_are_kept_as_its_policy_said(log: Log) -> None:
    tenant = await log.tenant(retention_days=DAYS)
    old, young = await log.record(tenant, days=DAYS + 2), await log.record(tenant, days=DAYS - 2)
    await log.step()
    await log.desk.lifecycle.delete(tenant, timedelta(0))
    await log.desk.administration.purge(await log.desk.lifecycle.find(tenant), operator())
    assert await log.kept(tenant, old, young) == [True, True]
    assert (await log.prune())[tenant] == 1
    assert await log.kept(tenant, old, young) == [False, True]
    assert (await log.verify()).returncode == 0


async def test_the_installations_own_log_is_kept_for_the_default(log: Log) -> None:
    days = Policy().retention_days
    old, young = [await log.record(INSTALLATION, days=each) for each in (days + 2, days - 2)]
    await log.step()
    assert (await log.prune())[INSTALLATION] == 1
    assert await log.kept(INSTALLATION, old, young) == [False, True]
    assert (await log.verify()).returncode == 0


async def test_the_word_itself_goes_in_its_turn(log: Log) -> None:
    """A later one covers what it covered."""
    tenant = await log.tenant(retention_days=1)
    first = await log.record(tenant, days=9)
    erased = await log.record(tenant, days=8)
    details = {"reason": REASON, "rows": 0, "entries": [str(erased)]}
    word = await log.record(tenant, days=7, operation="admin.subject_erase", details=details)
    await log.step()
    await Pruning(log.desk.database).issue(tenant, word)
    assert await Pruning(log.desk.database).prune(tenant, word) == 1
    assert (await log.prune())[tenant] == 2
    assert await log.kept(tenant, first, erased, word) == [False] * 3
    done = await log.verify()
    assert done.returncode == 0, done.stderr


async def test_what_an_entry_is_looked_up_by_goes_with_its_body(log: Log) -> None:
    tenant = await log.tenant(retention_days=DAYS)
    prints = await log.desk.audit.fingerprints(tenant)
    told: dict[str, Any] = {
        "query": prints.item("a \x00 query", b"pixels"),
        "documents": (prints.item("one", None), prints.item("two", b"more pixels")),
        "session": "s",
        "role": "a \x00 role",
        "details": {"screening": {"action": "mask", "risks": {"text": {"hate": [900_000, 600_000]}}}},
    }
    old, young = await log.record(tenant, days=DAYS + 2, **told), await log.record(tenant, **told)
    await log.step()
    search = Search(log.desk.database)
    asked = Filter(fingerprint=prints.text("two"), session="s", risk_above=0.5)
    assert [each.id for each in (await search.page(tenant, asked, most=9)).found] == [young, old]
    assert await indexed(log, old) == await indexed(log, young) == [1, 5, 2]
    for table in ("audit_search", "audit_input", "audit_risk"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="never changed"):
            await log.superuser.execute(f"delete from pericarp.{table} where id = '{old}'")
    assert (await log.prune())[tenant] == 1
    assert [await indexed(log, each) for each in (old, young)] == [[0, 0, 0], [1, 5, 2]]
    assert [each.id for each in (await search.page(tenant, asked, most=9)).found] == [young]
    request = await log.superuser.fetchval("select request_id from pericarp.audit_inbox where id = $1", old)
    assert (await search.page(tenant, Filter(request_id=request), most=9)).found == ()
    with pytest.raises(EntryNotFound):
        await search.find(tenant, old)
    assert (await search.find(tenant, young)).body
    assert (await log.verify()).returncode == 0


async def indexed(log: Log, entry: uuid.UUID) -> list[int]:
    """Its rows in each table that auditors search by."""
    return [
        await log.superuser.fetchval(f"select count(*) from pericarp.{table} where id = $1", entry)
        for table in ("audit_search", "audit_input", "audit_risk")
    ]


# -- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["origin", "replica"])
@pytest.mark.parametrize(
    "change",
    [
        "body = '{}'",
        "body = null, schema_version = 2",
        "body = null, recorded_at = recorded_at - interval '1 day'",
        "body = null, orphan = true",
        "orphan = true",
    ],
)
async def test_a_warrant_lets_a_body_go_and_nothing_else(log: Log, mode: str, change: str) -> None:
    tenant, entry = await with_warrant(log)
    await log.superuser.execute(f"set session_replication_role = '{mode}'")
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="never changed"):
        await log.superuser.execute(f"update pericarp.audit_inbox set {change} where id = '{entry}'")
    assert await log.kept(tenant, entry) == [True]


async def test_a_warrant_lets_go_what_it_names_alone(log: Log) -> None:
    tenant, _ = await with_warrant(log)
    young, other = await log.record(tenant), await log.record(await log.tenant(), days=DAYS + 9)
    for refused in (young, other):
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="never changed"):
            await log.superuser.execute(f"update pericarp.audit_inbox set body = null where id = '{refused}'")
    assert (await log.prune())[tenant] == 1
    done = await log.record(tenant, days=DAYS + 9)
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="never changed"):
        await log.superuser.execute(f"update pericarp.audit_inbox set body = null where id = '{done}'")
    for statement in (
        "delete from pericarp.audit_warrant",
        "update pericarp.audit_warrant set before = now()",
        "truncate pericarp.audit_retention",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="never changed"):
            await log.superuser.execute(statement)


async def with_warrant(log: Log) -> tuple[TenantId, uuid.UUID]:
    """An entry that is due, its warrant in the tree."""
    tenant = await log.tenant(retention_days=DAYS)
    entry = await log.record(tenant, days=DAYS + 2)
    await log.step()
    await erasing_of(log.desk).prune_due(lambda *_: None)
    await log.step()
    return tenant, entry


@pytest.mark.parametrize(
    ("operation", "days_ago", "retention_days"),
    [
        ("admin.log_prune", DAYS - 1, DAYS),
        ("admin.log_prune", DAYS + 1, DAYS - 1),
        ("admin.log_prune", DAYS + 1, DAYS + 1),
        ("admin.policy_change", DAYS + 1, DAYS),
    ],
    ids=["too-early", "fewer-days", "more-days", "no-word"],
)
async def test_no_warrant_is_issued_against_the_policy(
    log: Log, operation: str, days_ago: int, retention_days: int
) -> None:
    tenant = await log.tenant(retention_days=DAYS)
    now = await log.superuser.fetchval("select (extract(epoch from clock_timestamp()) * 1000000)::bigint")
    details = {"before_us": now - days_ago * 86_400_000_000, "bodies": 0, "retention_days": retention_days}
    word = await log.record(tenant, operation=operation, details=details)
    with pytest.raises(DBAPIError, match="policy does not allow it"):
        await Pruning(log.desk.database).issue(tenant, word)
    honest = {**details, "before_us": now - (DAYS + 1) * 86_400_000_000, "retention_days": DAYS}
    word = await log.record(tenant, operation="admin.log_prune", details=honest)
    await Pruning(log.desk.database).issue(tenant, word)


async def test_no_word_takes_another_word_away(log: Log) -> None:
    """What that one covers would be covered by nothing."""
    tenant = await log.tenant()

    async def say(*entries: uuid.UUID) -> uuid.UUID:
        details = {"reason": REASON, "rows": 0, "entries": [str(each) for each in entries]}
        word = await log.record(tenant, operation="admin.subject_erase", details=details)
        await Pruning(log.desk.database).issue(tenant, word)
        return word

    first = await say(await log.record(tenant))
    with pytest.raises(DBAPIError, match="no warrant takes another one away"):
        await say(await log.record(tenant), first)


async def test_the_runtime_roles_take_no_body_away(log: Log) -> None:
    tenant, entry = await with_warrant(log)
    connection = await asyncpg.connect(log.urls.app_url)
    try:
        await connection.execute("select set_config('app.tenant_id', $1, false)", str(tenant))
        for role in ("pericarp_app", "pericarp_quota"):
            await connection.execute(f"set role {role}")
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute("update pericarp.audit_inbox set body = null")
    finally:
        await connection.close()
    assert await log.kept(tenant, entry) == [True]


async def test_an_entry_without_a_body_is_not_taken(log: Log) -> None:
    with pytest.raises(asyncpg.NotNullViolationError):
        await log.superuser.execute(
            "insert into pericarp.audit_inbox (tenant_id, request_id, schema_version) values ($1, $2, 1)",
            await log.tenant(),
            uuid.uuid4(),
        )


# -- what is found ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("days", [0, DAYS + 2], ids=["young", "old"])
async def test_a_body_that_somebody_took_away_is_told(log: Log, days: int) -> None:
    tenant = await log.tenant(retention_days=DAYS)
    entry = await log.record(tenant, days=days)
    await log.step()
    await disarmed(log, f"update pericarp.audit_inbox set body = null where id = '{entry}'")
    name = await log.superuser.fetchval("select name from pericarp.tenant where id = $1", tenant)
    done = await log.verify(tenant=name)
    assert done.returncode == 1
    assert "the body is gone, too early for its time, and no entry says so" in done.stderr
    assert str(entry) in done.stderr


async def test_a_word_that_is_too_early_is_told(log: Log) -> None:
    """Somebody writes the entry past the functions, and prunes by it."""
    tenant = await log.tenant(retention_days=DAYS)
    entry = await log.record(tenant, days=DAYS - 10)
    now = await log.superuser.fetchval("select (extract(epoch from clock_timestamp()) * 1000000)::bigint")
    details = {"before_us": now - 86_400_000_000, "bodies": 1, "retention_days": DAYS}
    await log.record(tenant, operation="admin.log_prune", details=details)
    await log.step()
    await disarmed(log, f"update pericarp.audit_inbox set body = null where id = '{entry}'")
    name = await log.superuser.fetchval("select name from pericarp.tenant where id = $1", tenant)
    done = await log.verify(tenant=name)
    assert done.returncode == 1 and "bodies are pruned that are younger than 30 days" in done.stderr


async def test_another_tenants_word_is_none(log: Log) -> None:
    tenant, entry = await with_warrant(log)
    stranger = await log.record(await log.tenant(retention_days=400), days=DAYS + 9)
    assert await log.prune() == {tenant: 1}
    await disarmed(log, f"update pericarp.audit_inbox set body = null where id = '{stranger}'")
    done = await log.verify()
    assert done.returncode == 1
    assert f"no entry says so (tenant {await owner_of(log, stranger)}, entry {stranger})" in done.stderr
    assert await log.kept(tenant, entry) == [False]


async def owner_of(log: Log, entry: uuid.UUID) -> uuid.UUID:
    found: uuid.UUID = await log.superuser.fetchval(
        "select tenant_id from pericarp.audit_inbox where id = $1", entry
    )
    return found


async def disarmed(log: Log, statement: str) -> None:
    """As somebody who first switches the triggers off."""
    for each in (*DISARM, statement):
        await log.superuser.execute(each)
