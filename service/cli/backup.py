"""`backup …`: make backups that restore, read them back, and restore them.

Exit status, for whoever runs these by a timer: 0 it is done and good, 1 there is a doubt or it failed, 2 it was asked wrongly.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from models import ModelError
from service.backup import BackupDoubted, BackupRefused
from service.backup.drilling import drill
from service.backup.key import BackupKey, derive, read_secret
from service.backup.making import Making
from service.backup.manifest import Manifest, Parent
from service.backup.pruning import Pruning
from service.backup.restoring import refuse_used, restore
from service.backup.shelf import Shelf, Shelved
from service.backup.store import open_store
from service.backup.verifying import Expected, Verifying, read_checkpoint
from service.backup.workplace import alone, scratch
from service.cli.console import JsonFlag, print_record, print_records
from service.cli.opening import installation, operator, work_in
from service.custody import read_trust
from service.desk import Desk
from service.installation import SECRET_BYTES, opened
from service.settings import Settings
from tenants.access import INSTALLATION
from tenants.backups import Known, Made
from tenants.base_backup import database_of
from tenants.checkpoint import VerifyKey
from tenants.sequencer import log_signer

app = typer.Typer(
    help="Backups that restore: encrypted, signed, read back, drilled. PERICARP_BACKUP_STORE says where they go.",
    no_args_is_help=True,
)
LIST_COLUMNS = [
    "sequence",
    "kind",
    "parent",
    "log_size",
    "stored_bytes",
    "recorded_at",
    "verified_at",
    "state",
]
Sequence = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="The backup of that sequence number; the newest if left out."),
]
Witnessed = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A checkpoint of the log that a witness or auditor kept: a backup that does not reach it is refused.",
    ),
]


@dataclass(frozen=True, slots=True)
class Opened:
    """What every command works with."""

    settings: Settings
    home: Path
    folder: Path
    shelf: Shelf
    log_key: VerifyKey


@app.command("run")
def run(
    full: Annotated[bool, typer.Option("--full", help="A full one, whatever may be incremental.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Make a backup: what changed since the last one, or a full one every PERICARP_BACKUP_INCREMENTS + 1 times.

    Works beside a running service. Run it every hour by a timer; see deploy/pericarp-backup.timer.
    """
    with installation() as (settings, found), _opened(settings, make=True) as at:
        if found.backup_url is None:
            raise typer.BadParameter("set PERICARP_BACKUP_DATABASE_URL: a role that may replicate")
        backup_url, database = found.backup_url, database_of(found.app_url)

        async def work(desk: Desk) -> dict[str, Any]:
            making = Making(settings=settings, folder=at.folder, desk=desk, shelf=at.shelf, progress=stage)
            done = await making.run(operator(), backup_url, database, full=full)
            manifest = done.shelved.manifest
            return {
                "sequence": manifest.sequence,
                "kind": manifest.kind,
                "why_full": done.why_full,
                "parent": manifest.parent.sequence if manifest.parent else None,
                "log_size": manifest.log_size,
                "database_bytes": done.database_bytes,
                "stored_bytes": manifest.stored_bytes,
                "model_files": done.model_files,
                "duration_s": round(done.duration_s, 3),
            }

        record = work_in(found, work)
    print_record("Backup", record, as_json=as_json)


@app.command("verify")
def verify(
    sequence: Sequence = None,
    checkpoint: Witnessed = None,
    as_json: JsonFlag = False,
) -> None:
    """Restore a backup into a scratch Postgres, read all of it, and compare its log with what is known of the log.

    Ends with 1 on any doubt. On a host without the installation's database it needs --checkpoint, and the secrets
    backup-key and log-key in the home.
    """
    _read_back("verify", sequence, checkpoint, as_json=as_json)


@app.command("drill")
def run_drill(sequence: Sequence = None, as_json: JsonFlag = False) -> None:
    """Recover from a backup into a scratch home until a service of its own answers /v1/rerank; tells each stage's time.

    Nothing of it is signed with the log's key, and nothing is left of it.
    """
    _read_back("drill", sequence, None, as_json=as_json)


@app.command("restore")
def restore_home(
    sequence: Sequence = None,
    checkpoint: Witnessed = None,
    as_json: JsonFlag = False,
) -> None:
    """Restore a backup into PERICARP_HOME, which must have no database, and the secrets of the installation.

    Cut off, run it again: it goes on. With --checkpoint it first makes sure that the backup is not older than that.
    The log goes on from the backup: read docs/backups.md before you serve, for erasures and witnesses.
    """
    settings = Settings()
    if settings.database_url is not None:
        raise typer.BadParameter("unset PERICARP_DATABASE_URL: what is restored is an embedded Postgres")
    with _opened(settings) as at:
        refuse_used(at.home)
        began = time.monotonic()
        shelved = _choose(at, sequence)
        expected = _expected(checkpoint, at.log_key)
        if expected and expected[0].checkpoint.size > shelved.manifest.log_size:
            lost = expected[0].checkpoint.size - shelved.manifest.log_size
            typer.echo(f"Up to {lost} entries that the checkpoint has may be missing: verifying.", err=True)
        if expected:
            with scratch(at.folder) as room:
                asyncio.run(_verifying(at).verify(shelved, room, live=None, witnessed=expected))
        done = restore(at.shelf, shelved, at.home, at.folder, at.home / "secrets", stage)
        duration_s = time.monotonic() - began
        with opened(settings) as found:
            work_in(found, lambda desk: _note(desk, shelved, "restore", duration_s))
    record = {
        "sequence": shelved.sequence,
        "log_size": shelved.manifest.log_size,
        "model": str(done.model) if done.model else None,
        "configuration": str(done.configuration),
        "duration_s": round(duration_s, 3),
        "stages_s": {name: round(value, 3) for name, value in done.stages_s.items()},
    }
    print_record("Restored", record, as_json=as_json)


@app.command("list")
def list_backups(as_json: JsonFlag = False) -> None:
    """Show the backups in the store, oldest first, and when each was read back. Each manifest's signature is verified."""
    with installation() as (settings, found), _opened(settings) as at:
        known = {each.sequence: each for each in work_in(found, lambda desk: desk.backups.list())}
        there = {each.sequence: each.manifest for each in at.shelf.finished()}
    records = [
        _tell(sequence, there.get(sequence), known.get(sequence)) for sequence in sorted({*known, *there})
    ]
    records = [record for record in records if record["state"] != "pruned"]
    print_records("Backups", LIST_COLUMNS, records, as_json=as_json)
    if any(record["state"] == "missing" for record in records):
        raise typer.Exit(1)


@app.command("prune")
def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Remove what PERICARP_BACKUP_KEEP full backups and those upon them leave over, and what was never finished.

    What a kept backup stands upon stays, and so does the newest one that was verified.
    """
    with installation() as (settings, found), _opened(settings) as at:

        async def work(desk: Desk) -> dict[str, Any]:
            pruning = Pruning(shelf=at.shelf, desk=desk)
            plan = await pruning.plan(settings.backup_keep)
            if not dry_run:
                await pruning.prune(operator(), plan)
            return {
                "kept": plan.kept,
                "removed": plan.removed,
                "unfinished": plan.unfinished,
                "model_files": plan.models,
            }

        record = work_in(found, work)
    print_record("Would be pruned" if dry_run else "Pruned", record, as_json=as_json)


def _tell(sequence: int, manifest: Manifest | None, row: Known | None) -> dict[str, Any]:
    """A backup as the store and the database have it."""
    told: Manifest | Made = manifest if manifest is not None else cast("Known", row)
    parent = told.parent.sequence if isinstance(told.parent, Parent) else told.parent
    if manifest is None:
        state = "pruned" if row is not None and row.pruned_at is not None else "missing"
    else:
        state = "kept" if row is not None else "not of this database"
    return {
        "sequence": sequence,
        "id": str(told.id),
        "kind": told.kind,
        "parent": parent,
        "log_size": told.log_size,
        "stored_bytes": told.stored_bytes,
        "versions": manifest.versions if manifest is not None else None,
        "recorded_at": row.recorded_at if row is not None else None,
        "verified_at": row.verified_at if row is not None else None,
        "state": state,
    }


@contextmanager
def stage(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, in bytes, for one stage; none where nobody looks."""
    columns = (
        *(SpinnerColumn(), TextColumn("{task.description}"), BarColumn()),
        *(DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn()),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda advance: bar.advance(task, advance)


@contextmanager
def _opened(settings: Settings, *, make: bool = False) -> Iterator[Opened]:
    """The store of this installation's backups, and the home's folder for them, for one command at a time."""
    os.umask(0o077)
    home = settings.home.resolve()
    store = open_store(settings.backup_store, timeout_s=settings.backup_timeout_s)
    signer = log_signer(_log_key(home))
    name = signer.key.name.rpartition("/")[2]
    key: BackupKey = derive(read_secret(settings, home, make=make), name)
    with alone(home) as folder:
        try:
            yield Opened(settings, home, folder, Shelf(store, key), signer.key)
        except OSError as exc:  # of files of this host: no room, no right
            raise BackupRefused(f"{exc.strerror or type(exc).__name__}: {exc.filename or folder}") from exc


def _log_key(home: Path) -> bytes:
    path = home / "secrets" / "log-key"
    if not path.is_file() or len(secret := path.read_bytes()) != SECRET_BYTES:
        raise typer.BadParameter(f"{path} is not there, or is none: it says whose backups these are")
    return secret


def _read_back(kind: str, sequence: int | None, checkpoint: Path | None, *, as_json: bool) -> None:
    """Verify or drill, and note what came of it where the installation is there."""
    settings = Settings()
    home = settings.home.resolve()
    is_here = settings.database_url is not None or (home / "postgres" / "location").exists()
    if not is_here and (kind == "drill" or checkpoint is None):
        needs = (
            "its database here"
            if kind == "drill"
            else "--checkpoint, for there is no database here to compare with"
        )
        raise typer.BadParameter(f"this needs {needs}")
    if not is_here:
        with _opened(settings) as at:
            record = asyncio.run(_verify(at, _choose(at, sequence), None, checkpoint))
        print_record("Verified", record, as_json=as_json)
        return
    with installation() as (settings, found), _opened(settings) as at:
        shelved = _choose(at, sequence)

        async def work(desk: Desk) -> dict[str, Any]:
            began = time.monotonic()
            good = False
            try:
                if kind == "verify":
                    record = await _verify(at, shelved, desk, checkpoint)
                else:
                    record = await asyncio.to_thread(_drill, at, shelved)
                good = True
            finally:
                await _note(desk, shelved, kind, time.monotonic() - began, good=good)
            return record

        record = work_in(found, work)
    print_record("Verified" if kind == "verify" else "Recovered", record, as_json=as_json)


async def _verify(at: Opened, shelved: Shelved, live: Desk | None, checkpoint: Path | None) -> dict[str, Any]:
    began = time.monotonic()
    with scratch(at.folder) as room:
        found = await _verifying(at).verify(
            shelved, room, live=live, witnessed=_expected(checkpoint, at.log_key)
        )
    return {
        "sequence": shelved.sequence,
        "backups_read": found.backups_read,
        "log_size": found.log_size,
        "bodies": found.bodies,
        "pruned": found.pruned,
        "model_files": found.model_files,
        "compared": found.compared,
        "duration_s": round(time.monotonic() - began, 3),
    }


def _drill(at: Opened, shelved: Shelved) -> dict[str, Any]:
    with scratch(at.folder) as room:
        done = drill(at.settings, at.shelf, shelved, room, stage)
    return {
        "sequence": shelved.sequence,
        "total_s": round(done.total_s, 3),
        "stages_s": {name: round(value, 3) for name, value in done.stages_s.items()},
    }


def _verifying(at: Opened) -> Verifying:
    try:
        trust = read_trust(at.settings)
    except ModelError as exc:
        raise BackupRefused(f"the model's signature cannot be checked: {exc}") from exc
    return Verifying(shelf=at.shelf, log_key=at.log_key, trust=trust, progress=stage)


def _choose(at: Opened, sequence: int | None) -> Shelved:
    shelved = at.shelf.newest() if sequence is None else at.shelf.find(sequence)
    if shelved is None:
        raise BackupDoubted("there is no backup" if sequence is None else f"there is no backup {sequence}")
    return shelved


def _expected(checkpoint: Path | None, log_key: VerifyKey) -> list[Expected]:
    if checkpoint is None:
        return []
    try:
        note = checkpoint.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise typer.BadParameter(f"{checkpoint} cannot be read: {exc}") from None
    return [Expected(read_checkpoint(note, log_key), str(checkpoint), reached=True)]


async def _note(desk: Desk, shelved: Shelved, kind: str, duration_s: float, *, good: bool = True) -> None:
    """What came of reading a backup back: a row and an entry, in one transaction."""
    async with desk.deeds.deed(operator(), f"backup_{kind}", tenant=INSTALLATION) as deed:
        deed.details = {
            "sequence": shelved.sequence,
            "good": int(good),
            "duration_us": round(duration_s * 1e6),
        }
        if kind == "restore":  # no backup has the row of itself
            await desk.backups.note(shelved.manifest.made(shelved.note))
        await desk.backups.note_check(shelved.sequence, kind, good=good, duration_s=duration_s)
