"""Run the gateway: uvicorn around `create_app`, one line on stdout once it is ready."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import sys
from typing import TYPE_CHECKING

import orjson
import uvicorn
import uvloop

from service.app import create_app
from service.fleet.router import Party
from service.tls import ServerTls, protocol_options, server_tls
from service.watch import metrics
from service.watch.log_folder import LogFolder, LogFolderUnusable
from service.watch.logs import close, configure, get_logger
from tenants.access import Access, Role
from tenants.database import Database
from tenants.directory import Directory
from tenants.errors import TenantExists, Unauthenticated
from tenants.policy import Policy

if TYPE_CHECKING:
    from pathlib import Path

    from service.fleet.router import Fleet
    from service.installation import Installation
    from service.settings import Settings

DEMO = "demo"
DEMO_POLICY = Policy(images_per_minute=600, images_per_request=100)
"""The defaults, but for room to play with images."""
GRACE_S = 20
"""How long answers under way may take once the service was told to stop."""

log = get_logger(__name__)


def run(settings: Settings, installation: Installation, *, demo: bool, fleet: Fleet | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then let answers under way end. Raises SystemExit if it cannot start.

    `fleet` as in `create_app`.
    """
    _open_log(settings)
    try:
        _run(settings, installation, demo=demo, fleet=fleet)
    finally:
        close()


def _open_log(settings: Settings) -> None:
    folder = None
    if settings.log_folder is not None:
        try:
            folder = LogFolder(
                settings.log_folder,
                file_bytes=settings.log_file_bytes,
                retention_days=settings.log_retention_days,
            )
        except LogFolderUnusable as exc:
            sys.exit(f"PERICARP_LOG_FOLDER: {exc}")
    configure(settings.log_level, folder=folder, dropped=metrics.DROPPED_LOG_LINES.inc)


def _run(settings: Settings, installation: Installation, *, demo: bool, fleet: Fleet | None) -> None:
    key, keep_warm = asyncio.run(_look_up(settings, installation, demo=demo))
    if len(keep_warm) > settings.max_workers:
        sys.exit(
            f"{len(keep_warm)} workers are to be kept warm, but PERICARP_MAX_WORKERS is {settings.max_workers}."
        )
    tls = _open_tls(settings)
    _raise_open_files()
    app = create_app(settings, installation, keep_warm=keep_warm, fleet=fleet)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            loop="uvloop",
            **protocol_options(tls),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # who we see is who connects; a header would let callers choose their address
            timeout_graceful_shutdown=GRACE_S,
            h11_max_incomplete_event_size=None,
        )
    )
    log.info("starting", action="service_start", model=settings.model)
    if not (settings.listens_inside or tls):
        log.warning(
            "other hosts may connect without TLS: keys and texts cross that network in the clear",
            action="plaintext",
            host=settings.host,
        )
    # Uvicorn ends by raising the signal that stopped it once more: as an exception, so that we end by ourselves.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        contextlib.suppress(KeyboardInterrupt),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(_serve(server, app.state.fleet, settings, key, tls))
    if not server.started:
        sys.exit(1)
    log.info("stopped", action="service_stop")


def _open_tls(settings: Settings) -> ServerTls | None:
    """Raises SystemExit where the files are not a certificate and its key."""
    try:
        return server_tls(settings)
    except OSError as exc:
        sys.exit(f"The certificate, its key or the client CA cannot be used: {type(exc).__name__}.")


def _raise_open_files() -> None:
    """As many connections as the system allows, rather than what a shell's default leaves."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _serve(
    server: uvicorn.Server, fleet: Fleet, settings: Settings, key: str | None, tls: ServerTls | None
) -> None:
    if tls is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, tls.reload)
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
    url = f"{'https' if settings.tls_certificate else 'http'}://{settings.host}:{port}"
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


async def _look_up(
    settings: Settings, installation: Installation, *, demo: bool
) -> tuple[str | None, tuple[Party, ...]]:
    """The demo's key where one is wanted, and the parties whose worker is to be kept warm by a tenant's policy."""
    database = Database(installation.app_url, pool_size=1, call_pool_size=1)
    await database.open()
    try:
        directory = Directory(database, pepper=installation.pepper, master_key=installation.master_key)
        access = Access(database, pepper=installation.pepper)
        key = await _demo_key(settings.home / "secrets" / "demo-key", directory, access) if demo else None
        tenants = [tenant.id for tenant in await directory.list_tenants(state="active")]
        policies = {str(tenant): await directory.find_policy(tenant) for tenant in tenants}
        warm = [Party.of(tenant, policy) for tenant, policy in policies.items() if policy.keep_warm]
        return key, tuple(dict.fromkeys(warm))  # tenants of one group keep one worker
    finally:
        await database.close()


async def _demo_key(kept: Path, directory: Directory, access: Access) -> str:
    """The demo tenant's search key: the one in `kept` if it still opens the door, else a new one.

    Only the demo's key is ever kept as text, so that every start can print a request that works.
    """
    text = _read_key(kept)
    if text is not None:
        try:
            await access.authenticate(text)
            return text
        except Unauthenticated:
            pass  # revoked, or of another database: the demo gets a new one
    try:
        tenant = await directory.create_tenant(DEMO, DEMO_POLICY)
    except TenantExists:
        tenant = await directory.find_tenant(DEMO)
    _key, text = await directory.keys.create(tenant.id, Role.SEARCH, name="printed by make run")
    _keep_key(kept, text)
    return text


def _read_key(kept: Path) -> str | None:
    return kept.read_text().strip() if kept.exists() else None


def _keep_key(kept: Path, text: str) -> None:
    kept.unlink(missing_ok=True)
    with os.fdopen(os.open(kept, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text + "\n")
