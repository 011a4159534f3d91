"""Finds entries of the log: newest first, by what a trigger noted of each (`audit_search`, `audit_input`, `audit_risk`).

Whoever asks is bound to one tenant, and row security lets it see that tenant's rows alone. A page is read from the index
of its most telling filter, in the order of the page, so it costs what it holds and not what the log holds.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import (
    Date,
    and_,
    cast,
    exists,
    func,
    literal,
    or_,
    select,
    text,
    tuple_,
    union_all,
)

from tenants.audit import MICRO
from tenants.errors import EntryNotFound
from tenants.tables import audit_inbox, audit_input, audit_risk, audit_search

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, FromClause

    from tenants.access import TenantId
    from tenants.database import Database

LEAST_RISK = 0.1
"""Below it no score is noted."""
BANDS = 10
MOST_BYTES = 16 * 2**20
"""Of the bodies on a page, but for its last entry: an entry of a thousand documents has 100 KB."""
FORCE_CUSTOM_PLAN = text("select set_config('plan_cache_mode', 'force_custom_plan', true)")
"""A plan for any value would serve none: what is rare is to be looked up, and what is common read in order."""


@dataclass(frozen=True, slots=True)
class Filter:
    """What entries are looked for: all that is set holds of each of them."""

    since: datetime | None = None
    """Recorded then or later, by the database's clock."""
    until: datetime | None = None
    """Recorded before."""
    last_days: int | None = None
    """Recorded within so many times 24 hours of now."""
    key_id: str | None = None
    operation: str | None = None
    decision: str | None = None
    action: str | None = None
    """What screening did: allow, flag, demote, mask, refuse."""
    session: str | None = None
    request_id: UUID | None = None
    category: str | None = None
    """Of which a score was measured; unset with `risk_above`: any."""
    risk_above: float | None = None
    """The highest score of the category is above it; at least `LEAST_RISK`, which holds where only a category is set."""
    fingerprint: str | None = None
    """Of a text or an image that the entry tells of."""


@dataclass(frozen=True, slots=True)
class Found:
    """An entry as it stands in the log."""

    tenant: TenantId
    id: UUID
    recorded_at: datetime
    schema_version: int
    body: bytes

    @property
    def position(self) -> Position:
        return self.recorded_at, self.id


Position = tuple[datetime, UUID]
"""A place in the order of a page: what was recorded when, and of equal times the id."""


@dataclass(frozen=True, slots=True)
class Page:
    """Entries, newest first."""

    found: tuple[Found, ...]
    more: bool
    """Whether there may be more behind them."""


@dataclass(frozen=True, slots=True)
class Count:
    """How many entries of one day, operation and decision."""

    day: str
    """In UTC, `2026-11-27`."""
    operation: str
    decision: str
    count: int


class Search:
    """Reads one tenant's log at a time."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def page(
        self, tenant: TenantId, asked: Filter, *, most: int, before: Position | None = None
    ) -> Page:
        """The newest entries that `asked` describes, of those behind `before`: at most `most`, or `MOST_BYTES` of them."""
        parts = []
        for driver, conditions in _sources(tenant, asked):
            place = driver.c.recorded_at, driver.c.id
            if before is not None:
                conditions = [*conditions, tuple_(*place) < tuple_(*map(literal, before))]
            parts.append(
                select(*place).where(*conditions).order_by(place[0].desc(), place[1].desc()).limit(most)
            )
        places = (parts[0] if len(parts) == 1 else union_all(*parts)).subquery("places")
        newest = (
            select(places.c.recorded_at, places.c.id)
            .order_by(places.c.recorded_at.desc(), places.c.id.desc())
            .limit(most)
            .subquery("newest")
        )
        inbox = audit_inbox.c
        order = (newest.c.recorded_at.desc(), newest.c.id.desc())
        size = func.octet_length(inbox.body)  # known without reading the body
        sized = (
            select(
                newest.c.id,
                newest.c.recorded_at,
                inbox.schema_version,
                inbox.body,
                (func.sum(size).over(order_by=order) - size).label("bytes_before"),
                func.count().over().label("entries"),
            )
            .join(audit_inbox, and_(inbox.tenant_id == tenant, inbox.id == newest.c.id))
            .subquery("sized")
        )
        query = (
            select(sized)
            .where(sized.c.bytes_before < MOST_BYTES)
            .order_by(sized.c.recorded_at.desc(), sized.c.id.desc())
        )
        async with self._database.transaction(tenant) as connection:
            await connection.execute(FORCE_CUSTOM_PLAN)
            rows = (await connection.execute(query)).all()
        told = b"" if asked.fingerprint is None else asked.fingerprint.encode()
        found = tuple(
            Found(tenant, UUID(int=row.id.int), row.recorded_at, row.schema_version, row.body)
            for row in rows
            if told in row.body  # the index has the fingerprint's beginning alone
        )
        return Page(found, bool(found) and (len(rows) == most or len(rows) < rows[0].entries))

    async def find(self, tenant: TenantId, entry_id: UUID) -> Found:
        """That entry of the tenant. Raises `EntryNotFound`, for another tenant's as for none."""
        inbox = audit_inbox.c
        query = select(inbox.recorded_at, inbox.schema_version, inbox.body).where(
            inbox.tenant_id == tenant, inbox.id == entry_id
        )
        async with self._database.transaction(tenant) as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise EntryNotFound
        return Found(tenant, entry_id, row.recorded_at, row.schema_version, bytes(row.body))

    async def count(self, tenant: TenantId, asked: Filter) -> tuple[Count, ...]:
        """How many entries `asked` describes, by day, operation and decision; newest day first."""
        parts = []
        for driver, conditions in _sources(tenant, asked):
            told: FromClause = audit_search
            if driver is not audit_search:
                told = audit_search.alias("told")
                conditions = [*conditions, told.c.tenant_id == tenant, _same_entry(driver, told)]
            day = cast(func.timezone("UTC", told.c.recorded_at), Date).label("day")
            parts.append(select(day, told.c.operation, told.c.decision).where(*conditions))
        found = union_all(*parts).subquery() if len(parts) > 1 else parts[0].subquery()
        grouped = (found.c.day, found.c.operation, found.c.decision)
        query = (
            select(*grouped, func.count().label("entries"))
            .group_by(*grouped)
            .order_by(found.c.day.desc(), found.c.operation, found.c.decision)
        )
        async with self._database.transaction(tenant) as connection:
            await connection.execute(FORCE_CUSTOM_PLAN)
            rows = (await connection.execute(query)).all()
        return tuple(Count(row.day.isoformat(), row.operation, row.decision, row.entries) for row in rows)


def print_of(fingerprint: str) -> int:
    """The first 8 bytes of a fingerprint as the signed number that it is looked up by."""
    return int.from_bytes(base64.urlsafe_b64decode(fingerprint[:12])[:8], "big", signed=True)


def _sources(tenant: TenantId, asked: Filter) -> Iterable[tuple[FromClause, list[ColumnElement[bool]]]]:
    """The table to read in order, and what is to hold; several where the entries are those of all of them, none twice."""
    driver: FromClause
    told, bands = _told(asked), _bands(asked)
    if asked.request_id is not None:
        driver, own = audit_inbox, [audit_inbox.c.request_id == asked.request_id]
    elif asked.fingerprint is not None:
        driver, own = audit_input, [audit_input.c.print == print_of(asked.fingerprint)]
    elif bands and not told:
        driver, own = audit_risk, []
    else:
        driver, own = audit_search, []
    own = [driver.c.tenant_id == tenant, *own]
    if asked.since is not None:
        own.append(driver.c.recorded_at >= asked.since)
    if asked.until is not None:
        own.append(driver.c.recorded_at < asked.until)
    if asked.last_days is not None:
        own.append(driver.c.recorded_at >= func.now() - timedelta(days=asked.last_days))
    if driver is audit_search:
        own += told
    elif told:
        own.append(
            exists().where(audit_search.c.tenant_id == tenant, _same_entry(driver, audit_search), *told)
        )
    if asked.fingerprint is not None and driver is not audit_input:
        own.append(
            exists().where(
                audit_input.c.tenant_id == tenant,
                audit_input.c.print == print_of(asked.fingerprint),
                _same_entry(driver, audit_input),
            )
        )
    if driver is audit_risk:
        return [(driver, [*own, *_risk(tenant, asked, [band])]) for band in bands]
    if bands:
        own.append(exists().where(*_risk(tenant, asked, bands), _same_entry(driver, audit_risk)))
    return [(driver, own)]


def _told(asked: Filter) -> list[ColumnElement[bool]]:
    """What is to hold of the columns that an entry has once."""
    told = audit_search.c
    wanted: list[tuple[Any, str | None]] = [
        (told.key_id, asked.key_id),
        (told.operation, asked.operation),
        (told.decision, asked.decision),
        (told.action, asked.action),
        (told.session, asked.session),
    ]
    return [named == value for named, value in wanted if value is not None]


def _bands(asked: Filter) -> range:
    """Which bands of a tenth hold scores that are asked for; none where no risk is asked for."""
    if asked.category is None and asked.risk_above is None:
        return range(0)
    return range(_above(asked) * BANDS // MICRO, BANDS + 1)


def _above(asked: Filter) -> int:
    return round((LEAST_RISK if asked.risk_above is None else asked.risk_above) * MICRO)


def _risk(tenant: TenantId, asked: Filter, bands: Sequence[int]) -> list[ColumnElement[bool]]:
    """What is to hold of a risk in one of these bands. Only the lowest band asks for the score: the others are above it."""
    risk = audit_risk.c
    held = [risk.tenant_id == tenant, risk.category == (asked.category or ""), risk.band.in_(bands)]
    if asked.risk_above is not None and (lowest := _above(asked) * BANDS // MICRO) in bands:
        held.append(or_(risk.band > lowest, risk.score > _above(asked)))
    return held


def _same_entry(one: FromClause, other: FromClause) -> ColumnElement[bool]:
    return and_(
        one.c.tenant_id == other.c.tenant_id,
        one.c.recorded_at == other.c.recorded_at,
        one.c.id == other.c.id,
    )
