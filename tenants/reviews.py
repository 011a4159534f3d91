"""Items that reviewers judge: those that were drawn at random, and stopped ones that somebody appeals.

A decision is made once and stands. Whether it votes is settled with it: of an end user's day the first one does, in each
category and mode, whatever is sent how often. Nothing of an item's content is here, and its score is not
shown to whoever judges it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import ColumnElement, Select, func, select, true, tuple_, update

from tenants import tables
from tenants.adaptation import MEMORY_DAYS, Vote
from tenants.errors import ReviewNotFound, ReviewRefused
from tenants.policies import Setter
from tenants.risk import Category, Mode

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from tenants.access import TenantId
    from tenants.database import Database

COUNTS_DAYS = 4 * MEMORY_DAYS
"""An older vote weighs under 2 %, and is not read."""
_TABLE = tables.review
_COLUMNS = tables.review.c


class Verdict(StrEnum):
    """What a reviewer says of an item. Part of the API."""

    HARMFUL = "harmful"
    HARMLESS = "harmless"


@dataclass(frozen=True, slots=True)
class Place:
    """Which item of which decision, judged in which category."""

    entry_id: UUID
    item: str
    category: Category
    mode: Mode


@dataclass(frozen=True, slots=True)
class Review:
    """An item that may be judged, or is."""

    place: Place
    stopped: bool
    drawn: bool
    """At random; else it was stopped, and may be appealed."""
    screened_at: datetime
    appealed_at: datetime | None
    verdict: Verdict | None
    decided_at: datetime | None
    decided_by: Setter
    votes: bool
    """Whether the verdict counts. Another one of the same end user and day may have been first, or it came too late to tell
    how much that user sent."""


class Reviews:
    """Lists, appeals and decides. Every change is durable when it returns."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def waiting(
        self, tenant: TenantId, *, most: int, after: tuple[datetime, Place] | None = None
    ) -> tuple[Review, ...]:
        """Drawn and appealed items without a verdict, the one that waits longest first."""
        query = (
            select(_TABLE)
            .where(
                _COLUMNS.tenant_id == tenant,
                _COLUMNS.verdict.is_(None),
                _COLUMNS.odds.is_not(None) | _COLUMNS.appealed_at.is_not(None),
            )
            .order_by(_COLUMNS.screened_at, *_KEY)
            .limit(most)
        )
        if after is not None:
            moment, place = after
            query = query.where(
                tuple_(_COLUMNS.screened_at, *_KEY)
                > tuple_(moment, place.entry_id, place.item, str(place.category), str(place.mode))
            )
        async with self._database.transaction(tenant) as connection:
            return tuple(_review(row) for row in (await connection.execute(query)).all())

    async def appeal(self, tenant: TenantId, place: Place) -> tuple[Review, bool]:
        """Ask for a reviewer's decision on a stopped item; whether that is new. It moves nothing by itself.

        Idempotent. Raises `ReviewNotFound` where no such item was stopped.
        """
        async with self._database.transaction(tenant) as connection:
            before = await _find(connection, tenant, place)
            if not before.stopped:
                raise ReviewNotFound
            if before.appealed_at is not None or before.verdict is not None:
                return before, False
            row = await connection.execute(
                update(_TABLE)
                .where(*_is(tenant, place))
                .values(appealed_at=func.clock_timestamp())
                .returning(_TABLE)
            )
            return _review(row.one()), True

    async def decide(
        self, tenant: TenantId, place: Place, verdict: Verdict, *, by: Setter
    ) -> tuple[Review, bool]:
        """A reviewer's decision; whether it is new. The same one again changes nothing.

        Raises `ReviewNotFound`; `ReviewRefused` where the item was neither drawn nor appealed, so that nobody picks what is
        judged, or is decided otherwise.
        """
        async with self._database.transaction(tenant) as connection:
            # Votes of one tenant are settled one after the other; `review_vote` would refuse a second one anyway.
            await connection.execute(
                select(tables.tenant.c.id).where(tables.tenant.c.id == tenant).with_for_update(key_share=True)
            )
            before = await _find(connection, tenant, place)
            if before.verdict is not None:
                if before.verdict is not verdict:
                    raise ReviewRefused
                return before, False
            if not before.drawn and before.appealed_at is None:
                raise ReviewRefused
            row = (
                await connection.execute(select(_COLUMNS.end_user, _COLUMNS.day).where(*_is(tenant, place)))
            ).one()
            volume = await _volume(connection, tenant, place.mode, row.end_user, row.day)
            votes = volume is not None and not await _has_voted(
                connection, tenant, place, row.end_user, row.day
            )
            decided = await connection.execute(
                update(_TABLE)
                .where(*_is(tenant, place))
                .values(
                    verdict=verdict,
                    decided_at=func.clock_timestamp(),
                    decided_by=by.name,
                    decided_role=by.role,
                    volume=volume or 1,
                    votes=votes,
                )
                .returning(_TABLE)
            )
            return _review(decided.one()), True


async def find_votes(
    connection: AsyncConnection,
    tenant: TenantId,
    category: Category,
    mode: Mode,
    *,
    detectors: str,
    since: datetime | None,
    today: date,
) -> tuple[Vote, ...]:
    """The votes that count: on scores of those detectors, decided `since` then; None: whenever.

    A drawn item stands for as many as were not drawn, an appealed one for itself; each divided by how many items its end
    user sent on that day.
    """
    rows = await connection.execute(
        select(_COLUMNS.score, _COLUMNS.verdict, _COLUMNS.odds, _COLUMNS.volume, _COLUMNS.day).where(
            _COLUMNS.tenant_id == tenant,
            _COLUMNS.category == category,
            _COLUMNS.mode == mode,
            _COLUMNS.votes,
            _COLUMNS.detectors == detectors,
            true() if since is None else _COLUMNS.decided_at >= since,
            _COLUMNS.day > today - timedelta(days=COUNTS_DAYS),
        )
    )
    return tuple(
        Vote(
            row.score,
            row.verdict == Verdict.HARMFUL,
            1 / ((row.odds or 1.0) * row.volume),
            (today - row.day).days,
        )
        for row in rows.all()
    )


_KEY = (_COLUMNS.entry_id, _COLUMNS.item, _COLUMNS.category, _COLUMNS.mode)


def _is(tenant: TenantId, place: Place) -> tuple[ColumnElement[bool], ...]:
    return (
        _COLUMNS.tenant_id == tenant,
        _COLUMNS.entry_id == place.entry_id,
        _COLUMNS.item == place.item,
        _COLUMNS.category == place.category,
        _COLUMNS.mode == place.mode,
    )


async def _find(connection: AsyncConnection, tenant: TenantId, place: Place) -> Review:
    query: Select[Any] = select(_TABLE).where(*_is(tenant, place)).with_for_update()
    row = (await connection.execute(query)).one_or_none()
    if row is None:
        raise ReviewNotFound
    return _review(row)


async def _volume(
    connection: AsyncConnection, tenant: TenantId, mode: Mode, end_user: str, day: date
) -> int | None:
    """How many items the end user sent on that day; None where that is no longer known, so that nothing counts too much."""
    columns = tables.traffic_user.c
    items: int | None = await connection.scalar(
        select(columns["items"]).where(
            columns.tenant_id == tenant,
            columns.day == day,
            columns.mode == mode,
            columns.end_user == end_user,
        )
    )
    return items


async def _has_voted(
    connection: AsyncConnection, tenant: TenantId, place: Place, end_user: str, day: date
) -> bool:
    found = await connection.scalar(
        select(func.count()).where(
            _COLUMNS.tenant_id == tenant,
            _COLUMNS.category == place.category,
            _COLUMNS.mode == place.mode,
            _COLUMNS.end_user == end_user,
            _COLUMNS.day == day,
            _COLUMNS.votes,
        )
    )
    return bool(found)


def _review(row: Any) -> Review:
    return Review(
        Place(UUID(int=row.entry_id.int), row.item, Category(row.category), Mode(row.mode)),
        row.stopped,
        row.odds is not None,
        row.screened_at,
        row.appealed_at,
        None if row.verdict is None else Verdict(row.verdict),
        row.decided_at,
        Setter(row.decided_role, row.decided_by),
        row.votes,
    )
