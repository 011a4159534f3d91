"""A leaf of the log's tree: 112 bytes that say which entry it is, when it was recorded, and the hash of its bytes.

All numbers are big-endian and unsigned; an id is its 16 bytes (RFC 9562).

    offset  bytes  field
         0     16  `pericarp/leaf/v1` in ASCII
        16      4  schema version of the body
        20      4  flags: 1 = the entry says that its request's hold was orphaned; no other bit is set
        24      8  when it was recorded, by the database's clock, in microseconds since 1970
        32     16  tenant
        48     16  the entry's id: the receipt's
        64     16  request id
        80     32  SHA-256 of the body

The tree's leaves are envelopes, not bodies: a body can be pruned or erased, and every proof stays whole.
`migrations/versions/0014_log.py` builds these bytes in the entry's own transaction.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from uuid import UUID

from tenants.errors import ProofInvalid

MAGIC = b"pericarp/leaf/v1"
ENVELOPE_BYTES = 112
ORPHAN = 1
_LAYOUT = struct.Struct(">16sIIQ16s16s16s32s")
assert _LAYOUT.size == ENVELOPE_BYTES


@dataclass(frozen=True, slots=True)
class Envelope:
    """What a leaf says."""

    schema_version: int
    orphan: bool
    recorded_at_us: int
    tenant: UUID
    """Told, not proven: reading a leaf mints no TenantId."""
    id: UUID
    request_id: UUID
    body_hash: bytes

    @classmethod
    def parse(cls, data: bytes) -> Envelope:
        """Raises `ProofInvalid` for any other bytes than `pack` gives."""
        if len(data) != ENVELOPE_BYTES:
            raise ProofInvalid("a leaf is 112 bytes")
        magic, schema, flags, at_us, tenant, entry, request, body_hash = _LAYOUT.unpack(data)
        if magic != MAGIC or flags & ~ORPHAN:
            raise ProofInvalid("not a leaf of this log")
        return cls(
            schema,
            bool(flags & ORPHAN),
            at_us,
            UUID(bytes=tenant),
            UUID(bytes=entry),
            UUID(bytes=request),
            body_hash,
        )

    def pack(self) -> bytes:
        """The 112 bytes."""
        return _LAYOUT.pack(
            MAGIC,
            self.schema_version,
            ORPHAN if self.orphan else 0,
            self.recorded_at_us,
            self.tenant.bytes,
            self.id.bytes,
            self.request_id.bytes,
            self.body_hash,
        )

    def covers(self, body: bytes) -> bool:
        """Whether this is the leaf of an entry with that body."""
        return hashlib.sha256(body).digest() == self.body_hash
