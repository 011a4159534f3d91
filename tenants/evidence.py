"""What the traffic was like, and which items reviewers may judge: noted in memory, written in batches.

Whoever judged an item notes it here once its entry stands. Of every item counts its score and its end user. Every
stopped item is kept, so that it can be appealed; of those with a score that a threshold could ever meet, a random part is
drawn for a reviewer, with a chance that is known and kept. Never on the request path: a gateway that dies forgets
some seconds of it, at random, which harms no estimate.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import IntegrityError

from tenants import tables
from tenants.errors import DatabaseUnavailable
from tenants.risk import Category, Mode
from tenants.traffic import BASELINE_DAYS, BINS, Day, bin_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncConnection

    from tenants.access import TenantId
    from tenants.database import Database

STOPPED_ODDS = 0.10
NEAR_ODDS, NEAR = 0.05, 0.15
"""Of passed items that score so little below their threshold: they say most."""
PASSED_ODDS = 0.01
LEAST_SCORE = 0.10
"""What scores lower is never drawn: no threshold comes near it."""
MOST_REVIEWS, MOST_USERS = 10_000, 50_000
"""Of one tenant between two writes; what is more is not noted."""
ITEM_LENGTH = 64
KEPT_DAYS = 180
"""How long an item for reviewers is kept at most, or as long as its entry; traffic is as long as it is compared."""

_SYSTEM = random.SystemRandom()


@dataclass(frozen=True, slots=True)
class Measure:
    """What was measured of an item in one category, and the threshold that it was held against."""

    category: Category
    score: float
    threshold: float
    for_review: bool = False
    """Draw it whatever the odds: `tenants.adaptation.is_for_review`."""


@dataclass(frozen=True, slots=True)
class Screened:
    """One item of a request, its text or its image, measured and decided. Nothing of its content."""

    entry_id: UUID
    """Of the decision, in the log."""
    item: str
    """Its place in the request: `query`, `documents[3]`."""
    mode: Mode
    end_user: str
    """Who sent it: a fingerprint under the tenant's own key."""
    detectors: str
    """The version of all that measured; scores of another version mean something else."""
    measures: Sequence[Measure]
    """Categories that are not named scored 0."""


@dataclass(slots=True)
class _Batch:
    """What is not written yet of one tenant."""

    items: Counter[tuple[date, str, str]] = field(default_factory=Counter)
    """By day, mode and detectors."""
    bins: Counter[tuple[date, str, str, str, int]] = field(default_factory=Counter)
    """By day, mode, detectors, category and bin: those that scored above 0."""
    stopped: Counter[tuple[date, str, str, str]] = field(default_factory=Counter)
    users: Counter[tuple[date, str, str]] = field(default_factory=Counter)
    """By day, mode and end user."""
    reviews: list[dict[str, Any]] = field(default_factory=list)

    def take(self, other: _Batch) -> None:
        self.items += other.items
        self.bins += other.bins
        self.stopped += other.stopped
        self.users += other.users
        self.reviews += other.reviews


class Evidence:
    """Notes what was screened, and writes it when told. One per gateway."""

    def __init__(
        self,
        database: Database,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        draw: Callable[[], float] = _SYSTEM.random,
    ) -> None:
        """`draw` gives numbers from 0 to 1 that nobody outside can foresee."""
        self._database = database
        self._clock = clock
        self._draw = draw
        self._waiting: dict[TenantId, _Batch] = {}

    def note(self, tenant: TenantId, screened: Sequence[Screened]) -> None:
        """Remember the items of one decision. Quick: some microseconds an item."""
        batch = self._waiting.setdefault(tenant, _Batch())
        day = self._clock().date()
        for each in screened:
            batch.items[day, each.mode, each.detectors] += 1
            user = (day, str(each.mode), each.end_user)
            if len(batch.users) < MOST_USERS or user in batch.users:
                batch.users[user] += 1
            for measure in each.measures:
                if measure.score > 0:
                    self._note_measure(batch, day, each, measure)

    def _note_measure(self, batch: _Batch, day: date, of: Screened, measure: Measure) -> None:
        key = (day, str(of.mode), of.detectors, str(measure.category))
        batch.bins[*key, bin_of(measure.score)] += 1
        stopped = measure.score >= measure.threshold
        if stopped:
            batch.stopped[key] += 1
        odds = odds_of(measure)
        drawn = odds > 0 and self._draw() < odds
        if (stopped or drawn) and len(batch.reviews) < MOST_REVIEWS:
            batch.reviews.append(
                {
                    "entry_id": of.entry_id,
                    "item": of.item[:ITEM_LENGTH],
                    "category": str(measure.category),
                    "mode": str(of.mode),
                    "score": measure.score,
                    "stopped": stopped,
                    "odds": odds if drawn else None,
                    "end_user": of.end_user,
                    "detectors": of.detectors,
                    "day": day,
                }
            )

    async def write(self) -> int:
        """Write what was noted; of how many tenants. What cannot be written now is kept for the next time.

        Raises `DatabaseUnavailable`.
        """
        written = 0
        for tenant in list(self._waiting):
            batch = self._waiting.pop(tenant)
            try:
                async with self._database.transaction(tenant) as connection:
                    await _write(connection, tenant, batch)
            except IntegrityError:
                continue  # the tenant was purged meanwhile
            except DatabaseUnavailable:
                batch.take(self._waiting.get(tenant, _Batch()))
                self._waiting[tenant] = batch
                raise
            written += 1
        return written

    async def forget(self) -> int:
        """Remove what is too old to count, of every tenant: how many rows. Raises `DatabaseUnavailable`."""
        (row,) = await self._database.call(
            "select pericarp.forget_evidence($1, $2)", BASELINE_DAYS + 2, KEPT_DAYS
        )
        return int(row[0])


def odds_of(measure: Measure) -> float:
    """The chance with which an item is drawn for a reviewer."""
    if measure.for_review:
        return 1.0
    if measure.score >= measure.threshold:
        return STOPPED_ODDS
    if measure.score < LEAST_SCORE:
        return 0.0
    return NEAR_ODDS if measure.score >= measure.threshold - NEAR else PASSED_ODDS


async def find_detectors(
    connection: AsyncConnection, tenant: TenantId, category: Category, mode: Mode
) -> str:
    """The version that measures now: the newest of the last day; empty where nothing was measured yet."""
    columns = tables.traffic.c
    found: str | None = await connection.scalar(
        select(columns.detectors)
        .where(columns.tenant_id == tenant, columns.category == category, columns.mode == mode)
        .order_by(columns.day.desc(), columns.began_at.desc())
        .limit(1)
    )
    return found or ""


async def find_days(
    connection: AsyncConnection, tenant: TenantId, category: Category, mode: Mode, detectors: str, today: date
) -> tuple[Day, ...]:
    """The days that `tenants.traffic` compares, as those detectors measured them."""
    columns = tables.traffic.c
    rows = await connection.execute(
        select(columns.day, columns["items"], columns.stopped, columns.histogram)
        .where(
            columns.tenant_id == tenant,
            columns.category == category,
            columns.mode == mode,
            columns.detectors == detectors,
            columns.day > today - timedelta(days=BASELINE_DAYS + 2),
        )
        .order_by(columns.day)
    )
    return tuple(Day(row.day, row.items, row.stopped, tuple(row.histogram)) for row in rows.all())


async def find_crowds(
    connection: AsyncConnection, tenant: TenantId, mode: Mode, today: date
) -> tuple[dict[int, int], ...]:
    """Of yesterday and today, how many end users sent so many items."""
    columns = tables.traffic_user.c
    days = (today - timedelta(days=1), today)
    rows = await connection.execute(
        select(columns.day, columns["items"], func.count().label("users"))
        .where(columns.tenant_id == tenant, columns.mode == mode, columns.day.in_(days))
        .group_by(columns.day, columns["items"])
    )
    crowds: dict[date, dict[int, int]] = {day: {} for day in days}
    for row in rows.all():
        crowds[row.day][row.items] = row.users
    return tuple(crowds.values())


# Rows are written in the order of their keys, so that two gateways never wait for each other in a circle.
_TRAFFIC = text(
    """
    insert into pericarp.traffic (tenant_id, day, category, mode, detectors, items, stopped, histogram)
    values (:tenant, :day, :category, :mode, :detectors, :items, :stopped, :histogram)
    on conflict on constraint traffic_pkey do update set
        items = traffic.items + excluded.items,
        stopped = traffic.stopped + excluded.stopped,
        histogram = (select array_agg(sums.was + sums.more order by sums.bin)
                       from unnest(traffic.histogram, excluded.histogram)
                            with ordinality as sums (was, more, bin))
    """
)
_USER = text(
    """
    insert into pericarp.traffic_user (tenant_id, day, mode, end_user, items)
    values (:tenant, :day, :mode, :end_user, :items)
    on conflict on constraint traffic_user_pkey do update set items = traffic_user.items + excluded.items
    """
)


async def _write(connection: AsyncConnection, tenant: TenantId, batch: _Batch) -> None:
    days = []
    for (day, mode, detectors), items in sorted(batch.items.items()):
        for category in Category:
            histogram = [batch.bins[day, mode, detectors, str(category), place] for place in range(BINS)]
            histogram[0] += items - sum(histogram)
            days.append(
                {
                    "tenant": tenant,
                    "day": day,
                    "category": str(category),
                    "mode": mode,
                    "detectors": detectors,
                    "items": items,
                    "stopped": batch.stopped[day, mode, detectors, str(category)],
                    "histogram": histogram,
                }
            )
    users = [
        {"tenant": tenant, "day": day, "mode": mode, "end_user": end_user, "items": items}
        for (day, mode, end_user), items in sorted(batch.users.items())
    ]
    if days:
        await connection.execute(_TRAFFIC, days)
    if users:
        await connection.execute(_USER, users)
    if batch.reviews:
        await connection.execute(
            insert(tables.review).on_conflict_do_nothing(constraint="review_pkey"),
            [{"tenant_id": tenant, **review} for review in batch.reviews],
        )
