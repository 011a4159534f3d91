"""What the database knows of the backups of its installation: which there are, and which of them were read back.

What a backup is, and where it lies, is `service.backup`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import BigInteger, bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY

if TYPE_CHECKING:
    from tenants.database import Database


@dataclass(frozen=True, slots=True)
class Made:
    """A backup that is whole in its store."""

    sequence: int
    id: UUID
    kind: str
    """`full`, or `incremental` upon `parent`."""
    parent: int | None
    log_size: int
    """Leaves of the log that it has at least."""
    stored_bytes: int
    manifest_sha256: bytes


@dataclass(frozen=True, slots=True)
class Known(Made):
    """A backup, and when it was made, pruned, read back; None where that never happened."""

    recorded_at: datetime
    pruned_at: datetime | None
    verified_at: datetime | None
    restored_at: datetime | None


@dataclass(frozen=True, slots=True)
class Standing:
    """How long ago, in seconds by the database's clock; None: never."""

    newest: int | None
    """The sequence number of the newest backup that is kept."""
    backup_age_s: float | None
    verified_age_s: float | None
    """Since a verify or a drill found nothing wrong."""
    drilled_age_s: float | None


class Backups:
    """Notes backups, inside the `together` block that writes the entry of it, and tells of them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def note(self, made: Made) -> None:
        """Note a backup; one that is noted already stands."""
        async with self._database.outside_tenants() as connection:
            await connection.execute(
                text(
                    "select pericarp.note_backup(:sequence, :id, :kind, :parent, :log_size, :stored_bytes, :digest)"
                ).bindparams(bindparam("parent", type_=BigInteger)),
                {
                    "sequence": made.sequence,
                    "id": made.id,
                    "kind": made.kind,
                    "parent": made.parent,
                    "log_size": made.log_size,
                    "stored_bytes": made.stored_bytes,
                    "digest": made.manifest_sha256,
                },
            )

    async def note_check(self, sequence: int, kind: str, *, good: bool, duration_s: float) -> None:
        """Note that a backup was read back: `verify`, `drill` or `restore`, and whether nothing was wrong."""
        async with self._database.outside_tenants() as connection:
            await connection.execute(
                text("select pericarp.note_backup_check(:sequence, :kind, :good, :duration_s)"),
                {"sequence": sequence, "kind": kind, "good": good, "duration_s": duration_s},
            )

    async def note_pruned(self, sequences: Sequence[int]) -> None:
        """Note that these are no longer in the store."""
        async with self._database.outside_tenants() as connection:
            await connection.execute(
                text("select pericarp.note_backups_pruned(:sequences)").bindparams(
                    bindparam("sequences", type_=ARRAY(BigInteger))
                ),
                {"sequences": list(sequences)},
            )

    async def list(self) -> tuple[Known, ...]:
        """All that was ever noted, by sequence number."""
        rows = await self._database.call("select * from pericarp.list_backups()")
        return tuple(
            Known(
                sequence=row["sequence"],
                id=UUID(int=row["id"].int),
                kind=row["kind"],
                parent=row["parent"],
                log_size=row["log_size"],
                stored_bytes=row["stored_bytes"],
                manifest_sha256=row["manifest_sha256"],
                recorded_at=row["recorded_at"],
                pruned_at=row["pruned_at"],
                verified_at=row["verified_at"],
                restored_at=row["restored_at"],
            )
            for row in rows
        )

    async def standing(self) -> Standing:
        """How old the newest backup is, and the newest that was read back."""
        row = (await self._database.call("select * from pericarp.backup_standing()"))[0]
        return Standing(row["newest"], row["backup_age_s"], row["verified_age_s"], row["drilled_age_s"])

    async def of_entries(self, entries: Sequence[tuple[UUID, UUID]]) -> dict[UUID, int | None]:
        """In which backup each of these entries (tenant, id) is first; None: in none yet."""
        rows = await self._database.call(
            "select * from pericarp.backups_of_entries($1, $2)",
            [tenant for tenant, _ in entries],
            [entry for _, entry in entries],
        )
        found = {UUID(int=row["id"].int): row["sequence"] for row in rows}
        return {entry: found.get(entry) for _, entry in entries}

    async def of_leaf(self, index: int) -> int | None:
        """In which backup the log's leaf of that index is first; None: in none yet."""
        rows = await self._database.call("select pericarp.backup_of_leaf($1)", index)
        sequence: int | None = rows[0][0]
        return sequence
