"""The whole log, or one tenant's part of it, as lines of JSON that `tools/verify.py` checks; docs/log.md has the format.

Read in one snapshot by the owner of the database: the runtime role sees one tenant at a time, and no tiles. Nothing is
verified here, for what is wrong is to be seen by whoever checks the export.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING
from uuid import UUID

import orjson

from tenants import merkle
from tenants.database import connect, translated
from tenants.envelope import Envelope
from tenants.errors import ReceiptPending, TenantNotFound

if TYPE_CHECKING:
    from asyncpg import Connection, Record

FORMAT = "pericarp-log-export"
VERSION = 1
CHECKPOINTS = """
select c.size, c.note || coalesce((select string_agg(k.line, '' order by k.witness)
                                     from pericarp.audit_cosignature k where k.size = c.size), '') as note
  from pericarp.audit_checkpoint c
"""
"""Each with its cosignatures."""

Told = Callable[[int, int], None]
"""How many leaves of how many are written."""


async def export_log(
    owner_url: str,
    *,
    tenant: str | None = None,
    bodies: bool = True,
    cosigned: bool = False,
    told: Told | None = None,
) -> AsyncIterator[bytes]:
    """The log's lines, each with its end. `tenant`: the entries of the tenant of that name, others' as hashes alone.

    `cosigned`: up to the newest tree that witnesses have cosigned, whatever came since.
    Raises `ReceiptPending` while there is no such tree, `TenantNotFound`, `DatabaseUnavailable`.
    """
    with translated():
        connection = await connect(owner_url, {}, command_timeout=None)
        try:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                async for line in _Reading(connection, bodies, cosigned, told).lines(tenant):
                    yield line
        finally:
            await connection.close(timeout=3)


class _Reading:
    """One snapshot of the log."""

    def __init__(
        self, connection: Connection[Record], bodies: bool, cosigned: bool, told: Told | None
    ) -> None:
        self._connection = connection
        self._bodies = bodies
        self._cosigned = cosigned
        self._told = told
        self._tenants: set[UUID] = set()

    async def lines(self, name: str | None) -> AsyncIterator[bytes]:
        newest = await self._connection.fetchrow(
            CHECKPOINTS
            + " where not $1 or exists (select from pericarp.audit_cosignature k where k.size = c.size)"
            " order by c.size desc limit 1",
            self._cosigned,
        )
        if newest is None:
            raise ReceiptPending("nothing is in the log's tree yet")
        only = None
        if name is not None:
            only = await self._connection.fetchval("select id from pericarp.find_tenant($1)", name)
            if only is None:
                raise TenantNotFound
        size: int = newest["size"]
        yield _line(
            {
                "format": FORMAT,
                "version": VERSION,
                "whole": only is None,
                "bodies": self._bodies,
                "note": newest["note"],
            }
        )
        for number in range(-(-size // merkle.TILE_WIDTH)):
            first = number * merkle.TILE_WIDTH
            after = min(first + merkle.TILE_WIDTH, size)
            async for line in self._tile(0, number, after - first):
                yield line
            async for line in self._leaves(first, after, only):
                yield line
            if self._told is not None:
                self._told(after, size)
        level, count = 1, size // merkle.TILE_WIDTH
        while count:
            for number in range(-(-count // merkle.TILE_WIDTH)):
                width = min(merkle.TILE_WIDTH, count - number * merkle.TILE_WIDTH)
                async for line in self._tile(level, number, width):
                    yield line
            level, count = level + 1, count // merkle.TILE_WIDTH
        async for line in self._outside(only):
            yield line

    async def _tile(self, level: int, number: int, width: int) -> AsyncIterator[bytes]:
        """As it is stored, but for hashes that came into it later; none where there is none."""
        hashes = await self._connection.fetchval(
            "select hashes from pericarp.audit_tile where level = $1 and number = $2", level, number
        )
        if hashes is not None:
            yield _line({"tile": [level, number], "hashes": _base64(hashes[: width * merkle.HASH_BYTES])})

    async def _leaves(self, first: int, after: int, only: UUID | None) -> AsyncIterator[bytes]:
        """The leaves of one tile with their entries, and the checkpoints of the trees that end there."""
        leaves = await self._connection.fetch(
            "select tenant_id, id, index, envelope from pericarp.audit_leaf"
            " where index >= $1 and index < $2 and ($3::uuid is null or tenant_id = $3) order by index",
            first,
            after,
            only,
        )
        notes = await self._connection.fetch(
            CHECKPOINTS + " where c.size > $1 and c.size <= $2", first, after
        )
        noted = {row["size"]: row["note"] for row in notes}
        entries = await self._entries(leaves)
        by_index = {leaf["index"]: leaf for leaf in leaves}
        for index in range(first, after):
            if index in by_index:
                leaf = by_index[index]
                yield self._entry(leaf, entries.get((leaf["tenant_id"], leaf["id"])))
            if index + 1 in noted:
                yield _line({"checkpoint": noted[index + 1]})

    def _entry(self, leaf: Record, entry: Record | None) -> bytes:
        """A leaf with its entry's body, and with the envelope that the row would have now, where that is another one."""
        envelope: bytes = leaf["envelope"]
        told: dict[str, object] = {"index": leaf["index"], "envelope": _base64(envelope)}
        if entry is None:
            return _line(told)
        row = Envelope(
            entry["schema_version"],
            entry["orphan"],
            entry["recorded_at_us"],
            leaf["tenant_id"],
            leaf["id"],
            entry["request_id"],
            envelope[-merkle.HASH_BYTES :],
        ).pack()
        if row != envelope:
            told["row"] = _base64(row)
        body: bytes | None = entry["body"]
        if not self._bodies:
            return _line(told)
        if body is None:
            return _line({**told, "pruned": True})
        if b"\n" in body:  # nothing that we wrote has one
            return _line({**told, "body64": _base64(body)})
        return _line(told)[:-2] + b',"body":' + body + b"}\n"

    async def _entries(self, leaves: Sequence[Record]) -> dict[tuple[UUID, UUID], Record]:
        """These leaves' entries, where they are still there."""
        found = {}
        for tenant in {leaf["tenant_id"] for leaf in leaves}:
            self._tenants.add(tenant)
            ids = [leaf["id"] for leaf in leaves if leaf["tenant_id"] == tenant]
            await self._bind(tenant)
            rows = await self._connection.fetch(
                "select id, request_id, orphan, schema_version, body,"
                " (extract(epoch from recorded_at) * 1000000)::bigint as recorded_at_us"
                " from pericarp.audit_inbox where tenant_id = $1 and id = any($2)",
                tenant,
                ids,
            )
            found.update({(tenant, row["id"]): row for row in rows})
        return found

    async def _outside(self, only: UUID | None) -> AsyncIterator[bytes]:
        """What should not be: leaves beyond the newest checkpoint, entries that neither are in the tree nor wait for it."""
        beyond = await self._connection.fetchval(
            "select min(index) from pericarp.audit_leaf"
            " where index >= (select max(size) from pericarp.audit_checkpoint)"
        )
        if beyond is not None:
            yield _line({"beyond": beyond})
        tenants = {only} if only is not None else self._tenants | {UUID(int=0)}
        if only is None:
            tenants |= {row["id"] for row in await self._connection.fetch("select id from pericarp.tenant")}
        for tenant in sorted(tenants):
            await self._bind(tenant)
            rows = await self._connection.fetch(
                "select i.id from pericarp.audit_inbox i where i.tenant_id = $1"
                " and not exists (select from pericarp.audit_leaf l where l.tenant_id = $1 and l.id = i.id)"
                " and not exists (select from pericarp.audit_waiting w"
                " where substring(w.envelope from 33 for 32) = uuid_send(i.tenant_id) || uuid_send(i.id))",
                tenant,
            )
            for row in rows:
                yield _line({"unsequenced": str(row["id"]), "tenant": str(tenant)})

    async def _bind(self, tenant: UUID) -> None:
        """Row security is forced upon the owner too."""
        await self._connection.execute("select set_config('app.tenant_id', $1, true)", str(tenant))


def _line(told: dict[str, object]) -> bytes:
    return orjson.dumps(told, option=orjson.OPT_APPEND_NEWLINE)


def _base64(data: bytes) -> str:
    return b64encode(data).decode()
