"""The log: what is written of each decision, as bytes that can be proven later.

An `Entry` is one JSON object in canonical bytes: keys sorted, only integers, strings, lists and objects of
them, keys of [a-z0-9_]. The bytes are stored as they were hashed and never rebuilt. No input text and no
image is in an entry, only HMAC-SHA-256 under the tenant's own key: equal inputs of one tenant look equal,
those of two tenants never do, and once the key is destroyed nothing ties an entry to an input.
"""

from __future__ import annotations

import base64
import hmac
import time
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any
from uuid import UUID

import orjson
from sqlalchemy import insert, select, tuple_

from tenants import sealing
from tenants.errors import EntryInvalid, SealBroken, TenantNotFound
from tenants.tables import audit_inbox
from tenants.tables import tenant as tenant_table

if TYPE_CHECKING:
    from tenants.access import TenantId
    from tenants.database import Database

SCHEMA_VERSION = 1
MICRO = 1_000_000
FINGERPRINTS_KEPT = 1024
FINGERPRINTS_S = 60.0
"""How long a tenant's audit key may stay in memory after it was destroyed."""


class Decision(StrEnum):
    """What became of a request."""

    ANSWERED = "answered"
    REFUSED = "refused"
    """A limit or a wrong request."""
    DENIED = "denied"
    """No right, or risky content."""
    FAILED = "failed"
    ORPHANED = "orphaned"
    """Its gateway vanished; whether work was done is not known."""
    EXPIRED = "expired"
    """Nobody asked: a session's time was over."""


@dataclass(frozen=True, slots=True)
class ItemPrint:
    """What an entry tells of a query or document: fingerprints and sizes; empty and 0 where there is none."""

    text: str = ""
    chars: int = 0
    image: str = ""
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """One decision. Integers and strings only: scores are micro-units, durations microseconds."""

    request_id: str
    tenant: UUID
    """Told, not proven: reading an entry mints no TenantId."""
    key_id: str
    role: str
    operation: str
    decision: Decision
    code: str
    """`ok`, or the error's code at the edge."""
    status: int
    at_us: int = field(default_factory=lambda: time.time_ns() // 1000)
    """The gateway's clock, microseconds since 1970; the column `recorded_at` has the database's."""
    query: ItemPrint | None = None
    documents: tuple[ItemPrint, ...] = ()
    document_count: int = 0
    image_count: int = 0
    places: tuple[tuple[int, int], ...] = ()
    """The answer in its order: document index, score in micro-units."""
    input_tokens: int = 0
    image_tokens: int = 0
    model: str = ""
    model_digest: str = ""
    stages_us: tuple[tuple[str, int], ...] = ()
    client: str = ""
    """Fingerprint of the client's address."""
    session: str = ""
    """The session's id, where it is about one or used one; else the bytes have no such key."""
    shadowed: tuple[str, ...] = ()
    """Limits in shadow that would have refused it, where there are any; else the bytes have no such key."""
    details: Mapping[str, object] = field(default_factory=dict)
    """Of an `admin.…` operation: what was changed. Of a `score` pair by pair: `queries`, one for each document. Of
    a `clean_image`: what was `removed`, and `trailing_bytes`. Of all that was screened: `screening`. In integers, strings,
    lists and objects of them; else no such key."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """An entry as it stands in the log."""

    id: UUID
    recorded_at: datetime
    schema_version: int
    body: bytes


class Fingerprints:
    """Keyed fingerprints of one tenant's inputs: HMAC-SHA-256, base64url without padding, 43 characters.

    The message is the kind (`text`, `image`, `address`, `subject`, `end_user`), a zero byte, and the input. Text is
    normalised to NFC and encoded as UTF-8, nothing else: case, spaces and line ends count. An image is its bytes as
    they were sent.
    """

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        self._key = key

    def text(self, text: str) -> str:
        return self._of(b"text", unicodedata.normalize("NFC", text).encode("utf-8", "surrogatepass"))

    def image(self, image: bytes) -> str:
        return self._of(b"image", image)

    def address(self, address: str) -> str:
        return self._of(b"address", address.encode())

    def subject(self, subject: str) -> str:
        """Of a token's `sub`, or of the name in a certificate."""
        return self._of(b"subject", subject.encode("utf-8", "surrogatepass"))

    def end_user(self, name: str) -> str:
        """Of whom a search backend says that it asks for."""
        return self._of(b"end_user", name.encode())

    def item(self, text: str | None, image: bytes | None) -> ItemPrint:
        """Fingerprints and sizes of one query or document."""
        return ItemPrint(
            text=self.text(text) if text is not None else "",
            chars=len(text) if text is not None else 0,
            image=self.image(image) if image is not None else "",
            bytes=len(image) if image is not None else 0,
        )

    def _of(self, kind: bytes, message: bytes) -> str:
        digest = hmac.digest(self._key, kind + b"\0" + message, "sha256")
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


class Audit:
    """Append to and read from the log of one installation."""

    def __init__(self, database: Database, *, master_key: bytes) -> None:
        self._database = database
        self._master_key = master_key
        self._kept: dict[TenantId, tuple[float, Fingerprints]] = {}

    async def fingerprints(self, tenant: TenantId) -> Fingerprints:
        """The tenant's fingerprints. Raises `TenantNotFound`, `SealBroken` (also once it is destroyed)."""
        kept = self._kept.get(tenant)
        if kept is not None and kept[0] > time.monotonic():
            return kept[1]
        async with self._database.transaction(tenant) as connection:
            row = (
                await connection.execute(select(tenant_table.c.audit_key).where(tenant_table.c.id == tenant))
            ).one_or_none()
        if row is None:
            raise TenantNotFound
        if row.audit_key is None:
            raise SealBroken("the tenant's audit key was destroyed")
        fingerprints = Fingerprints(sealing.unseal(self._master_key, tenant, row.audit_key))
        if len(self._kept) >= FINGERPRINTS_KEPT:
            self._kept.pop(next(iter(self._kept)), None)
        self._kept[tenant] = (time.monotonic() + FINGERPRINTS_S, fingerprints)
        return fingerprints

    async def record(self, entry: Entry) -> UUID:
        """Write an entry by itself: for what was refused before anything was held.

        Durable when it returns the entry's id. Idempotent by request id: the first entry stands.
        """
        (row,) = await self._database.call(
            "select pericarp.append_entry($1, $2, $3, $4)",
            entry.tenant,
            entry.request_id,
            SCHEMA_VERSION,
            encode(entry),
        )
        return UUID(int=row[0].int)

    async def append(self, tenant: TenantId, entry: Entry) -> UUID:
        """Write an entry beside the change that it tells of: inside `Database.together` both stand, or neither.

        Returns the entry's id.
        """
        if entry.tenant != tenant:
            raise ValueError("the entry tells of another tenant")
        statement = (
            insert(audit_inbox)
            .values(
                tenant_id=tenant,
                request_id=entry.request_id,
                schema_version=SCHEMA_VERSION,
                body=encode(entry),
            )
            .returning(audit_inbox.c.id)
        )
        async with self._database.transaction(tenant) as connection:
            return UUID(int=(await connection.execute(statement)).scalar_one().int)

    async def list_entries(
        self, tenant: TenantId, *, limit: int = 100, before: UUID | None = None
    ) -> tuple[Recorded, ...]:
        """The tenant's newest entries first, at most `limit`; `before` is the last id of the page before."""
        columns = audit_inbox.c
        query = (
            select(columns.id, columns.recorded_at, columns.schema_version, columns.body)
            .where(columns.tenant_id == tenant)
            .order_by(columns.recorded_at.desc(), columns.id.desc())
            .limit(limit)
        )
        if before is not None:
            edge = (
                select(columns.recorded_at)
                .where(columns.tenant_id == tenant, columns.id == before)
                .scalar_subquery()
            )
            query = query.where(tuple_(columns.recorded_at, columns.id) < tuple_(edge, before))
        async with self._database.transaction(tenant) as connection:
            rows = (await connection.execute(query)).all()
        return tuple(Recorded(row.id, row.recorded_at, row.schema_version, bytes(row.body)) for row in rows)


def micro_units(score: float) -> int:
    """A score as the log keeps it."""
    return round(score * MICRO)


def encode(entry: Entry) -> bytes:
    """The entry's canonical bytes (equal to RFC 8785 on this domain: ASCII keys, no floats).

    Raises `EntryInvalid` for details that are not of this domain.
    """
    if not _is_canonical(entry.details):
        raise EntryInvalid
    session = {"session": entry.session} if entry.session else {}
    shadowed = {"shadowed": entry.shadowed} if entry.shadowed else {}
    details = {"details": entry.details} if entry.details else {}
    return orjson.dumps(
        {
            "at_us": entry.at_us,
            "client": entry.client,
            "code": entry.code,
            "decision": entry.decision.value,
            "document_count": entry.document_count,
            "documents": [tell_item(item) for item in entry.documents],
            "image_count": entry.image_count,
            "image_tokens": entry.image_tokens,
            "input_tokens": entry.input_tokens,
            "key_id": entry.key_id,
            "model": entry.model,
            "model_digest": entry.model_digest,
            "operation": entry.operation,
            "places": entry.places,
            "query": tell_item(entry.query) if entry.query is not None else {},
            "request_id": entry.request_id,
            "role": str(entry.role),
            **session,
            **shadowed,
            **details,
            "stages_us": dict(entry.stages_us),
            "status": entry.status,
            "tenant": str(entry.tenant),
        },
        option=orjson.OPT_SORT_KEYS,
    )


def decode(body: bytes) -> Entry:
    """The entry that `encode` wrote. Pure. Raises `EntryInvalid` for any other bytes."""
    try:
        raw = orjson.loads(body)
        entry = Entry(
            request_id=raw["request_id"],
            tenant=UUID(raw["tenant"]),
            key_id=raw["key_id"],
            role=raw["role"],
            operation=raw["operation"],
            decision=Decision(raw["decision"]),
            code=raw["code"],
            status=raw["status"],
            at_us=raw["at_us"],
            query=ItemPrint(**raw["query"]) if raw["query"] else None,
            documents=tuple(ItemPrint(**item) for item in raw["documents"]),
            document_count=raw["document_count"],
            image_count=raw["image_count"],
            places=tuple((index, score) for index, score in raw["places"]),
            input_tokens=raw["input_tokens"],
            image_tokens=raw["image_tokens"],
            model=raw["model"],
            model_digest=raw["model_digest"],
            stages_us=tuple(sorted(raw["stages_us"].items())),
            client=raw["client"],
            session=raw.get("session", ""),
            shadowed=tuple(raw.get("shadowed", ())),
            details=raw.get("details", {}),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise EntryInvalid from exc
    if not _is_canonical(raw) or encode(entry) != body:
        raise EntryInvalid
    return entry


def tell_item(item: ItemPrint) -> dict[str, Any]:
    """A query or document as an entry holds it. Only what there is: most documents have no image."""
    told: dict[str, Any] = {}
    if item.text:
        told |= {"text": item.text, "chars": item.chars}
    if item.image:
        told |= {"image": item.image, "bytes": item.bytes}
    return told


def _is_canonical(value: object) -> bool:
    """Only integers, strings, and lists and objects of them."""
    if isinstance(value, dict):
        return all(map(_is_canonical, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_canonical, value))
    return isinstance(value, int | str) and not isinstance(value, bool)
