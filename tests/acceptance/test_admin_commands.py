"""The administrators' verbs on the command line, beside a running service that takes part in them."""

from __future__ import annotations

import json
import threading

import httpx
import pytest

from tests.acceptance.service_process import Service, Tenant, until

ASK = {"query": "q", "documents": ["a", "b"]}
LONG = {"query": "red fruit", "documents": [f"document {number} " * 40 for number in range(400)]}


def test_a_tenant_lives_from_create_to_purge(service: Service) -> None:
    made = service.tell("tenant", "create", "cli-life", "sessions=7", "kind=research")
    assert (made["name"], made["state"]) == ("cli-life", "active")
    key = service.make_key("cli-life")
    policy = service.tell("tenant", "policy", "cli-life", "text_length=50", "sessions=null")
    assert (policy["text_length"], policy["sessions"], policy["kind"]) == (50, 100, "research")
    history = service.tell("tenant", "history", "cli-life")
    assert [(each["version"], each["set_by"]) for each in history] == [(2, "operator"), (1, "operator")]
    stale = service.run("tenant", "policy", "cli-life", "text_length=60", "--expected", "1")
    assert (stale.returncode, stale.stdout) == (1, "") and stale.stderr.startswith("PolicyChanged: ")
    wrong = service.run("tenant", "policy", "cli-life", "isolation=pooled", "images_per_request=900")
    assert wrong.returncode == 1 and "group" in wrong.stderr and "images_per_request" in wrong.stderr

    assert service.tell("tenant", "suspend", "cli-life")["state"] == "suspended"
    until(lambda: service.rerank(ASK, key["key"]).status_code == 403, 30)
    assert service.tell("tenant", "resume", "cli-life")["state"] == "active"
    until(lambda: service.rerank(ASK, key["key"]).status_code == 200, 30)

    assert service.tell("tenant", "delete", "cli-life", "--grace-days", "1")["state"] == "deleted"
    assert service.tell("tenant", "restore", "cli-life")["state"] == "active"
    service.tell("tenant", "delete", "cli-life", "--grace-days", "0")
    service.tell("tenant", "purge")  # the gateway may have been faster
    gone = service.run("tenant", "show", "cli-life")
    assert (gone.returncode, gone.stdout) == (1, "") and gone.stderr.startswith("TenantNotFound: ")
    assert service.rerank(ASK, key["key"]).status_code == 401


def test_a_key_is_limited_rotated_and_shown(service: Service, acme: Tenant) -> None:
    made = service.make_key(acme.name)
    assert service.tell("key", "limits", made["id"], "requests_per_minute=30") == {"requests_per_minute": 30}
    refused = service.run("key", "limits", made["id"], "requests_per_minute=99999")
    assert refused.returncode == 1 and refused.stderr.startswith("InvalidKeyLimits: ")
    changed = service.tell("key", "change", made["id"], "--name", "till", "--allow", "127.0.0.0/8")
    assert (changed["name"], changed["allowed_cidrs"]) == ("till", ["127.0.0.0/8"])
    shown = service.tell("key", "show", made["id"])
    assert (shown["state"], shown["limits"]) == ("active", {"requests_per_minute": 30})
    assert made["key"] not in json.dumps(shown)
    contained = service.tell("contain", acme.name, "--key", made["id"], "--reason", "seen in a repository")
    assert contained["state"] == "contained"
    until(lambda: service.rerank(ASK, made["key"]).status_code == 401, 30)
    assert service.tell("release", acme.name, "--key", made["id"])["state"] == "active"
    until(lambda: service.rerank(ASK, made["key"]).status_code == 200, 30)
    told = [entry for entry in service.entries(acme.name) if entry["details"].get("key") == made["id"]]
    assert {entry["operation"] for entry in told} >= {
        "admin.key_create",
        "admin.key_change",
        "admin.key_contain",
        "admin.key_release",
    }
    assert {entry["role"] for entry in told} == {"operator"}


def test_a_tenant_is_contained_while_it_works(service: Service) -> None:
    tenant = service.make_tenant("cli-incident")
    with service.client(tenant.key) as client:
        session = client.post("/v1/sessions").json()["id"]
    assert service.rerank(ASK, tenant.key).status_code == 200
    until(lambda: len(service.tell("worker", "list", tenant.name)) == 1, 60)
    (worker,) = service.tell("worker", "list", tenant.name)
    assert (worker["tenant"], worker["pid"]) == (tenant.name, service.worker_of(tenant).pid)
    (used,) = service.tell("usage", tenant.name)
    assert (used["key_id"], used["requests"]) == (tenant.key_id, 1)

    answers: list[httpx.Response] = []
    working = threading.Thread(target=lambda: answers.append(service.rerank(LONG, tenant.key)))
    pid = service.worker_of(tenant).pid
    working.start()
    done = service.run("contain", tenant.name, "--reason", "drill")
    working.join()
    assert done.returncode == 0, done.stderr
    assert done.stdout == "cli-incident is contained.\n"
    assert answers[0].status_code in (200, 403)  # it may have been faster than the command
    until(lambda: pid not in {each.pid for each in service.workers()}, 10)
    assert service.rerank(ASK, tenant.key).status_code == 403
    operations = [entry["operation"] for entry in service.entries(tenant.name)]
    assert {"admin.contain", "admin.stop"} <= set(operations)

    service.tell("release", tenant.name)
    until(lambda: service.rerank(ASK, tenant.key).status_code == 200, 30)
    (open_session,) = service.tell("session", "list", tenant.name)
    assert open_session["id"] == session
    assert service.run("session", "close", tenant.name, session).returncode == 0
    assert service.tell("session", "list", tenant.name) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("tenant", "show", "nobody"), "TenantNotFound: "),
        (("contain", "nobody"), "TenantNotFound: "),
        (("contain", "acme", "--key", "AAAAAAAAAAAA"), "KeyNotFound: "),
        (("session", "close", "acme", "ses_none"), "SessionNotFound: "),
        (("tenant", "ceiling", "--all", "sessions=-1"), "InvalidPolicy: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_wrong_is_one_sentence(
    service: Service, acme: Tenant, arguments: tuple[str, ...], says: str
) -> None:
    done = service.run(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    (sentence,) = done.stderr.strip().splitlines()
    assert sentence.startswith(says)


def test_the_help_teaches(service: Service) -> None:
    shown = " ".join(service.run("contain", "--help").stdout.replace("│", " ").split())
    for words in ("within 2 seconds", "--key", "--reason", "--no-wait", "audit list"):
        assert words in shown
