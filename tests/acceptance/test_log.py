"""The log as an operator and an auditor check it: by commands and by `tools/verify.py`, with a service and without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.acceptance.service_process import REPOSITORY, Service, Tenant, command, new_home, until

ASK = {"query": "red fruit", "documents": ["a blue car", "strawberry"]}


def verify(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", REPOSITORY / "tools" / "verify.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_callers_receipt_and_the_operators_export_agree(
    service: Service, acme: Tenant, tmp_path: Path
) -> None:
    receipt = service.rerank(ASK, acme.key).headers["Pericarp-Receipt"]
    answers = []

    def proven() -> bool:
        with service.client(acme.key) as client:
            answers.append(client.get(f"/v1/receipts/{receipt}"))
        return answers[-1].status_code == 200

    until(proven, 30)
    (tmp_path / "receipt").write_bytes(answers[-1].content)
    key = service.tell("audit", "key")["key"]
    done = verify("receipt", tmp_path / "receipt", "--key", key, "--id", receipt)
    assert done.returncode == 0, done.stderr
    exported = service.run("audit", "export", str(tmp_path / "log.jsonl"), "--tenant", acme.name)
    assert exported.returncode == 0, exported.stderr
    note = answers[-1].text.partition("\n\n")[2]  # a receipt's end is a checkpoint, and worth keeping
    (tmp_path / "note").write_text(note)
    done = verify("export", tmp_path / "log.jsonl", "--key", key, "--checkpoint", tmp_path / "note")
    assert done.returncode == 0, done.stderr
    bodies = [json.loads(line).get("body", {}) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert answers[-1].status_code == 200 and {body.get("tenant") for body in bodies} == {None, acme.id}
    assert "red fruit" not in (tmp_path / "log.jsonl").read_text()


def test_the_log_is_exported_where_no_service_runs(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    with new_home() as home:
        early = command(home, "audit", "export", str(file))
        assert early.returncode == 1 and "nothing is in the log's tree yet" in early.stderr
        assert not file.exists()
        assert command(home, "tenant", "create", "solo").returncode == 0
        assert command(home, "audit", "export", str(file)).returncode == 0
        key = command(home, "audit", "key").stdout.strip()
        again = command(home, "audit", "export", str(file))
        assert again.returncode == 2 and "FILE is there already" in again.stderr
        whole = command(home, "audit", "export", "-", "--no-bodies")
        nobody = command(home, "audit", "export", str(tmp_path / "none"), "--tenant", "nobody")
        assert nobody.returncode == 1 and "TenantNotFound" in nobody.stderr
        assert not (tmp_path / "none").exists()
    for exported in (file.read_text(), whole.stdout):
        (tmp_path / "exported").write_text(exported)
        done = verify("export", tmp_path / "exported", "--key", key)
        assert done.returncode == 0, done.stderr
        assert "1 entries" in done.stdout
