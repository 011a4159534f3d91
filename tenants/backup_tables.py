"""The tables of backups and of what was done to make sure of them; `tenants.tables` is where everybody finds them."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    Index,
    LargeBinary,
    PrimaryKeyConstraint,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import UUID

from tenants.columns import metadata, time

backup = Table(
    "backup",
    metadata,
    Column("sequence", BigInteger, nullable=False, autoincrement=False),
    Column("id", UUID, nullable=False),
    Column("kind", Text, nullable=False),
    Column("parent", BigInteger),
    Column("log_size", BigInteger, nullable=False, comment="leaves of the log that it has at least"),
    Column("stored_bytes", BigInteger, nullable=False),
    Column("manifest_sha256", LargeBinary, nullable=False),
    time("recorded_at", default=True),
    time("pruned_at", nullable=True),
    PrimaryKeyConstraint("sequence", name="backup_pkey"),
    CheckConstraint("sequence > 0 and (parent is null or parent < sequence)", name="backup_sequence_check"),
    CheckConstraint(
        "kind in ('full', 'incremental') and (kind = 'full') = (parent is null)", name="backup_kind_check"
    ),
    CheckConstraint("log_size >= 0", name="backup_log_size_check"),
    Index("backup_log_size", "log_size", postgresql_where=text("pruned_at is null")),
)

backup_check = Table(
    "backup_check",
    metadata,
    Column("id", UUID, nullable=False, server_default=text("gen_random_uuid()")),
    Column("sequence", BigInteger, nullable=False),
    Column("kind", Text, nullable=False),
    Column("good", Boolean, nullable=False),
    Column("duration_s", Double, nullable=False),
    time("recorded_at", default=True),
    PrimaryKeyConstraint("id", name="backup_check_pkey"),
    CheckConstraint("kind in ('verify', 'drill', 'restore')", name="backup_check_kind_check"),
    Index("backup_check_newest", "kind", "recorded_at", postgresql_where=text("good")),
)
