"""Brings back what a backup holds: its base backups unpacked, each checked by its own manifest, then put together.

A folder `NNNNNNNNNN` for each backup of a chain, and `NNNNNNNNNN.whole` once it is unpacked and verified: what was cut off
goes on behind the last of these.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from service.backup import BackupDamaged, Progress
from service.backup.archive import Members, unpacking
from service.backup.configuration import Configuration
from service.backup.manifest import CONFIGURATION, DATABASE, DATABASE_MANIFEST, MODEL
from service.backup.model_files import Model
from service.backup.parts import open_part
from service.backup.shelf import DIGITS, Shelf, Shelved
from tenants import base_backup, embedded
from tenants.provisioning import scram_verifier

if TYPE_CHECKING:
    import cobblestone


def fetch_small(shelf: Shelf, shelved: Shelved) -> tuple[Configuration, Model]:
    """The configuration and the list of the model's files. Raises `BackupDamaged`, `StoreFailed`."""
    found = []
    for name in (CONFIGURATION, MODEL):
        out = io.BytesIO()
        _open(shelf, shelved, name, out)
        found.append(out.getvalue())
    return Configuration.unpack(found[0]), Model.unpack(found[1])


def unpack_chain(
    shelf: Shelf, chain: Sequence[Shelved], binaries: Path, folder: Path, progress: Progress
) -> list[Path]:
    """Unpack and verify the base backups of a chain below `folder`; where each is.

    Raises `BackupDamaged`, `StoreFailed`, `BaseBackupFailed`, `OSError`.
    """
    unpacked = []
    for shelved in chain:
        place = folder / f"{shelved.sequence:0{DIGITS}d}"
        whole = place.with_suffix(".whole")
        if not (whole.exists() and whole.read_text() == shelved.as_parent.manifest_sha256):
            if place.exists():
                shutil.rmtree(place)
            place.mkdir(mode=0o700)
            size = shelved.manifest.part(DATABASE).size_bytes
            with progress(f"Backup {shelved.sequence}", size) as told:
                _unpack(shelf, shelved, place, told)
            base_backup.verify(binaries, place)
            whole.write_text(shelved.as_parent.manifest_sha256)
        unpacked.append(place)
    return unpacked


def put_together(binaries: Path, unpacked: Sequence[Path], home: Path, *, durably: bool) -> None:
    """Make the database of a home that has none of the unpacked base backups of a chain.

    `durably`: it survives a power cut. Raises `BaseBackupFailed`, an `EmbeddedError`, `OSError`.
    """
    embedded.adopt(
        home,
        lambda cluster: base_backup.combine(binaries, unpacked, cluster, durably=durably),
        verifier_of=scram_verifier,
    )


class _Counted:
    """Passes on what is written, and tells how much it was."""

    def __init__(self, target: Members, told: Callable[[int], None]) -> None:
        self._target = target
        self._told = told

    def write(self, data: memoryview, /) -> int:
        self._told(len(data))
        return self._target.write(data)


def _unpack(shelf: Shelf, shelved: Shelved, place: Path, told: Callable[[int], None]) -> None:
    with Members(unpacking(place)) as members:
        _open(shelf, shelved, DATABASE, _Counted(members, told))
        members.finish()
    manifest = io.BytesIO()
    _open(shelf, shelved, DATABASE_MANIFEST, manifest)
    found = place / base_backup.MANIFEST
    if not found.is_file() or found.read_bytes() != manifest.getvalue():
        raise BackupDamaged(f"backup {shelved.sequence} has two lists of its files that differ")


def _open(shelf: Shelf, shelved: Shelved, name: str, out: cobblestone.Writable) -> None:
    open_part(
        shelf.store,
        shelf.path(shelved.sequence, name),
        shelved.manifest.part(name),
        shelf.key,
        shelf.context(shelved.manifest, name),
        out,
    )
