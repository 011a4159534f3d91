"""The whole service in a thread of its own, over real HTTP, around workers whose model is a puppet.

For what needs many requests and no scores of a real model: it starts in a second.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from typing import Any, TypeVar

import httpx
import uvicorn

from service.app import create_app
from service.containment import Enforcement
from service.desk import Desk, build_desk
from service.fleet.local import LocalFleet
from service.installation import Installation
from service.screening.fetch import Network
from service.settings import Settings
from tenants.access import Role
from tenants.audit import decode
from tenants.database import Database
from tenants.policy import Policy

Result = TypeVar("Result")
PUPPET = "tests.integration.fake_worker"


@dataclass
class Served:
    """One running service. Everything that is asked of it by a test is asked from outside of its thread."""

    url: str
    loop: asyncio.AbstractEventLoop
    desk: Desk
    fleet: LocalFleet
    enforcement: Enforcement
    platform_key: str
    issued: list[str] = field(default_factory=list)
    """The text of every key that was made."""

    def client(self, key: str | None = None) -> httpx.Client:
        """As the platform's administrator, or with `key`; without any where it is empty."""
        key = self.platform_key if key is None else key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def rerank(self, body: object, key: str, headers: dict[bytes, bytes] | None = None) -> httpx.Response:
        with self.client(key) as client:
            return client.post("/v1/rerank", json=body, headers=headers)

    def search_key(self, **limits: Any) -> tuple[str, str]:
        """A new tenant of that Policy: its name, and a search key of its own."""

        async def make() -> tuple[str, str]:
            name = f"tenant-{secrets.token_hex(8)}"
            tenant = await self.desk.directory.create_tenant(name, Policy(**limits))
            _, key = await self.desk.directory.keys.create(tenant.id, Role.SEARCH)
            return name, key

        return self.wait(make())

    def wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of `work`, done in the service's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def entries(self, tenant: str) -> list[dict[str, Any]]:
        """The entries of the tenant of that name, newest first."""
        return self.wait(self._entries(tenant))

    async def _entries(self, name: str) -> list[dict[str, Any]]:
        tenant = await self.desk.directory.find_tenant(name)
        recorded = await self.desk.audit.list_entries(tenant.id, limit=10_000)
        return [{"id": str(each.id), **asdict(decode(each.body))} for each in recorded]


@contextmanager
def serve(
    app_url: str,
    pepper: bytes,
    master_key: bytes,
    log_key: bytes,
    *,
    judges_images: bool = False,
    network: Network | None = None,
    puppet: bool = True,
    ready: Callable[[LocalFleet], bool] = attrgetter("ready"),
    **settings: Any,
) -> Iterator[Served]:
    """A service over that database, `ready`; gone afterwards whatever happened. `network` is for remote images.

    The networks that judge images take seconds of a core to load: a module that sends images asks for them. Without a
    `puppet` its workers load the model that `settings` name.
    """
    installation = Installation(app_url, None, pepper, master_key, log_key)
    running: list[Served] = []
    failed: list[BaseException] = []
    stop = threading.Event()

    async def run() -> None:
        networks = {"image_nets": judges_images, "image_text": judges_images}
        chosen = Settings(**{"model": "puppet", "screeners": 1, **networks, **settings})
        puppets = (
            LocalFleet(model="puppet", worker=PUPPET, max_workers=4, spare_workers=1) if puppet else None
        )
        app = create_app(chosen, installation, fleet=puppets, network=network)
        fleet: LocalFleet = app.state.fleet
        server = uvicorn.Server(
            uvicorn.Config(app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=1)
        )
        serving = asyncio.create_task(server.serve())
        while not (server.started and ready(fleet)):
            assert not serving.done(), "it did not start"
            await asyncio.sleep(0.02)
        database = Database(app_url)
        await database.open()
        desk = build_desk(database, installation)
        platform = await desk.directory.create_tenant(f"platform-{secrets.token_hex(4)}")
        _, key = await desk.directory.keys.create(platform.id, Role.PLATFORM_ADMIN)
        port = server.servers[0].sockets[0].getsockname()[1]
        url, loop = f"http://127.0.0.1:{port}", asyncio.get_running_loop()
        running.append(Served(url, loop, desk, fleet, app.state.enforcement, key))
        while not stop.is_set():
            await asyncio.sleep(0.05)
        await database.close()
        server.should_exit = True
        await serving

    def work() -> None:
        try:
            asyncio.run(run())
        except BaseException as exc:
            failed.append(exc)

    thread = threading.Thread(target=work, name="served")
    thread.start()
    try:
        while not running:
            if failed:
                raise failed[0]
            time.sleep(0.02)
        yield running[0]
    finally:
        stop.set()
        thread.join(60)
    if failed:
        raise failed[0]


def until(holds: Callable[[], bool], within_s: float = 30.0, every_s: float = 0.05) -> None:
    """Wait for something that must come; the time is only there to end a broken run."""
    deadline_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline_s, f"still waiting after {within_s:g} s"
        time.sleep(every_s)
