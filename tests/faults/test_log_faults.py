"""The log over two gateways on one database: under load, killed again and again, and checked by a program of its own.

The gateways are real processes with real workers; what the workers do is a puppet's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from base64 import b64decode
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from uuid import UUID

import httpx
import pytest

from tests.acceptance.service_process import (
    REPOSITORY,
    Service,
    Tenant,
    await_ready,
    command,
    new_home,
    put_down,
    until,
)
from tests.faults.test_admission_faults import GENEROUS, launch, post

pytestmark = pytest.mark.timeout(600)

CLIENTS = 6


@pytest.fixture
def gateways() -> Iterator[list[Service]]:
    """Two on one installation; whoever kills one puts another in its place."""
    with new_home() as home:
        running = [launch(home) for _ in range(2)]
        try:
            for service in running:
                await_ready(service)
            yield running
        finally:
            for service in running:
                service.process.terminate()
            for service in running:
                put_down(service)


class Load:
    """Callers who never stop asking, at whatever gateways there are, until they are told to."""

    def __init__(self, gateways: list[Service], tenant: Tenant) -> None:
        self.receipts: list[str] = []
        self._gateways = gateways
        self._tenant = tenant
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def goes_on(self, more: int) -> None:
        """Returns once so many more answers have come."""
        wanted = len(self.receipts) + more
        until(lambda: len(self.receipts) >= wanted, 120)

    def _ask(self, number: int) -> None:
        while not self._over.is_set():
            # A gateway that is gone refuses connections, or breaks them off: then it is asked anew.
            with (
                suppress(httpx.TransportError),
                self._gateways[number % 2].client(self._tenant.key) as client,
            ):
                while not self._over.is_set():
                    answer = post(client, self._tenant.key)
                    if answer.status_code == 200:
                        self.receipts.append(answer.headers["Pericarp-Receipt"])


def checked_export(home: Path, *more: str) -> dict[str, int]:
    """Every entry's id and its index, by an export that `verify.py` finds whole."""
    file = home.parent / "log.jsonl"
    file.unlink(missing_ok=True)
    made = command(home, "audit", "export", str(file))
    assert made.returncode == 0, made.stderr
    key = command(home, "audit", "key").stdout.strip()
    done = subprocess.run(
        [sys.executable, "-I", REPOSITORY / "tools" / "verify.py", "export", file, "--key", key, *more],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = {}
    for line in file.read_bytes().splitlines():
        told = json.loads(line)
        if "envelope" in told:
            entry_id = str(UUID(bytes=b64decode(told["envelope"])[48:64]))
            assert found.setdefault(entry_id, told["index"]) == told["index"], "an entry is in the tree once"
    return found


@pytest.mark.campaign
def test_gateways_that_are_killed_again_and_again_lose_and_double_no_entry(
    gateways: list[Service], tmp_path: Path
) -> None:
    home = gateways[0].home
    tenant = gateways[0].make_tenant("killed")
    gateways[0].tell("tenant", "policy", tenant.name, *GENEROUS)
    auditor = gateways[0].make_key(tenant.name, "auditor")["key"]
    kept: list[str] = []
    with Load(gateways, tenant) as load:
        for turn in range(4):
            load.goes_on(40 + 17 * turn)
            with gateways[1 - turn % 2].client(auditor) as client:
                note = client.get("/audit/v1/checkpoint").text
            (tmp_path / f"{turn}.note").write_text(note)
            kept += ["--checkpoint", str(tmp_path / f"{turn}.note")]
            doomed = gateways[turn % 2]
            doomed.process.kill()
            doomed.process.wait()
            load.goes_on(20)
            gateways[turn % 2] = await_ready(launch(home))
    assert len(load.receipts) == len(set(load.receipts))

    def all_in_the_tree() -> bool:
        with gateways[0].client(tenant.key) as client:
            return client.get(f"/v1/receipts/{load.receipts[-1]}").status_code == 200

    until(all_in_the_tree, 30)
    found = checked_export(home, *kept)
    assert set(load.receipts) <= set(found), "no answer without its leaf"
    # What has no answer has an entry all the same: of requests that were broken off, and of what administrators did.
    assert len(found) >= len(load.receipts)
    for service in gateways:
        with service.client("") as client:
            assert client.get("/readyz").json()["checks"]["log"] is True


def test_a_gateway_with_another_log_key_says_so_and_signs_nothing(gateways: list[Service]) -> None:
    home = gateways[0].home
    tenant = gateways[0].make_tenant("keyed")
    with gateways[0].client(tenant.key) as client:
        receipt = post(client, tenant.key).headers["Pericarp-Receipt"]
        until(lambda: client.get(f"/v1/receipts/{receipt}").status_code == 200, 30)
    kept = (home / "secrets" / "log-key").read_bytes()
    (home / "secrets" / "log-key").write_bytes(bytes(32))
    stranger = await_ready(launch(home))
    try:
        with stranger.client("") as client:
            until(lambda: client.get("/readyz").status_code == 503, 30)
            assert client.get("/readyz").json()["reason"] == "log"
        assert '"action": "log_broken"' in stranger.stderr and "not signed by" in stranger.stderr
        with stranger.client(tenant.key) as client:
            answer = post(client, tenant.key)  # answered, recorded, and proven by the others
            assert answer.status_code == 200
            assert client.get(f"/v1/receipts/{receipt}").json()["code"] == "log_broken"
    finally:
        stranger.end()
        (home / "secrets" / "log-key").write_bytes(kept)
    with gateways[0].client(tenant.key) as client:
        receipt = answer.headers["Pericarp-Receipt"]
        until(lambda: client.get(f"/v1/receipts/{receipt}").status_code == 200, 30)
    assert receipt in checked_export(home)
