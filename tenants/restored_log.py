"""The whole log of a restored database, hashed anew: does every entry lead to the roots that were signed?

Read as a superuser, whom no row security bounds, of a database that nobody else uses. It takes the leaves as they stand,
recomputes the tree from nothing, and compares with the stored tiles of nobody: neither a tile nor a recorded root is
believed, but for comparing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tenants import merkle
from tenants.checkpoint import Checkpoint
from tenants.database import CONNECT_S, connect, translated
from tenants.errors import LogBroken
from tenants.sequencer import verified

if TYPE_CHECKING:
    from asyncpg import Connection, Record

    from tenants.checkpoint import VerifyKey

BATCH = 4096
Told = Callable[[int, int], None]
"""How many leaves of how many are hashed."""


@dataclass(frozen=True, slots=True)
class Recomputed:
    """What the log is."""

    newest: Checkpoint
    """Signed by the log's key, and its root is that of the leaves."""
    roots: Mapping[int, bytes]
    """The roots of the sizes that were asked for and that the log has."""
    bodies: int
    """Entries whose bytes are there and are those that the leaf was made of."""
    pruned: int
    """Entries whose bodies are gone, by erasure or at the end of their time."""


async def recompute(
    superuser_url: str, key: VerifyKey, sizes: frozenset[int] = frozenset(), *, told: Told | None = None
) -> Recomputed:
    """Hash every leaf and every body. Raises `LogBroken` for the first that does not hold, `DatabaseUnavailable`."""
    with translated():
        connection = await connect(superuser_url, {}, command_timeout=None)
        try:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                return await _recompute(connection, key, sizes, told)
        finally:
            await connection.close(timeout=CONNECT_S)


async def _recompute(
    connection: Connection[Record], key: VerifyKey, sizes: frozenset[int], told: Told | None
) -> Recomputed:
    note = await connection.fetchval("select note from pericarp.audit_checkpoint order by size desc limit 1")
    newest = verified(note, key)
    stored = await connection.fetchval("select count(*) from pericarp.audit_leaf")
    if stored != newest.size:
        raise LogBroken(f"the tree of {newest.size} leaves is stored with {stored}")
    checkpoints = {
        row["size"]: row["root"]
        for row in await connection.fetch("select size, root from pericarp.audit_checkpoint")
    }
    tree, roots = Tree(), {0: merkle.EMPTY_ROOT}
    bodies = pruned = 0
    for first in range(0, newest.size, BATCH):
        rows = await connection.fetch(
            "select l.index, l.envelope, i.id is not null as recorded, sha256(i.body) as digest"
            " from pericarp.audit_leaf l"
            " left join pericarp.audit_inbox i on i.tenant_id = l.tenant_id and i.id = l.id"
            " where l.index >= $1 and l.index < $2 order by l.index",
            first,
            first + BATCH,
        )
        for row in rows:
            if row["index"] != tree.size or not row["recorded"]:
                raise LogBroken(f"leaf {tree.size} has no entry, or no place")
            if row["digest"] is None:
                pruned += 1
            elif row["digest"] != row["envelope"][-merkle.HASH_BYTES :]:
                raise LogBroken(f"the entry of leaf {tree.size} is not the one that its leaf was made of")
            else:
                bodies += 1
            tree.add(merkle.hash_leaf(row["envelope"]))
            if tree.size in sizes or tree.size in checkpoints:
                roots[tree.size] = tree.root()
                if checkpoints.get(tree.size, roots[tree.size]) != roots[tree.size]:
                    raise LogBroken(f"the leaves do not lead to the root that was recorded at {tree.size}")
        if told is not None:
            told(tree.size, newest.size)
    if tree.size != newest.size or tree.root() != newest.root:
        raise LogBroken(f"the leaves do not lead to the root that was signed of {newest.size}")
    return Recomputed(
        newest, {size: roots[size] for size in sizes | {newest.size} if size in roots}, bodies, pruned
    )


class Tree:
    """A tree that only grows, as the roots of its whole subtrees: as many as its size has bits that are set."""

    def __init__(self) -> None:
        self.size = 0
        self._whole: list[bytes] = []

    def add(self, leaf_hash: bytes) -> None:
        """One leaf more."""
        self._whole.append(leaf_hash)
        self.size += 1
        for _ in range((self.size & -self.size).bit_length() - 1):
            right = self._whole.pop()
            self._whole.append(merkle.hash_node(self._whole.pop(), right))

    def root(self) -> bytes:
        """RFC 9162, section 2.1.1."""
        if not self._whole:
            return merkle.EMPTY_ROOT
        *rest, root = self._whole
        for left in reversed(rest):
            root = merkle.hash_node(left, root)
        return root
