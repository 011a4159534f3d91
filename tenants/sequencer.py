"""Takes leaves out of the queue and into the tree, and signs what the tree is then.

One step is one transaction under an advisory lock, so of any number of gateways one integrates at a time, and a step
that breaks off anywhere has not happened. Leaves get their index in the order of the queue; no clock is asked.

Before a step builds on the stored tree it makes sure that it is the one that was signed: the newest checkpoint's
signature by our own key, the tiles at the tree's edge, the number of leaves, and that the tree which this process saw
last is the beginning of this one. What does not hold raises `LogBroken`, and nothing is signed until it holds again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import asyncpg

from tenants import merkle
from tenants.checkpoint import Checkpoint, Signer, open_checkpoint
from tenants.envelope import Envelope
from tenants.errors import LogBroken, ProofInvalid

if TYPE_CHECKING:
    from asyncpg import Record
    from asyncpg.pool import PoolConnectionProxy

    from tenants.checkpoint import VerifyKey
    from tenants.database import Database

STEP_LEAVES = 4096
"""Leaves of one step at most."""
ORIGIN = "pericarp/log/"
_EMPTY = Checkpoint("", 0, merkle.EMPTY_ROOT)
Tiles = dict[tuple[int, int], bytes]
Fetch = Callable[..., Awaitable[list["Record"]]]
"""Runs a statement with its arguments: a connection's `fetch`, or `Database.call`."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one step did."""

    integrated: int = 0
    size: int | None = None
    """Of the tree afterwards; None where another integrates at the moment."""

    @property
    def full(self) -> bool:
        """Whether more may be waiting than fitted into one step."""
        return self.integrated == STEP_LEAVES


class Sequencer:
    """Grows the log's tree. One to a process; it remembers the newest tree that it has seen."""

    def __init__(self, database: Database, signer: Signer) -> None:
        self._database = database
        self._signer = signer
        self.waiting = 0
        """Leaves that waited when this process looked last and were not integrated then, `STEP_LEAVES` at most."""
        self._seen = _EMPTY
        self._head: tuple[int, float] | None = None

    async def step(self) -> Step:
        """Integrate what waits, at most `STEP_LEAVES`, and sign it. Durable when it returns.

        Raises `LogBroken` where the stored tree is not the one that was signed, `DatabaseUnavailable`.
        """
        try:
            async with self._database.calls() as connection:
                step, newest = await self._step(connection)
        except asyncpg.UniqueViolationError as exc:
            # Rows that were restored one by one queued themselves again; the first leaf of an entry stands.
            forgotten = await self._database.call("select pericarp.forget_integrated($1)", STEP_LEAVES)
            if not forgotten[0][0]:
                raise LogBroken("a leaf or a checkpoint stands where the tree has none") from exc
            return Step()
        self._seen = newest
        if step.integrated:
            self._head = None
            self.waiting -= step.integrated
        return step

    async def look(self) -> tuple[Checkpoint, int | None] | None:
        """The newest tree, after all that `step` makes sure of, and the place of the first leaf that waits for it.

        Changes nothing. None where another integrates at the moment. Raises `LogBroken`, `DatabaseUnavailable`.
        """
        async with self._database.calls() as connection:
            row = await connection.fetchrow("select * from pericarp.begin_integration($1)", 1)
            assert row is not None, "a function without a set gives one row"
            if not row["locked"]:
                return None
            newest, _ = await self._check(connection, row["note"], row["leaves"])
            return newest, row["head"]

    async def _step(self, connection: PoolConnectionProxy[Record]) -> tuple[Step, Checkpoint]:
        """What was done, and the newest tree that is known to be ours once that is durable."""
        row = await connection.fetchrow("select * from pericarp.begin_integration($1)", STEP_LEAVES)
        assert row is not None, "a function without a set gives one row"
        self._note_head(row["head"])
        if not row["locked"]:
            return Step(), self._seen
        self.waiting = len(row["positions"] or ())
        newest, tiles = await self._check(connection, row["note"], row["leaves"])
        positions, envelopes = row["positions"], row["envelopes"]
        if not positions:
            return Step(size=newest.size), newest
        for envelope in envelopes:
            _check_leaf(envelope)
        grown = merkle.grow(
            newest.size, [merkle.hash_leaf(envelope) for envelope in envelopes], tile_reader(tiles)
        )
        size = newest.size + len(positions)
        root = merkle.root(size, tile_reader(tiles | grown))
        after = Checkpoint(self._signer.key.name, size, root)
        await connection.execute(
            "select pericarp.integrate($1, $2, $3, $4, $5, $6, $7)",
            newest.size,
            positions,
            [level for level, _ in grown],
            [number for _, number in grown],
            list(grown.values()),
            root,
            self._signer.sign(after),
        )
        return Step(len(positions), size), after

    async def _check(
        self, connection: PoolConnectionProxy[Record], note: str | None, leaves: int
    ) -> tuple[Checkpoint, Tiles]:
        """The newest checkpoint and the tiles at its tree's edge, after all that is to hold of them."""
        newest = verified(note, self._signer.key)
        if leaves != newest.size:
            raise LogBroken(f"the tree of {newest.size} leaves is stored with {leaves}")
        if newest.size < self._seen.size:
            raise LogBroken(f"the tree had {self._seen.size} leaves and has {newest.size}")
        points = [self._seen.size - 1] if self._seen.size else []
        tiles = await read_tiles(connection.fetch, merkle.tiles_for(newest.size, points))
        read = tile_reader(tiles)
        try:
            if merkle.root(newest.size, read) != newest.root:
                raise LogBroken(f"the tiles of the tree of {newest.size} leaves do not lead to its root")
            proof = merkle.prove_consistency(self._seen.size, newest.size, read)
            merkle.verify_consistency(self._seen.size, newest.size, self._seen.root, newest.root, proof)
        except LogBroken:
            raise
        except ProofInvalid as exc:
            raise LogBroken(
                f"the tree of {newest.size} leaves does not begin with that of {self._seen.size}: {exc}"
            ) from exc
        return newest, tiles

    @property
    def seen(self) -> Checkpoint:
        """The newest tree that this process has seen; of no leaves before it has seen one."""
        return self._seen

    @property
    def lag_s(self) -> float:
        """For how long, by this process's own clock, the first leaf of the queue has been seen waiting there."""
        return time.monotonic() - self._head[1] if self._head is not None else 0.0

    def _note_head(self, position: int | None) -> None:
        if position is None:
            self._head, self.waiting = None, 0
        elif self._head is None or self._head[0] != position:
            self._head = (position, time.monotonic())


def log_signer(seed: bytes) -> Signer:
    """The log's own key, from the 32 bytes of an RFC 8032 private key. It signs as the log's origin, which is made from it."""
    public = Signer(ORIGIN, seed).key.public
    return Signer(ORIGIN + hashlib.sha256(public).hexdigest()[:32], seed)


def verified(note: str | None, key: VerifyKey) -> Checkpoint:
    """The checkpoint of a stored note, of an empty tree where there is none. Raises `LogBroken`."""
    if note is None:
        return _EMPTY
    try:
        return open_checkpoint(note, [key], origin=key.name).checkpoint
    except ProofInvalid as exc:
        raise LogBroken(f"the newest checkpoint is not signed by {key.name}: {exc}") from exc


async def read_tiles(fetch: Fetch, places: Iterable[tuple[int, int]]) -> Tiles:
    """The stored tiles at these places, `(level, number)`; those that are missing are left out."""
    wanted = sorted(places)
    rows = await fetch(
        "select * from pericarp.read_tiles($1, $2)",
        [level for level, _ in wanted],
        [number for _, number in wanted],
    )
    return {(row["level"], row["number"]): row["hashes"] for row in rows}


def tile_reader(tiles: Tiles) -> merkle.ReadTile:
    """Reads from `tiles`; one that is missing is empty, which every reader of it refuses."""
    return lambda level, number: tiles.get((level, number), b"")


def _check_leaf(envelope: bytes) -> None:
    try:
        Envelope.parse(envelope)
    except ProofInvalid as exc:
        raise LogBroken(f"what waits for the tree is no leaf: {exc}") from exc
