"""The service under signals and with what it needs missing: it ends whole, comes back by itself, and never hangs."""

from __future__ import annotations

import base64
import os
import re
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from service.fleet.starts import FAILURES_TO_REFUSE
from tenants import embedded
from tests.acceptance.service_process import (
    REPOSITORY,
    Process,
    Service,
    Tenant,
    launch,
    new_home,
    put_down,
    serving,
    until,
)
from tests.acceptance.test_access import converse
from tests.assets.images import encode, photo

ASK: object = {"query": "q", "documents": ["a", "b"]}
GONE_S = 20.0
"""How long a process may take to go on a busy machine; a few seconds elsewhere."""


def metric(service: Service, key: str, name: str) -> float:
    with service.client(key) as client:
        values = re.findall(rf"^{re.escape(name)} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return float(values[0])


def long(documents: int = 500) -> object:
    """A request that computes for a second or more."""
    return {"query": "a long one", "documents": [f"document {number}" for number in range(documents)]}


def spent(process: Process) -> int:
    """Ticks of CPU that the process has used."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].split()
    except FileNotFoundError:
        return 0
    return int(fields[11]) + int(fields[12])


def test_a_worker_killed_in_a_request_costs_nobody_an_answer(
    service: Service, acme: Tenant, demo: Tenant
) -> None:
    watcher = service.make_key(acme.name, "platform_admin")["key"]
    for tenant in (acme, demo):
        assert service.rerank(ASK, tenant.key).status_code == 200
    killed, neighbour = service.worker_of(acme), service.worker_of(demo)
    retries = metric(service, watcher, "pericarp_worker_retries_total")
    rested = spent(killed)
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(service.rerank, long(), acme.key)
        until(lambda: spent(killed) > rested + 10, 30, every_s=0.01)
        beside = pool.submit(service.rerank, long(), demo.key)
        os.kill(killed.pid, signal.SIGKILL)
        answer = asked.result()
        assert beside.result().status_code == 200
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["results"]) == 500
    assert metric(service, watcher, "pericarp_worker_retries_total") == retries + 1
    assert service.worker_of(acme).pid != killed.pid
    assert service.worker_of(demo) == neighbour
    assert service.rerank(ASK, acme.key).status_code == 200
    entries = [each for each in service.entries(acme.name) if each["request_id"] == answer.json()["id"]]
    assert [entry["decision"] for entry in entries] == ["answered"]


def test_a_caller_who_hangs_up_frees_its_slot_and_leaves_one_entry(service: Service) -> None:
    tenant = service.make_tenant("hasty")
    service.tell("tenant", "policy", tenant.name, "concurrent_requests=1")
    assert service.rerank(ASK, tenant.key).status_code == 200
    with service.client(tenant.key) as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/rerank", json=long(), timeout=httpx.Timeout(0.3, connect=10, write=10, pool=10))
    until(lambda: service.rerank(ASK, tenant.key).status_code == 200, 60)
    (given_up,) = (entry for entry in service.entries(tenant.name) if entry["document_count"] == 500)
    assert (given_up["status"], given_up["code"]) == (499, "client_closed")


def test_a_killed_screener_is_replaced(service: Service) -> None:
    screeners = [child for child in service.children() if "service.screening.child" in child.command]
    assert len(screeners) == 2
    for screener in screeners:
        os.kill(screener.pid, signal.SIGKILL)
    picture = encode(photo(50, 50), "PNG")
    body = {"query": "q", "documents": [{"image": base64.b64encode(picture).decode()}]}
    until(lambda: service.rerank(body).status_code == 200, 30)
    until(lambda: readiness(service) == 200, 30)


def test_a_killed_postgres_comes_back_and_meanwhile_every_answer_is_clear(
    service: Service, demo: Tenant
) -> None:
    answered = len(service.entries(demo.name))
    answers: list[httpx.Response] = []

    def answered_again() -> bool:
        answers.append(service.rerank(ASK))
        return answers[-1].status_code == 200

    with embedded.running(service.home) as server:
        killed = server.pid
        os.kill(killed, signal.SIGKILL)
        until(answered_again, 60)
        until(lambda: readiness(service) == 200, 30)
        assert server.pid != killed
    for answer in answers[:-1]:
        assert answer.status_code == 503
        assert answer.json()["code"] in ("database_unavailable", "log_unavailable")
        assert int(answer.headers["Retry-After"]) >= 1
    assert len(service.entries(demo.name)) >= answered + 1, "the log lost nothing that was answered"


def readiness(service: Service) -> int:
    with service.client("") as client:
        return client.get("/readyz").status_code


@pytest.mark.campaign
def test_it_recovers_from_a_kill_and_ends_whole_on_a_signal(
    record_property: Callable[[str, object], None],
) -> None:
    with new_home() as home:
        with serving(home) as first:
            assert first.rerank(ASK).status_code == 200
            made = first.make_tenant("keeper")
            assert first.rerank(ASK, made.key).status_code == 200
            family = [each for each in first.family() if each.pid != first.process.pid]
            assert {"service.fleet.worker", "service.screening.child", "postgres_guardian.py"} <= {
                part for each in family for part in PARTS if part in each.command
            }
            first.process.kill()
            first.process.wait()
            until(lambda: not living(family), GONE_S)
            assert first.orphans() == []
        said = home.parent / "said"
        with serving(home, PERICARP_LOG_FOLDER=str(said)) as second:
            record_property("first_start_s", round(first.up_s, 1))
            record_property("second_start_s", round(second.up_s, 1))
            print(f"first start {first.up_s:.1f} s, after a kill {second.up_s:.1f} s")
            assert second.key == first.key, "the line that was pasted yesterday still works"
            assert second.rerank(ASK).status_code == 200
            assert second.rerank(ASK, made.key).status_code == 200
            reranks = [each for each in second.entries("keeper") if each["operation"] == "rerank"]
            assert len(reranks) == 2, "the log survived"
            family = second.family()
            rested = {each.pid: spent(each) for each in second.workers()}
            with ThreadPoolExecutor(1) as pool:
                asked = pool.submit(second.rerank, long())
                until(
                    lambda: any(spent(each) > rested.get(each.pid, 999) + 10 for each in second.workers()), 30
                )
                assert second.end(signal.SIGTERM) == 0
                assert asked.result().status_code == 200, "an answer under way is still given"
            until(lambda: not living(family), GONE_S)
            assert second.orphans() == []
            written = "".join(path.read_text() for path in said.iterdir())
            assert '"action": "service_stop"' in written.splitlines()[-1]
            assert "Traceback" not in written and second.stderr == ""


PARTS = ("service.fleet.worker", "service.screening.child", "postgres_guardian.py")


def living(family: list[Process]) -> list[Process]:
    return [each for each in family if each.lives]


@pytest.mark.campaign
def test_without_its_model_it_says_so_refuses_at_once_and_ends_by_ctrl_c(tmp_path: Path) -> None:
    with new_home() as home:
        # The printed line waits for a worker, so the address comes from a port of our own and the key from the CLI.
        port = free_port()
        service = launch(
            home,
            PERICARP_MODEL=str(tmp_path / "no-such-model"),
            PERICARP_PORT=str(port),
            PERICARP_DEADLINE_S="10",
        )
        service.line = f"http://127.0.0.1:{port}"
        try:
            until(lambda: answers(service), 60)
            tenant = service.make_tenant("early")
            ready = httpx.get(f"{service.url}/readyz")
            assert ready.status_code == 503
            assert ready.json()["code"] == "not_ready"
            assert ready.json()["reason"] == "worker"
            assert int(ready.headers["Retry-After"]) >= 1
            assert httpx.get(f"{service.url}/healthz").status_code == 200
            # Until two starts failed a request waits for a worker, and may pass its deadline.
            until(lambda: service.stderr.count("A worker cannot be started.") >= FAILURES_TO_REFUSE, 60)
            answer = service.rerank(ASK, tenant.key)
            assert answer.status_code == 503
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert answer.json()["code"] == "overloaded"
            assert int(answer.headers["Retry-After"]) >= 1
            assert str(tmp_path) not in answer.text + ready.text
            (entry,) = (each for each in service.entries(tenant.name) if each["operation"] == "rerank")
            assert (entry["decision"], entry["status"]) == ("failed", 503)
            # What failed on our side gives its images back: else the second 20 would be over the 20 a minute.
            dog = base64.b64encode((REPOSITORY / "docs/samples/dog.webp").read_bytes()).decode()
            pictures = {"query": "a dog", "documents": [{"image": dog}] * 20}
            assert [service.rerank(pictures, tenant.key).status_code for _ in range(2)] == [503, 503]
            # It also has the shortest deadline of all these services: a body that never comes is not waited for.
            status, told = converse(service, f"Authorization: Bearer {tenant.key}", "Content-Length: 1000")
            assert (status, told["code"]) == (408, "body_too_slow")
            assert "ModelNotFound" in service.stderr
            assert service.stdout == "", "it never said that it is ready"
            family = service.family()
            assert service.end(signal.SIGINT) == 0, "Ctrl-C"
            until(lambda: not living(family), GONE_S)
            assert "Traceback" not in service.stderr
        finally:
            put_down(service)


def answers(service: Service) -> bool:
    assert service.process.poll() is None, service.stderr[-2000:]
    try:
        return httpx.get(f"{service.url}/healthz").status_code == 200
    except httpx.TransportError:
        return False


def free_port() -> int:
    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        port: int = line.getsockname()[1]
        return port
