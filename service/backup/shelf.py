"""The backups of one installation in a store, by their sequence numbers.

    <installation>/<sequence>/begun            whose it is; taken by the first run that asks for that number
    <installation>/<sequence>/<part>.NNNNNN    parts.py
    <installation>/<sequence>/manifest         last
    <installation>/models/<sha256>/…           model_files.py

A number that was taken is never taken again, whether its backup was finished or not, so nothing is ever overwritten and
two runs at once do not meet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.backup import BackupDamaged, BackupRefused, StoreFailed
from service.backup.manifest import Manifest, Parent, open_manifest, sign

if TYPE_CHECKING:
    from service.backup.key import BackupKey
    from service.backup.store import Store

DIGITS = 10
MANIFEST = "manifest"
BEGUN = "begun"


@dataclass(frozen=True, slots=True)
class Shelved:
    """A finished backup and its manifest as it is stored."""

    manifest: Manifest
    note: bytes

    @property
    def sequence(self) -> int:
        return self.manifest.sequence

    @property
    def as_parent(self) -> Parent:
        return Parent(self.sequence, hashlib.sha256(self.note).hexdigest())


class Shelf:
    """Reads and adds backups. Whatever is read was verified."""

    def __init__(self, store: Store, key: BackupKey) -> None:
        self.store = store
        self.key = key

    def path(self, sequence: int, word: str) -> str:
        return f"{self.key.installation}/{sequence:0{DIGITS}d}/{word}"

    def context(self, manifest: Manifest, part: str) -> bytes:
        """What a part is sealed to."""
        return self.key.context(manifest.id, manifest.sequence, part)

    def sequences(self) -> list[int]:
        """Every number that was taken, finished or not. Raises `BackupDamaged` for a folder that is none of ours."""
        found = []
        for word in self.store.folders(self.key.installation):
            if word == "models":
                continue
            if not (word.isascii() and word.isdigit() and len(word) == DIGITS):
                raise BackupDamaged(f"{self.key.installation}/{word} is no backup's place")
            found.append(int(word))
        return sorted(found)

    def take(self, sequence: int, backup_id: str) -> None:
        """Make a number this run's own. Raises `BackupRefused` where another run has it."""
        try:
            self.store.create(self.path(sequence, BEGUN), backup_id.encode())
        except StoreFailed as exc:
            if self.store.read(self.path(sequence, BEGUN)) in (None, backup_id.encode()):
                raise
            raise BackupRefused(f"another run is making backup {sequence}: run again later") from exc

    def add(self, manifest: Manifest) -> Shelved:
        """Finish a backup, whose parts are stored."""
        note = sign(manifest, self.key)
        self.store.create(self.path(manifest.sequence, MANIFEST), note)
        return Shelved(manifest, note)

    def find(self, sequence: int) -> Shelved | None:
        """A finished backup; None where it was not finished. Raises `BackupDamaged` where it is another one."""
        note = self.store.read(self.path(sequence, MANIFEST))
        if note is None:
            return None
        manifest = open_manifest(note, self.key)
        if manifest.sequence != sequence:
            raise BackupDamaged(f"in the place of backup {sequence} is the manifest of {manifest.sequence}")
        return Shelved(manifest, note)

    def finished(self) -> list[Shelved]:
        """Every finished backup, the oldest first."""
        return [found for sequence in self.sequences() if (found := self.find(sequence)) is not None]

    def newest(self) -> Shelved | None:
        """The finished backup with the highest number."""
        return next((found for each in reversed(self.sequences()) if (found := self.find(each))), None)

    def chain(self, last: Shelved) -> Sequence[Shelved]:
        """The full backup that `last` stands upon, those between, and itself. Raises `BackupDamaged` where one is missing."""
        chain = [last]
        while (parent := chain[0].manifest.parent) is not None:
            found = self.find(parent.sequence)
            if found is None:
                raise BackupDamaged(
                    f"backup {chain[0].sequence} stands upon {parent.sequence}, which is not there"
                )
            if found.as_parent != parent:
                raise BackupDamaged(
                    f"backup {chain[0].sequence} stands upon another {parent.sequence} than is there"
                )
            chain.insert(0, found)
        return chain
