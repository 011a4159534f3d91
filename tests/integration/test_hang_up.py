"""A caller who hangs up, over real HTTP: the whole service around workers whose model is a puppet."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn

from service.app import create_app
from service.fleet.local import LocalFleet
from service.installation import Installation
from service.settings import Settings
from service.watch import metrics
from tenants.access import Role, TenantId
from tenants.audit import Audit, Entry, decode
from tenants.directory import Directory
from tenants.policy import Policy
from tests.integration.conftest import Secrets
from tests.integration.fleet_conformance import until

SLEEP = {"query": "sleep 30", "documents": ["a"]}
RUNNING = {"query": "running", "documents": ["a"]}
"""Scored by how many jobs are at the worker: sigmoid(1) where there is this one only."""
ALONE = pytest.approx(0.7310585786300049)


@dataclass
class Served:
    """The service, listening, and one tenant of it."""

    host: str
    port: int
    fleet: LocalFleet
    tenant: TenantId
    key: str
    platform_key: str
    audit: Audit

    def client(self, key: str | None = None) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {key or self.key}"}
        return httpx.AsyncClient(base_url=f"http://{self.host}:{self.port}", headers=headers, timeout=30)

    async def send(self, *bodies: object) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Requests on one connection, all of them at once."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        for body in bodies:
            text = json.dumps(body)
            head = f"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self.key}\r\n"
            writer.write(f"{head}Content-Length: {len(text)}\r\n\r\n{text}".encode())
        await writer.drain()
        return reader, writer

    async def jobs(self) -> dict[str, float]:
        """What `/metrics` says of them."""
        async with self.client(self.platform_key) as client:
            told = (await client.get("/metrics")).text
        return {
            state: float(count) for state, count in re.findall(r'pericarp_jobs{state="(\w+)"} (\S+)', told)
        }

    async def entries(self, count: int) -> list[Entry]:
        """All of them, once there are so many."""
        async with asyncio.timeout(10):
            while len(recorded := await self.audit.list_entries(self.tenant)) < count:
                await asyncio.sleep(0.01)
        return [decode(each.body) for each in recorded]

    @property
    def running(self) -> int:
        return sum(state.running for state in self.fleet.workers())


@pytest.fixture
async def served(
    app_url: str, installation_secrets: Secrets, directory: Directory, audit: Audit, tmp_path: Path
) -> AsyncIterator[Served]:
    tenant = await directory.create_tenant(f"hasty-{secrets.token_hex(4)}", Policy(concurrent_requests=2))
    _, key = await directory.keys.create(tenant.id, Role.SEARCH)
    platform = await directory.create_tenant(f"platform-{secrets.token_hex(4)}")
    _, platform_key = await directory.keys.create(platform.id, Role.PLATFORM_ADMIN)
    fleet = LocalFleet(model="puppet", worker="tests.integration.fake_worker", jobs_at_once=1)
    settings = Settings(home=tmp_path, port=0, screeners=1)
    app = create_app(settings, Installation(app_url, None, *installation_secrets.keys), fleet=fleet)
    server = uvicorn.Server(uvicorn.Config(app, port=0, http="httptools", ws="none", log_config=None))
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started or serving.done(), 30)
    host, port = server.servers[0].sockets[0].getsockname()
    yield Served(host, port, fleet, tenant.id, key, platform_key, audit)
    server.should_exit = True
    await serving


def hang_ups() -> float:
    labels = {"operation": "/v1/rerank", "status": "499"}
    return metrics.REGISTRY.get_sample_value("pericarp_requests_total", labels) or 0.0


def watchers() -> int:
    names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
    return names.count("Exchange._watch")


async def test_who_hangs_up_leaves_nothing_running_waiting_or_held(served: Served) -> None:
    """Two at most may be under way for this tenant, and one at a time at its worker."""
    counted = hang_ups()
    async with served.client() as client:
        assert (await client.post("/v1/rerank", json=RUNNING)).status_code == 200
        writers = [(await served.send(SLEEP))[1] for _ in range(2)]
        await until(lambda: served.running == 1 and served.fleet.waiting == 1)
        assert await served.jobs() == {"running": 1, "waiting": 1}
        assert watchers() == 2
        for writer in writers:
            writer.close()
        await until(lambda: served.running == 0 and served.fleet.waiting == 0)
        assert await served.jobs() == {"running": 0, "waiting": 0}
        gone = [entry for entry in await served.entries(3) if entry.status == 499]
        assert [entry.code for entry in gone] == ["client_closed"] * 2
        answers = await asyncio.gather(*(client.post("/v1/rerank", json=RUNNING) for _ in range(2)))
        for answer in answers:
            assert answer.status_code == 200, "both slots are free"
            assert answer.json()["results"][0]["relevance_score"] == ALONE, "nothing sleeps at the worker"
    await until(lambda: hang_ups() == counted + 2)
    assert watchers() == 0


async def test_requests_one_after_the_other_and_all_at_once_on_one_connection_are_answered(
    served: Served,
) -> None:
    counted = hang_ups()
    reader, writer = await served.send(RUNNING, {**RUNNING, "query": "sleep 0.2"}, RUNNING)
    for _ in range(3):
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        (length,) = (line.split()[1] for line in head.lower().split(b"\r\n") if b"content-length" in line)
        await reader.readexactly(int(length))
    writer.close()
    async with served.client() as client:
        for _ in range(3):
            assert (await client.post("/v1/rerank", json=RUNNING)).status_code == 200
    assert {entry.status for entry in await served.entries(6)} == {200}
    assert watchers() == 0
    assert hang_ups() == counted
