"""Hands out what proves the log: receipts, the newest checkpoint, tiles and bundles of leaves.

Nothing is handed out that was not verified first as its reader will verify it, but tiles and bundles, which prove
nothing by themselves.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import select

from tenants import merkle
from tenants.checkpoint import Checkpoint, Proof
from tenants.cosignatures import with_cosignatures
from tenants.errors import LogBroken, ProofInvalid, ReceiptNotFound, ReceiptPending
from tenants.sequencer import read_tiles, tile_reader, verified
from tenants.tables import audit_inbox, audit_leaf

if TYPE_CHECKING:
    from tenants.access import TenantId
    from tenants.checkpoint import VerifyKey
    from tenants.database import Database

LATELY = timedelta(minutes=1)


class Proofs:
    """Reads the tree that the sequencer grows."""

    def __init__(self, database: Database, key: VerifyKey) -> None:
        """`key` is the log's own."""
        self._database = database
        self._key = key

    async def prove(self, tenant: TenantId, receipt: str) -> Proof:
        """The receipt of that id, an entry's: its leaf, its place, and a proof that a tree has it there.

        The tree is, of those that have it, the newest that the most witnesses have cosigned, or the newest of all.

        Raises `ReceiptNotFound` (no id, none of the tenant's), `ReceiptPending` (recorded, not in the tree yet),
        `LogBroken`.
        """
        try:
            entry_id = UUID(receipt)
        except ValueError:
            raise ReceiptNotFound from None
        if str(entry_id) != receipt:
            raise ReceiptNotFound
        leaf, inbox = audit_leaf.c, audit_inbox.c
        async with self._database.transaction(tenant) as connection:
            row = (
                await connection.execute(
                    select(leaf.index.label("place"), leaf.envelope).where(
                        leaf.tenant_id == tenant, leaf.id == entry_id
                    )
                )
            ).one_or_none()
            if row is None:
                recorded = await connection.scalar(
                    select(inbox.id).where(inbox.tenant_id == tenant, inbox.id == entry_id)
                )
                raise ReceiptNotFound if recorded is None else ReceiptPending
        note, newest = await self._cosigned(row.place)
        tiles = await read_tiles(self._database.call, merkle.tiles_for(newest.size, [row.place]))
        try:
            nodes = merkle.prove_inclusion(row.place, newest.size, tile_reader(tiles))
            merkle.verify_inclusion(
                merkle.hash_leaf(row.envelope), row.place, newest.size, nodes, newest.root
            )
        except ProofInvalid as exc:
            raise LogBroken(f"leaf {row.place} is not in the tree of {newest.size} leaves: {exc}") from exc
        return Proof(row.place, tuple(nodes), note, bytes(row.envelope))

    async def checkpoint(self) -> str:
        """The newest checkpoint that witnesses have cosigned, a signed note; where none has lately, the newest.

        Raises `ReceiptPending` before the first, `LogBroken`.
        """
        note, _ = await self._cosigned(-1, LATELY)
        return note

    async def witnessed(self) -> str | None:
        """The newest checkpoint that witnesses have cosigned, whenever; None where none has. Raises `LogBroken`."""
        row = (await self._database.call("select * from pericarp.cosigned_checkpoint($1, $2)", -1, None))[0]
        if not row["witnesses"]:
            return None
        verified(row["note"], self._key)
        return with_cosignatures(row["note"], row["witnesses"], row["lines"])

    async def tile(self, level: int, number: int, width: int = merkle.TILE_WIDTH) -> bytes | None:
        """The first `width` hashes of a tile, one after the other; None where the tree has not so many there."""
        tiles = await read_tiles(self._database.call, [(level, number)])
        hashes = tiles.get((level, number), b"")[: width * merkle.HASH_BYTES]
        return hashes if len(hashes) == width * merkle.HASH_BYTES else None

    async def bundle(self, number: int, width: int = merkle.TILE_WIDTH) -> bytes | None:
        """The first `width` leaves below a tile of level 0, each after its length in two bytes (C2SP tlog-tiles).

        None where the tree has not so many there.
        """
        first = number * merkle.TILE_WIDTH
        rows = await self._database.call("select * from pericarp.read_leaves($1, $2)", first, width)
        if [row["index"] for row in rows] != list(range(first, first + width)):
            return None
        return b"".join(len(row["envelope"]).to_bytes(2, "big") + row["envelope"] for row in rows)

    async def _cosigned(self, above: int, lately: timedelta | None = None) -> tuple[str, Checkpoint]:
        """Of trees with more than `above` leaves; with `lately` none that lags more than that behind the newest."""
        row = (
            await self._database.call("select * from pericarp.cosigned_checkpoint($1, $2)", above, lately)
        )[0]
        if row["note"] is None:
            raise ReceiptPending
        checkpoint = verified(row["note"], self._key)
        return with_cosignatures(row["note"], row["witnesses"], row["lines"]), checkpoint
