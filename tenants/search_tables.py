"""The tables that entries of the log are looked up by; `tenants.tables` is where everybody finds them."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    PrimaryKeyConstraint,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, UUID

from tenants.columns import metadata, time

audit_search = Table(
    "audit_search",
    metadata,
    Column("tenant_id", UUID, nullable=False),
    time("recorded_at"),
    Column("id", UUID, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("operation", Text, nullable=False),
    Column("decision", Text, nullable=False),
    Column("action", Text, nullable=False, comment="of screening; empty: nothing was screened"),
    Column("session", Text, nullable=False),
    PrimaryKeyConstraint("tenant_id", "recorded_at", "id", name="audit_search_pkey"),
    Index("audit_search_key", "tenant_id", "key_id", "recorded_at", "id"),
    Index("audit_search_operation", "tenant_id", "operation", "recorded_at", "id"),
    Index(
        "audit_search_decision",
        "tenant_id",
        "decision",
        "recorded_at",
        "id",
        postgresql_where=text("decision <> 'answered'"),
    ),
    Index(
        "audit_search_action",
        "tenant_id",
        "action",
        "recorded_at",
        "id",
        postgresql_where=text("action not in ('', 'allow')"),
    ),
    Index(
        "audit_search_session",
        "tenant_id",
        "session",
        "recorded_at",
        "id",
        postgresql_where=text("session <> ''"),
    ),
)

audit_input = Table(
    "audit_input",
    metadata,
    Column("tenant_id", UUID, nullable=False),
    Column(
        "print",
        BigInteger,
        nullable=False,
        comment="first 8 bytes of the fingerprint, a signed number, big end first",
    ),
    time("recorded_at"),
    Column("id", UUID, nullable=False),
    PrimaryKeyConstraint("tenant_id", "print", "recorded_at", "id", name="audit_input_pkey"),
)

audit_risk = Table(
    "audit_risk",
    metadata,
    Column("tenant_id", UUID, nullable=False),
    Column("category", Text, nullable=False),
    Column("band", Integer, nullable=False),
    time("recorded_at"),
    Column("id", UUID, nullable=False),
    Column("score", Integer, nullable=False, comment="micro-units"),
    PrimaryKeyConstraint("tenant_id", "category", "band", "recorded_at", "id", name="audit_risk_pkey"),
    CheckConstraint("band = score / 100000 and band > 0", name="audit_risk_band_check"),
)

saved_search = Table(
    "saved_search",
    metadata,
    Column(
        "tenant_id", UUID, ForeignKey("pericarp.tenant.id", name="saved_search_tenant_fkey"), nullable=False
    ),
    Column("name", Text, nullable=False),
    Column("filters", JSONB, nullable=False),
    time("saved_at", default=True),
    Column("saved_by", Text, nullable=False),
    PrimaryKeyConstraint("tenant_id", "name", name="saved_search_pkey"),
)
