"""`backup run`: a full backup, or what changed since the last one; whole in the store, and noted, or not there.

The order is that of trust: first the log's tree is grown by what waits and its checkpoint taken, then the model's files, the
configuration, and the database as it is streamed; the signed manifest comes last. Each incremental backup stands upon the
one before, as Postgres' WAL summaries tell what changed since.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from service import __version__
from service.backup import BackupDoubted, BackupRefused, Progress
from service.backup.archive import Kept, Members, catching
from service.backup.configuration import collect
from service.backup.manifest import CONFIGURATION, DATABASE, DATABASE_MANIFEST, MODEL, Manifest
from service.backup.model_files import folder_of, keep_model
from service.backup.parts import Part, SealedPart, open_part
from service.backup.workplace import scratch
from tenants import base_backup
from tenants.access import INSTALLATION
from tenants.base_backup import BaseBackupFailed, Source
from tenants.database import schema_head
from tenants.errors import LogBroken

if TYPE_CHECKING:
    from service.backup.shelf import Shelf, Shelved
    from service.deeds import Actor
    from service.desk import Desk
    from service.settings import Settings
    from tenants.backups import Known
    from tenants.checkpoint import Checkpoint

PIECE_BYTES = 2**18
AGAIN_S = 0.1


@dataclass(frozen=True, slots=True)
class Done:
    """A backup that was made."""

    shelved: Shelved
    why_full: str
    """Why it is no incremental one; empty where it is."""
    model_files: int
    """Of the model; 0 where its files are not on this host."""
    database_bytes: int
    duration_s: float


class Making:
    """Makes backups of one open installation."""

    def __init__(
        self, *, settings: Settings, folder: Path, desk: Desk, shelf: Shelf, progress: Progress
    ) -> None:
        """`folder` is the workplace, in the home."""
        self._settings = settings
        self._folder = folder
        self._desk = desk
        self._shelf = shelf
        self._progress = progress

    async def run(self, actor: Actor, backup_url: str, database: str, *, full: bool) -> Done:
        """One backup, of the whole server at `backup_url`; `database` is the name of ours.

        Raises a `BackupError`, `BaseBackupFailed`, `DatabaseUnavailable`; then there is none.
        """
        began = time.monotonic()
        known = await self._desk.backups.list()
        checkpoint = await self._checkpoint()
        configuration = await collect(self._settings, self._folder.parent, self._desk.directory, database)
        async with base_backup.source(backup_url) as source:
            parent, why_full = await asyncio.to_thread(self._parent, known, source, full)
            making = (known, checkpoint, configuration.pack(), source)
            try:
                shelved, model_files, size = await asyncio.to_thread(self._make, *making, parent)
            except BaseBackupFailed as exc:
                if parent is None:
                    raise
                why_full = f"an incremental one failed: {exc}"
                shelved, model_files, size = await asyncio.to_thread(self._make, *making, None)
        duration_s = time.monotonic() - began
        async with self._desk.deeds.deed(actor, "backup_run", tenant=INSTALLATION) as deed:
            deed.details = {
                "sequence": shelved.sequence,
                "kind": shelved.manifest.kind,
                "log_size": checkpoint.size,
                "stored_bytes": shelved.manifest.stored_bytes,
                "manifest": shelved.as_parent.manifest_sha256,
                "duration_us": round(duration_s * 1e6),
            }
            await self._desk.backups.note(shelved.manifest.made(shelved.note))
        return Done(shelved, why_full, model_files, size, duration_s)

    async def _checkpoint(self) -> Checkpoint:
        """Of the newest tree, once all that waited is in it."""
        try:
            while (step := await self._desk.sequencer.step()).integrated or step.size is None:
                if step.size is None:  # another integrates at the moment
                    await asyncio.sleep(AGAIN_S)
        except LogBroken as exc:
            raise BackupDoubted(f"the log is broken, so no backup of it would verify: {exc}") from exc
        return self._desk.sequencer.seen

    def _parent(self, known: Sequence[Known], source: Source, full: bool) -> tuple[Shelved | None, str]:
        newest = self._shelf.newest()
        if full:
            return None, "asked for"
        if newest is None:
            return None, "the first one"
        ours = next((each for each in known if each.sequence == newest.sequence), None)
        if ours is None or str(ours.id) != newest.manifest.id:
            return None, f"backup {newest.sequence} is not of this database's history"
        if ours.restored_at is not None:
            return None, f"the database was restored from backup {newest.sequence}"
        if not source.summarizes:
            return None, "the server does not summarize its WAL: set summarize_wal = on"
        if newest.manifest.versions["postgres"].split(".")[0] != source.version.split(".")[0]:
            return None, "Postgres has another major version than it had"
        if len(self._shelf.chain(newest)) > self._settings.backup_increments:
            return None, f"after {self._settings.backup_increments} incremental ones"
        return newest, ""

    def _make(
        self,
        known: Sequence[Known],
        checkpoint: Checkpoint,
        configuration: bytes,
        source: Source,
        parent: Shelved | None,
    ) -> tuple[Shelved, int, int]:
        """The backup, how many files its model has, and how many bytes Postgres gave."""
        taken = [*self._shelf.sequences(), *(each.sequence for each in known), 0]
        sequence, backup_id = max(taken) + 1, str(uuid.uuid4())
        self._shelf.take(sequence, backup_id)
        name = self._settings.model
        folder = folder_of(name)
        size = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file()) if folder else None
        with self._progress("Model files", size) as told:
            model = keep_model(self._shelf.store, self._shelf.key, name, told)
        parts = {
            MODEL: self._seal(sequence, backup_id, MODEL, model.pack()),
            CONFIGURATION: self._seal(sequence, backup_id, CONFIGURATION, configuration),
        }
        manifest, kept = Kept(), 0
        with ExitStack() as stack:
            upon = None
            if parent is not None:
                upon = stack.enter_context(scratch(self._folder)) / base_backup.MANIFEST
                with upon.open("wb") as out:
                    self._open(parent, DATABASE_MANIFEST, out)
            told = stack.enter_context(
                self._progress("Database", source.size_bytes if parent is None else None)
            )
            members = stack.enter_context(Members(catching(base_backup.MANIFEST, manifest)))
            sealed = stack.enter_context(self._part(sequence, backup_id, DATABASE))
            with base_backup.streamed(source, upon) as stream:
                while data := stream.read(PIECE_BYTES):
                    members.write(data)
                    sealed.write(data)
                    kept += len(data)
                    told(len(data))
            members.finish()
        if not manifest.getvalue():
            raise BackupRefused("pg_basebackup gave no manifest")
        parts[DATABASE] = sealed.part
        parts[DATABASE_MANIFEST] = self._seal(sequence, backup_id, DATABASE_MANIFEST, manifest.getvalue())
        shelved = self._shelf.add(
            Manifest(
                sequence=sequence,
                id=backup_id,
                parent=None if parent is None else parent.as_parent,
                log_size=checkpoint.size,
                log_root=checkpoint.root,
                made_at_us=time.time_ns() // 1000,
                versions={"pericarp": __version__, "postgres": source.version, "schema": schema_head()},
                parts=tuple(parts.values()),
            )
        )
        return shelved, len(model.files), kept

    def _seal(self, sequence: int, backup_id: str, name: str, data: bytes) -> Part:
        with self._part(sequence, backup_id, name) as sealed:
            sealed.write(data)
        return sealed.part

    def _part(self, sequence: int, backup_id: str, name: str) -> SealedPart:
        key = self._shelf.key
        return SealedPart(
            self._shelf.store, self._shelf.path(sequence, name), key, key.context(backup_id, sequence, name)
        )

    def _open(self, shelved: Shelved, name: str, out: IO[bytes]) -> None:
        manifest = shelved.manifest
        path, context = self._shelf.path(shelved.sequence, name), self._shelf.context(manifest, name)
        open_part(self._shelf.store, path, manifest.part(name), self._shelf.key, context, out)
