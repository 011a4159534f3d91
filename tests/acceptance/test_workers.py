"""What `ps` and /proc show of two tenants' workers: each has its own, and none holds a secret or a way out."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.service_process import Process, Service, Tenant, until
from tests.assets.images import encode, photo

ASK = {"query": "q", "documents": ["a", "b"]}


@pytest.fixture
def two_workers(service: Service, demo: Tenant, acme: Tenant) -> tuple[Process, Process]:
    """The workers of two tenants that have both been served."""
    for tenant in (demo, acme):
        assert service.rerank(ASK, tenant.key).status_code == 200
    return service.worker_of(demo), service.worker_of(acme)


def secrets_of(service: Service) -> list[bytes]:
    """Everything that no child may hold, in every form in which it might."""
    kept = [path.read_bytes() for path in (service.home / "secrets").iterdir() if path.is_file()]
    assert len(kept) >= 4
    forms = [form for secret in kept for form in (secret.strip(), secret.hex().encode())]
    keys = [key.encode() for key in (service.key, *service.issued)]
    return [*forms, *keys, b"prc_live_", b"PERICARP_", b"postgres", b"pericarp_app"]


def test_each_tenant_has_a_worker_process_of_its_own_beside_a_spare(
    service: Service, two_workers: tuple[Process, Process]
) -> None:
    first, second = two_workers
    assert first.pid != second.pid

    def spares() -> list[Process]:
        """Those that serve nobody yet; where the service is root, only once they gave it up."""
        return [
            worker for worker in service.workers() if worker.name == "prc-worker" and gave_up_root(worker)
        ]

    until(lambda: bool(spares()), 60)
    spare = spares()[0]
    assert spare.pid not in (first.pid, second.pid)
    assert len({os.getsid(worker.pid) for worker in (first, second, spare)}) == 3
    assert os.getsid(first.pid) != os.getsid(service.process.pid), "Ctrl-C reaches the gateway alone"
    if os.geteuid() == 0:
        assert len({uid_of(worker) for worker in (first, second, spare)} - {0}) == 3


def test_a_tenant_keeps_its_worker(
    service: Service, two_workers: tuple[Process, Process], acme: Tenant
) -> None:
    for _ in range(3):
        assert service.rerank(ASK, acme.key).status_code == 200
    assert service.worker_of(acme) == two_workers[1]


def test_no_child_shows_a_secret(service: Service, two_workers: tuple[Process, Process]) -> None:
    secrets = secrets_of(service)
    until(lambda: len(service.children()) >= 5, 60)
    children = service.children()
    assert len(children) >= 5, "two workers, a spare, two screeners"
    for child in children:
        for secret in secrets:
            assert secret not in child.command.encode(), child.name
            # Who is not root may not even look.
            assert secret not in child.environment(), child.name
        if os.geteuid() == 0:
            assert b"PATH=" in child.environment(), "we did look"
    for each in service.family():  # Postgres and its guardian too
        for secret in secrets[:-4]:
            assert secret not in each.command.encode()


def test_a_worker_holds_one_socket_and_no_file_of_the_installation(
    service: Service, two_workers: tuple[Process, Process]
) -> None:
    if os.geteuid() != 0:
        with pytest.raises(PermissionError):
            list(Path(f"/proc/{two_workers[0].pid}/fd").iterdir())
        return
    listening = inodes("tcp", "tcp6", "udp", "udp6", "raw", "raw6")
    for child in service.children():
        held = {entry.name: link_of(entry) for entry in Path(f"/proc/{child.pid}/fd").iterdir()}
        sockets = {
            number: link.removeprefix("socket:[").rstrip("]")
            for number, link in held.items()
            if link.startswith("socket:")
        }
        assert len(sockets.keys() - {"2"}) == 1, (child.name, held)  # uvloop makes stderr a socket pair too
        assert not set(sockets.values()) & listening, "a network socket"
        assert not [link for link in held.values() if link.startswith(str(service.home))], child.name


def test_a_child_may_gain_nothing(service: Service, two_workers: tuple[Process, Process]) -> None:
    until(lambda: all(gave_up_root(child) for child in service.children()), 60)
    for child in service.children():
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{child.pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        assert status["NoNewPrivs"] == "1", child.name
        if os.geteuid() == 0:
            assert set(status["Uid"].split()) == {str(uid_of(child))}
            assert uid_of(child) != 0
            assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0


def test_readiness_tells_that_workers_are_locked_in_and_so_does_the_kernel(
    service: Service, two_workers: tuple[Process, Process]
) -> None:
    with service.client("") as client:
        told = client.get("/readyz").json()["workers"]["sandbox"]
    assert {"seccomp", "data", "oom_first", "landlock_files"} <= told.keys()
    for worker in two_workers:
        for thread in Path(f"/proc/{worker.pid}/task").iterdir():
            assert ("\nSeccomp:\t2\n" in (thread / "status").read_text()) is told["seccomp"]


def test_health_tells_whether_the_service_is_ready(service: Service) -> None:
    port = service.url.rpartition(":")[2]
    command = [sys.executable, "-m", "service", "health"]
    for asked, status, said in ((port, 0, "ready"), ("1", 1, "Nobody answers on port 1")):
        environ = {**os.environ, "PERICARP_PORT": asked}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == status
        assert said in done.stdout + done.stderr


def test_the_metrics_count_the_workers(service: Service, two_workers: tuple[Process, Process]) -> None:
    key = service.make_key("acme", "platform_admin")["key"]
    with service.client(key) as client:
        metrics = client.get("/metrics").text
    counted = {
        line.split()[0]: float(line.split()[1]) for line in metrics.splitlines() if not line.startswith("#")
    }
    assert counted['pericarp_workers{state="assigned"}'] >= 2
    assert counted['pericarp_requests_total{operation="/v1/rerank",status="200"}'] >= 2
    assert counted["pericarp_packs_total"] >= 2
    assert 0 < counted["pericarp_packed_tokens_total"] <= counted["pericarp_pack_room_tokens_total"]
    assert counted["pericarp_computed_tokens_total"] > 0
    for stranger in ("acme", json.dumps("demo"), service.key):
        assert stranger not in metrics.replace("pericarp-demo", "")


def gave_up_root(process: Process) -> bool:
    return os.geteuid() != 0 or uid_of(process) != 0


def uid_of(process: Process) -> int:
    """The effective user; who is not dumpable belongs to root in /proc."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("Uid:"):
            return int(line.split()[2])
    raise AssertionError("no Uid")


def link_of(entry: Path) -> str:
    try:
        return str(entry.readlink())
    except FileNotFoundError:
        return ""


def inodes(*tables: str) -> set[str]:
    """The inodes of every network socket of this host."""
    lines = (line for table in tables for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:])
    return {line.split()[9] for line in lines}


PICTURES = [{"image": base64.b64encode(encode(photo(96, 64, seed=seed), "PNG")).decode()} for seed in (7, 8)]


def keep_warm_twice(service: Service, tenant: Tenant) -> tuple[int, int, int]:
    """Open a session, ask twice, close it: images found at hand, then tokens computed, first and second time."""
    body = {"query": "a striped thing", "documents": PICTURES}
    with service.client(tenant.key) as client:
        session = client.post("/v1/sessions", json={}).json()["id"]
        first, second = (
            client.post("/v1/rerank", json={**body, "session_id": session}).json()["meta"]["session"]
            for _ in range(2)
        )
        assert client.delete(f"/v1/sessions/{session}").status_code == 204
    return first["reused_images"], first["computed_tokens"], second["computed_tokens"]


@pytest.mark.campaign
def test_each_tier_is_what_it_says_it_is_and_sessions_work_in_it(service: Service, acme: Tenant) -> None:
    """A pool of two, a stranger in another pool, and one with weights of its own."""
    tiers = {
        "first-of-pool": ("isolation=pooled", "group=cheap"),
        "second-of-pool": ("isolation=pooled", "group=cheap"),
        "other-pool": ("isolation=pooled", "group=elsewhere"),
        "by-itself": ("isolation=dedicated",),
    }
    tenants = {name: service.make_tenant(name) for name in tiers}
    for name, changes in tiers.items():
        service.tell("tenant", "policy", name, *changes)
    for tenant in tenants.values():
        reused, computed, computed_again = keep_warm_twice(service, tenant)
        assert reused == 0, "also the second of the pool finds nothing of the first's"
        assert computed > 0 and computed_again == 0
    names = [worker.name for worker in service.workers()]
    assert names.count("prc-g-cheap") == 1
    assert names.count("prc-g-elsewher") == 1, "eight characters of its name"
    assert not {tenants[name].worker_name for name in ("first-of-pool", "second-of-pool")} & set(names)
    own = service.worker_of(tenants["by-itself"])
    assert "--own-weights" in own.command and "--shared" not in own.command
    if os.geteuid() == 0:
        assert service.rerank(ASK, acme.key).status_code == 200
        shares = {worker.pid: "/memfd:weights" in maps_of(worker) for worker in service.workers()}
        assert not shares.pop(own.pid)
        assert ".safetensors" not in maps_of(own)
        assert shares[service.worker_of(acme).pid]


def test_a_tier_without_its_group_is_refused_with_the_reason(service: Service, acme: Tenant) -> None:
    for change, reason in (
        ("isolation=pooled", "group: a pooled tenant needs a group"),
        ("group=cheap", "group: must be null where isolation is isolated"),
    ):
        done = service.run("tenant", "policy", acme.name, change)
        assert done.returncode == 1
        assert reason in done.stderr
    assert service.tell("tenant", "policy", acme.name)["isolation"] == "isolated"


def maps_of(process: Process) -> str:
    return Path(f"/proc/{process.pid}/maps").read_text()
