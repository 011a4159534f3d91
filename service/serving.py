"""Run the gateway: uvicorn around `create_app`, one line on stdout once it is ready."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import uvicorn
import uvloop

from service.app import create_app
from service.watch.logs import configure, get_logger
from tenants.access import Access, Role
from tenants.database import Database
from tenants.directory import Directory
from tenants.errors import TenantExists, Unauthenticated
from tenants.policy import Policy

if TYPE_CHECKING:
    from service.fleet.router import Fleet
    from service.installation import Installation
    from service.settings import Settings

DEMO = "demo"
DEMO_POLICY = Policy(images_per_minute=600, images_per_request=100)
"""The defaults, but for room to play with images."""
GRACE_S = 20
"""How long answers under way may take once the service was told to stop."""

log = get_logger(__name__)


def run(settings: Settings, installation: Installation, *, demo: bool) -> None:
    """Serve until SIGTERM or SIGINT, then let answers under way end. Raises SystemExit(1) if it cannot start."""
    configure(settings.log_level)
    key = asyncio.run(_demo_key(settings.home, installation)) if demo else None
    app = create_app(settings, installation)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            loop="uvloop",
            http="httptools",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_S,
            h11_max_incomplete_event_size=None,
        )
    )
    log.info("starting", action="service_start", model=settings.model)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(server, app.state.fleet, settings, key))
    if not server.started:
        sys.exit(1)
    log.info("stopped", action="service_stop")


async def _serve(server: uvicorn.Server, fleet: Fleet, settings: Settings, key: str | None) -> None:
    announcing = asyncio.create_task(_announce(server, fleet, settings, key))
    try:
        await server.serve()
    finally:
        announcing.cancel()


async def _announce(server: uvicorn.Server, fleet: Fleet, settings: Settings, key: str | None) -> None:
    """One line, once a worker has scored its warm-up: everything before it would be a promise."""
    while not (server.started and fleet.ready):  # noqa: ASYNC110 - uvicorn tells of its start by a flag alone
        await asyncio.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://{settings.host}:{port}"
    log.info("ready", action="service_ready", url=url)
    if key is not None:
        sys.stdout.write(f"Pericarp is ready. Try: {_example(url, key)}\n")
    else:
        sys.stdout.write(f"Pericarp is ready at {url}\n")
    sys.stdout.flush()


def _example(url: str, key: str) -> str:
    body = {
        "query": "red fruit",
        "documents": ["a blue car", "strawberry", "rain and thunder"],
        "return_documents": True,
    }
    return (
        f"curl -s {url}/v1/rerank -H 'Authorization: Bearer {key}' "
        f"-H 'Content-Type: application/json' -d '{orjson.dumps(body).decode()}'"
    )


async def _demo_key(home: Path, installation: Installation) -> str:
    """The demo tenant's search key: the one that is kept under the home if it still opens the door, else a new one.

    Only the demo's key is ever kept as text, so that every start can print a request that works.
    """
    kept = home / "secrets" / "demo-key"
    database = Database(installation.app_url, pool_size=1, call_pool_size=1)
    await database.open()
    try:
        if kept.exists():
            try:
                await Access(database, pepper=installation.pepper).authenticate(kept.read_text().strip())
                return kept.read_text().strip()
            except Unauthenticated:
                kept.unlink()
        directory = Directory(database, pepper=installation.pepper, master_key=installation.master_key)
        try:
            tenant = await directory.create_tenant(DEMO, DEMO_POLICY)
        except TenantExists:
            tenant = await directory.find_tenant(DEMO)
        _key, text = await directory.create_key(tenant.id, Role.SEARCH, name="printed by make run")
        with os.fdopen(os.open(kept, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text + "\n")
        return text
    finally:
        await database.close()
