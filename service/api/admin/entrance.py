"""Who may come in to `/admin/v1`, and what all of its paths share: bodies, answers, pages, repeats.

Every complaint about a body names each field that is wrong, and why. A POST that carries an `Idempotency-Key` is
done once: whoever sends it again gets the first answer.
"""

from __future__ import annotations

import base64
import hashlib
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from service.api.complaints import complaints, refuse
from service.api.requests import read_body
from service.deeds import Actor, actor_of
from service.errors import BadRequest, BodyTooLarge, Forbidden, NotFound
from tenants.access import Caller, Role, Scope
from tenants.errors import TenantNotFound
from tenants.repeats import IDEMPOTENCY_KEY, Kept

if TYPE_CHECKING:
    from datetime import datetime

    from service.asks import Exchange
    from tenants.database import Database
    from tenants.directory import Tenant
    from tenants.lifecycle import Lifecycle
    from tenants.repeats import Repeats

BODY_BYTES = 256 * 1024
"""Nothing that an administrator sends is longer."""
ADMINISTRATORS = frozenset({Role.TENANT_ADMIN, Role.PLATFORM_ADMIN})
NO_SUCH_PATH = "There is no such path; /docs lists them."

Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Told:
    """An answer before it is bytes."""

    body: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class Entrance:
    """Finds out who asks for what, and answers."""

    def __init__(
        self, *, database: Database, lifecycle: Lifecycle, repeats: Repeats, deadline_s: float
    ) -> None:
        self._database = database
        self._lifecycle = lifecycle
        self._repeats = repeats
        self._deadline_s = deadline_s

    async def tenant(self, request: Request, tenant_id: str, scope: Scope) -> Tenant:
        """The tenant of a path, where the caller may do to it what `scope` says.

        Raises `TenantNotFound` for an unknown tenant, no id at all, or another's than the administrator's own;
        `Forbidden` where the caller lacks the scope.
        """
        caller = self.caller(request, scope)
        try:
            asked = uuid.UUID(tenant_id)
        except ValueError:
            raise TenantNotFound from None
        if str(asked) != tenant_id or (caller.role != Role.PLATFORM_ADMIN and asked != caller.tenant):
            raise TenantNotFound
        return await self._lifecycle.find(asked)

    def caller(self, request: Request, scope: Scope) -> Caller:
        """The caller, with that scope. Raises `Forbidden`."""
        caller = _caller(request)
        if scope not in caller.scopes:
            raise Forbidden(f"This needs the scope {scope}.", reason="scope")
        return caller

    def platform(self, request: Request) -> Caller:
        """The caller, who administers the platform; for others the path is not there. Raises `NotFound`."""
        if _caller(request).role != Role.PLATFORM_ADMIN:
            raise NotFound(NO_SUCH_PATH)
        return self.caller(request, Scope.TENANTS)

    def actor(self, request: Request) -> Actor:
        """The caller as the log names it."""
        return actor_of(request.state.exchange)

    async def read(self, request: Request, shape: type[Body]) -> Body:
        """The body. Raises `BadRequest` with all that is wrong, `BodyTooLarge`, `BodyTooSlow`."""
        return parse(await self.body(request), shape)

    async def body(self, request: Request) -> bytes:
        """The body as it was sent. Raises `BodyTooLarge`, `BodyTooSlow`."""
        body = await read_body(request, self._deadline_s)
        if len(body) > BODY_BYTES:
            raise BodyTooLarge(f"The body is larger than {BODY_BYTES} bytes.", limit=BODY_BYTES)
        return body

    async def once(self, request: Request, act: Callable[[bytes, Actor], Awaitable[Told]]) -> Response:
        """The answer of `act`, which gets the body; or the one of before, where this is the same request again.

        With an `Idempotency-Key` the answer is kept in the same transaction as what `act` did. Raises
        `RepeatDiffers`, `RepeatUnderWay`, and what `act` raises; nothing is kept then.
        """
        name = request.headers.get("idempotency-key")
        body = await self.body(request)
        actor = self.actor(request)
        if name is None:
            told = await act(body, actor)
            return respond(request, told, actor)
        if IDEMPOTENCY_KEY.fullmatch(name) is None:
            raise BadRequest(
                "Idempotency-Key is 1 to 255 printable ASCII characters without spaces.",
                field="Idempotency-Key",
            )
        caller = _caller(request)
        who = f"{caller.key_id}/{caller.subject}"  # of one issuer's tokens, each subject has names of its own
        digest = hashlib.sha256(
            b"\0".join((request.method.encode(), request.url.path.encode(), request.url.query.encode(), body))
        ).digest()
        async with self._database.together():
            kept = await self._repeats.find(caller.tenant, who, name, digest)
            if kept is None:
                told = await act(body, actor)
                await self._repeats.keep(caller.tenant, who, name, digest, _keep(told, actor))
        if kept is None:
            return respond(request, told, actor)
        actor.receipt = str(kept.receipt) if kept.receipt is not None else None
        told = Told(**orjson.loads(kept.answer))
        return respond(request, told, actor, {"Idempotency-Replayed": "true"})


def let_in(request: Request) -> None:
    """A dependency of every path: name the operation, and hide the path from all but administrators."""
    exchange: Exchange = request.state.exchange
    exchange.operation = f"admin.{request.scope['route'].name}"
    if _caller(request).role not in ADMINISTRATORS:
        raise NotFound(NO_SUCH_PATH)


def _caller(request: Request) -> Caller:
    caller: Caller | None = request.state.exchange.caller
    if caller is None:  # the door lets nobody else in; this is a second lock, not a path
        raise NotFound(NO_SUCH_PATH)
    return caller


def parse(body: bytes, shape: type[Body]) -> Body:
    """A body as `shape` says; an empty one is `{}`. Raises `BadRequest` with all that is wrong."""
    try:
        return shape.model_validate_json(body or b"{}")
    except ValidationError as exc:
        raise refuse(complaints(exc.errors(include_url=False, include_input=False))) from None


def respond(
    request: Request, told: Told, actor: Actor | None = None, more: Mapping[str, str] | None = None
) -> Response:
    """JSON; of a GET with an ETag over what it says, and 304 for who has that already."""
    if actor is not None and actor.receipt is not None:
        request.state.exchange.entry_id = actor.receipt
    headers = {**told.headers, **(more or {})}
    body = b"" if told.body is None else encode(told.body)
    if request.method == "GET" and told.status == 200:
        headers.setdefault("ETag", f'"{hashlib.sha256(body).hexdigest()[:32]}"')
        headers["Cache-Control"] = "private, no-cache"
        if headers["ETag"] in tags(request.headers.get("if-none-match", "")):
            return Response(status_code=304, headers=headers)
    else:
        headers["Cache-Control"] = "no-store"  # it may hold a new key's text
    media_type = "application/json" if body else None
    return Response(body, told.status, headers, media_type=media_type)


def encode(value: object) -> bytes:
    return orjson.dumps(value, default=str, option=orjson.OPT_UTC_Z)


def tags(header: str) -> frozenset[str]:
    """The entity tags of an If-Match or If-None-Match header; weak ones count as strong ones."""
    return frozenset(tag.strip().removeprefix("W/") for tag in header.split(",") if tag.strip())


def _keep(told: Told, actor: Actor) -> Kept:
    answer = encode({"body": told.body, "status": told.status, "headers": dict(told.headers)})
    return Kept(answer, uuid.UUID(actor.receipt) if actor.receipt is not None else None)


# -- pages ------------------------------------------------------------------------------------------------------


def write_cursor(listing: str, *position: str) -> str:
    """Where the next page of a listing begins: after what sorts at `position`."""
    return base64.urlsafe_b64encode(orjson.dumps([listing, *position])).rstrip(b"=").decode()


def read_cursor(cursor: str | None, listing: str, parts: int) -> tuple[str, ...] | None:
    """The position in a cursor of that listing; None where there is none. Raises `BadRequest`."""
    if cursor is None:
        return None
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        read = orjson.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    except ValueError:
        read = None
    if not (
        isinstance(read, list)
        and len(read) == parts + 1
        and read[0] == listing
        and all(isinstance(part, str) and "\0" not in part for part in read)
    ):
        raise BadRequest("cursor is not one that this listing gave; begin without one.", field="cursor")
    return tuple(read[1:])


def sortable(moment: datetime) -> str:
    """Microseconds since 1970, so that text sorts as time does until the year 2286."""
    return f"{round(moment.timestamp() * 1_000_000):017d}"


def page(listed: list[Any], limit: int, cursor_of: Callable[[int], str]) -> dict[str, Any]:
    """A page of at most `limit` out of `listed`, which holds one more where there is more.

    `cursor_of` writes the cursor behind the entry at that place.
    """
    more = len(listed) > limit
    return {
        "object": "list",
        "data": listed[:limit],
        "has_more": more,
        "next_cursor": cursor_of(limit - 1) if more else None,
    }
