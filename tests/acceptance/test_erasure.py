"""`audit erase` beside a running service, as whoever answers a person's request types it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.service_process import REPOSITORY, Service, Tenant, until

ASK = {"query": "red fruit", "documents": ["strawberry"]}
REASON = ("--reason", "request 17 of 2026")


def ask(service: Service, key: str, end_user: str) -> str:
    """The receipt of an answer."""
    with service.client(key, **{"Pericarp-End-User": end_user}) as client:
        answer = client.post("/v1/rerank", json=ASK)
    assert answer.status_code == 200, answer.text
    return answer.headers["Pericarp-Receipt"]


def printed(service: Service, tenant: str, receipt: str) -> str:
    (entry,) = (each for each in service.entries(tenant) if each["id"] == receipt)
    return str(entry["query"]["text"])


def check(service: Service, file: Path) -> str:
    """What an independent check says of all of the log, which holds."""
    made = service.run("audit", "export", str(file))
    assert made.returncode == 0, made.stderr
    key = service.run("audit", "key").stdout.strip()
    done = subprocess.run(
        [sys.executable, "-I", REPOSITORY / "tools" / "verify.py", "export", file, "--key", key],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_end_user_is_erased_and_then_all_of_the_tenant(
    service: Service, acme: Tenant, tmp_path: Path
) -> None:
    anna = [ask(service, acme.key, "anna") for _ in range(2)]
    ben = ask(service, acme.key, "ben")
    before = printed(service, acme.name, ben)
    erased = service.tell("audit", "erase", acme.name, "--subject", "anna", *REASON)
    assert erased["entries"] == 2
    operations = {each["id"]: each["operation"] for each in service.entries(acme.name)}
    assert [operations[each] for each in (*anna, ben)] == ["(pruned)", "(pruned)", "rerank"]
    assert [operations[each] for each in erased["warrants"]] == ["admin.subject_erase"]
    assert "0 pruned, 2 erased for a person" in check(service, tmp_path / "subject.jsonl")

    done = service.tell("audit", "erase", acme.name, *REASON)
    until(lambda: printed(service, acme.name, ask(service, acme.key, "ben")) != before, 30)
    assert printed(service, acme.name, ben) == before
    told = {each["id"]: each for each in service.entries(acme.name)}[done["warrants"][0]]
    assert (told["operation"], told["role"]) == ("admin.audit_erase", "operator")
    assert told["details"] == {"reason": REASON[1]}
    assert "2 erased for a person" in check(service, tmp_path / "tenant.jsonl")


@pytest.mark.parametrize("reason", [(), ("--reason", ""), ("--reason", "a\nb"), ("--reason", "x" * 201)])
def test_nothing_is_erased_without_a_reason(service: Service, acme: Tenant, reason: tuple[str, ...]) -> None:
    entries = len(service.entries(acme.name))
    done = service.run("audit", "erase", acme.name, *reason)
    assert done.returncode == 2 and "--reason" in done.stderr
    assert len(service.entries(acme.name)) == entries


def test_nobody_is_erased_of_a_tenant_that_is_not_there(service: Service) -> None:
    done = service.run("audit", "erase", "nobody-here", *REASON)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith("TenantNotFound: ")
