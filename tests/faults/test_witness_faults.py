"""A service and its witness, two processes: cosigned within seconds, and what only the witness can tell when the service is
given an older database, or the witness goes away."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tenants.checkpoint import Proof, VerifyKey, open_checkpoint
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
from tests.faults.test_admission_faults import launch, post
from tests.integration.witness_process import WitnessProcess, witnessing

pytestmark = pytest.mark.timeout(600)


@dataclass
class Pair:
    """An installation and where its witness keeps what it knows; each may be started again."""

    home: Path
    folder: Path
    witness: WitnessProcess
    key: str
    """The log's."""

    def start(self) -> Service:
        return await_ready(launch(self.home, PERICARP_WITNESSES=self.witness.address))


@pytest.fixture
def pair() -> Iterator[Pair]:
    with new_home() as home, witnessing(home.parent / "witness") as witness:
        key = command(home, "audit", "key").stdout.strip()
        witness.add_log(key)
        yield Pair(home, home.parent / "witness", witness, key)


def readiness(service: Service) -> tuple[int, dict[str, Any]]:
    with service.client("") as client:
        answer = client.get("/readyz")
    return answer.status_code, answer.json()


def standing(service: Service) -> str:
    status, told = readiness(service)
    assert status == 200, "a witness makes nobody wait"
    (found,) = told["witnesses"].values()
    return str(found)


def ask(service: Service, tenant: Tenant, count: int = 1) -> str:
    """The last receipt's id."""
    with service.client(tenant.key) as client:
        for _ in range(count):
            answer = post(client, tenant.key)
            assert answer.status_code == 200
    return answer.headers["Pericarp-Receipt"]


def receipt_of(service: Service, tenant: Tenant, receipt: str) -> str | None:
    with service.client(tenant.key) as client:
        answer = client.get(f"/v1/receipts/{receipt}")
    return answer.text if answer.status_code == 200 else None


def cosigned(text: str | None, witness: str) -> bool:
    """Whether the receipt's checkpoint has the witness's signature."""
    return text is not None and VerifyKey.parse(witness).name in Proof.parse(text).note


def metrics(service: Service, key: str) -> dict[str, float]:
    with service.client(key) as client:
        lines = client.get("/metrics").text.splitlines()
    return {
        name: float(value)
        for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    }


def failures(service: Service, key: str, reason: str) -> float:
    return metrics(service, key).get(f'pericarp_log_cosigning_failures_total{{reason="{reason}"}}', 0.0)


def verify(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", REPOSITORY / "tools" / "verify.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def export(home: Path, name: str, *options: str) -> Path:
    file = home.parent / name
    made = command(home, "audit", "export", str(file), *options)
    assert made.returncode == 0, made.stderr
    return file


@pytest.mark.campaign
def test_an_answer_is_cosigned_within_seconds_and_proven_by_both_keys(pair: Pair, tmp_path: Path) -> None:
    service = pair.start()
    try:
        tenant = service.make_tenant("seen")
        receipt = ask(service, tenant, 3)
        witness = pair.witness.key
        until(lambda: cosigned(receipt_of(service, tenant, receipt), witness), 20)
        assert standing(service) == "ok"
        file = tmp_path / "answer.tlog-proof"
        file.write_text(receipt_of(service, tenant, receipt) or "", encoding="utf-8")
        both = ("--key", pair.key, "--witness", witness)
        assert verify("receipt", file, *both).returncode == 0
        with witnessing(tmp_path / "other") as other:  # one that nobody has asked
            refused = verify("receipt", file, *both, "--witness", other.key)
            assert refused.returncode == 1 and "1 of 2 witnesses have cosigned it, not 2" in refused.stderr
            assert verify("receipt", file, *both, "--witness", other.key, "--threshold", "1").returncode == 0
            assert verify("receipt", file, "--key", pair.key, "--witness", other.key).returncode == 1
        for threshold in ("0", "2"):
            assert verify("receipt", file, *both, "--threshold", threshold).returncode == 2
        changed = file.read_text(encoding="utf-8")
        at = changed.rindex(" ") + 20
        file.write_text(
            changed[:at] + ("A" if changed[at] != "A" else "B") + changed[at + 1 :], encoding="utf-8"
        )
        assert verify("receipt", file, *both).returncode == 1
        auditor = service.make_key(tenant.name, "auditor")["key"]
        with service.client(auditor) as client:
            note = client.get("/audit/v1/checkpoint").text
        keys = [VerifyKey.parse(pair.key), VerifyKey.parse(witness)]
        opened = open_checkpoint(note, keys, origin=keys[0].name)
        assert opened.signers == tuple(keys)
        platform = service.make_key(tenant.name, "platform_admin")["key"]
        size = f'pericarp_log_cosigned_size{{witness="{keys[1].name}"}}'
        assert metrics(service, platform)[size] >= opened.checkpoint.size
        done = verify("export", export(pair.home, "log.jsonl", "--cosigned"), *both)
        assert done.returncode == 0, done.stderr
    finally:
        put_down(service)


@pytest.mark.campaign
def test_a_witness_that_is_away_keeps_nobody_waiting_and_goes_on_where_it_was(pair: Pair) -> None:
    service = pair.start()
    try:
        tenant = service.make_tenant("patient")
        platform = service.make_key(tenant.name, "platform_admin")["key"]
        receipt = ask(service, tenant)
        until(lambda: cosigned(receipt_of(service, tenant, receipt), pair.witness.key), 20)
        port, held = pair.witness.port, pair.witness.held
        pair.witness.kill()
        assert pair.witness.held == held
        later = ask(service, tenant)
        until(lambda: receipt_of(service, tenant, later) is not None, 10)
        until(lambda: standing(service) == "away", 20)
        assert not cosigned(receipt_of(service, tenant, later), pair.witness.key)
        assert failures(service, platform, "away") >= 1
        assert '"action": "cosigning_failed"' in service.stderr
        with witnessing(pair.folder, port) as back:
            assert back.key == pair.witness.key
            until(lambda: cosigned(receipt_of(service, tenant, later), back.key), 20)
            until(lambda: standing(service) == "ok", 20)
            assert min(back.held.values()) > max(held.values())
        assert "critical" not in service.stderr
    finally:
        put_down(service)


@pytest.mark.campaign
def test_an_older_database_is_told_by_its_witness_and_proven_by_what_that_kept(
    pair: Pair, tmp_path: Path
) -> None:
    """The whole cluster is put back, as whoever has the host could do it; nothing in it contradicts itself."""
    service = pair.start()
    try:
        tenant = service.make_tenant("rolled")
        platform = service.make_key(tenant.name, "platform_admin")["key"]
        receipt = ask(service, tenant, 2)
        until(lambda: cosigned(receipt_of(service, tenant, receipt), pair.witness.key), 20)
    finally:
        put_down(service)
    location = json.loads((pair.home / "postgres" / "location").read_text())
    cluster = Path(location["cluster"]) / "data"
    older = tmp_path / "older"
    subprocess.run(["cp", "-a", cluster, older], check=True)
    service = pair.start()
    try:
        receipt = ask(service, tenant, 5)
        until(lambda: cosigned(receipt_of(service, tenant, receipt), pair.witness.key), 20)
    finally:
        put_down(service)
    (held,) = pair.witness.held.values()
    shutil.rmtree(cluster)
    subprocess.run(["cp", "-a", older, cluster], check=True)

    service = pair.start()
    try:
        until(lambda: standing(service) == "inconsistent", 20)  # before anything is asked
        accused = [json.loads(line) for line in service.stderr.splitlines() if '"cosigning_refused"' in line]
        assert accused[0]["level"] == "critical"
        assert f"cosigned a tree of {held} leaves" in accused[0]["reason"]
        assert failures(service, platform, "inconsistent") >= 1
        assert receipt_of(service, tenant, receipt) is None
        # It grows past what the witness has seen, and is another tree.
        newer = ask(service, tenant, held + 2)
        until(lambda: receipt_of(service, tenant, newer) is not None, 20)
        until(lambda: bool(pair.witness.evidence), 30)
        assert not cosigned(receipt_of(service, tenant, newer), pair.witness.key)
        assert pair.witness.held == {VerifyKey.parse(pair.key).name: held}
        assert any(line["action"] == "witness_contradicted" for line in pair.witness.lines)
        assert standing(service) == "inconsistent"
    finally:
        put_down(service)
    # Whole in itself, and signed by the log's own key; what the witness kept outlives the database that had it.
    file = export(pair.home, "forked.jsonl")
    assert verify("export", file, "--key", pair.key).returncode == 0
    assert verify("export", file, "--key", pair.key, "--witness", pair.witness.key).returncode == 1
    (kept,) = (pair.folder / "checkpoints").iterdir()
    done = verify("export", file, "--key", pair.key, "--checkpoint", kept)
    assert done.returncode == 1
    assert f"an entry below index {held} is not what it was at your checkpoint" in done.stderr
