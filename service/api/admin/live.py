"""What goes on and what went on: usage by day and key, open sessions, workers."""

from __future__ import annotations

from datetime import date, timedelta
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from service.api.admin.described import refusals
from service.api.admin.entrance import Told, page, read_cursor, respond, sortable, write_cursor
from service.api.admin.shapes import SessionPage, UsagePage, WorkerPage
from service.api.complaints import refuse
from service.errors import BadRequest
from tenants.access import Role, Scope
from tenants.errors import Fault

if TYPE_CHECKING:
    from service.administration import Administration
    from service.api.admin.entrance import Entrance
    from service.bindings import Bindings
    from service.present_use import PresentUse
    from tenants.policies import Policies
    from tenants.presence import Presences, ToldWorker
    from tenants.sessions import Session, Sessions
    from tenants.usage import DayUse

LONGEST_DAYS = 400
Limit = Annotated[int, Query(ge=1, le=1000, description="Entries on a page.")]
Cursor = Annotated[str | None, Query(max_length=1000, description="`next_cursor` of the page before.")]


def build_live_router(
    *,
    entrance: Entrance,
    administration: Administration,
    policies: Policies,
    use: PresentUse,
    sessions: Sessions,
    bindings: Bindings,
    presences: Presences,
) -> APIRouter:
    """The routes of usage, sessions and workers."""
    router = APIRouter()

    @router.get(
        "/tenants/{tenant_id}/usage",
        name="usage",
        tags=["admin: usage"],
        response_model=UsagePage,
        responses=refusals(404, 422),
        summary="Usage by day and key",
    )
    async def list_usage(
        request: Request,
        tenant_id: str,
        since: Annotated[
            date | None, Query(description="First day, in UTC; unset: 30 days before the last.")
        ] = None,
        until: Annotated[date | None, Query(description="Last day, in UTC; unset: today.")] = None,
        key_id: Annotated[str | None, Query(max_length=100, description="Of that key alone.")] = None,
        limit: Limit = 100,
        cursor: Cursor = None,
    ) -> Response:
        """Newest day first. What a request used is counted once it has ended; a refused request used nothing."""
        tenant = await entrance.tenant(request, tenant_id, Scope.USAGE)
        position = read_cursor(cursor, "usage", 2)
        until = until or await use.today(tenant.id)
        since = since or until - timedelta(days=30)
        if since > until or until - since > timedelta(days=LONGEST_DAYS):
            raise refuse(
                (Fault("since", f"must be at most {LONGEST_DAYS} days before until, and not after it"),)
            )
        policy = (await policies.current(tenant.id)).policy
        last = until if position is None else min(until, _day(position[0]))
        listed = [
            each
            for each in await use.by_day(tenant, policy, since=since, until=last, key_id=key_id)
            if position is None or _is_behind(each.day.isoformat(), each.key_id, position)
        ]
        told = page(
            [_tell_use(each) for each in listed[: limit + 1]],
            limit,
            lambda at: write_cursor("usage", listed[at].day.isoformat(), listed[at].key_id),
        )
        return respond(request, Told(told))

    @router.get(
        "/tenants/{tenant_id}/sessions",
        name="session_list",
        tags=["admin: live work"],
        response_model=SessionPage,
        responses=refusals(404, 422),
        summary="A tenant's open sessions",
    )
    async def list_sessions(
        request: Request, tenant_id: str, limit: Limit = 100, cursor: Cursor = None
    ) -> Response:
        """Newest first."""
        tenant = await entrance.tenant(request, tenant_id, Scope.SESSIONS)
        position = read_cursor(cursor, "sessions", 2)
        listed = [
            each
            for each in await sessions.list_open(tenant.id)
            if position is None or _is_behind(sortable(each.created_at), each.id, position)
        ]
        told = page(
            [_tell_session(each) for each in listed[: limit + 1]],
            limit,
            lambda at: write_cursor("sessions", sortable(listed[at].created_at), listed[at].id),
        )
        return respond(request, Told(told))

    @router.delete(
        "/tenants/{tenant_id}/sessions/{session_id}",
        name="session_close",
        tags=["admin: live work"],
        status_code=204,
        response_class=Response,
        responses=refusals(404),
        summary="Close a session",
    )
    async def close_session(request: Request, tenant_id: str, session_id: str) -> Response:
        """What workers keep for it is overwritten: here at once, at other gateways within seconds."""
        tenant = await entrance.tenant(request, tenant_id, Scope.SESSIONS)
        actor = entrance.actor(request)
        await administration.close_session(actor, tenant.id, session_id)
        await bindings.end(tenant.id, session_id)
        return respond(request, Told(status=204), actor)

    @router.get(
        "/workers",
        name="worker_list",
        tags=["admin: live work"],
        response_model=WorkerPage,
        responses=refusals(422),
        summary="Workers of every gateway",
    )
    async def list_workers(request: Request, limit: Limit = 100, cursor: Cursor = None) -> Response:
        """As their gateways told in the last seconds; a gateway that is gone is forgotten after a minute. A tenant's
        administrator sees its own tenant's. Spares, which serve nobody yet, are counted by `/metrics`."""
        caller = entrance.caller(request, Scope.POLICY)
        position = read_cursor(cursor, "workers", 3)
        everything = caller.role == Role.PLATFORM_ADMIN
        told_workers = await (presences.list_all() if everything else presences.list(caller.tenant))
        listed = [each for each in told_workers if position is None or _spot(each) > position]
        told = page(
            [_tell_worker(each) for each in listed[: limit + 1]],
            limit,
            lambda at: write_cursor("workers", *_spot(listed[at])),
        )
        return respond(request, Told(told))

    return router


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise BadRequest(
            "cursor is not one that this listing gave; begin without one.", field="cursor"
        ) from None


def _is_behind(first: str, second: str, position: tuple[str, ...]) -> bool:
    """In an order that falls by the first and rises by the second."""
    return first < position[0] or (first == position[0] and second > position[1])


def _spot(worker: ToldWorker) -> tuple[str, str, str]:
    return str(worker.tenant), str(worker.gateway), f"{worker.pid:010d}"


def _tell_use(each: DayUse) -> dict[str, Any]:
    return {
        "day": each.day.isoformat(),
        "key_id": each.key_id,
        "requests": each.use.requests,
        "images": each.use.images,
        "tokens": each.use.tokens,
        "refused": each.use.refused,
        "shadowed": each.use.shadowed,
    }


def _tell_session(session: Session) -> dict[str, Any]:
    return {
        "id": session.id,
        "object": "session",
        "created_at": session.created_at,
        "expires_at": session.expires_at,
        "ends_at": session.ends_at,
        "ttl_s": session.ttl_s,
        "last_used_at": session.last_used_at,
        "requests": session.requests,
    }


def _tell_worker(worker: ToldWorker) -> dict[str, Any]:
    return {
        "object": "worker",
        "gateway": str(worker.gateway),
        "pid": worker.pid,
        "state": "assigned",
        "tenant": str(worker.tenant),
        "running": worker.running,
        "jobs": worker.jobs,
        "since": worker.since,
        "reported_at": worker.reported_at,
    }
