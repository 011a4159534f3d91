"""`backup verify`: is this backup one that restores, of this log, and not an older one in its place?

Everything is read back: each part, each file of each base backup against its manifest, each table and index of the restored
database, each leaf and each entry of the log against the roots that were signed, each file of the model. The root is then
compared with what others know: the log that is still there (its newest tree must have grown out of the backup's, and
every backup that it knows must be in the store), the newest checkpoint that witnesses cosigned, and one that is given.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models import ModelError
from models.weights import find
from service.backup import BackupDoubted, Progress
from service.backup.fetching import fetch_small, put_together, unpack_chain
from service.backup.model_files import check_model, restore_model
from tenants import base_backup, embedded, merkle
from tenants.checkpoint import Checkpoint, VerifyKey, open_checkpoint
from tenants.errors import ProofInvalid
from tenants.postgres_account import carried_binaries
from tenants.restored_log import Recomputed, recompute

if TYPE_CHECKING:
    from models import Trust
    from service.backup.model_files import Model
    from service.backup.shelf import Shelf, Shelved
    from service.desk import Desk


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found of a backup that holds."""

    shelved: Shelved
    backups_read: int
    """Base backups that it takes to restore it."""
    log_size: int
    bodies: int
    pruned: int
    model_files: int
    compared: tuple[str, ...]
    """What the log's root was compared with."""


@dataclass(frozen=True, slots=True)
class Expected:
    """A checkpoint that the log is to agree with, and where it comes from."""

    checkpoint: Checkpoint
    source: str
    reached: bool
    """Whether the backup must reach it: else one that is newer says nothing."""


class Verifying:
    """Verifies backups of one installation, in a scratch folder."""

    def __init__(self, *, shelf: Shelf, log_key: VerifyKey, trust: Trust, progress: Progress) -> None:
        self._shelf = shelf
        self._trust = trust
        self._log_key = log_key
        self._progress = progress

    async def verify(
        self, shelved: Shelved, room: Path, *, live: Desk | None, witnessed: Sequence[Expected]
    ) -> Verified:
        """Raises a `BackupError`, an `EmbeddedError`, `LogBroken`: after each, the backup is not to be relied upon."""
        if live is not None:
            await self._refuse_older(live)
            witnessed = [*witnessed, *await cosigned(live, self._log_key)]
        chain = self._shelf.chain(shelved)
        configuration, model = await asyncio.to_thread(fetch_small, self._shelf, shelved)
        await asyncio.to_thread(self._check_model, model, room / "model")
        binaries = carried_binaries()
        unpacked = await asyncio.to_thread(unpack_chain, self._shelf, chain, binaries, room, self._progress)
        with self._progress("Recovering", None):
            await asyncio.to_thread(put_together, binaries, unpacked, room / "home", durably=False)
        sizes = frozenset({shelved.manifest.log_size, *(each.checkpoint.size for each in witnessed)})
        found = await asyncio.to_thread(self._read_all, room / "home", configuration.database, sizes)
        compared = [*self._compare(shelved, found, witnessed)]
        if live is not None:
            await self._compare_live(live, found, witnessed)
            compared.append("the log as it is now")
        return Verified(
            shelved,
            len(chain),
            found.newest.size,
            found.bodies,
            found.pruned,
            len(model.files),
            tuple(compared),
        )

    def _check_model(self, model: Model, folder: Path) -> None:
        """Read every file; where models must be signed, as a worker would load them."""
        store, key = self._shelf.store, self._shelf.key
        with self._progress("Model files", sum(file.size_bytes for file in model.files)) as told:
            if not (self._trust.signer and model.files):
                check_model(store, key, model, told)
                return
            restore_model(store, key, model, folder, told)
        try:
            find(str(folder), trust=self._trust)
        except ModelError as exc:
            raise BackupDoubted(f"the backup's model would not be loaded: {exc}") from exc

    def _read_all(self, home: Path, database: str, sizes: frozenset[int]) -> Recomputed:
        with embedded.running(home, settings={"fsync": "off"}) as server:
            url = base_backup.in_database(server.superuser_url, database)
            with self._progress("Tables and indexes", None):
                base_backup.check_relations(server.binaries, url)
            with self._progress("Log", None) as told:
                seen = 0

                def tell(done: int, _size: int) -> None:
                    nonlocal seen
                    told(done - seen)
                    seen = done

                return asyncio.run(recompute(url, self._log_key, sizes, told=tell))

    async def _refuse_older(self, live: Desk) -> None:
        """A store that lacks what the database knows of was rolled back, or somebody removed it."""
        there = {each.sequence: each for each in await asyncio.to_thread(self._shelf.finished)}
        for known in await live.backups.list():
            if known.pruned_at is not None:
                continue
            found = there.get(known.sequence)
            if found is None:
                raise BackupDoubted(
                    f"backup {known.sequence}, which the database knows of, is not in the store"
                )
            if found.manifest.made(found.note).manifest_sha256 != known.manifest_sha256:
                raise BackupDoubted(
                    f"backup {known.sequence} in the store is another than the database knows of"
                )

    def _compare(self, shelved: Shelved, found: Recomputed, witnessed: Sequence[Expected]) -> Sequence[str]:
        own = Expected(shelved.manifest.checkpoint(self._log_key.name), "its own manifest", reached=True)
        compared = []
        for expected in (own, *witnessed):
            size = expected.checkpoint.size
            if size > found.newest.size:
                if expected.reached:
                    raise BackupDoubted(
                        f"the backup's log has {found.newest.size} entries, and {expected.source} tells of {size}:"
                        " it is an older one"
                    )
                continue
            if found.roots[size] != expected.checkpoint.root:
                raise BackupDoubted(
                    f"the backup's log is another than {expected.source} tells of, at {size} entries"
                )
            compared.append(expected.source)
        return compared

    async def _compare_live(self, live: Desk, found: Recomputed, witnessed: Sequence[Expected]) -> None:
        """The log as it is now must begin with the backup's, and with what witnesses saw since."""
        beyond = [each.checkpoint for each in witnessed if each.checkpoint.size > found.newest.size]
        for older in (found.newest, *beyond):
            if not older.size:  # every log grew out of the empty one
                continue
            try:
                grown = await live.cosignatures.submission(older.size)
                if grown is None:
                    raise BackupDoubted(
                        f"the log as it is now has fewer than {older.size} entries: it was rolled back"
                    )
                submission, newest = grown
                merkle.verify_consistency(
                    older.size, newest.size, older.root, newest.root, list(submission.nodes)
                )
            except ProofInvalid as exc:
                raise BackupDoubted(
                    f"the log as it is now does not begin with that of {older.size} entries: {exc}"
                ) from exc


async def cosigned(live: Desk, log_key: VerifyKey) -> list[Expected]:
    """The newest checkpoint that witnesses have cosigned, as the log that is there has it; none where none has."""
    note = await live.proofs.witnessed()
    if note is None:
        return []
    return [Expected(read_checkpoint(note, log_key), "the newest cosigned checkpoint", reached=False)]


def read_checkpoint(note: str, log_key: VerifyKey) -> Checkpoint:
    """The checkpoint of a note of this log. Raises `BackupDoubted`."""
    try:
        return open_checkpoint(note, [log_key], origin=log_key.name).checkpoint
    except ProofInvalid as exc:
        raise BackupDoubted(f"the checkpoint is not of this log: {exc}") from exc
