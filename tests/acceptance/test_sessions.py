"""A search engineer keeps work warm between requests, and learns nothing of anybody else's sessions by trying."""

from __future__ import annotations

import base64
import os
import re
import signal
import subprocess
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest

from tests.acceptance.service_process import REPOSITORY, Service, Tenant, until
from tests.assets.images import encode, photo

SESSION_ID = re.compile(r"ses_[0-9A-Za-z]{22}")
NO_SESSION = "ses_0000000000000000000000"
PICTURES = [
    {"image": base64.b64encode(encode(photo(96, 64, seed=seed), "PNG")).decode()} for seed in range(6)
]
ASK: dict[str, Any] = {"query": "a striped thing", "documents": PICTURES}
TEXTS: dict[str, Any] = {"query": "tea", "documents": ["green tea", "a lorry"]}


@pytest.fixture
def tenant(service: Service, request: pytest.FixtureRequest) -> Tenant:
    """A tenant of this test's own, with room for its images."""
    made = service.make_tenant(f"s{abs(hash(request.node.name)) % 10**12}")
    service.tell("tenant", "policy", made.name, "images_per_minute=600")
    return made


def opened(service: Service, tenant: Tenant, **body: Any) -> dict[str, Any]:
    with service.client(tenant.key) as client:
        answer = client.post("/v1/sessions", json=body)
    assert answer.status_code == 201, answer.text
    told: dict[str, Any] = answer.json()
    assert answer.headers["Location"] == f"/v1/sessions/{told['id']}"
    assert answer.headers["Pericarp-Receipt"]
    return told


def ask(service: Service, tenant: Tenant, session: str | None, body: dict[str, Any]) -> httpx.Response:
    return service.rerank(body if session is None else {**body, "session_id": session}, tenant.key)


def answered(service: Service, tenant: Tenant, session: str | None, body: dict[str, Any]) -> dict[str, Any]:
    answer = ask(service, tenant, session, body)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    assert told["meta"].get("session", {}).get("id") == session
    return told


def times(session: dict[str, Any]) -> dict[str, datetime]:
    return {name: datetime.fromisoformat(session[name]) for name in session if name.endswith("_at")}


def refusals(service: Service, tenant: Tenant, session: str) -> list[httpx.Response]:
    """What every path answers about a session that is not open."""
    with service.client(tenant.key) as client:
        return [
            client.get(f"/v1/sessions/{session}"),
            client.delete(f"/v1/sessions/{session}"),
            client.post("/v1/rerank", json={**TEXTS, "session_id": session}),
        ]


def bare(answer: httpx.Response) -> tuple[int, dict[str, Any], set[str]]:
    """All that an answer tells but for the request's own id: status, body, names of headers."""
    told = answer.json()
    assert told.pop("request_id") == answer.headers["X-Request-Id"]
    return answer.status_code, told, set(answer.headers)


# -- what it is for ---------------------------------------------------------------------------------------------


def test_a_second_request_over_the_same_images_finds_them_at_hand(service: Service, tenant: Tenant) -> None:
    session = opened(service, tenant)["id"]
    cold = answered(service, tenant, None, ASK)
    first = answered(service, tenant, session, ASK)
    again = answered(service, tenant, session, ASK)
    other = answered(service, tenant, session, {**ASK, "query": "a spotted thing"})
    assert cold["results"] == first["results"] == again["results"], "sooner, never different"
    assert cold["usage"] == first["usage"] == again["usage"]
    assert "session" not in cold["meta"]
    assert first["meta"]["session"]["computed_tokens"] > 0
    assert again["meta"]["session"]["computed_tokens"] == 0, "equal pairs are not even computed"
    assert other["meta"]["session"]["reused_images"] == len(PICTURES)
    assert 0 < other["meta"]["session"]["computed_tokens"] < other["usage"]["prompt_tokens"]
    entries = {each["request_id"]: each for each in service.entries(tenant.name)}
    assert [entries[each["id"]]["session"] for each in (cold, first, again)] == ["", session, session]


def test_a_session_tells_its_state_and_every_use_prolongs_it(service: Service, tenant: Tenant) -> None:
    fresh = opened(service, tenant)
    assert SESSION_ID.fullmatch(fresh["id"])
    assert (fresh["object"], fresh["ttl_s"], fresh["requests"], fresh["last_used_at"]) == (
        *("session", 900, 0, None),
    )
    since = times({**fresh, "last_used_at": fresh["created_at"]})
    assert since["expires_at"] - since["created_at"] == timedelta(seconds=900)
    assert since["ends_at"] - since["created_at"] == timedelta(days=1)
    for _ in range(2):
        answered(service, tenant, fresh["id"], TEXTS)
    with service.client(tenant.key) as client:
        used = client.get(f"/v1/sessions/{fresh['id']}").json()
        assert client.get("/v1/sessions").json() == {"object": "list", "data": [used]}
    assert used["requests"] == 2
    now = times(used)
    assert now["expires_at"] - now["last_used_at"] == timedelta(seconds=900)
    assert now["expires_at"] > since["expires_at"] and now["ends_at"] == since["ends_at"]


def test_the_example_of_the_documentation_works_when_pasted_into_a_shell(
    service: Service, tenant: Tenant
) -> None:
    section = (REPOSITORY / "docs" / "api.md").read_text().partition("\n## Sessions\n")[2]
    example = section.partition("```sh\n")[2].partition("```")[0]
    assert "/v1/sessions" in example
    done = subprocess.run(
        ["bash", "-euc", example.replace("http://127.0.0.1:8080", service.url)],
        cwd=REPOSITORY,
        env={**os.environ, "KEY": tenant.key},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"relevance_score"') == 6, done.stdout
    assert re.findall(r'"requests":(\d+)', done.stdout) == ["2"]
    with service.client(tenant.key) as client:
        assert client.get("/v1/sessions").json()["data"] == []


# -- the end ----------------------------------------------------------------------------------------------------


def test_a_closed_session_is_gone_and_the_second_closing_finds_nothing(
    service: Service, tenant: Tenant
) -> None:
    session = opened(service, tenant)["id"]
    answered(service, tenant, session, TEXTS)
    with service.client(tenant.key) as client:
        closed = client.delete(f"/v1/sessions/{session}")
    assert (closed.status_code, closed.content) == (204, b"")
    for answer in refusals(service, tenant, session):
        assert (answer.status_code, answer.json()["code"]) == (404, "session_not_found")
    life = [
        (each["operation"], each["decision"], each["status"], each["id"])
        for each in reversed(service.entries(tenant.name))
        if each["session"] == session
    ]
    assert [each[:3] for each in life] == [
        ("session_open", "answered", 201),
        ("rerank", "answered", 200),
        ("session_close", "answered", 204),
    ]
    assert life[-1][3] == closed.headers["Pericarp-Receipt"]


def test_an_expired_session_is_gone_and_the_log_says_that_time_ran_out(
    service: Service, tenant: Tenant
) -> None:
    session = opened(service, tenant, ttl_s=1)["id"]
    with service.client(tenant.key) as client:
        until(lambda: client.get(f"/v1/sessions/{session}").status_code == 404, 30, every_s=0.2)
    assert ask(service, tenant, session, TEXTS).status_code == 404

    def closing() -> list[dict[str, Any]]:
        return [
            each
            for each in service.entries(tenant.name)
            if each["operation"] == "session_close" and each["session"] == session
        ]

    until(lambda: bool(closing()), 60, every_s=0.5)
    (entry,) = closing()
    assert (entry["decision"], entry["code"], entry["key_id"]) == ("expired", "expired", tenant.key_id)


def test_a_killed_worker_costs_a_session_its_warmth_and_nothing_else(
    service: Service, tenant: Tenant
) -> None:
    session = opened(service, tenant)["id"]
    another = {**ASK, "query": "a spotted thing"}
    before = answered(service, tenant, session, ASK)
    os.kill(service.worker_of(tenant).pid, signal.SIGKILL)
    cold, warm = answered(service, tenant, session, ASK), answered(service, tenant, session, another)
    assert cold["results"] == before["results"]
    assert cold["meta"]["session"]["reused_images"] == 0
    assert cold["meta"]["session"]["computed_tokens"] == before["meta"]["session"]["computed_tokens"]
    assert warm["meta"]["session"]["reused_images"] == len(PICTURES)


# -- whose it is ------------------------------------------------------------------------------------------------


def test_a_foreign_session_answers_like_one_that_never_was(
    service: Service, tenant: Tenant, acme: Tenant
) -> None:
    foreign = opened(service, acme)["id"]
    mine = opened(service, tenant)["id"]
    with service.client(tenant.key) as client:
        client.delete(f"/v1/sessions/{mine}")
    unknown = [bare(answer) for answer in refusals(service, tenant, NO_SESSION)]
    assert {status for status, _, _ in unknown} == {404}
    assert {told["code"] for _, told, _ in unknown} == {"session_not_found"}
    for session in (foreign, mine, "ses_", "x", "%00", foreign + "x", foreign.upper()):
        assert [bare(answer) for answer in refusals(service, tenant, session)] == unknown, session
    assert foreign not in str(service.entries(tenant.name)), "nor does the log repeat what was tried"
    with service.client(acme.key) as client:
        kept = client.get(f"/v1/sessions/{foreign}")
        assert (kept.status_code, kept.json()["requests"]) == (200, 0)
        assert [each["id"] for each in client.get("/v1/sessions").json()["data"]] == [foreign]
        assert client.delete(f"/v1/sessions/{foreign}").status_code == 204
    with service.client(tenant.key) as client:
        assert client.get("/v1/sessions").json()["data"] == []


@pytest.mark.parametrize("role", ["auditor", "tenant_admin", "platform_admin"])
def test_a_key_of_another_role_may_do_nothing_with_sessions(
    service: Service, acme: Tenant, role: str
) -> None:
    session = opened(service, acme)["id"]
    with service.client(service.make_key(acme.name, role)["key"]) as client:
        answers = [
            client.post("/v1/sessions"),
            client.get("/v1/sessions"),
            client.get(f"/v1/sessions/{session}"),
            client.delete(f"/v1/sessions/{session}"),
            client.get(f"/v1/sessions/{NO_SESSION}"),
        ]
    assert [(each.status_code, each.json()["code"]) for each in answers] == [(401, "unauthenticated")] * 5
    with service.client(acme.key) as client:
        assert client.delete(f"/v1/sessions/{session}").status_code == 204


def test_who_has_no_key_learns_nothing_of_sessions(service: Service) -> None:
    with service.client("") as client:
        answers = [
            client.post("/v1/sessions"),
            client.get("/v1/sessions"),
            client.get(f"/v1/sessions/{NO_SESSION}"),
            client.delete(f"/v1/sessions/{NO_SESSION}"),
        ]
    assert [answer.status_code for answer in answers] == [401] * 4


# -- limits and bad input ---------------------------------------------------------------------------------------


def test_beyond_its_limit_a_tenant_opens_no_more_until_one_ends(service: Service, tenant: Tenant) -> None:
    assert service.tell("tenant", "policy", tenant.name)["sessions"] == 100
    service.tell("tenant", "policy", tenant.name, "sessions=2")
    first, _ = opened(service, tenant, ttl_s=300), opened(service, tenant)
    with service.client(tenant.key) as client:
        refused = client.post("/v1/sessions")
        assert refused.status_code == 429
        told = refused.json()
        assert (told["code"], told["violated-policies"]) == ("quota_exceeded", ["sessions"])
        assert 1 <= int(refused.headers["Retry-After"]) <= 300
        assert client.delete(f"/v1/sessions/{first['id']}").status_code == 204
        assert client.post("/v1/sessions").status_code == 201
        service.tell("tenant", "policy", tenant.name, "sessions=0")
        never = client.post("/v1/sessions")
        assert (never.status_code, never.json()["code"]) == (422, "request_too_costly")


def test_a_rerank_on_a_session_that_is_not_open_costs_no_quota(service: Service, tenant: Tenant) -> None:
    service.tell("tenant", "policy", tenant.name, "requests_per_minute=1", "request_burst=2")
    assert ask(service, tenant, None, TEXTS).status_code == 200
    for _ in range(5):
        assert ask(service, tenant, NO_SESSION, TEXTS).status_code == 404
    assert ask(service, tenant, None, TEXTS).status_code == 200, "the burst of two was still there"
    assert ask(service, tenant, None, TEXTS).status_code == 429


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"ttl_s": 0}', "ttl_s"),
        (b'{"ttl_s": 86401}', "ttl_s"),
        (b'{"ttl_s": "60"}', "ttl_s"),
        (b'{"metadata": {"a": 1}}', "metadata"),
        (b"[]", None),
        (b"not JSON", None),
    ],
)
def test_a_wrong_opening_says_what_is_wrong(service: Service, body: bytes, field: str | None) -> None:
    with service.client() as client:
        answer = client.post("/v1/sessions", content=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert answer.json().get("field") == field


def test_a_body_may_be_left_out_and_other_methods_are_named(service: Service, tenant: Tenant) -> None:
    with service.client(tenant.key) as client:
        assert client.post("/v1/sessions").status_code == 201
        answer = client.put("/v1/sessions")
    assert answer.status_code == 405
