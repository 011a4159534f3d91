"""What prune keeps: the newest full backups with all upon them, and the last one that was verified with all below it."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
import uuid
from pathlib import Path

import pytest

from service.backup import BackupDamaged
from service.backup.pruning import Pruning
from service.backup.shelf import Shelved
from service.deeds import OPERATOR, Actor
from service.desk import Desk, build_desk
from service.housekeeping import tell_backups
from service.installation import Installation
from service.watch.metrics import render
from tenants.access import INSTALLATION
from tenants.audit import decode
from tenants.backups import Made
from tenants.database import Database
from tests.backup_shelf import Small, read, small
from tests.integration.conftest import Secrets, run_as_superuser


@pytest.fixture
def desk(database: Database, app_url: str, installation_secrets: Secrets) -> Desk:
    return build_desk(database, Installation(app_url, None, *installation_secrets.keys))


@pytest.fixture
def at(tmp_path: Path, superuser_url: str) -> Small:
    """An empty store, and a database that knows of no backup."""
    asyncio.run(run_as_superuser(superuser_url, "truncate pericarp.backup, pericarp.backup_check"))
    return small(tmp_path / "store")


def chain(at: Small, increments: int, model: Path | None = None) -> list[Shelved]:
    """A full backup and so many upon it."""
    made = [at.add(model=model)]
    for _ in range(increments):
        made.append(at.add(parent=made[-1], model=model))
    return made


async def verified(desk: Desk, shelved: Shelved) -> None:
    await desk.backups.note(shelved.manifest.made(shelved.note))
    await desk.backups.note_check(shelved.sequence, "verify", good=True, duration_s=1.0)


async def test_the_newest_chains_stay_whole(at: Small, desk: Desk) -> None:
    for increments in (2, 1, 2):
        chain(at, increments)
    pruning = Pruning(shelf=at.shelf, desk=desk)
    assert (await pruning.plan(3)).removed == ()
    plan = await pruning.plan(2)
    assert (plan.removed, plan.kept) == ((1, 2, 3), (4, 5, 6, 7, 8))
    await pruning.prune(Actor(OPERATOR), plan)
    assert [each.sequence for each in at.shelf.finished()] == [4, 5, 6, 7, 8]
    assert at.shelf.sequences() == [4, 5, 6, 7, 8]
    for each in at.shelf.finished():
        read(at.shelf, each, "database")
    newest = at.shelf.newest()
    assert newest is not None and [each.sequence for each in at.shelf.chain(newest)] == [6, 7, 8]
    entry = decode((await desk.audit.list_entries(INSTALLATION, limit=1))[0].body)
    assert (entry.operation, entry.details["removed"]) == ("admin.backup_prune", [1, 2, 3])


async def test_the_last_verified_one_stays_with_what_it_stands_upon(at: Small, desk: Desk) -> None:
    first = chain(at, 3)
    chain(at, 1)
    await verified(desk, first[0])
    await verified(desk, first[2])
    plan = await Pruning(shelf=at.shelf, desk=desk).plan(1)
    assert (plan.kept, plan.removed) == ((1, 2, 3, 5, 6), (4,))


async def test_fewer_backups_than_are_to_be_kept_all_stay(at: Small, desk: Desk) -> None:
    chain(at, 1)
    plan = await Pruning(shelf=at.shelf, desk=desk).plan(14)
    assert (plan.kept, plan.removed, plan.unfinished, plan.models) == ((1, 2), (), (), ())


async def test_a_run_that_was_cut_off_goes_once_a_later_one_was_finished(at: Small, desk: Desk) -> None:
    chain(at, 0)
    cut = at.begin()
    pruning = Pruning(shelf=at.shelf, desk=desk)
    assert (await pruning.plan(14)).unfinished == (), "it may still be at work"
    chain(at, 0)
    plan = await pruning.plan(14)
    assert plan.unfinished == (cut,)
    await pruning.prune(Actor(OPERATOR), plan)
    assert at.shelf.sequences() == [1, 3]


async def test_a_models_files_go_with_the_last_backup_that_has_them(
    at: Small, desk: Desk, tmp_path: Path
) -> None:
    for name, content in (("old", b"1"), ("new", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
        (tmp_path / name / "config.json").write_bytes(b"{}")  # the same in both
    chain(at, 0, tmp_path / "old")
    chain(at, 0, tmp_path / "new")
    pruning = Pruning(shelf=at.shelf, desk=desk)
    plan = await pruning.plan(1)
    assert len(plan.models) == 1
    await pruning.prune(Actor(OPERATOR), plan)
    assert (await pruning.plan(1)).models == ()
    whole = [path for path in at.files() if path.name == "whole"]
    assert len(whole) == 2, "what both had, and what is new"


async def test_nothing_goes_where_a_backup_that_stays_cannot_be_read(at: Small, desk: Desk) -> None:
    chain(at, 0)
    chain(at, 0)
    path = at.folder / at.shelf.path(2, "model.000000")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BackupDamaged):
        await Pruning(shelf=at.shelf, desk=desk).plan(1)
    assert at.shelf.sequences() == [1, 2]


async def test_a_pruned_backup_is_no_entrys_backup_any_more(at: Small, desk: Desk) -> None:
    base = 10**6 + secrets.randbelow(10**6) * 10
    for step, size in ((1, base), (2, base + 5)):
        await desk.backups.note(Made(base + step, uuid.uuid4(), "full", None, size, 1, bytes(32)))
    assert await desk.backups.of_leaf(base - 1) == base + 1
    await desk.backups.note_pruned([base + 1])
    assert await desk.backups.of_leaf(base - 1) == base + 2
    assert await desk.backups.of_leaf(base + 5) is None


async def test_the_standing_of_backups_is_told(at: Small, desk: Desk) -> None:
    await verified(desk, chain(at, 0)[0])
    standing = await desk.backups.standing()
    assert (
        standing.newest is not None
        and standing.backup_age_s is not None
        and standing.verified_age_s is not None
    )
    assert standing.drilled_age_s is None
    await desk.backups.note_check(1, "drill", good=False, duration_s=1.0)
    assert (await desk.backups.standing()).drilled_age_s is None, "one that failed is none"
    await desk.backups.note_check(1, "drill", good=True, duration_s=1.0)
    assert (await desk.backups.standing()).drilled_age_s is not None
    await tell_backups(desk.backups)
    told = render().decode()
    for step in ("run", "verify", "drill"):
        (line,) = re.findall(
            rf'^pericarp_backup_timestamp_seconds{{step="{step}"}} (\S+)$', told, re.MULTILINE
        )
        assert abs(float(line) - time.time()) < 3600, "now, and not 0"
