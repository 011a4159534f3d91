"""Doctor's look at a real database and its log: what was changed there is found, and nothing is changed by looking."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.doctor import database, log
from service.doctor.check import Finding, State, Unseen
from service.doctor.sight import Sight
from service.settings import Settings
from tenants.audit import Audit, Decision, Entry
from tenants.database import Database
from tenants.directory import Directory
from tenants.sequencer import Sequencer, log_signer
from tests.integration.conftest import Secrets, run_as_superuser


@pytest.fixture
def sight(app_url: str, installation_secrets: Secrets, tmp_path: Path) -> Iterator[Sight]:
    """An installation with a Postgres of its own, and no service."""
    folder = tmp_path / "secrets"
    folder.mkdir()
    for name, secret in zip(("pepper", "master-key", "log-key"), installation_secrets.keys, strict=True):
        (folder / name).write_bytes(secret)
    # Nothing listens on port 1.
    with Sight(Settings(home=tmp_path, database_url=app_url, port=1)) as made:
        yield made


def harm(superuser_url: str, *statements: str) -> None:
    asyncio.run(run_as_superuser(superuser_url, *statements))


def test_a_database_as_it_should_be_holds(sight: Sight) -> None:
    for look in (
        database.look_at_schema,
        database.look_at_role,
        database.look_at_rows,
        database.look_at_durability,
        database.look_at_statements,
        database.look_at_connection,
        database.look_at_clock,
    ):
        found = look(sight)
        assert (found.state, found.remedy) == (State.HOLDS, ""), found.seen


@pytest.mark.parametrize(
    ("look", "fault", "harms", "mends"),
    [
        (
            database.look_at_rows,
            "table tenant does not force row security",
            "alter table pericarp.tenant no force row level security",
            "alter table pericarp.tenant force row level security",
        ),
        (
            database.look_at_role,
            "role pericarp_app may make roles",
            "alter role pericarp_app createrole",
            "alter role pericarp_app nocreaterole",
        ),
        (
            database.look_at_durability,
            "synchronous_commit is off",
            "alter role pericarp_app set synchronous_commit = off",
            "alter role pericarp_app reset synchronous_commit",
        ),
        (
            database.look_at_statements,
            "log_statement is all",
            "alter role pericarp_app set log_statement = 'all'",
            "alter role pericarp_app reset log_statement",
        ),
        (
            database.look_at_schema,
            "it stands at 0001",
            "update pericarp.alembic_version set version_num = '0001'",
            "",
        ),
    ],
    ids=["row security", "role", "commit", "statements", "schema"],
)
def test_what_was_changed_there_is_found(
    sight: Sight, superuser_url: str, look: object, fault: str, harms: str, mends: str
) -> None:
    assert callable(look)
    needed = sight.examination.needed
    harm(superuser_url, harms)
    try:
        del sight.examination
        found: Finding = look(sight)
    finally:
        harm(superuser_url, mends or f"update pericarp.alembic_version set version_num = '{needed}'")
    assert found.state is State.BROKEN and fault in found.seen and found.remedy


def test_a_log_that_holds_is_told_from_one_that_waits_and_one_that_was_changed(
    sight: Sight,
    app_url: str,
    superuser_url: str,
    installation_secrets: Secrets,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(log, "LAG_S", 1.0)

    async def grow(*, integrate: bool) -> None:
        opened = Database(app_url)
        await opened.open()
        try:
            if integrate:
                await Sequencer(opened, log_signer(installation_secrets.log_key)).step()
            else:
                directory = Directory(
                    opened, pepper=installation_secrets.pepper, master_key=installation_secrets.master_key
                )
                tenant = await directory.create_tenant("watched")
                audit = Audit(opened, master_key=installation_secrets.master_key)
                entry = Entry(
                    str(uuid.uuid4()), tenant.id, "", "gateway", "test", Decision.ANSWERED, "ok", 200
                )
                await audit.append(tenant.id, entry)
        finally:
            await opened.close()

    asyncio.run(grow(integrate=False))
    with pytest.raises(
        Unseen, match="no service answers"
    ):  # it waits, and nobody runs who would integrate it
        log.look_at_lag(sight)
    sight.readiness = {}
    assert log.look_at_lag(sight).state is State.BROKEN
    asyncio.run(grow(integrate=True))
    assert log.look_at_lag(sight).state is State.HOLDS
    assert log.look_at_tree(sight) == Finding(State.HOLDS, "1 entries")
    assert "no witness" in log.look_at_witnesses(sight).seen
    harm(
        superuser_url,
        "alter table pericarp.audit_tile disable trigger all",
        "update pericarp.audit_tile set hashes = sha256(hashes)",
    )
    found = log.look_at_tree(sight)
    assert found.state is State.BROKEN and "do not lead to its root" in found.seen


def test_a_database_that_is_away_cannot_be_told(installation_secrets: Secrets, tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    folder.mkdir()
    for name in ("pepper", "master-key", "log-key"):
        (folder / name).write_bytes(bytes(32))
    url = "postgresql://pericarp_app:x@127.0.0.1:1/pericarp"
    with (
        Sight(Settings(home=tmp_path, database_url=url)) as away,
        pytest.raises(Unseen, match="does not answer"),
    ):
        database.look_at_role(away)
