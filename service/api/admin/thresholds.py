"""Thresholds that learn: what is in force and why, feedback on items, rollback, canaries.

Each path is there twice: of a tenant by its id, and of the caller's own.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from service.api.admin.described import IDEMPOTENT, body_of, refusals
from service.api.admin.entrance import Told, page, parse, read_cursor, respond, sortable, write_cursor
from service.api.admin.threshold_shapes import (
    CanariesAnswer,
    CanarySet,
    DecidedReview,
    Feedback,
    ReviewPage,
    Rollback,
    RolledBack,
    ThresholdsAnswer,
)
from service.errors import BadRequest
from tenants.access import Scope
from tenants.canaries import Canary
from tenants.directory import Tenant
from tenants.reviews import Place
from tenants.risk import Category, Mode

if TYPE_CHECKING:
    from service.adapting import Adapting
    from service.api.admin.entrance import Entrance
    from service.deeds import Actor
    from tenants.canaries import Canaries
    from tenants.policies import Setter
    from tenants.reviews import Review, Reviews
    from tenants.thresholds import Change, Standing, Thresholds

EXAMPLE = {
    "entry": "0b0e5c9e-54bb-4e3f-9d2c-3f2c1c8f0a11",
    "item": "documents[3]",
    "category": "hate",
    "mode": "text",
}
Cursor = Annotated[str | None, Query(max_length=1000, description="`next_cursor` of the page before.")]


def build_thresholds_router(
    *,
    entrance: Entrance,
    adapting: Adapting,
    reviews: Reviews,
    thresholds: Thresholds,
    canaries: Canaries,
) -> APIRouter:
    """The routes of thresholds and feedback. `whose` below is the dependency that finds the tenant."""

    async def of_path(request: Request, tenant_id: str) -> Tenant:
        return await entrance.tenant(request, tenant_id, Scope.POLICY)

    async def own(request: Request) -> Tenant:
        caller = entrance.caller(request, Scope.POLICY)
        return await entrance.tenant(request, str(caller.tenant), Scope.POLICY)

    router = APIRouter(tags=["admin: thresholds"])
    for prefix, whose in (("/tenants/{tenant_id}", Depends(of_path)), ("", Depends(own))):
        _add_feedback(router, prefix, whose, entrance, adapting, reviews)
        _add_thresholds(router, prefix, whose, entrance, adapting, thresholds)
        _add_canaries(router, prefix, whose, entrance, adapting, canaries)
    return router


def _add_feedback(
    router: APIRouter, prefix: str, whose: Any, entrance: Entrance, adapting: Adapting, reviews: Reviews
) -> None:
    @router.post(
        f"{prefix}/feedback",
        name="threshold_label",
        status_code=201,
        response_model=DecidedReview,
        responses=refusals(404, 409, 422),
        openapi_extra=body_of(
            Feedback,
            label={**EXAMPLE, "verdict": "harmless"},
            appeal={**EXAMPLE, "kind": "appeal"},
        )
        | IDEMPOTENT,
        summary="Label an item, or appeal against its stop",
    )
    async def give_feedback(request: Request, tenant: Tenant = whose) -> Response:
        """A label is a reviewer's decision, on an item that was drawn at random or is appealed; it is made once: the
        same again is answered 200 and does nothing. It votes where it is the first of its end user, day, category and
        mode, and makes the threshold stricter at once where the votes want that. An appeal moves nothing."""

        async def act(body: bytes, actor: Actor) -> Told:
            asked = parse(body, Feedback)
            place = Place(asked.entry, asked.item, asked.category, asked.mode)
            change = None
            if asked.verdict is None:
                review = await adapting.appeal(actor, tenant.id, place)
            else:
                review, change = await adapting.label(actor, tenant.id, place, asked.verdict)
            told = tell_review(review) | {"change": None if change is None else tell_change(change)}
            return Told(told, 200 if actor.receipt is None else 201)

        return await entrance.once(request, act)

    @router.get(
        f"{prefix}/feedback",
        name="threshold_waiting",
        response_model=ReviewPage,
        responses=refusals(404, 422),
        summary="Items that wait for a reviewer",
    )
    async def list_waiting(
        request: Request,
        tenant: Tenant = whose,
        limit: Annotated[int, Query(ge=1, le=200, description="Items on a page.")] = 50,
        cursor: Cursor = None,
    ) -> Response:
        """Drawn at random, stopped and passed ones, or appealed; the one that waits longest first. What an item says only who
        sent it knows: the log holds fingerprints."""
        after = read_cursor(cursor, "feedback", 5)
        position = None if after is None else (_moment(after[0]), _place(after[1:]))
        listed = await reviews.waiting(tenant.id, most=limit + 1, after=position)

        def cursor_of(at: int) -> str:
            place = listed[at].place
            parts = (str(place.entry_id), place.item, str(place.category), str(place.mode))
            return write_cursor("feedback", sortable(listed[at].screened_at), *parts)

        return respond(request, Told(page([tell_review(each) for each in listed], limit, cursor_of)))


def _add_thresholds(
    router: APIRouter,
    prefix: str,
    whose: Any,
    entrance: Entrance,
    adapting: Adapting,
    thresholds: Thresholds,
) -> None:
    @router.get(
        f"{prefix}/thresholds",
        name="threshold_list",
        response_model=ThresholdsAnswer,
        responses=refusals(404, 422),
        summary="Thresholds in force, and why",
    )
    async def list_thresholds(
        request: Request,
        tenant: Tenant = whose,
        category: Annotated[Category | None, Query(description="Of that category alone.")] = None,
        mode: Annotated[Mode | None, Query(description="Of texts or images alone.")] = None,
        limit: Annotated[int, Query(ge=1, le=200, description="Changes on a page.")] = 50,
        cursor: Cursor = None,
    ) -> Response:
        """Every category, of texts and of images, with the changes, newest first: before and after, reason, evidence, and
        who or what did it. `cursor` pages through the changes."""
        after = read_cursor(cursor, "thresholds", 4)
        before = (
            None
            if after is None
            else (_moment(after[0]), _category(after[1]), _mode(after[2]), _number(after[3]))
        )
        listed = await thresholds.history(
            tenant.id, category=category, mode=mode, most=limit + 1, before=before
        )

        def cursor_of(at: int) -> str:
            change = listed[at]
            parts = (str(change.category), str(change.mode), str(change.version))
            return write_cursor("thresholds", sortable(change.changed_at), *parts)

        standings = [
            tell_standing(each)
            for each in await thresholds.list(tenant.id)
            if category in (None, each.category) and mode in (None, each.mode)
        ]
        history = page([tell_change(each) for each in listed], limit, cursor_of)
        told = {"object": "thresholds", "tenant": str(tenant.id), "thresholds": standings, "history": history}
        return respond(request, Told(told))

    @router.post(
        f"{prefix}/thresholds/rollback",
        name="threshold_rollback",
        response_model=RolledBack,
        responses=refusals(404, 409, 422),
        openapi_extra=body_of(Rollback, everything={}, one={"category": "hate", "mode": "text", "version": 3})
        | IDEMPOTENT,
        summary="Undo what was learnt",
    )
    async def roll_back(request: Request, tenant: Tenant = whose) -> Response:
        """At once, and at every gateway within two seconds. Votes of before count no more: whatever was learnt from them is not
        learnt again."""

        async def act(body: bytes, actor: Actor) -> Told:
            asked = parse(body, Rollback)
            changes = await adapting.roll_back(
                actor, tenant.id, asked.category, asked.mode, version=asked.version
            )
            return Told({"object": "list", "data": [tell_change(change) for change in changes]})

        return await entrance.once(request, act)


def _add_canaries(
    router: APIRouter, prefix: str, whose: Any, entrance: Entrance, adapting: Adapting, canaries: Canaries
) -> None:
    @router.get(
        f"{prefix}/thresholds/canaries",
        name="threshold_canaries_read",
        response_model=CanariesAnswer,
        responses=refusals(404),
        summary="The tenant's canaries",
    )
    async def read_canaries(request: Request, tenant: Tenant = whose) -> Response:
        """Its own; those that the platform keeps for every tenant count as well."""
        return respond(request, Told(_tell_canaries(await canaries.list(tenant.id))))

    @router.put(
        f"{prefix}/thresholds/canaries",
        name="threshold_canaries",
        response_model=CanariesAnswer,
        responses=refusals(404, 422),
        openapi_extra=body_of(
            CanarySet,
            one={
                "canaries": [
                    {"category": "hate", "mode": "text", "name": "slur-1", "score": 0.93, "detectors": "1"}
                ]
            },
        ),
        summary="Replace the tenant's canaries",
    )
    async def set_canaries(request: Request, tenant: Tenant = whose) -> Response:
        """Fixed items that must be stopped, by their scores. A threshold gets looser only where they still are."""
        asked = await entrance.read(request, CanarySet)
        actor = entrance.actor(request)
        await adapting.set_canaries(
            actor, tenant.id, [Canary(**each.model_dump()) for each in asked.canaries]
        )
        return respond(request, Told(_tell_canaries(await canaries.list(tenant.id))), actor)


def tell_review(review: Review) -> dict[str, Any]:
    """A review as the API shows it."""
    return {
        "object": "review",
        "entry": str(review.place.entry_id),
        "item": review.place.item,
        "category": review.place.category,
        "mode": review.place.mode,
        "stopped": review.stopped,
        "drawn": review.drawn,
        "screened_at": review.screened_at,
        "appealed_at": review.appealed_at,
        "verdict": review.verdict,
        "decided_at": review.decided_at,
        "decided_by": None if review.verdict is None else _tell_setter(review.decided_by),
        "votes": review.votes,
    }


def tell_change(change: Change) -> dict[str, Any]:
    """A change as the API shows it."""
    return {
        "object": "threshold_change",
        "category": change.category,
        "mode": change.mode,
        "version": change.version,
        "changed_at": change.changed_at,
        "before": change.before,
        "after": change.after,
        "anchor": change.anchor,
        "reason": change.reason,
        "frozen": change.frozen,
        "evidence": change.evidence,
        "set_by": _tell_setter(change.set_by),
    }


def tell_standing(standing: Standing) -> dict[str, Any]:
    """A threshold as the API shows it."""
    least, most = standing.bounds or (None, None)
    return {
        "object": "threshold",
        "category": standing.category,
        "mode": standing.mode,
        "threshold": standing.threshold,
        "anchor": standing.anchor,
        "least": least,
        "most": most,
        "frozen": standing.frozen,
        "version": standing.version,
    }


def tell_canary(canary: Canary) -> dict[str, Any]:
    """A canary as the API shows it, and takes it."""
    return {
        "category": canary.category,
        "mode": canary.mode,
        "name": canary.name,
        "score": canary.score,
        "detectors": canary.detectors,
    }


def _tell_canaries(listed: tuple[Canary, ...]) -> dict[str, Any]:
    return {"object": "list", "data": [tell_canary(each) for each in listed]}


def _tell_setter(setter: Setter) -> dict[str, Any]:
    return {"role": setter.role, "key_id": setter.name or None}


# -- cursors: a part that no listing of ours wrote is told as a wrong cursor --------------------------------------


def _moment(text: str) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=_number(text))


def _place(parts: tuple[str, ...]) -> Place:
    try:
        return Place(UUID(parts[0]), parts[1], _category(parts[2]), _mode(parts[3]))
    except ValueError:
        raise _wrong() from None


def _category(text: str) -> Category:
    try:
        return Category(text)
    except ValueError:
        raise _wrong() from None


def _mode(text: str) -> Mode:
    try:
        return Mode(text)
    except ValueError:
        raise _wrong() from None


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 18):
        raise _wrong()
    return int(text)


def _wrong() -> BadRequest:
    return BadRequest("cursor is not one that this listing gave; begin without one.", field="cursor")
