"""The tables of the Merkle tree over the log, and of what was pruned from it; `tenants.tables` is where everybody finds them."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    LargeBinary,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP, UUID

from tenants.columns import metadata, time

audit_waiting = Table(
    "audit_waiting",
    metadata,
    Column("position", BigInteger, Identity(always=True), nullable=False),
    Column("envelope", LargeBinary, nullable=False),
    PrimaryKeyConstraint("position", name="audit_waiting_pkey"),
)

audit_leaf = Table(
    "audit_leaf",
    metadata,
    Column("tenant_id", UUID, nullable=False),
    Column("id", UUID, nullable=False),
    Column("index", BigInteger, nullable=False, comment="in the tree, from 0 on, without a gap"),
    Column("envelope", LargeBinary, nullable=False),
    PrimaryKeyConstraint("tenant_id", "id", name="audit_leaf_pkey"),
    UniqueConstraint("index", name="audit_leaf_index_key"),
)

audit_tile = Table(
    "audit_tile",
    metadata,
    Column("level", Integer, nullable=False),
    Column("number", BigInteger, nullable=False),
    Column("hashes", LargeBinary, nullable=False),
    PrimaryKeyConstraint("level", "number", name="audit_tile_pkey"),
)

audit_checkpoint = Table(
    "audit_checkpoint",
    metadata,
    Column("size", BigInteger, nullable=False),
    Column("root", LargeBinary, nullable=False),
    Column("note", Text, nullable=False),
    time("recorded_at", default=True),
    PrimaryKeyConstraint("size", name="audit_checkpoint_pkey"),
    CheckConstraint("size > 0", name="audit_checkpoint_size_check"),
)

audit_warrant = Table(
    "audit_warrant",
    metadata,
    Column("tenant_id", UUID, nullable=False),
    Column("id", UUID, nullable=False, comment="of the entry that says so"),
    Column("before", TIMESTAMP(timezone=True), comment="every body that was recorded before it goes"),
    Column(
        "entries", ARRAY(UUID), nullable=False, server_default=text("'{}'"), comment="else these bodies go"
    ),
    time("done_at", nullable=True),
    PrimaryKeyConstraint("tenant_id", "id", name="audit_warrant_pkey"),
    CheckConstraint("(before is null) = (cardinality(entries) > 0)", name="audit_warrant_check"),
    Index(
        "audit_warrant_open",
        "tenant_id",
        unique=True,
        postgresql_where=text("done_at is null and before is not null"),
    ),
)

audit_retention = Table(
    "audit_retention",
    metadata,
    Column("tenant_id", UUID, nullable=False),
    Column("retention_days", Integer, nullable=False),
    PrimaryKeyConstraint("tenant_id", name="audit_retention_pkey"),
    CheckConstraint("retention_days > 0", name="audit_retention_days_check"),
)

audit_cosignature = Table(
    "audit_cosignature",
    metadata,
    Column("size", BigInteger, nullable=False),
    Column("witness", Text, nullable=False),
    Column("line", Text, nullable=False),
    time("recorded_at", default=True),
    PrimaryKeyConstraint("size", "witness", name="audit_cosignature_pkey"),
    ForeignKeyConstraint(["size"], [audit_checkpoint.c.size], name="audit_cosignature_size_fkey"),
)

audit_witness = Table(
    "audit_witness",
    metadata,
    Column("witness", Text, nullable=False),
    time("claimed_at"),
    Column(
        "size",
        BigInteger,
        nullable=False,
        server_default="0",
        comment="of the newest tree that it has cosigned",
    ),
    PrimaryKeyConstraint("witness", name="audit_witness_pkey"),
)
