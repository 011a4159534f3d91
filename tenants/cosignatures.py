"""What witnesses have cosigned: the newest checkpoint for each as it is to be submitted, and its cosignature kept.

A cosignature is verified before it is kept, and again before it is handed out. HTTP is not spoken here; see
`service.cosigning`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tenants import merkle
from tenants.checkpoint import COSIGNATURE, Submission, VerifyKey, open_checkpoint, split_note
from tenants.errors import LogBroken, ProofInvalid
from tenants.sequencer import read_tiles, tile_reader, verified

if TYPE_CHECKING:
    from tenants.checkpoint import Checkpoint
    from tenants.database import Database

CLAIMED_S = 3.0
"""Between two claims of one witness at least, over all gateways."""


@dataclass(frozen=True, slots=True)
class Turn:
    """How one witness stands."""

    claimed: bool
    """Whether it is this caller's to ask it now."""
    cosigned: int
    """Size of the newest tree that it has cosigned, as far as the database knows."""
    newest: int
    """Size of the newest tree."""


class Cosignatures:
    """Of one log, by any number of witnesses."""

    def __init__(self, database: Database, key: VerifyKey) -> None:
        """`key` is the log's own."""
        self._database = database
        self._key = key

    async def claim(self, witness: VerifyKey, *, always: bool = False) -> Turn:
        """Take the turn of asking that witness, where the tree has grown since it cosigned, or `always`; for `CLAIMED_S`."""
        row = (
            await self._database.call(
                "select * from pericarp.claim_witness($1, $2, $3)", witness.text, CLAIMED_S, always
            )
        )[0]
        return Turn(row["claimed"], row["cosigned"], row["newest"])

    async def submission(self, old: int) -> tuple[Submission, Checkpoint] | None:
        """The newest checkpoint with the proof that it grew out of the tree of `old` leaves; None where it is smaller.

        Raises `LogBroken` where the stored tree is not the one that was signed.
        """
        note = (await self._database.call("select pericarp.newest_checkpoint()"))[0][0]
        newest = verified(note, self._key)
        if old > newest.size or note is None:
            return None
        points = [old - 1] if old else []
        tiles = await read_tiles(self._database.call, merkle.tiles_for(newest.size, points))
        try:
            nodes = merkle.prove_consistency(old, newest.size, tile_reader(tiles))
        except ProofInvalid as exc:
            raise LogBroken(f"the tiles do not reach from {old} to {newest.size} leaves: {exc}") from exc
        return Submission(old, tuple(nodes), note), newest

    async def keep(self, witness: VerifyKey, note: str, lines: str) -> None:
        """Keep the witness's cosignature among these signature lines. Raises `ProofInvalid` where none of them is one."""
        text, _ = split_note(note)
        _, found = split_note(f"{text}\n{lines}")
        for line in found:
            try:
                opened = open_checkpoint(f"{text}\n{line}\n", [witness])
            except ProofInvalid:
                continue  # another key's, or none
            await self._database.call(
                "select pericarp.keep_cosignature($1, $2, $3)",
                witness.text,
                opened.checkpoint.size,
                f"{line}\n",
            )
            return
        raise ProofInvalid("no cosignature of that witness is among them")


def with_cosignatures(note: str, witnesses: Sequence[str], lines: Sequence[str]) -> str:
    """A note with the stored cosignatures of these verifier keys. Raises `LogBroken` where one does not hold."""
    text, _ = split_note(note)
    for witness, line in zip(witnesses, lines, strict=True):
        try:
            key = VerifyKey.parse(witness)
            open_checkpoint(f"{text}\n{line}", [key])
            if key.kind != COSIGNATURE:
                raise ProofInvalid("not a witness's key")
        except ProofInvalid as exc:
            raise LogBroken(f"a stored cosignature does not hold: {exc}") from exc
    return note + "".join(lines)
