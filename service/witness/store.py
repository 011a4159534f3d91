"""A witness's folder, and all that it remembers. It is 0700, what is in it 0600, and one process at a time serves it.

    key                      the Ed25519 private key (RFC 8032), 32 random bytes
    logs                     verifier keys of the logs that it knows, one a line
    checkpoints/ORIGIN.note  the newest checkpoint that it cosigned, with the log's signature and its own
    evidence/ORIGIN-….txt    what should not be: submissions that contradict it, as they came
    lock                     claimed by the process that serves (`flock`)

ORIGIN stands for 32 hexadecimal digits of the origin's SHA-256. A file is replaced whole and is on the disk before its
writer goes on.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tenants.checkpoint import ED25519, Checkpoint, Cosigner, VerifyKey, open_checkpoint
from tenants.errors import ProofInvalid

SEED_BYTES = 32
NAME = "pericarp/witness/"
EVIDENCE_MOST = 1000
"""Files of evidence; each needs a checkpoint of its own that the log signed, and the disk is not the log's to fill."""


class StoreBroken(Exception):
    """The witness's folder does not hold what this witness wrote; it cosigns nothing until it does."""


class Store:
    """Reads and writes one folder, which is made where there is none."""

    def __init__(self, folder: Path) -> None:
        """Raises `StoreBroken`, OSError."""
        self._folder = folder
        for each in (folder, folder / "checkpoints", folder / "evidence"):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.cosigner = _cosigner(self._seed())

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Nobody else serves this folder within the block. Raises `StoreBroken` where somebody does."""
        descriptor = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreBroken(f"another witness serves {self._folder}") from None
            yield
        finally:
            os.close(descriptor)

    def logs(self) -> tuple[VerifyKey, ...]:
        """The keys that are trusted, as the file has them now. Raises `StoreBroken`."""
        file = self._folder / "logs"
        if not file.exists():
            return ()
        try:
            return tuple(VerifyKey.parse(line) for line in file.read_text(encoding="utf-8").splitlines())
        except (ProofInvalid, UnicodeDecodeError) as exc:
            raise StoreBroken(f"{file} has a line that is no verifier key") from exc

    def add_log(self, key: VerifyKey) -> bool:
        """Trust `key` to sign for the log of its name; false where it is trusted already.

        Raises `ProofInvalid` of a key that is no log's, `StoreBroken`.
        """
        if key.kind != ED25519:
            raise ProofInvalid("that is not the key of a log")
        known = self.logs()
        if key in known:
            return False
        self._write(self._folder / "logs", "".join(f"{each.text}\n" for each in (*known, key)))
        return True

    def newest(self, origin: str) -> tuple[str, Checkpoint] | None:
        """What was cosigned last for that log, a note and what it says; None before the first. Raises `StoreBroken`."""
        file = self.checkpoint_file(origin)
        if not file.exists():
            return None
        try:
            note = file.read_text(encoding="utf-8")
            checkpoint = open_checkpoint(note, [self.cosigner.key]).checkpoint
        except (ProofInvalid, UnicodeDecodeError) as exc:
            raise StoreBroken(f"{file} is not what this witness wrote") from exc
        if checkpoint.origin != origin:
            raise StoreBroken(f"{file} is of another log")
        return note, checkpoint

    def keep(self, origin: str, note: str) -> None:
        """Remember that `note` was cosigned; on the disk when it returns."""
        self._write(self.checkpoint_file(origin), note)

    def keep_evidence(self, checkpoint: Checkpoint, text: str) -> Path | None:
        """Keep what contradicts this witness, once; on the disk when it returns. None where there is no room left."""
        digest = hashlib.sha256(checkpoint.text.encode()).hexdigest()[:16]
        folder = self._folder / "evidence"
        file = folder / f"{_digits(checkpoint.origin)}-{checkpoint.size}-{digest}.txt"
        if not file.exists():
            if sum(1 for _ in folder.iterdir()) >= EVIDENCE_MOST:
                return None
            self._write(file, text)
        return file

    def checkpoint_file(self, origin: str) -> Path:
        """Where what was cosigned last for that log lies."""
        return self._folder / "checkpoints" / f"{_digits(origin)}.note"

    def _seed(self) -> bytes:
        file = self._folder / "key"
        if not file.exists():
            if any((self._folder / "checkpoints").iterdir()):
                raise StoreBroken(f"{file} is gone, and without it this is another witness")
            self._write(file, secrets.token_bytes(SEED_BYTES), replace=False)
        seed = file.read_bytes()
        if len(seed) != SEED_BYTES:
            raise StoreBroken(f"{file} should hold {SEED_BYTES} bytes and holds {len(seed)}")
        return seed

    def _write(self, file: Path, content: str | bytes, *, replace: bool = True) -> None:
        """All of it or nothing, whatever ends this process or the machine. Without `replace`, what is there stays."""
        data = content.encode() if isinstance(content, str) else content
        fresh = file.with_name(f".{secrets.token_hex(8)}")
        try:
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            if replace:
                fresh.replace(file)
            else:
                try:
                    os.link(fresh, file)
                except FileExistsError:
                    return  # another process made it meanwhile
        finally:
            fresh.unlink(missing_ok=True)
        directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _cosigner(seed: bytes) -> Cosigner:
    public = Cosigner(NAME, seed).key.public
    return Cosigner(NAME + hashlib.sha256(public).hexdigest()[:32], seed)


def _digits(origin: str) -> str:
    return hashlib.sha256(origin.encode()).hexdigest()[:32]
