"""What a backup is: a note (C2SP signed-note) of four lines, signed with Ed25519 by the backups' own key.

    pericarp-backup/v1
    pericarp/backup/<installation>
    <sequence number>
    <JSON in one way to write it: sorted keys, integers and strings>

It is written last: a backup without one was not finished. It names every part with the size and SHA-256 of its stored
bytes, the backup that it stands upon with the SHA-256 of that one's manifest, and the log's newest checkpoint of the
moment before. Where it lies must agree with what it says. Whatever does not hold raises `BackupDamaged`.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import orjson

from service.backup import BackupDamaged
from service.backup.key import BackupKey
from service.backup.parts import Part
from tenants.backups import Made
from tenants.checkpoint import Checkpoint, open_note, read_base64, read_decimal, write_base64
from tenants.errors import ProofInvalid
from tenants.merkle import HASH_BYTES

FORM = "pericarp-backup/v1"
FULL, INCREMENTAL = "full", "incremental"
CONFIGURATION, MODEL, DATABASE, DATABASE_MANIFEST = "configuration", "model", "database", "database-manifest"
PARTS = (CONFIGURATION, MODEL, DATABASE, DATABASE_MANIFEST)
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Parent:
    """The backup that an incremental one stands upon."""

    sequence: int
    manifest_sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """One backup."""

    sequence: int
    id: str
    """A UUID; with the sequence number it is what the parts are bound to."""
    parent: Parent | None
    """None: a full one."""
    log_size: int
    """Of the newest tree before it began: it has that many leaves at least."""
    log_root: bytes
    made_at_us: int
    """The clock of whoever made it, microseconds since 1970. Nothing goes by it."""
    versions: dict[str, str]
    """Of `pericarp`, `postgres` and the `schema`."""
    parts: tuple[Part, ...]

    @property
    def kind(self) -> str:
        return FULL if self.parent is None else INCREMENTAL

    @property
    def stored_bytes(self) -> int:
        """Of its own parts; model files that earlier backups stored are not counted."""
        return sum(part.size_bytes for part in self.parts)

    def part(self, name: str) -> Part:
        (found,) = (part for part in self.parts if part.name == name)
        return found

    def made(self, note: bytes) -> Made:
        """What the database notes of it."""
        return Made(
            sequence=self.sequence,
            id=UUID(self.id),
            kind=self.kind,
            parent=self.parent.sequence if self.parent else None,
            log_size=self.log_size,
            stored_bytes=self.stored_bytes,
            manifest_sha256=hashlib.sha256(note).digest(),
        )

    def checkpoint(self, origin: str) -> Checkpoint:
        return Checkpoint(origin, self.log_size, self.log_root)


def sign(manifest: Manifest, key: BackupKey) -> bytes:
    """The manifest as a signed note."""
    told: dict[str, Any] = {
        "id": manifest.id,
        "log_root": write_base64(manifest.log_root),
        "log_size": manifest.log_size,
        "made_at_us": manifest.made_at_us,
        "parts": [
            {"name": part.name, "sha256": part.sha256, "size_bytes": part.size_bytes}
            for part in manifest.parts
        ],
        "versions": manifest.versions,
    }
    if manifest.parent is not None:
        told["parent"] = {
            "manifest_sha256": manifest.parent.manifest_sha256,
            "sequence": manifest.parent.sequence,
        }
    text = f"{FORM}\n{key.signer.key.name}\n{manifest.sequence}\n{_canonical(told)}\n"
    return key.signer.sign_text(text).encode()


def open_manifest(note: bytes, key: BackupKey) -> Manifest:
    """The manifest of a note that this key has signed, for this installation. Raises `BackupDamaged`."""
    try:
        text = open_note(note.decode(), key.signer.key)
        form, name, sequence, line, end = text.split("\n")
        told = orjson.loads(line)
        parent = told.pop("parent", None)
        manifest = Manifest(
            sequence=read_decimal(sequence),
            id=str(UUID(told.pop("id"))),
            parent=None
            if parent is None
            else Parent(int(parent["sequence"]), _hex(parent["manifest_sha256"])),
            log_size=int(told.pop("log_size")),
            log_root=read_base64(told.pop("log_root"), HASH_BYTES),
            made_at_us=int(told.pop("made_at_us")),
            versions={str(what): str(version) for what, version in told.pop("versions").items()},
            parts=tuple(
                Part(str(part["name"]), int(part["size_bytes"]), _hex(part["sha256"]))
                for part in told.pop("parts")
            ),
        )
    except (ProofInvalid, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise BackupDamaged(f"a manifest does not hold: {exc}") from exc
    names = sorted(part.name for part in manifest.parts)
    parent_is_before = manifest.parent is None or 0 < manifest.parent.sequence < manifest.sequence
    if (
        (form, name) != (FORM, key.signer.key.name)
        or end
        or told
        or names != sorted(PARTS)
        or not parent_is_before
    ):
        raise BackupDamaged("a manifest does not hold: it is of another kind or installation")
    if sign(manifest, key) != note:
        raise BackupDamaged("a manifest does not hold: it is written in another way than ours")
    return manifest


def _canonical(told: dict[str, Any]) -> str:
    return orjson.dumps(told, option=orjson.OPT_SORT_KEYS).decode()


def _hex(text: str) -> str:
    if not _HEX.fullmatch(text):
        raise ValueError("not a SHA-256")
    return text
