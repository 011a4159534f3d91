"""Prometheus's metrics: to the platform's administrators on the service's port, or to whoever reaches a port of their own."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

import uvicorn
from fastapi import APIRouter, Request
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from service.api.requests import require
from service.watch.logs import get_logger
from service.watch.metrics import CONTENT_TYPE
from tenants.access import Scope

if TYPE_CHECKING:
    from service.exposition import Exposition

CONNECTIONS = 16
"""At that port, at the same time; beyond it 503."""
STOP_S = 1

log = get_logger(__name__)


def build_metrics_router(*, exposition: Exposition) -> APIRouter:
    """The route on the service's own port."""
    router = APIRouter()

    @router.get("/metrics", tags=["operations"], summary="Prometheus metrics (platform_admin keys)")
    async def export_metrics(request: Request) -> Response:
        """Counts over all tenants, so only the platform's own keys may read them."""
        request.state.exchange.operation = "metrics"
        require(request.state.exchange, "platform_admin", Scope.METRICS)
        return Response(await exposition.render(), media_type=CONTENT_TYPE)

    return router


class MetricsPort:
    """`GET /metrics` on a port of its own, without a key. Starts and ends with the gateway, on its event loop."""

    def __init__(self, exposition: Exposition, *, host: str, port: int | None) -> None:
        """Where `port` is None there is none, and 0 takes a free one."""
        self._exposition = exposition
        self._host = host
        self._port = port
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen. Raises OSError where that cannot be."""
        if self._port is None:
            return
        try:
            listening = socket.create_server(
                (self._host, self._port),
                family=socket.AF_INET6 if ":" in self._host else socket.AF_INET,
            )
        except OSError as exc:
            log.critical(
                "metrics cannot be listened for",
                action="metrics_failed",
                host=self._host,
                port=self._port,
                error=type(exc).__name__,
                reason=exc.strerror,
            )
            raise
        self._server = _Server(
            uvicorn.Config(
                Starlette(routes=[Route("/metrics", self._export, methods=["GET"])]),
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=CONNECTIONS,
                timeout_graceful_shutdown=STOP_S,
            )
        )
        self._serving = asyncio.create_task(self._server.serve(sockets=[listening]), name="metrics")
        self._serving.add_done_callback(self._notice_end)
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        log.info("metrics are served", action="metrics_ready", url=f"http://{shown}:{port}/metrics")

    async def close(self) -> None:
        """Listen no more. Idempotent."""
        server, self._server = self._server, None
        if server is not None and self._serving is not None:
            server.should_exit = True
            await asyncio.wait({self._serving})

    async def _export(self, _request: Request) -> Response:
        return Response(await self._exposition.render(), media_type=CONTENT_TYPE)

    def _notice_end(self, serving: asyncio.Task[None]) -> None:
        if self._server is None:
            return
        exc = None if serving.cancelled() else serving.exception()
        log.critical(
            "metrics are served no more",
            action="metrics_failed",
            error=type(exc).__name__ if exc is not None else None,
        )


class _Server(uvicorn.Server):
    """Leaves signals to the gateway's own server."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
