"""Thresholds that learn, kept: what is in force, why it changed, and every way to change it.

The arithmetic is `tenants.adaptation`'s, the evidence comes from `tenants.evidence` and `tenants.reviews`. A request
reads `effective(caller.policy, caller.adapted, ...)`, which costs no statement; a change is told to every gateway as a
policy's is. Steps of one tenant run one after the other, in the transaction of whoever asks, beside the entry that tells of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import Row, func, insert, select, text, tuple_, update
from sqlalchemy.dialects.postgresql import insert as insert_or

from tenants import tables
from tenants.adaptation import (
    Adapted,
    Learnt,
    Reason,
    Situation,
    State,
    begin,
    bounds,
    effective,
    step,
)
from tenants.canaries import Canaries
from tenants.errors import Fault, Invalid, ThresholdNotFound
from tenants.evidence import find_crowds, find_days, find_detectors
from tenants.policies import OPERATOR, Policies, Setter
from tenants.reviews import find_votes
from tenants.risk import Category, Mode
from tenants.traffic import has_baseline, look

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from tenants.access import TenantId
    from tenants.database import Database
    from tenants.policy import Policy

__all__ = ["Change", "Standing", "Thresholds", "effective"]

GATEWAY = Setter("gateway")
_TABLE = tables.threshold
_COLUMNS = _TABLE.c
_CHANGES = tables.threshold_change.c


@dataclass(frozen=True, slots=True)
class Change:
    """One version of a threshold: what it was, what it became, and on what evidence."""

    category: Category
    mode: Mode
    version: int
    changed_at: datetime
    before: float
    after: float
    anchor: float
    reason: Reason
    frozen: str
    evidence: dict[str, Any]
    """`votes` and `harmful` of them; `aim`, `recall_before`, `recall_after` where there were any."""
    set_by: Setter


@dataclass(frozen=True, slots=True)
class Standing:
    """A threshold as it is now."""

    category: Category
    mode: Mode
    threshold: float
    """In force."""
    anchor: float
    bounds: tuple[float, float] | None
    """Between which it may move; None: it does not."""
    frozen: str
    version: int
    """Of its last change; 0: it never changed."""
    known: bool
    """Whether any vote was cast on it."""


class Thresholds:
    """Reads, steps and rolls back. Every change is durable when it returns, or with the `together` around it."""

    def __init__(
        self,
        database: Database,
        policies: Policies,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`clock` says which day it is, in UTC."""
        self._database = database
        self._policies = policies
        self._canaries = Canaries(database)
        self._clock = clock

    async def in_force(self, tenant: TenantId, category: Category, mode: Mode) -> float:
        """The score from which on content is stopped now; requests have it in their Caller. Raises `TenantNotFound`."""
        standings = await self.list(tenant)
        return next(each.threshold for each in standings if (each.category, each.mode) == (category, mode))

    async def list(self, tenant: TenantId) -> tuple[Standing, ...]:
        """Every threshold of the tenant, learnt or not. Raises `TenantNotFound`."""
        async with self._database.together():
            policy, most = await self._frame(tenant)
            async with self._database.transaction(tenant) as connection:
                rows = await connection.execute(select(_TABLE).where(_COLUMNS.tenant_id == tenant))
                found = {(Category(row.category), Mode(row.mode)): row for row in rows.all()}
        adapted = Adapted(
            {place: Learnt(row.threshold, row.anchor, row.detectors) for place, row in found.items()}, most
        )
        standings = []
        for category in Category:
            for mode in Mode:
                anchor, row = policy.threshold(category), found.get((category, mode))
                standings.append(
                    Standing(
                        category,
                        mode,
                        effective(policy, adapted, category, mode),
                        anchor,
                        bounds(anchor, category, mode, most=most) if policy.adaptive_thresholds else None,
                        "" if row is None else row.frozen,
                        0 if row is None else row.version,
                        row is not None,
                    )
                )
        return tuple(standings)

    async def history(
        self,
        tenant: TenantId,
        *,
        category: Category | None = None,
        mode: Mode | None = None,
        most: int = 100,
        before: tuple[datetime, Category, Mode, int] | None = None,
    ) -> tuple[Change, ...]:
        """Changes, the newest first, those `before` that one."""
        key = (_CHANGES.changed_at, _CHANGES.category, _CHANGES.mode, _CHANGES.version)
        query = (
            select(tables.threshold_change)
            .where(_CHANGES.tenant_id == tenant)
            .order_by(*(column.desc() for column in key))
            .limit(most)
        )
        if category is not None:
            query = query.where(_CHANGES.category == category)
        if mode is not None:
            query = query.where(_CHANGES.mode == mode)
        if before is not None:
            moment, of_category, of_mode, version = before
            query = query.where(tuple_(*key) < tuple_(moment, str(of_category), str(of_mode), version))
        async with self._database.transaction(tenant) as connection:
            return tuple(_change(row) for row in (await connection.execute(query)).all())

    async def due(self, *, most: int = 1_000) -> tuple[UUID, ...]:
        """Tenants whose daily step is still to come today. Told, not proven: this mints no TenantId."""
        async with self._database.outside_tenants() as connection:
            rows = await connection.execute(
                text("select tenant_id from pericarp.due_thresholds(:most)"), {"most": most}
            )
            return tuple(UUID(int=row.tenant_id.int) for row in rows.all())

    async def step(self, tenant: TenantId, *, by: Setter = GATEWAY) -> tuple[Change, ...]:
        """The daily step of every threshold that votes were cast on; what changed. Again on that day it changes little or
        nothing: a day has one way. Raises `TenantNotFound`."""
        async with self._database.together():
            policy, most = await self._frame(tenant)
            async with self._database.transaction(tenant) as connection:
                await _lock(connection, tenant)
                rows = await connection.execute(select(_TABLE).where(_COLUMNS.tenant_id == tenant))
                changes = [await self._step(connection, tenant, row, policy, most, by) for row in rows.all()]
        return tuple(change for change in changes if change is not None)

    async def tighten(
        self, tenant: TenantId, category: Category, mode: Mode, *, by: Setter = GATEWAY
    ) -> Change | None:
        """What a vote that has just come makes stricter at once; None where that is nothing. Raises `TenantNotFound`."""
        async with self._database.together():
            policy, most = await self._frame(tenant)
            async with self._database.transaction(tenant) as connection:
                await _lock(connection, tenant)
                row = await self._find(connection, tenant, policy, category, mode)
                return await self._step(connection, tenant, row, policy, most, by, tighten_only=True)

    async def roll_back(
        self, tenant: TenantId, category: Category, mode: Mode, *, version: int | None = None, by: Setter
    ) -> Change | None:
        """Back to what a threshold was after `version`, or to the anchor, at once; None where it is there.

        All votes that were cast until now count no more, so that what was learnt wrong is not learnt again. Raises
        `ThresholdNotFound`; `Invalid` where that version lies outside of today's bounds; `TenantNotFound`.
        """
        async with self._database.together():
            policy, most = await self._frame(tenant)
            async with self._database.transaction(tenant) as connection:
                await _lock(connection, tenant)
                row = (await connection.execute(_of(tenant, category, mode))).one_or_none()
                if row is None:
                    raise ThresholdNotFound
                anchor, target = policy.threshold(category), policy.threshold(category)
                if version is not None:
                    target = await _after(connection, tenant, category, mode, version)
                limits = bounds(anchor, category, mode, most=most) or (anchor, anchor)
                if target != anchor and not limits[0] <= target <= limits[1]:
                    raise Invalid(
                        (Fault("version", f"was {target}; the policy allows {limits[0]} to {limits[1]} now"),)
                    )
                await connection.execute(
                    update(_TABLE)
                    .where(*_is(tenant, category, mode))
                    .values(counts_from=func.clock_timestamp())
                )
                state = State(target, anchor, self._clock().date(), target, row.detectors)
                return await _save(connection, tenant, row, state, Reason.ROLLBACK, {}, by)

    async def _frame(self, tenant: TenantId) -> tuple[Policy, float]:
        """The policy in force, and the highest threshold that a ceiling allows."""
        policy = (await self._policies.current(tenant)).policy
        most = (await self._policies.bounds(tenant, OPERATOR)).risk_threshold
        return policy, 1.0 if most is None else most

    async def _find(
        self, connection: AsyncConnection, tenant: TenantId, policy: Policy, category: Category, mode: Mode
    ) -> Row[Any]:
        """The threshold's row; made where it has learnt nothing yet, so that the daily step knows of it."""
        today = self._clock().date()
        state = begin(policy.threshold(category), today)
        await connection.execute(
            insert_or(_TABLE)
            .values(
                tenant_id=tenant,
                category=category,
                mode=mode,
                threshold=state.threshold,
                anchor=state.anchor,
                day=today,
                day_began_at=state.threshold,
                stepped_on=today,
            )
            .on_conflict_do_nothing(constraint="threshold_pkey")
        )
        return (await connection.execute(_of(tenant, category, mode))).one()

    async def _step(
        self,
        connection: AsyncConnection,
        tenant: TenantId,
        row: Row[Any],
        policy: Policy,
        most: float,
        by: Setter,
        *,
        tighten_only: bool = False,
    ) -> Change | None:
        category, mode, today = Category(row.category), Mode(row.mode), self._clock().date()
        detectors = await find_detectors(connection, tenant, category, mode)
        days = await find_days(connection, tenant, category, mode, detectors, today)
        anchor = policy.threshold(category)
        now = Situation(
            anchor,
            bounds(anchor, category, mode, most=most) if policy.adaptive_thresholds else None,
            detectors,
            await find_votes(
                connection,
                tenant,
                category,
                mode,
                detectors=detectors,
                since=row.counts_from,
                today=today,
            ),
            look(days, await find_crowds(connection, tenant, mode, today), today) or "",
            has_baseline(days, today),
            await self._canaries.scores(tenant, category, mode, detectors),
        )
        before = State(row.threshold, row.anchor, row.day, row.day_began_at, row.detectors, row.frozen)
        move = step(before, now, today, tighten_only=tighten_only)
        evidence: dict[str, Any] = {"votes": move.aim.votes, "harmful": move.aim.harmful}
        if move.aim.threshold is not None:
            evidence["aim"] = move.aim.threshold
        if move.recall is not None:
            evidence |= {"recall_before": move.recall[0], "recall_after": move.recall[1]}
        stepped_on = row.stepped_on if tighten_only else today
        return await _save(connection, tenant, row, move.state, move.reason, evidence, by, stepped_on)


def _of(tenant: TenantId, category: Category, mode: Mode) -> Any:
    return select(_TABLE).where(*_is(tenant, category, mode))


def _is(tenant: TenantId, category: Category, mode: Mode) -> tuple[Any, ...]:
    return _COLUMNS.tenant_id == tenant, _COLUMNS.category == category, _COLUMNS.mode == mode


async def _lock(connection: AsyncConnection, tenant: TenantId) -> None:
    """Steps and votes of one tenant one after the other; its rows elsewhere may be added meanwhile."""
    columns = tables.tenant.c
    await connection.execute(select(columns.id).where(columns.id == tenant).with_for_update(key_share=True))


async def _after(
    connection: AsyncConnection, tenant: TenantId, category: Category, mode: Mode, version: int
) -> float:
    """What the threshold was after that version."""
    after: float | None = await connection.scalar(
        select(_CHANGES.after).where(
            _CHANGES.tenant_id == tenant,
            _CHANGES.category == category,
            _CHANGES.mode == mode,
            _CHANGES.version == version,
        )
    )
    if after is None:
        raise ThresholdNotFound
    return after


async def _save(
    connection: AsyncConnection,
    tenant: TenantId,
    row: Row[Any],
    state: State,
    reason: Reason,
    evidence: dict[str, Any],
    by: Setter,
    stepped_on: date | None = None,
) -> Change | None:
    """Keep a state; where it is another threshold, anchor or standstill, with a version that tells why."""
    category, mode = Category(row.category), Mode(row.mode)
    changed = (state.threshold, state.anchor, state.frozen) != (row.threshold, row.anchor, row.frozen)
    version = row.version + changed
    await connection.execute(
        update(_TABLE)
        .where(*_is(tenant, category, mode))
        .values(
            version=version,
            threshold=state.threshold,
            anchor=state.anchor,
            detectors=state.detectors,
            day=state.day,
            day_began_at=state.day_began_at,
            frozen=state.frozen,
            stepped_on=stepped_on or row.stepped_on,
        )
    )
    if not changed:
        return None
    added = await connection.execute(
        insert(tables.threshold_change)
        .values(
            tenant_id=tenant,
            category=category,
            mode=mode,
            version=version,
            before=row.threshold,
            after=state.threshold,
            anchor=state.anchor,
            reason=reason,
            frozen=state.frozen,
            evidence=evidence,
            set_by=by.name,
            set_role=by.role,
        )
        .returning(tables.threshold_change)
    )
    return _change(added.one())


def _change(row: Any) -> Change:
    return Change(
        Category(row.category),
        Mode(row.mode),
        row.version,
        row.changed_at,
        row.before,
        row.after,
        row.anchor,
        Reason(row.reason),
        row.frozen,
        row.evidence,
        Setter(row.set_role, row.set_by),
    )
