"""The door, pure ASGI: request id, authentication from headers alone, body cap, one answer for every error.

Nothing behind the door runs for a caller without a key, and not a byte of the body is read before the key was
checked. Every exception from behind ends here: by the one table in `service.errors` it becomes an answer in the
dialect of the path and, for a known caller, an entry in the log. Who has no key leaves a metric instead.
"""

from __future__ import annotations

import re
import uuid
from typing import TYPE_CHECKING

import orjson
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response

from service.api.dialects import dialect_of
from service.api.leaks import LEAKED_PATH
from service.api.limits import limit_headers
from service.api.requests import read_end_user
from service.asks import Exchange
from service.errors import BodyTooLarge, LogUnavailable, NotReady, Trouble, describe
from service.watch import metrics
from service.watch.logs import get_logger, request_of, where_it_broke
from service.watch.traces import read_trace_id
from tenants.access import Role
from tenants.errors import ReceiptPending

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from service.api.dialects import Dialect
    from service.api.identify import Identify
    from service.asks import Running
    from service.ledger import Ledger

OPEN_PATHS = frozenset(
    {
        "/healthz",
        "/readyz",
        "/openapi.json",
        "/docs",
        "/docs/swagger-ui.js",
        "/docs/swagger-ui.css",
        LEAKED_PATH,
    }
)
"""What answers without a key: health, documentation, and reports of leaked keys; nothing of any tenant."""
OPEN_BODY_BYTES = 64 * 1024
"""Who has shown no key may send no more."""

USER_AGENT_LENGTH = 200
PLAIN_PATH = re.compile(r"/[a-z0-9/_.-]{0,47}")

log = get_logger(__name__)


class Door:
    """Lets callers in. Outermost but for Starlette's own last resort."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        identify: Identify,
        ledger: Ledger,
        running: Running,
        observe: Callable[[Exchange, int], None],
        body_limit_bytes: int,
    ) -> None:
        """`observe` is told of every request once it is finished, with its status; it never raises."""
        self.app = app
        self.identify = identify
        self.ledger = ledger
        self.running = running
        self.observe = observe
        self.body_limit_bytes = body_limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        exchange = Exchange(
            request_id=str(uuid.uuid4()),
            client_address=self.identify.address(scope),
            operation=_operation(scope),
            keyless="authorization" not in headers,
            trace_id=read_trace_id(headers.getlist("traceparent")),
            user_agent=headers.get("user-agent", "")[:USER_AGENT_LENGTH],
        )
        scope.setdefault("state", {})["exchange"] = exchange
        with request_of(exchange.request_id, exchange.trace_id):
            await self._answer(scope, receive, send, exchange)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, exchange: Exchange) -> None:
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = exchange.request_id
                if exchange.stages_ms:
                    headers["Server-Timing"] = server_timing(exchange)
                if exchange.entry_id is not None:
                    headers["Pericarp-Receipt"] = exchange.entry_id
                if exchange.screened is not None and (counts := exchange.screened.count()):
                    told = ", ".join(f"{word}={count}" for word, count in counts.items())
                    headers["Pericarp-Screening"] = told
                headers.update(limit_headers(exchange.standings))
            await send(message)

        try:
            await self._admit(scope, receive, send_with_id, exchange)
        except Exception as exc:
            if status:  # the answer has begun: all that is left is to break it off
                raise
            trouble = await self._record(exchange, exc)
            refusal = refuse(trouble, exchange, dialect_of(scope["path"]))
            await refusal(scope, receive, send_with_id)
        self.observe(exchange, status)
        caller = exchange.caller
        metrics.note_request(
            _known_operation(scope),
            status,
            exchange.elapsed_ms / 1000,
            str(caller.tenant) if caller else None,
            searches=caller is not None and caller.role is Role.SEARCH,
        )
        log.info(
            "answered a request",
            action="request",
            method=scope["method"],
            operation=_known_operation(scope),
            status=status,
            elapsed_ms=round(exchange.elapsed_ms, 1),
            tenant=str(caller.tenant) if caller else None,
        )

    async def _admit(self, scope: Scope, receive: Receive, send: Send, exchange: Exchange) -> None:
        headers = Headers(scope=scope)
        most_bytes = OPEN_BODY_BYTES
        if scope["path"] not in OPEN_PATHS:
            exchange.caller = await self.identify(scope, exchange)
            exchange.end_user = read_end_user(headers)
            most_bytes = self.body_limit_bytes
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length) > most_bytes:
            raise _too_large(most_bytes)
        received = 0

        def receive_capped(count: Callable[[int], None] | None = None) -> Receive:
            async def receive_next() -> Message:
                nonlocal received
                message = await receive()
                size_bytes = len(message.get("body", b""))
                received += size_bytes
                if received > most_bytes:
                    raise _too_large(most_bytes)
                if count is not None:
                    count(size_bytes)
                return message

            return receive_next

        if exchange.caller is None:
            await self.app(scope, receive_capped(), send)
            return
        with self.running.under_way(exchange) as count:
            await self.app(scope, receive_capped(count), send)

    async def _record(self, exchange: Exchange, exc: Exception) -> Trouble:
        """What to answer for `exc`; for a known caller only after the log has its entry ("no entry, no answer")."""
        trouble = describe(exc)
        if isinstance(
            exc, NotReady | ReceiptPending
        ):  # who asks too early has an answer; it is nobody's failure
            return trouble
        if trouble.status >= 500:
            log.error(
                "a request failed",
                action="request_failed",
                error=type(exc).__name__,
                where=where_it_broke(exc),
            )
        if exchange.caller is None:
            metrics.UNAUTHENTICATED.labels(trouble.code).inc()
            return trouble
        metrics.note_refusal(trouble.code, trouble.reason)
        if exchange.entry_id is None:
            try:
                await self.ledger.refuse(exchange, trouble)
            except Exception as failure:  # noqa: BLE001 - whatever kept the entry from being written, it is a 503
                log.error(
                    "the log could not be written",
                    action="entry_failed",
                    error=type(failure).__name__,
                    where=where_it_broke(failure),
                )
                return describe(LogUnavailable())
        return trouble


def _too_large(most_bytes: int) -> BodyTooLarge:
    # The connection stays: closed on unread bytes it would be reset, and who sends all before it reads
    # would never see this answer. The server drops what still comes.
    return BodyTooLarge(
        f"The body is larger than {most_bytes} bytes; send fewer or smaller images.", limit=most_bytes
    )


def refuse(trouble: Trouble, exchange: Exchange, dialect: Dialect) -> Response:
    """The error in the caller's dialect. The headers are the same in all of them."""
    complaint = dialect.complain(trouble, exchange)
    headers = dict(trouble.headers)
    if trouble.retry_after_s is not None:
        headers["Retry-After"] = str(trouble.retry_after_s)
    if trouble.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(orjson.dumps(complaint.body), complaint.status, headers, media_type=complaint.media_type)


def server_timing(exchange: Exchange) -> str:
    """The stages as a `Server-Timing` header (W3C Server Timing, section 3)."""
    return ", ".join(f"{name};dur={ms:.1f}" for name, ms in exchange.stages_ms.items())


def _operation(scope: Scope) -> str:
    """What the log calls the request until a route knows better; a path that says too much is not repeated."""
    path = scope["path"] if PLAIN_PATH.fullmatch(scope["path"]) else "other"
    return f"{scope['method'][:8]} {path}"


def _known_operation(scope: Scope) -> str:
    """The route's template, never the raw path: a label that callers could make up grows without bound."""
    route = scope.get("route")
    return getattr(route, "path", None) or (scope["path"] if scope["path"] in OPEN_PATHS else "other")
