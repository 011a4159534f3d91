"""Limits over four gateways on one database: exact under load, when a gateway is killed, when the database restarts.

The gateways are real processes with real workers; what the workers do is a puppet's.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tenants import embedded
from tests.acceptance.service_process import (
    REPOSITORY,
    Service,
    Tenant,
    await_ready,
    environment,
    new_home,
    put_down,
    until,
)

pytestmark = pytest.mark.timeout(600)

GATEWAYS, CLIENTS = 4, 64
GENEROUS = ("requests_per_minute=1000000", "concurrent_requests=1000", "tokens_per_minute=60000000")


def launch(home: Path, **settings: str) -> Service:
    folder = Path(tempfile.mkdtemp(prefix="start-", dir=home.parent))
    with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "bench.echo"),
                *("--worker", "tests.integration.fake_worker", "--model", "puppet"),
            ],
            cwd=REPOSITORY,
            env=environment(home, PERICARP_SCREENERS="1", PERICARP_DEADLINE_S="100", **settings),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )
    return Service(home, process, folder, {}, time.monotonic())


@dataclass
class Gateways:
    """Gateways on one installation. A killed one is started again by whoever killed it."""

    home: Path
    running: list[Service]

    @property
    def first(self) -> Service:
        return self.running[0]

    def make_tenant(self, name: str, *limits: str) -> Tenant:
        tenant = self.first.make_tenant(name)
        self.first.tell("tenant", "policy", name, *GENEROUS, *limits)
        return tenant


@pytest.fixture(scope="module")
def gateways() -> Iterator[Gateways]:
    with new_home() as home:
        started = Gateways(home, [launch(home) for _ in range(GATEWAYS)])
        try:
            for service in started.running:
                await_ready(service)
            yield started
        finally:
            for service in started.running:  # all of them first: Postgres goes with the last
                service.process.terminate()
            for service in started.running:
                put_down(service)


def post(client: httpx.Client, key: str, query: str = "q") -> httpx.Response:
    return client.post(
        "/v1/rerank",
        json={"query": query, "documents": ["a", "bc"]},
        headers={"Authorization": f"Bearer {key}"},
    )


def storm(
    gateways: Gateways, key: str, until_refused: Callable[[httpx.Response], bool]
) -> list[httpx.Response]:
    """64 clients at once, spread over the gateways; each goes on until an answer tells it to stop."""

    def client(number: int) -> list[httpx.Response]:
        with httpx.Client(base_url=gateways.running[number % GATEWAYS].url, timeout=120) as connection:
            answers = []
            while True:
                answers.append(post(connection, key))
                if until_refused(answers[-1]):
                    return answers

    with ThreadPoolExecutor(CLIENTS) as pool:
        return [answer for answers in pool.map(client, range(CLIENTS)) for answer in answers]


def is_refusal(answer: httpx.Response) -> bool:
    return answer.status_code == 429


@pytest.mark.parametrize(
    ("limits", "violated"),
    [
        (("requests_per_month=200",), "requests_month"),
        (("requests_per_minute=1", "request_burst=200"), "requests"),
    ],
)
def test_four_gateways_under_64_clients_admit_exactly_the_limit(
    gateways: Gateways, limits: tuple[str, ...], violated: str
) -> None:
    tenant = gateways.make_tenant(f"exact-{violated.replace('_', '-')}", *limits)
    began_s = time.monotonic()
    everything = storm(gateways, tenant.key, is_refusal)
    minutes = (time.monotonic() - began_s) / 60
    busy = {answer.json()["code"] for answer in everything if answer.status_code == 503}
    assert busy <= {"overloaded", "database_unavailable"}, "a slow machine may say so, and it costs nothing"
    answers = [answer for answer in everything if answer.status_code != 503]
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429}
    come_back = int(minutes) if violated == "requests" else 0  # one a minute, on however slow a machine
    assert 200 <= statuses[200] <= 200 + come_back
    for answer in answers:
        assert "RateLimit" in answer.headers and "RateLimit-Policy" in answer.headers
        if answer.status_code == 429:
            assert answer.json()["violated-policies"] == [violated]
            assert int(answer.headers["Retry-After"]) >= 1
    with gateways.first.client(tenant.key) as client:
        today = client.get("/v1/usage").json()["today"]
    assert today["requests"] == statuses[200]
    assert today["refused"] == statuses[429]
    assert today["tokens"] == statuses[200], "a puppet reads one token"


@pytest.mark.campaign
def test_a_gateway_killed_with_every_slot_frees_them_all_within_its_lease(
    gateways: Gateways, record_property: Callable[[str, object], None]
) -> None:
    tenant = gateways.make_tenant("killed", "concurrent_requests=8")
    doomed, other = gateways.running[3], gateways.running[1]

    def hang() -> None:
        with doomed.client(tenant.key) as client, suppress(httpx.TransportError):
            post(client, tenant.key, "sleep 90")

    with ThreadPoolExecutor(8) as pool:
        lost = [pool.submit(hang) for _ in range(8)]
        until(lambda: slots_left(other, tenant) == 0, 60)
        refused = ask(other, tenant)
        assert (refused.status_code, refused.json()["violated-policies"]) == (429, ["concurrency"])
        doomed.process.kill()
        killed_s = time.monotonic()
        doomed.process.wait()
        until(lambda: slots_left(other, tenant) == 8, 60)
        record_property("freed_after_s", round(time.monotonic() - killed_s, 1))
        print(f"free {time.monotonic() - killed_s:.1f} s after the kill")
        for one in lost:
            one.result()
    with ThreadPoolExecutor(8) as pool:  # all of them, not one: each waits until eight are there
        met = list(pool.map(lambda _: ask(other, tenant, "meet 8").status_code, range(8)))
    assert met == [200] * 8
    until(lambda: orphans(other, tenant) == 8, 60)
    gateways.running[3] = await_ready(launch(gateways.home))


def ask(service: Service, tenant: Tenant, query: str = "q") -> httpx.Response:
    with service.client(tenant.key) as client:
        return post(client, tenant.key, query)


def slots_left(service: Service, tenant: Tenant) -> int:
    """How many more may run at once; asking is free."""
    with service.client(tenant.key) as client:
        limits = client.get("/v1/usage").json()["limits"]
    (left,) = (limit["remaining"] for limit in limits if limit["name"] == "concurrency")
    return int(left)


def orphans(service: Service, tenant: Tenant) -> int:
    return sum(entry["decision"] == "orphaned" for entry in service.entries(tenant.name))


@pytest.mark.campaign
def test_a_database_that_restarts_under_load_lets_nobody_in_unasked_and_comes_back(
    gateways: Gateways,
) -> None:
    tenant = gateways.make_tenant("restarted", "requests_per_month=600")
    numbers = itertools.count(1)

    with embedded.running(gateways.home) as server:
        before = server.pid

        def stop(answer: httpx.Response) -> bool:
            if next(numbers) == 150:
                os.kill(before, signal.SIGINT)  # a fast shutdown, from which the guardian starts it again
            if answer.status_code == 503:
                time.sleep(0.2)
            return is_refusal(answer)

        answers = storm(gateways, tenant.key, stop)
        assert server.pid != before
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429, 503}
    for answer in answers:
        if answer.status_code == 503:
            assert answer.json()["code"] in ("database_unavailable", "log_unavailable")
            assert int(answer.headers["Retry-After"]) >= 1
        if answer.status_code == 429:
            assert answer.json()["violated-policies"] == ["requests_month"]
    # What was charged and then could not be answered is charged; nothing is let in beyond it.
    assert 600 - statuses[503] <= statuses[200] <= 600
    answered = [entry for entry in gateways.first.entries(tenant.name) if entry["decision"] == "answered"]
    assert len(answered) >= statuses[200], "no answer without its entry"
    for service in gateways.running:
        assert service.process.poll() is None, "nobody had to start a gateway again"
        with service.client("") as client:
            assert client.get("/readyz").status_code == 200
