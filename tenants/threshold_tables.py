"""The tables of thresholds that learn; `tenants.tables` is where everybody finds them."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    Double,
    ForeignKey,
    Index,
    Integer,
    PrimaryKeyConstraint,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TIMESTAMP, UUID

from tenants.columns import metadata, time

_NONE = text("''")


def _tenant(of: str) -> Column[object]:
    return Column(
        "tenant_id", UUID, ForeignKey("pericarp.tenant.id", name=f"{of}_tenant_fkey"), nullable=False
    )


def _place() -> tuple[Column[str], Column[str]]:
    return Column("category", Text, nullable=False), Column("mode", Text, nullable=False)


threshold = Table(
    "threshold",
    metadata,
    _tenant("threshold"),
    *_place(),
    Column("version", Integer, nullable=False, server_default=text("0"), comment="of the last change"),
    Column("threshold", Double, nullable=False),
    Column("anchor", Double, nullable=False),
    Column("detectors", Text, nullable=False, server_default=_NONE),
    Column("day", Date, nullable=False, comment="of the last step, UTC"),
    Column("day_began_at", Double, nullable=False, comment="the threshold when that day began"),
    Column("frozen", Text, nullable=False, server_default=_NONE),
    Column(
        "counts_from",
        TIMESTAMP(timezone=True),
        comment="votes decided before it count no more: a rollback",
    ),
    Column("stepped_on", Date, nullable=False, comment="the last daily step, UTC"),
    PrimaryKeyConstraint("tenant_id", "category", "mode", name="threshold_pkey"),
    CheckConstraint("threshold between 0 and 1 and anchor between 0 and 1", name="threshold_range_check"),
    CheckConstraint("mode in ('text', 'image')", name="threshold_mode_check"),
    Index("threshold_stepped", "stepped_on"),
)

threshold_change = Table(
    "threshold_change",
    metadata,
    _tenant("threshold_change"),
    *_place(),
    Column("version", Integer, nullable=False),
    time("changed_at", default=True),
    Column("before", Double, nullable=False),
    Column("after", Double, nullable=False),
    Column("anchor", Double, nullable=False),
    Column("reason", Text, nullable=False),
    Column("frozen", Text, nullable=False, server_default=_NONE),
    Column("evidence", JSONB, nullable=False),
    Column("set_by", Text, nullable=False),
    Column("set_role", Text, nullable=False),
    PrimaryKeyConstraint("tenant_id", "category", "mode", "version", name="threshold_change_pkey"),
    CheckConstraint("version > 0", name="threshold_change_version_check"),
)

review = Table(
    "review",
    metadata,
    _tenant("review"),
    Column("entry_id", UUID, nullable=False),
    Column("item", Text, nullable=False),
    *_place(),
    Column("score", Double, nullable=False),
    Column("stopped", Boolean, nullable=False),
    Column(
        "odds",
        Double,
        comment="the chance that it had to be drawn; null: it was not, and is there to be appealed",
    ),
    Column("end_user", Text, nullable=False, comment="a fingerprint under the tenant's own key"),
    Column("detectors", Text, nullable=False),
    Column("day", Date, nullable=False, comment="UTC"),
    time("screened_at", default=True),
    Column("volume", BigInteger, comment="once decided: how many items the end user sent on that day"),
    time("appealed_at", nullable=True),
    Column("verdict", Text),
    time("decided_at", nullable=True),
    Column("decided_by", Text, nullable=False, server_default=_NONE),
    Column("decided_role", Text, nullable=False, server_default=_NONE),
    Column("votes", Boolean, nullable=False, server_default=text("false")),
    PrimaryKeyConstraint("tenant_id", "entry_id", "item", "category", "mode", name="review_pkey"),
    CheckConstraint("score between 0 and 1", name="review_score_check"),
    CheckConstraint("mode in ('text', 'image')", name="review_mode_check"),
    CheckConstraint("stopped or odds is not null", name="review_passed_check"),
    CheckConstraint("odds is null or (odds > 0 and odds <= 1)", name="review_odds_check"),
    CheckConstraint("appealed_at is null or stopped", name="review_appeal_check"),
    CheckConstraint("verdict in ('harmful', 'harmless')", name="review_verdict_check"),
    CheckConstraint(
        "(verdict is null) = (decided_at is null) and (verdict is null) = (volume is null)",
        name="review_decided_check",
    ),
    CheckConstraint("not votes or verdict is not null", name="review_votes_check"),
    Index(
        "review_vote",
        "tenant_id",
        "category",
        "mode",
        "end_user",
        "day",
        unique=True,
        postgresql_where=text("votes"),
    ),
    Index("review_screened", "tenant_id", "screened_at"),
    Index("review_day", "day"),
)

traffic = Table(
    "traffic",
    metadata,
    _tenant("traffic"),
    Column("day", Date, nullable=False, comment="UTC"),
    *_place(),
    Column("detectors", Text, nullable=False),
    Column("items", BigInteger, nullable=False),
    Column("stopped", BigInteger, nullable=False),
    Column("histogram", ARRAY(BigInteger), nullable=False, comment="items by score, in ten bins"),
    time("began_at", default=True),
    PrimaryKeyConstraint("tenant_id", "day", "category", "mode", "detectors", name="traffic_pkey"),
    Index("traffic_day", "day"),
)

traffic_user = Table(
    "traffic_user",
    metadata,
    _tenant("traffic_user"),
    Column("day", Date, nullable=False, comment="UTC"),
    Column("mode", Text, nullable=False),
    Column("end_user", Text, nullable=False, comment="a fingerprint under the tenant's own key"),
    Column("items", BigInteger, nullable=False),
    PrimaryKeyConstraint("tenant_id", "day", "mode", "end_user", name="traffic_user_pkey"),
    Index("traffic_user_day", "day"),
)

canary = Table(
    "canary",
    metadata,
    Column("tenant_id", UUID, nullable=False, comment="the nil id: of every tenant"),
    *_place(),
    Column("name", Text, nullable=False),
    Column("detectors", Text, nullable=False),
    Column("score", Double, nullable=False),
    time("set_at", default=True),
    PrimaryKeyConstraint("tenant_id", "category", "mode", "name", name="canary_pkey"),
    CheckConstraint("score between 0 and 1", name="canary_score_check"),
    CheckConstraint("mode in ('text', 'image')", name="canary_mode_check"),
)
