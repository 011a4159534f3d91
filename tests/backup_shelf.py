"""A small shelf of backups without any Postgres: parts and manifests as `backup run` writes them, in a folder."""

from __future__ import annotations

import io
import uuid
from dataclasses import dataclass
from pathlib import Path

from service.backup.configuration import SECRETS, Configuration, check_value
from service.backup.key import BackupKey, derive
from service.backup.manifest import CONFIGURATION, DATABASE, DATABASE_MANIFEST, MODEL, PARTS, Manifest
from service.backup.model_files import Model, keep_model
from service.backup.parts import Part, SealedPart, open_part
from service.backup.shelf import Shelf, Shelved
from service.backup.store import open_store
from tenants.merkle import EMPTY_ROOT

INSTALLATION = "0123456789abcdef0123456789abcdef"
KEY = derive(bytes(range(32)), INSTALLATION)


@dataclass(frozen=True, slots=True)
class Small:
    """A shelf whose backups hold a few bytes."""

    shelf: Shelf
    folder: Path

    def add(self, *, parent: Shelved | None = None, model: Path | None = None) -> Shelved:
        """The next backup; `model`: the folder of its model's files."""
        sequence, backup_id = max([0, *self.shelf.sequences()]) + 1, str(uuid.uuid4())
        self.shelf.take(sequence, backup_id)
        files = Model("none", ())
        if model is not None:
            files = keep_model(self.shelf.store, self.shelf.key, str(model), lambda _count: None)
        configuration = Configuration(
            {}, {name: check_value(bytes(32)) for name in SECRETS}, {}, [], "pericarp"
        )
        contents = {
            CONFIGURATION: configuration.pack(),
            MODEL: files.pack(),
            DATABASE: b"what Postgres wrote" * 100,
            DATABASE_MANIFEST: b"{}",
        }
        return self.shelf.add(
            Manifest(
                sequence=sequence,
                id=backup_id,
                parent=None if parent is None else parent.as_parent,
                log_size=sequence,
                log_root=EMPTY_ROOT,
                made_at_us=1,
                versions={"pericarp": "0", "postgres": "18.6", "schema": "0021"},
                parts=tuple(self._seal(sequence, backup_id, name, contents[name]) for name in PARTS),
            )
        )

    def begin(self) -> int:
        """A run that was cut off."""
        sequence = max([0, *self.shelf.sequences()]) + 1
        self.shelf.take(sequence, str(uuid.uuid4()))
        return sequence

    def files(self) -> list[Path]:
        """Every object in the store."""
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def _seal(self, sequence: int, backup_id: str, name: str, data: bytes) -> Part:
        key = self.shelf.key
        path, context = self.shelf.path(sequence, name), key.context(backup_id, sequence, name)
        with SealedPart(self.shelf.store, path, key, context) as sealed:
            sealed.write(data)
        return sealed.part


def small(folder: Path, key: BackupKey = KEY) -> Small:
    return Small(Shelf(open_store(str(folder), timeout_s=10.0), key), folder)


def read(shelf: Shelf, shelved: Shelved, name: str) -> bytes:
    """The plain bytes of a part."""
    out = io.BytesIO()
    open_part(
        shelf.store,
        shelf.path(shelved.sequence, name),
        shelved.manifest.part(name),
        shelf.key,
        shelf.context(shelved.manifest, name),
        out,
    )
    return out.getvalue()
