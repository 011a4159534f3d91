"""What a witness answers to a checkpoint: C2SP tlog-witness, `add-checkpoint`.

Its state is written before the cosignature leaves, and nothing else happens between reading and writing it. A log's
first checkpoint is believed as it is; from then on every one must be proven to have grown out of the last.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from service.watch.logs import get_logger
from tenants.checkpoint import NOTE_BYTES_MOST, Checkpoint, Submission, VerifyKey, open_checkpoint, split_note
from tenants.errors import ProofInvalid
from tenants.merkle import EMPTY_ROOT, verify_consistency

if TYPE_CHECKING:
    from service.witness.store import Store

BODY_BYTES_MOST = NOTE_BYTES_MOST + 4096
"""A note, 63 hashes and the old size."""
TEXT = "text/plain; charset=utf-8"
SIZE = "text/x.tlog.size"

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """Of HTTP."""

    status: int
    body: str
    media_type: str = TEXT


class Judge:
    """Cosigns what has only grown. One to a store; calls must not overlap."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    def add_checkpoint(self, body: bytes) -> Answer:
        """The answer to that body: 200 with a cosignature's line, or 400, 403, 404, 409, 422 as C2SP says.

        Raises `StoreBroken`, OSError: then nothing was cosigned.
        """
        try:
            submission = Submission.parse(body.decode())
            text, _ = split_note(submission.note)
            checkpoint = Checkpoint.parse(text)
        except (ProofInvalid, UnicodeDecodeError) as exc:
            return _refuse(400, "malformed", str(exc) if isinstance(exc, ProofInvalid) else "not UTF-8")
        keys = [key for key in self._store.logs() if key.name == checkpoint.origin]
        if not keys:
            return _refuse(404, "unknown", "this witness does not know that log")
        signed = _signed(submission.note, keys)
        if not signed:
            return _refuse(403, "unsigned", "no key that this witness trusts for that log has signed this")
        if submission.old > checkpoint.size:
            return _refuse(400, "malformed", "the old size is above the new one")
        return self._judge(replace(submission, note=signed), checkpoint)

    def _judge(self, submission: Submission, checkpoint: Checkpoint) -> Answer:
        held = self._store.newest(checkpoint.origin)
        note, last = held or ("", Checkpoint(checkpoint.origin, 0, EMPTY_ROOT))
        if checkpoint.size == last.size and checkpoint.root != last.root:
            self._accuse("fork", note, submission, checkpoint)
            return _conflict(last.size)
        if submission.old != last.size:
            log.info(
                "a checkpoint came with another old size than this witness knows",
                action="witness_refused",
                origin=checkpoint.origin,
                reason="conflict",
                old=submission.old,
                size=checkpoint.size,
                known=last.size,
            )
            return _conflict(last.size)
        try:
            verify_consistency(last.size, checkpoint.size, last.root, checkpoint.root, submission.nodes)
        except ProofInvalid as exc:
            self._accuse("inconsistent", note, submission, checkpoint)
            return Answer(422, f"{exc}\n")
        line = self._store.cosigner.cosign(checkpoint, at_s=int(self._clock()))
        self._store.keep(checkpoint.origin, submission.note + line)
        log.info(
            "cosigned a checkpoint",
            action="witness_cosigned",
            origin=checkpoint.origin,
            size=checkpoint.size,
        )
        return Answer(200, line)

    def _accuse(self, reason: str, note: str, submission: Submission, checkpoint: Checkpoint) -> None:
        """Two signed checkpoints of one size with different roots convict the log by themselves. A proof that does not
        hold does not: whoever has a checkpoint can send it with a wrong proof."""
        file = self._store.keep_evidence(
            checkpoint, f"{reason}\n\nlast cosigned:\n\n{note}\nsubmitted:\n\n{submission.text}"
        )
        log.critical(
            "a signed checkpoint contradicts what this witness has cosigned",
            action="witness_contradicted",
            origin=checkpoint.origin,
            reason=reason,
            size=checkpoint.size,
            old=submission.old,
            evidence=file.name if file is not None else None,
        )


def _signed(note: str, keys: list[VerifyKey]) -> str:
    """The note with the log's own signatures that hold, one of each key, and no other line; empty where there is none.

    C2SP passes over lines of unknown keys. One that does not hold is passed over as well, where another one does.
    """
    text, lines = split_note(note)
    holding: dict[VerifyKey, str] = {}
    for line in lines:
        for key in keys:
            try:
                open_checkpoint(f"{text}\n{line}\n", [key], origin=key.name)
            except ProofInvalid:
                continue
            holding.setdefault(key, f"{line}\n")
    return f"{text}\n{''.join(holding.values())}" if holding else ""


def _refuse(status: int, reason: str, message: str) -> Answer:
    log.warning("refused a checkpoint", action="witness_refused", reason=reason, status=status)
    return Answer(status, f"{message}\n")


def _conflict(size: int) -> Answer:
    return Answer(409, f"{size}\n", SIZE)
