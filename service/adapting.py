"""Feedback and what it moves: one set of functions for the API, the command line and the daily step.

Every label, appeal, change and rollback is one transaction with its entry, which tells the threshold before and after in
millionths, as scores are told, and the evidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from service.deeds import GATEWAY, Actor
from tenants.audit import micro_units
from tenants.policies import Setter
from tenants.risk import Category, Mode

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.deeds import Deeds
    from tenants.access import TenantId
    from tenants.canaries import Canaries, Canary
    from tenants.lifecycle import Lifecycle
    from tenants.reviews import Place, Review, Reviews, Verdict
    from tenants.thresholds import Change, Thresholds


class Adapting:
    """Takes feedback, and moves thresholds."""

    def __init__(
        self,
        *,
        deeds: Deeds,
        lifecycle: Lifecycle,
        reviews: Reviews,
        thresholds: Thresholds,
        canaries: Canaries,
    ) -> None:
        self._deeds = deeds
        self._lifecycle = lifecycle
        self._reviews = reviews
        self._thresholds = thresholds
        self._canaries = canaries

    async def label(
        self, actor: Actor, tenant: TenantId, place: Place, verdict: Verdict
    ) -> tuple[Review, Change | None]:
        """A reviewer's decision, and what it makes stricter at once. The same one again does nothing.

        Raises `ReviewNotFound`, `ReviewRefused`.
        """
        async with self._deeds.deed(actor, "threshold_label", tenant=tenant, status=201) as deed:
            review, deed.happened = await self._reviews.decide(tenant, place, verdict, by=_setter(actor))
            change = None
            if deed.happened and review.votes:
                change = await self._thresholds.tighten(tenant, place.category, place.mode, by=_setter(actor))
            deed.details = {
                **_tell_place(place),
                "verdict": str(verdict),
                "votes": int(review.votes),
                "changes": [] if change is None else [tell_change(change)],
            }
        return review, change

    async def appeal(self, actor: Actor, tenant: TenantId, place: Place) -> Review:
        """Ask for a reviewer's decision on a stopped item; it moves nothing. Idempotent. Raises `ReviewNotFound`."""
        async with self._deeds.deed(actor, "threshold_appeal", tenant=tenant, status=201) as deed:
            review, deed.happened = await self._reviews.appeal(tenant, place)
            deed.details = _tell_place(place)
        return review

    async def roll_back(
        self,
        actor: Actor,
        tenant: TenantId,
        category: Category | None = None,
        mode: Mode | None = None,
        *,
        version: int | None = None,
    ) -> tuple[Change, ...]:
        """Back to the policy's own thresholds, all or those of a category and mode, or one to what it was after `version`.

        Votes of before count no more. Raises `ThresholdNotFound`, `Invalid`, `TenantNotFound`; nothing has changed then.
        """
        places = [
            (each.category, each.mode)
            for each in await self._thresholds.list(tenant)
            if category in (None, each.category) and mode in (None, each.mode) and each.known
        ]
        if category is not None and mode is not None:
            places = [(category, mode)]  # where nothing was learnt, that is told
        async with self._deeds.deed(actor, "threshold_rollback", tenant=tenant) as deed:
            made = [
                await self._thresholds.roll_back(tenant, *place, version=version, by=_setter(actor))
                for place in places
            ]
            changes = tuple(change for change in made if change is not None)
            deed.details = {
                "places": [f"{of_category}/{of_mode}" for of_category, of_mode in places],
                "changes": [tell_change(change) for change in changes],
            }
        return changes

    async def set_canaries(self, actor: Actor, tenant: TenantId, canaries: Sequence[Canary]) -> None:
        """Replace the tenant's canaries, or the installation's. Raises `Invalid`."""
        async with self._deeds.deed(actor, "threshold_canaries", tenant=tenant) as deed:
            await self._canaries.set(tenant, canaries)
            deed.details = {"count": len(canaries)}

    async def step(self, tenant: TenantId, actor: Actor | None = None) -> tuple[Change, ...]:
        """The daily step of a tenant: what changed. Raises `TenantNotFound`."""
        actor = actor or Actor(GATEWAY)
        async with self._deeds.deed(actor, "threshold_step", tenant=tenant) as deed:
            changes = await self._thresholds.step(tenant, by=_setter(actor))
            deed.details = {"changes": [tell_change(change) for change in changes]}
            deed.happened = bool(changes)
        return changes

    async def step_due(self, told: Callable[[TenantId, tuple[Change, ...]], None] | None = None) -> int:
        """The daily step of every tenant that has not had it today; how many there were.

        Any number of gateways may try at once: a day has one way, whoever goes it.
        """
        due = await self._thresholds.due()
        for tenant_id in due:
            tenant = await self._lifecycle.find(tenant_id)
            changes = await self.step(tenant.id)
            if changes and told is not None:
                told(tenant.id, changes)
        return len(due)


def tell_change(change: Change) -> dict[str, object]:
    """A change as an entry tells it: integers and strings, thresholds and shares in millionths."""
    evidence = change.evidence
    told: dict[str, object] = {
        "category": str(change.category),
        "mode": str(change.mode),
        "version": change.version,
        "before": micro_units(change.before),
        "after": micro_units(change.after),
        "anchor": micro_units(change.anchor),
        "reason": str(change.reason),
        "frozen": change.frozen,
    }
    told |= {name: evidence[name] for name in ("votes", "harmful") if name in evidence}
    told |= {
        name: micro_units(evidence[name])
        for name in ("aim", "recall_before", "recall_after")
        if name in evidence
    }
    return told


def _tell_place(place: Place) -> dict[str, object]:
    return {
        "entry": str(place.entry_id),
        "item": place.item,
        "category": str(place.category),
        "mode": str(place.mode),
    }


def _setter(actor: Actor) -> Setter:
    return Setter(actor.role, actor.key_id)
