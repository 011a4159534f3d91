"""What a search engineer calls to keep work warm between requests: sessions opened, read, listed and closed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.requests import PROBLEMS, Responses, read_body, require
from service.api.schemas import OpenSessions, SessionAnswer, read_session
from tenants.access import Scope

if TYPE_CHECKING:
    from service.asks import Exchange
    from service.bindings import Bindings
    from service.ledger import Ledger
    from tenants.sessions import Session, Sessions

OPENING_BODY: dict[str, Any] = {
    "requestBody": {
        "required": False,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/SessionRequest"},
                "examples": {
                    "default": {"summary": "15 minutes without use", "value": {}},
                    "hour": {"summary": "An hour without use", "value": {"ttl_s": 3600}},
                },
            }
        },
    }
}
REFUSALS: Responses = {status: PROBLEMS[status] for status in (401, 403, 503)}


def build_sessions_router(
    *, ledger: Ledger, sessions: Sessions, bindings: Bindings, deadline_s: float
) -> APIRouter:
    """The routes of sessions. All need the role `search` and see the caller's tenant alone."""
    router = APIRouter(tags=["sessions"])

    @router.post(
        "/v1/sessions",
        status_code=201,
        response_model=SessionAnswer,
        responses={**REFUSALS, **{status: PROBLEMS[status] for status in (408, 413, 422, 429)}},
        openapi_extra=OPENING_BODY,
        summary="Open a session",
    )
    async def open_session(request: Request) -> Response:
        """Name its id in `session_id` of `/v1/rerank`: what is computed there is kept for its next request."""
        exchange = _begin(request, "session_open")
        ttl_s = read_session(await read_body(request, deadline_s))
        session = await ledger.open_session(exchange, ttl_s)
        return _json(_tell(session), status=201, headers={"Location": f"/v1/sessions/{session.id}"})

    @router.get(
        "/v1/sessions", response_model=OpenSessions, responses=REFUSALS, summary="The tenant's open sessions"
    )
    async def list_sessions(request: Request) -> Response:
        """All of them, newest first: no more than the tenant's limit."""
        exchange = _begin(request, "session_list")
        listed = await sessions.list_open(require(exchange, "search", Scope.SESSIONS).tenant)
        return _json({"object": "list", "data": [_tell(session) for session in listed]})

    @router.get(
        "/v1/sessions/{session_id}",
        response_model=SessionAnswer,
        responses={**REFUSALS, 404: PROBLEMS[404]},
        summary="One open session",
    )
    async def read_one(request: Request, session_id: str) -> Response:
        """404 for a session that is closed, expired, unknown or another tenant's: one answer for all."""
        exchange = _begin(request, "session_read")
        return _json(
            _tell(await sessions.find(require(exchange, "search", Scope.SESSIONS).tenant, session_id))
        )

    @router.delete(
        "/v1/sessions/{session_id}",
        status_code=204,
        response_class=Response,
        responses={**REFUSALS, 404: PROBLEMS[404]},
        summary="Close a session, and wipe what it keeps",
    )
    async def close_session(request: Request, session_id: str) -> Response:
        """What workers kept for it is overwritten, then freed; here at once, at other gateways within seconds."""
        exchange = _begin(request, "session_close")
        await ledger.close_session(exchange, session_id)
        await bindings.end(require(exchange, "search", Scope.SESSIONS).tenant, session_id)
        return Response(status_code=204)

    return router


def _begin(request: Request, operation: str) -> Exchange:
    exchange: Exchange = request.state.exchange
    exchange.operation = operation
    require(exchange, "search", Scope.SESSIONS)
    return exchange


def _tell(session: Session) -> dict[str, Any]:
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


def _json(told: dict[str, Any], *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    body = orjson.dumps(told, option=orjson.OPT_UTC_Z)
    return Response(body, status, headers, media_type="application/json")
