"""The tables of alerts; `tenants.tables` is where everybody finds them."""

from __future__ import annotations

from sqlalchemy import CheckConstraint, Column, PrimaryKeyConstraint, Table, Text, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, UUID

from tenants.columns import metadata, time

alert_silence = Table(
    "alert_silence",
    metadata,
    Column("tenant_id", UUID, nullable=False),
    Column("id", UUID, nullable=False, server_default=text("gen_random_uuid()")),
    Column("matchers", ARRAY(Text), nullable=False),
    time("created_at", default=True),
    time("ends_at"),
    Column("created_by", Text, nullable=False),
    Column("comment", Text, nullable=False),
    PrimaryKeyConstraint("tenant_id", "id", name="alert_silence_pkey"),
    CheckConstraint("cardinality(matchers) > 0", name="alert_silence_matchers_check"),
)

alert_told = Table(
    "alert_told",
    metadata,
    Column("tenant_id", UUID, nullable=False),
    Column("gateway", UUID, nullable=False),
    Column("fingerprint", Text, nullable=False),
    Column("alert", JSONB, nullable=False),
    time("told_at", default=True),
    PrimaryKeyConstraint("tenant_id", "gateway", "fingerprint", name="alert_told_pkey"),
)
