"""`GET /v1/usage`: what the caller's tenant used today and this month, and where its limits stand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import orjson
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from service.api.requests import PROBLEMS, require
from tenants.access import Scope
from tenants.usage import Use

if TYPE_CHECKING:
    from service.asks import Exchange
    from tenants.limits import Standing
    from tenants.quotas import Quotas


class Used(BaseModel):
    """What was used. Requests under way are not in it yet."""

    requests: int = Field(description="Requests that were let in and have ended, however they ended.")
    images: int
    tokens: int = Field(
        description="As `usage.prompt_tokens` counts them; nothing for a request that failed."
    )
    refused: int = Field(description="Requests that a limit refused.")
    shadowed: int = Field(description="Of `requests`, those that a limit in shadow would have refused.")


class Spans(BaseModel):
    """The same over two spans of time, in UTC."""

    today: Used
    this_month: Used


class LimitState(BaseModel):
    """One limit, of the tenant or (`key_…`) of the key."""

    name: str
    limit: int = Field(description="What fits at once; of a month, into it.")
    per_window: int = Field(description="What comes back over `window_s`.")
    window_s: int | None = Field(description="Absent for requests at the same time.")
    remaining: int
    more_in_s: int = Field(
        description="Seconds until there is more; 0 where nothing is used, or no time is known."
    )
    shadow: bool = Field(description="It counts and never denies.")


class KeySpans(Spans):
    key_id: str


class UsageAnswer(BaseModel):
    """A tenant's usage and limits at one moment, by the database's clock."""

    object: Literal["usage"]
    tenant: str
    day: str
    today: Used
    this_month: Used
    limits: list[LimitState]
    keys: list[KeySpans] = Field(description="The caller's own key.")


def build_usage_router(*, quotas: Quotas) -> APIRouter:
    """The route of usage."""
    router = APIRouter(tags=["usage"])

    @router.get(
        "/v1/usage",
        response_model=UsageAnswer,
        responses={status: PROBLEMS[status] for status in (401, 403, 503)},
        summary="What was used, and what remains",
    )
    async def tell_usage(request: Request) -> Response:
        """Asking is free: no limit is charged."""
        exchange: Exchange = request.state.exchange
        exchange.operation = "usage"
        caller = require(exchange, "search", Scope.USAGE)
        usage = await quotas.usage(caller)
        exchange.standings = usage.standings
        answer = {
            "object": "usage",
            "tenant": caller.tenant_name,
            "day": usage.day.isoformat(),
            "today": _sum(usage.today.values()),
            "this_month": _sum(usage.month.values()),
            "limits": [tell_standing(standing) for standing in usage.standings],
            "keys": [
                {
                    "key_id": caller.key_id,
                    "today": usage.today.get(caller.key_id, Use()),
                    "this_month": usage.month.get(caller.key_id, Use()),
                }
            ],
        }
        return Response(orjson.dumps(answer), media_type="application/json")

    return router


def tell_standing(standing: Standing) -> dict[str, object]:
    """A limit as `LimitState` has it."""
    return {
        "name": standing.name,
        "limit": standing.limit,
        "per_window": standing.per_window,
        "window_s": standing.window_s,
        "remaining": standing.remaining,
        "more_in_s": standing.more_in_s,
        "shadow": standing.shadow,
    }


def _sum(uses: Iterable[Use]) -> Use:
    return sum(uses, Use())
