"""Limits of a tenant, exact under load: what is let in, what is refused, and that a refusal costs nothing."""

from __future__ import annotations

import base64
import os
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from typing import Any

import http_sf
import httpx

from tests.acceptance.service_process import Service, Tenant
from tests.assets.images import encode, photo

ASK: object = {"query": "q", "documents": ["a", "b"]}
PICTURE = {"image": base64.b64encode(encode(photo(40, 40), "PNG")).decode()}


def images(count: int) -> object:
    return {"query": "q", "documents": [PICTURE] * count}


def reranks(service: Service, tenant: Tenant) -> list[dict[str, Any]]:
    """What the log has of a tenant's requests, beside what was done to the tenant itself."""
    return [entry for entry in service.entries(tenant.name) if not entry["operation"].startswith("admin.")]


def check_used_up(answer: httpx.Response, *violated: str, at_most_s: int) -> None:
    assert answer.status_code == 429, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    told = answer.json()
    assert told["code"] == "quota_exceeded"
    assert told["type"] == "https://iana.org/assignments/http-problem-types#quota-exceeded"
    assert told["violated-policies"] == list(violated)
    assert 1 <= int(answer.headers["Retry-After"]) <= at_most_s
    assert f"in {answer.headers['Retry-After']} s" in told["detail"]
    assert all(name in told["detail"] for name in violated)


def test_a_new_tenant_has_20_images_a_minute_and_a_refused_request_costs_none(service: Service) -> None:
    tenant = service.make_tenant("pictures")
    too_many = service.rerank(images(21), tenant.key)
    assert too_many.status_code == 422
    assert (too_many.json()["limit"], too_many.json()["field"]) == (20, "documents[20].image")
    assert service.rerank(images(12), tenant.key).status_code == 200
    for _ in range(3):
        check_used_up(service.rerank(images(15), tenant.key), "images", at_most_s=60)
    assert service.rerank(images(8), tenant.key).status_code == 200, "the refused ones took nothing"
    check_used_up(service.rerank(images(20), tenant.key), "images", at_most_s=60)
    assert service.rerank(ASK, tenant.key).status_code == 200, "text is not held up by images"
    entries = reranks(service, tenant)
    assert Counter(entry["code"] for entry in entries) == {
        "invalid_request": 1,
        "ok": 3,
        "quota_exceeded": 4,
    }
    assert {entry["decision"] for entry in entries if entry["code"] == "quota_exceeded"} == {"refused"}


def test_a_burst_lets_in_exactly_its_number_of_parallel_requests(service: Service) -> None:
    tenant = service.make_tenant("burst")
    told = service.tell(
        *("tenant", "policy", tenant.name),
        *("requests_per_minute=1", "request_burst=7", "concurrent_requests=20"),
    )
    assert (told["requests_per_minute"], told["request_burst"], told["concurrent_requests"]) == (1, 7, 20)
    for _ in range(3):  # wrong requests are no use of the limit
        assert service.rerank({"query": "q"}, tenant.key).status_code == 422
    answers = service.rerank_at_once([ASK] * 20, tenant.key)
    assert Counter(answer.status_code for answer in answers) == {200: 7, 429: 13}
    for answer in answers:
        if answer.status_code == 429:
            check_used_up(answer, "requests", at_most_s=60)
    entries = reranks(service, tenant)
    assert Counter(entry["code"] for entry in entries) == {
        "ok": 7,
        "quota_exceeded": 13,
        "invalid_request": 3,
    }
    assert {entry["request_id"] for entry in entries} >= {
        answer.headers["X-Request-Id"] for answer in answers
    }


def test_a_new_tenant_has_five_requests_at_once_and_another_tenant_notices_nothing(service: Service) -> None:
    tenant = service.make_tenant("crowd")
    assert service.rerank(ASK, tenant.key).status_code == 200
    worker = service.worker_of(tenant)
    os.kill(worker.pid, signal.SIGSTOP)  # so that nothing ends before all have asked
    try:
        with ThreadPoolExecutor(20) as pool:
            asked = [pool.submit(service.rerank, ASK, tenant.key) for _ in range(20)]
            waiting = as_completed(asked)
            refused = [next(waiting).result() for _ in range(15)]
            neighbour = service.rerank(ASK)
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGCONT)
            answered = [one.result() for one in waiting]
    finally:
        with suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGCONT)
    for answer in refused:
        check_used_up(answer, "concurrency", at_most_s=120)
    assert neighbour.status_code == 200
    assert [answer.status_code for answer in answered] == [200] * 5
    assert service.rerank(ASK, tenant.key).status_code == 200, "every slot is free again"


def parsed(field: str) -> dict[str, dict[str, Any]]:
    """A RateLimit field by a strict parser of structured fields: each limit's name and parameters."""
    items: Any = http_sf.parse(field.encode(), tltype="list")
    return dict(items)


def test_every_decided_answer_tells_where_the_limits_stand(service: Service) -> None:
    tenant = service.make_tenant("standing")
    service.tell(
        *("tenant", "policy", tenant.name, "requests_per_minute=1", "request_burst=2"),
        *("requests_per_month=50", "tokens_per_month=1000000"),
    )
    undecided = service.rerank({"query": "q"}, tenant.key)
    assert "RateLimit" not in undecided.headers, "wrong before any limit was asked"
    answers = [service.rerank(ASK, tenant.key) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    policies = [parsed(answer.headers["RateLimit-Policy"]) for answer in answers]
    states = [parsed(answer.headers["RateLimit"]) for answer in answers]
    assert policies[0] == policies[1] == policies[2]
    assert policies[0]["requests"] == {"q": 1, "w": 60, "pericarp-burst": 2}
    assert policies[0]["concurrency"] == {"q": 5, "qu": "concurrent-requests"}
    assert policies[0]["requests_month"]["q"] == 50
    assert [state["requests"]["r"] for state in states] == [1, 0, 0]
    assert [state["requests_month"]["r"] for state in states] == [49, 48, 48]
    assert int(answers[2].headers["Retry-After"]) >= states[2]["requests"]["t"]
    broken = service.rerank({"query": "q", "documents": [{"image": "AAAA"}]}, tenant.key)
    assert "RateLimit" in broken.headers, "it was decided, whatever became of it"


def test_tokens_are_settled_as_read_and_usage_tells_of_all(service: Service) -> None:
    tenant = service.make_tenant("reader")
    service.tell("tenant", "policy", tenant.name, "tokens_per_minute=1", "token_burst=3000")
    answer = service.rerank({"query": "q" * 300, "documents": ["word " * 100, "another " * 50]}, tenant.key)
    assert answer.status_code == 200, answer.text
    read = answer.json()["usage"]["prompt_tokens"]
    assert 0 < read < 3000 - parsed(answer.headers["RateLimit"])["tokens"]["r"], (
        "reserved was more than was read"
    )
    costly = service.rerank({"query": "q", "documents": ["x" * 4000]}, tenant.key)
    assert (costly.status_code, costly.json()["code"]) == (422, "request_too_costly")
    assert (costly.json()["limit"], costly.json()["reason"]) == (3000, "tokens")
    check_used_up(
        service.rerank({"query": "q", "documents": ["x" * 2700]}, tenant.key), "tokens", at_most_s=10**6
    )
    with service.client(tenant.key) as client:
        told = client.get("/v1/usage").json()
    used = {"requests": 1, "images": 0, "tokens": read, "refused": 1, "shadowed": 0}
    assert told["today"] == told["this_month"] == used
    assert told["keys"] == [{"key_id": tenant.key_id, "today": used, "this_month": used}]
    (tokens,) = (limit for limit in told["limits"] if limit["name"] == "tokens")
    assert tokens["remaining"] == 3000 - read


def test_a_limit_in_shadow_denies_nothing_and_is_seen_everywhere(service: Service) -> None:
    tenant = service.make_tenant("shadowed")
    service.tell(
        *("tenant", "policy", tenant.name, "requests_per_minute=1", "request_burst=1", 'shadow=["requests"]')
    )
    answers = [service.rerank(ASK, tenant.key) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert "requests" not in parsed(answers[0].headers["RateLimit"]), "nobody is to go slower because of it"
    entries = reranks(service, tenant)
    assert sorted(entry.get("shadowed", []) for entry in entries) == [[], ["requests"], ["requests"]]
    with service.client(tenant.key) as client:
        assert client.get("/v1/usage").json()["today"]["shadowed"] == 2
