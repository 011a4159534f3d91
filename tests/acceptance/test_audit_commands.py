"""`audit query` beside a running service: what was decided is found, shown, and written to files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from tenants.audit import decode
from tests.acceptance.service_process import Service, Tenant


def test_entries_are_found_by_what_was_sent_and_asking_is_told(
    service: Service, acme: Tenant, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_text("words of the auditor\n")
    answer = service.rerank({"query": "words of the auditor", "documents": ["a"]}, acme.key)
    receipt = answer.headers["Pericarp-Receipt"]
    (found,) = service.tell("audit", "query", acme.name, "--text", str(text))
    assert (found["id"], found["body"]["operation"]) == (receipt, "rerank")
    assert service.tell("audit", "query", acme.name, "--text", str(text), "--decision", "denied") == []
    told = service.tell("audit", "query", acme.name, "--operation", "audit.query", "--limit", "2")
    assert [each["body"]["role"] for each in told] == ["operator", "operator"]
    assert told[0]["body"]["details"]["filters"]["decision"] == "denied"
    assert told[1]["body"]["details"]["filters"]["input"] == "text"
    everyone = service.tell(
        "audit", "query", "--operation", "rerank", "--request", found["body"]["request_id"]
    )
    assert [each["id"] for each in everyone] == [receipt]
    shown = service.run("audit", "query", acme.name, "--operation", "rerank")
    assert shown.returncode == 0 and receipt in shown.stdout


def test_entries_are_written_to_new_files_alone(service: Service, acme: Tenant, tmp_path: Path) -> None:
    service.rerank({"query": "q", "documents": ["a"]}, acme.key)
    lines, table, events = (tmp_path / name for name in ("a.jsonl", "a.csv", "a.ocsf"))
    wanted = ("audit", "query", acme.name, "--operation", "rerank")
    wrote = service.tell(*wanted, "--file", str(lines))
    written = lines.read_bytes().splitlines()
    assert wrote == {"file": str(lines), "format": "jsonl", "entries": len(written)}
    assert len(written) > 0
    for line in written:
        assert decode(line[line.index(b'"body":') + 7 : -1]).operation == "rerank"
    service.tell(*wanted, "--file", str(table), "--format", "csv")
    with table.open(newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == [json.loads(line)["id"] for line in written]
    service.tell(*wanted, "--file", str(events), "--format", "ocsf")
    assert {json.loads(line)["class_uid"] for line in events.read_bytes().splitlines()} == {6003}
    again = service.run(*wanted, "--file", str(lines))
    assert again.returncode == 2 and "already" in again.stderr
    assert lines.read_bytes().splitlines() == written


def test_a_wrong_filter_is_named(service: Service, acme: Tenant) -> None:
    for options, word in (
        (("--from", "yesterday"), "from"),
        (("--from", "2026-02-02T00:00:00Z", "--to", "2026-02-01T00:00:00Z"), "to"),
        (("--risk-above", "2"), "risk_above"),
        (("--fingerprint", "short"), "fingerprint"),
        (("--text", "/missing"), "missing"),
    ):
        wrong = service.run("audit", "query", acme.name, *options)
        assert (wrong.returncode, wrong.stdout) == (2, "") and word in wrong.stderr, options
    unknown = service.run("audit", "query", "no-such-tenant")
    assert unknown.returncode == 1 and unknown.stderr.startswith("TenantNotFound: ")
