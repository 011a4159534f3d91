"""A witness over HTTP: `POST /add-checkpoint`, and nothing else.

One body at a time is judged, so no two overlap. A body has a size and a time within which it must be there.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from service.watch.logs import get_logger, where_it_broke
from service.witness.judge import BODY_BYTES_MOST, Answer
from service.witness.store import StoreBroken

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from service.witness.judge import Judge

PATH = "/add-checkpoint"
BODY_S = 10.0
"""How long a body may take to arrive."""

log = get_logger(__name__)


class Door:
    """The ASGI application of one witness."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # ASGI: whatever an application does not speak (lifespan, websockets), it answers by raising.
            raise ValueError(f"a witness speaks HTTP alone, not {scope['type']}")
        answer = await self._answer(scope, receive)
        body = answer.body.encode()
        headers = [
            (b"content-type", answer.media_type.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
            *([(b"allow", b"POST")] if answer.status == 405 else []),
            # What is left of a body that was not read must not be taken for the next request.
            *([(b"connection", b"close")] if answer.status in (404, 405, 408, 413) else []),
        ]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Scope, receive: Receive) -> Answer:
        if scope["path"] != PATH:
            return Answer(404, f"There is {PATH} alone.\n")
        if scope["method"] != "POST":
            return Answer(405, "This path takes POST.\n")
        try:
            async with asyncio.timeout(BODY_S):
                body = await _read(receive)
        except TimeoutError:
            return Answer(408, "The body did not arrive in time.\n")
        if body is None:
            return Answer(413, f"A body has {BODY_BYTES_MOST} bytes at most.\n")
        try:
            # Blocks this loop for some milliseconds: that is what keeps judgements apart.
            return self._judge.add_checkpoint(body)
        except (StoreBroken, OSError) as exc:
            log.critical(
                "this witness's folder cannot be read or written: nothing is cosigned",
                action="witness_failed",
                error=type(exc).__name__,
                where=where_it_broke(exc),
            )
            return Answer(503, "This witness cannot reach its own store.\n")


async def _read(receive: Receive) -> bytes | None:
    """The body; None where it is too large. What a caller who hung up had sent is judged like the rest."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > BODY_BYTES_MOST:
            return None
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return bytes(body)
