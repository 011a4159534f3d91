"""What every route asks of a request: its caller's role and its body; and how each may be refused."""

from __future__ import annotations

import asyncio
import re
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect

from service.api.schemas import Problem
from service.errors import BadRequest, BodyTooSlow, Forbidden

if TYPE_CHECKING:
    from starlette.datastructures import Headers
    from starlette.requests import Request
    from starlette.types import Receive

    from service.asks import Exchange
    from tenants.access import Caller, Scope

END_USER = "Pericarp-End-User"
END_USER_NAME = re.compile(r"[!-~]{1,255}")

Responses = dict[int | str, dict[str, Any]]

PROBLEMS: Responses = {
    status: {"model": Problem, "description": description}
    for status, description in {
        401: "No key, or not a valid one.",
        403: "The key's role may not do this, or content is above a threshold of the tenant.",
        404: "No such model, or no such open session.",
        408: "The body did not arrive within the deadline.",
        413: "The body is too large.",
        422: "The request, or an image in it, cannot be used; `field` and `limit` say why.",
        429: "A limit of the tenant is used up; `Retry-After` says when to come back.",
        502: "The model gave no usable score.",
        503: "No worker, or the log cannot be written; try again after `Retry-After`.",
        504: "The deadline passed.",
    }.items()
}


FOR_AN_END_USER: dict[str, Any] = {
    "parameters": [
        {
            "name": END_USER,
            "in": "header",
            "required": False,
            "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
            "description": "A name of yours for whom you ask. Kept as a keyed fingerprint only: in the log, and to give "
            "each end user one vote where thresholds learn. A token speaks for its own subject.",
        }
    ]
}
"""What a route's description takes in whose content is screened."""


def require(exchange: Exchange, role: str, scope: Scope | None = None) -> Caller:
    """The caller, who has that role, and that scope where one is named. Raises `Forbidden` for any other."""
    caller = exchange.caller
    if caller is None:  # the door lets nobody else in; this is a second lock, not a path
        raise Forbidden
    if caller.role != role:
        raise Forbidden(f"This needs a key with the role {role}; this one has {caller.role}.", reason="role")
    if scope is not None and scope not in caller.scopes:
        raise Forbidden(f"This needs the scope {scope}.", reason="scope")
    return caller


def read_end_user(headers: Headers) -> str:
    """For whom the caller asks; empty where it does not say. Raises `BadRequest` for what is no name."""
    named = headers.getlist(END_USER)
    if not named:
        return ""
    if len(named) > 1 or END_USER_NAME.fullmatch(named[0]) is None:
        raise BadRequest(
            f"{END_USER} is one name of 1 to 255 printable ASCII characters without spaces.", field=END_USER
        )
    return named[0]


async def read_body(request: Request, deadline_s: float) -> bytes:
    """The whole body; from then on the exchange knows when its caller hangs up.

    Raises `BodyTooSlow`, `BodyTooLarge` (from the door), and `BadRequest` where it breaks off.
    """
    try:
        async with asyncio.timeout(deadline_s):
            body = await request.body()
    except TimeoutError:
        raise BodyTooSlow(f"The body did not arrive within {deadline_s:g} s.") from None
    except ClientDisconnect:
        raise BadRequest("The body ended before all of it was sent.") from None
    request.state.exchange.hung_up = partial(_hung_up, request.receive)
    return body


async def _hung_up(receive: Receive) -> None:
    """ASGI: where the body has been read, `receive` waits for the end of the connection, or of the answer."""
    while (await receive())["type"] != "http.disconnect":
        pass
