"""The schema as SQLAlchemy sees it. `migrations/` build it; a test compares the two.

Only what runs inside `transaction(tenant)` uses these; admission, authentication and the log's append are SQL
functions.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, CIDR, INET, JSONB, TIMESTAMP, UUID

from tenants.alert_tables import alert_silence, alert_told
from tenants.backup_tables import backup, backup_check
from tenants.columns import SCHEMA, metadata, time
from tenants.log_tables import (
    audit_checkpoint,
    audit_cosignature,
    audit_leaf,
    audit_retention,
    audit_tile,
    audit_waiting,
    audit_warrant,
    audit_witness,
)
from tenants.search_tables import audit_input, audit_risk, audit_search, saved_search
from tenants.threshold_tables import canary, review, threshold, threshold_change, traffic, traffic_user

__all__ = [
    "SCHEMA",
    "alert_silence",
    "alert_told",
    "audit_checkpoint",
    "audit_cosignature",
    "audit_input",
    "audit_leaf",
    "audit_retention",
    "audit_risk",
    "audit_search",
    "audit_tile",
    "audit_waiting",
    "audit_warrant",
    "audit_witness",
    "backup",
    "backup_check",
    "canary",
    "metadata",
    "review",
    "saved_search",
    "threshold",
    "threshold_change",
    "traffic",
    "traffic_user",
]

_NEVER = text("'-infinity'")
_EMPTY = text("'{}'")

tenant = Table(
    "tenant",
    metadata,
    Column("id", UUID, primary_key=True),
    Column("name", Text, nullable=False),
    time("created_at", default=True),
    time("suspended_at", nullable=True),
    time("contained_at", nullable=True),
    time("deleted_at", nullable=True),
    time("purge_after", nullable=True),
    Column("audit_key", LargeBinary, comment="wrapped under the master key; null once destroyed"),
    UniqueConstraint("name", name="tenant_name_key"),
    CheckConstraint("(deleted_at is null) = (purge_after is null)", name="tenant_deleted_check"),
    Index("tenant_purge", "purge_after", postgresql_where=text("purge_after is not null")),
)

policy = Table(
    "policy",
    metadata,
    Column("tenant_id", UUID, ForeignKey("pericarp.tenant.id", name="policy_tenant_fkey"), nullable=False),
    Column("version", Integer, nullable=False),
    time("created_at", default=True),
    Column("body", JSONB, nullable=False),
    Column("set_by", Text, nullable=False, server_default=text("''")),
    Column("set_role", Text, nullable=False, server_default=text("'operator'")),
    PrimaryKeyConstraint("tenant_id", "version", name="policy_pkey"),
    CheckConstraint("version > 0", name="policy_version_check"),
)

ceiling = Table(
    "ceiling",
    metadata,
    Column("tenant_id", UUID, nullable=False),
    Column("version", Integer, nullable=False),
    time("created_at", default=True),
    Column("set_by", Text, nullable=False),
    Column("set_role", Text, nullable=False),
    Column("body", JSONB, nullable=False),
    PrimaryKeyConstraint("tenant_id", "version", name="ceiling_pkey"),
    CheckConstraint("version > 0", name="ceiling_version_check"),
)

key = Table(
    "key",
    metadata,
    Column("tenant_id", UUID, ForeignKey("pericarp.tenant.id", name="key_tenant_fkey"), nullable=False),
    Column("id", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("name", Text),
    time("created_at", default=True),
    time("expires_at", nullable=True),
    time("revoked_at", nullable=True),
    time("contained_at", nullable=True),
    Column("contained_until", TIMESTAMP(timezone=True), comment="null: until somebody releases it"),
    Column("kind", Text, nullable=False),
    Column("scopes", ARRAY(Text), nullable=False, server_default=_EMPTY),
    Column(
        "allowed_cidrs",
        ARRAY(CIDR),
        nullable=False,
        server_default=_EMPTY,
        comment="empty: from everywhere",
    ),
    Column("limits", JSONB, nullable=False, server_default=_EMPTY),
    Column("revoked_reason", Text),
    Column(
        "last_used_at",
        TIMESTAMP(timezone=True),
        comment="written in batches, some seconds late",
    ),
    Column("last_used_address", INET),
    PrimaryKeyConstraint("tenant_id", "id", name="key_pkey"),
    UniqueConstraint("id", name="key_id_key"),
    Index("key_contained_until", "contained_until", postgresql_where=text("contained_until is not null")),
    CheckConstraint("contained_until is null or contained_at is not null", name="key_contained_until_check"),
)

key_secret = Table(
    "key_secret",
    metadata,
    Column("tenant_id", UUID, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("pepper_version", Integer, nullable=False),
    time("created_at", default=True),
    time("not_after", nullable=True),
    PrimaryKeyConstraint("tenant_id", "key_id", "digest", name="key_secret_pkey"),
    ForeignKeyConstraint(
        ["tenant_id", "key_id"], ["pericarp.key.tenant_id", "pericarp.key.id"], name="key_secret_key_fkey"
    ),
)

denied_token = Table(
    "denied_token",
    metadata,
    Column(
        "tenant_id", UUID, ForeignKey("pericarp.tenant.id", name="denied_token_tenant_fkey"), nullable=False
    ),
    Column("issuer", Text, nullable=False),
    Column("jti", Text, nullable=False),
    time("denied_at", default=True),
    Column(
        "until",
        TIMESTAMP(timezone=True),
        nullable=False,
        comment="after it the token is expired anyway, and the row goes",
    ),
    PrimaryKeyConstraint("tenant_id", "issuer", "jti", name="denied_token_pkey"),
)

audit_inbox = Table(
    "audit_inbox",
    metadata,
    Column("tenant_id", UUID, nullable=False),
    Column("id", UUID, nullable=False, server_default=text("gen_random_uuid()")),
    Column("request_id", UUID, nullable=False),
    Column("orphan", Boolean, nullable=False, server_default=text("false")),
    time("recorded_at", default=True),
    Column("schema_version", Integer, nullable=False),
    Column("body", LargeBinary, comment="null once it was pruned"),
    PrimaryKeyConstraint("tenant_id", "id", name="audit_inbox_pkey"),
    UniqueConstraint("tenant_id", "request_id", "orphan", name="audit_inbox_request_key"),
    Index("audit_inbox_recorded", "tenant_id", "recorded_at", "id"),
)

quota = Table(
    "quota",
    metadata,
    Column("tenant_id", UUID, ForeignKey("pericarp.tenant.id", name="quota_tenant_fkey"), nullable=False),
    Column("key_id", Text, nullable=False, server_default=text("''")),
    Column("month", Date, nullable=False, server_default=_NEVER),
    Column("month_requests", BigInteger, nullable=False, server_default=text("0")),
    Column(
        "leaked_us",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="the moment of the levels, microseconds since 1970",
    ),
    *(
        Column(f"{name}_level", BigInteger, nullable=False, server_default=text("0"))
        for name in ("requests", "images", "tokens")
    ),
    *(Column(f"{name}_rate", BigInteger) for name in ("requests", "images", "tokens")),
    Column("month_tokens", BigInteger, nullable=False, server_default=text("0")),
    PrimaryKeyConstraint("tenant_id", "key_id", name="quota_pkey"),
)

gateway = Table(
    "gateway",
    metadata,
    Column("id", UUID, nullable=False),
    time("lease_until"),
    PrimaryKeyConstraint("id", name="gateway_pkey"),
)

slot = Table(
    "slot",
    metadata,
    Column("tenant_id", UUID, ForeignKey("pericarp.tenant.id", name="slot_tenant_fkey"), nullable=False),
    Column("n", Integer, nullable=False),
    Column(
        "token",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="fencing: counts who had the slot; a stale one frees nothing",
    ),
    Column("request_id", UUID, comment="null: free"),
    Column("key_id", Text, nullable=False, server_default=text("''")),
    Column("gateway_id", UUID),
    Column("images", Integer, nullable=False, server_default=text("0")),
    Column("tokens", BigInteger, nullable=False, server_default=text("0")),
    Column("shadowed", ARRAY(Integer), nullable=False, server_default=text("'{}'")),
    Column("expires_at", TIMESTAMP(timezone=True), nullable=False, server_default=_NEVER),
    Column("settled_at", TIMESTAMP(timezone=True), comment="not null: ended, and not yet counted"),
    Column("used_images", Integer, nullable=False, server_default=text("0")),
    Column("used_tokens", BigInteger, nullable=False, server_default=text("0")),
    PrimaryKeyConstraint("tenant_id", "n", name="slot_pkey"),
)

usage = Table(
    "usage",
    metadata,
    Column("tenant_id", UUID, ForeignKey("pericarp.tenant.id", name="usage_tenant_fkey"), nullable=False),
    Column("day", Date, nullable=False, comment="UTC"),
    Column("key_id", Text, nullable=False),
    *(
        Column(name, BigInteger, nullable=False, server_default=text("0"))
        for name in ("requests", "images", "tokens", "refused", "shadowed")
    ),
    PrimaryKeyConstraint("tenant_id", "day", "key_id", name="usage_pkey"),
)

session = Table(
    "session",
    metadata,
    Column("tenant_id", UUID, ForeignKey("pericarp.tenant.id", name="session_tenant_fkey"), nullable=False),
    Column("id", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    time("created_at", default=True),
    Column("ttl_s", Integer, nullable=False),
    Column(
        "expires_at",
        TIMESTAMP(timezone=True),
        nullable=False,
        comment="moves with every use, never beyond ends_at",
    ),
    time("ends_at"),
    time("last_used_at", nullable=True),
    Column("requests", BigInteger, nullable=False, server_default=text("0")),
    PrimaryKeyConstraint("tenant_id", "id", name="session_pkey"),
    CheckConstraint("ttl_s > 0", name="session_ttl_check"),
    Index("session_expires", "expires_at"),
)

repeat = Table(
    "repeat",
    metadata,
    Column("tenant_id", UUID, ForeignKey("pericarp.tenant.id", name="repeat_tenant_fkey"), nullable=False),
    Column("key_id", Text, nullable=False),
    Column("idempotency_key", Text, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column(
        "answer",
        LargeBinary,
        nullable=False,
        comment="wrapped under the master key: it may hold a new key's text",
    ),
    Column("receipt", UUID),
    time("created_at", default=True),
    time("expires_at"),
    PrimaryKeyConstraint("tenant_id", "key_id", "idempotency_key", name="repeat_pkey"),
    Index("repeat_expires", "expires_at"),
)

worker = Table(
    "worker",
    metadata,
    Column("tenant_id", UUID, ForeignKey("pericarp.tenant.id", name="worker_tenant_fkey"), nullable=False),
    Column("gateway", UUID, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("running", Integer, nullable=False),
    Column("jobs", BigInteger, nullable=False),
    time("since"),
    time("reported_at", default=True),
    PrimaryKeyConstraint("tenant_id", "gateway", "pid", name="worker_pkey"),
    Index("worker_gateway", "gateway"),
    Index("worker_reported", "reported_at"),
)
