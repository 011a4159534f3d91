"""HTTP/1.1 as uvicorn speaks it, and patience with an end: whoever opens a connection must say what it wants soon.

Uvicorn waits for the end of a request's headers for as long as it takes, and keeps all of them. So our own protocol counts
both. Bodies have the request's deadline (`api/requests.py`), idle connections five seconds, and a tenant its share
(`asks.Running`). It uses uvicorn's own methods, which is why uvicorn is pinned and a test opens real connections.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

if TYPE_CHECKING:
    import asyncio

HEADERS_S = 10.0
"""From the connection's start, or a further request's first byte, to the end of its headers."""
HEADER_BYTES = 64 * 1024


class Connection(HttpToolsProtocol):
    """One connection, closed without an answer where headers take too long or too much room."""

    headers_s = HEADERS_S
    _patience: asyncio.TimerHandle | None = None
    _header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._wait()

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._patience is not None:
            self._header_bytes += len(data)
            if self._header_bytes > HEADER_BYTES:
                self._give_up()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._stop_waiting()
        self._patience = self.loop.call_later(self.headers_s, self._give_up)

    def _stop_waiting(self) -> None:
        self._header_bytes = 0
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _give_up(self) -> None:
        if self._patience is not None:
            self._stop_waiting()
            self.transport.abort()
