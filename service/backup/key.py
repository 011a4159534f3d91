"""The secret of backups: 32 bytes in a file of the secrets' folder, from a file descriptor, or from a command (a KMS client).

Two keys are derived from it (HKDF-SHA-256, RFC 5869): one seals, one signs. Whoever has it reads every backup and can make
others; without it no backup opens, so it is kept where the installation's other secrets are kept, and not beside the backups.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from service.backup import BackupRefused
from service.given_keys import KeyNotGiven, read_given_key
from service.installation import SECRET_BYTES, keep_secret
from tenants.checkpoint import Signer

if TYPE_CHECKING:
    from service.settings import Settings

FILE = "backup-key"


@dataclass(frozen=True, slots=True)
class BackupKey:
    """What seals and signs the backups of one installation."""

    sealing: bytes = field(repr=False)
    signer: Signer = field(repr=False)
    installation: str
    """32 hexadecimal digits, of the log's public key."""

    def context(self, *words: object) -> bytes:
        """What a sealed part is bound to. No word holds a zero byte."""
        return "\0".join(("pericarp-backup/v1", self.installation, *map(str, words))).encode()


def derive(secret: bytes, installation: str) -> BackupKey:
    """The keys of an installation's backups."""
    seed = _expand(secret, b"pericarp backup signing")
    return BackupKey(
        sealing=_expand(secret, b"pericarp backup sealing"),
        signer=Signer(f"pericarp/backup/{installation}", seed),
        installation=installation,
    )


def read_secret(settings: Settings, home: Path, *, make: bool = False) -> bytes:
    """From the descriptor or command that is set, else from the secrets' folder, where `make` makes it once.

    Raises `BackupRefused` where there is none, or what is there is no key.
    """
    try:
        given = read_given_key("the key of backups", settings.backup_key_fd, settings.backup_key_command)
    except KeyNotGiven as exc:
        raise BackupRefused(str(exc)) from exc
    if given is not None:
        return given
    path = home / "secrets" / FILE
    if not make and not path.exists():
        raise BackupRefused(f"{path} is not there: backups open with the key that they were made with")
    try:
        return keep_secret(path)
    except RuntimeError as exc:
        raise BackupRefused(str(exc)) from exc


def _expand(secret: bytes, purpose: bytes) -> bytes:
    return HKDF(SHA256(), SECRET_BYTES, salt=None, info=purpose).derive(secret)
