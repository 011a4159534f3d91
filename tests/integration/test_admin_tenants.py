"""Tenants over `/admin/v1` as administrators act: made, listed, changed, suspended, deleted, and every change told."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.integration.administrators import (
    ASK,
    UNKNOWN,
    House,
    build_house,
    faults,
    make_key,
    problem,
    without_ids,
)
from tests.integration.conftest import run_as_superuser
from tests.integration.served import Served, until

TENANTS = "/admin/v1/tenants"


@pytest.fixture(scope="module")
def platform(service: Served) -> Iterator[httpx.Client]:
    with service.client() as client:
        yield client


@pytest.fixture
def house(service: Served, platform: httpx.Client) -> House:
    return build_house(service, platform)


def test_a_tenant_is_made_read_and_listed(service: Served, platform: httpx.Client) -> None:
    made = platform.post(TENANTS, json={"name": "made-1", "policy": {"kind": "enterprise", "sessions": 7}})
    assert made.status_code == 201
    told = made.json()
    assert made.headers["Location"] == f"{TENANTS}/{told['id']}"
    assert (told["object"], told["name"], told["state"]) == ("tenant", "made-1", "active")
    read = platform.get(made.headers["Location"])
    assert read.json() == told
    assert platform.get(TENANTS, params={"name": "made-1"}).json()["data"] == [told]
    policy = platform.get(f"{TENANTS}/{told['id']}/policy").json()
    assert (policy["version"], policy["policy"]["kind"], policy["policy"]["sessions"]) == (1, "enterprise", 7)
    (entry,) = service.entries("made-1")
    assert (entry["operation"], entry["role"]) == ("admin.tenant_create", "platform_admin")
    assert entry["details"] == {"name": "made-1"}
    assert entry["id"] == made.headers["Pericarp-Receipt"]
    assert entry["request_id"] == made.headers["X-Request-Id"]


def test_a_name_is_taken_once(platform: httpx.Client, house: House) -> None:
    problem(platform.post(TENANTS, json={"name": house.name}), 409, "tenant_exists")


def test_a_page_that_is_unchanged_is_not_sent_again(platform: httpx.Client, house: House) -> None:
    first = platform.get(house.path)
    again = platform.get(house.path, headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    platform.post(f"{house.path}/suspend")
    changed = platform.get(house.path, headers={"If-None-Match": first.headers["ETag"]})
    assert changed.status_code == 200
    assert changed.headers["ETag"] != first.headers["ETag"]


def test_pages_are_stable_while_tenants_are_made(service: Served, platform: httpx.Client) -> None:
    for number in (1, 2, 3, 5):
        platform.post(TENANTS, json={"name": f"page-{number}"})
    seen: list[str] = []
    cursor = None
    while True:
        query = {"limit": 2} | ({"cursor": cursor} if cursor else {})
        told = platform.get(TENANTS, params=query).json()
        seen += [tenant["name"] for tenant in told["data"]]
        assert len(told["data"]) <= 2
        if "page-3" in seen and "page-4" not in {*seen}:
            platform.post(TENANTS, json={"name": "page-4"})  # behind what was seen: it comes
            platform.post(TENANTS, json={"name": "page-0"})  # before it: it does not, and nothing comes twice
        assert told["has_more"] == (told["next_cursor"] is not None)
        cursor = told["next_cursor"]
        if cursor is None:
            break
    assert [name for name in seen if name.startswith("page-")] == [f"page-{n}" for n in (1, 2, 3, 4, 5)]
    assert len(seen) == len(set(seen))


def test_a_suspended_tenant_is_refused_until_it_is_resumed(
    service: Served, platform: httpx.Client, house: House
) -> None:
    assert service.rerank(ASK, house.search).status_code == 200
    assert platform.post(f"{house.path}/suspend").json()["state"] == "suspended"
    until(lambda: service.rerank(ASK, house.search).status_code == 403)
    assert platform.post(f"{house.path}/resume").json()["state"] == "active"
    until(lambda: service.rerank(ASK, house.search).status_code == 200)
    operations = [entry["operation"] for entry in service.entries(house.name)]
    assert "admin.tenant_suspend" in operations and "admin.tenant_resume" in operations


def test_a_deleted_tenant_is_refused_restored_and_at_last_purged(
    service: Served, platform: httpx.Client, house: House
) -> None:
    service.rerank(ASK, house.search)
    deleted = platform.delete(house.path)
    assert deleted.status_code == 202
    assert (
        deleted.json()["state"] == "deleted" and deleted.json()["purge_after"] > deleted.json()["deleted_at"]
    )
    until(lambda: service.rerank(ASK, house.search).status_code == 403)
    assert platform.get(house.path).json()["state"] == "deleted"
    assert house.id in {
        each["id"] for each in platform.get(TENANTS, params={"state": "deleted"}).json()["data"]
    }
    assert platform.post(f"{house.path}/restore").json()["state"] == "active"
    until(lambda: service.rerank(ASK, house.search).status_code == 200)

    assert platform.delete(house.path, params={"grace_days": 0}).status_code == 202
    service.wait(service.desk.administration.purge_due())
    gone = platform.get(house.path)
    assert without_ids(gone) == without_ids(platform.get(f"{TENANTS}/{UNKNOWN}"))
    problem(platform.delete(house.path), 404, "tenant_not_found")
    assert service.rerank(ASK, house.search).status_code == 401


def test_the_same_post_twice_acts_once(service: Served, platform: httpx.Client) -> None:
    once = {"Idempotency-Key": "order-66"}
    body = {"name": "once-1"}
    first = platform.post(TENANTS, json=body, headers=once)
    again = platform.post(TENANTS, json=body, headers=once)
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.content == first.content
    assert again.headers["Location"] == first.headers["Location"]
    assert again.headers["Pericarp-Receipt"] == first.headers["Pericarp-Receipt"]
    assert (again.headers.get("Idempotency-Replayed"), first.headers.get("Idempotency-Replayed")) == (
        "true",
        None,
    )
    assert len(service.entries("once-1")) == 1
    problem(platform.post(TENANTS, json={"name": "once-2"}, headers=once), 422, "idempotency_key_reused")
    assert platform.get(TENANTS, params={"name": "once-2"}).json()["data"] == []
    keys = [
        platform.post(f"{first.headers['Location']}/keys", json={}, headers={"Idempotency-Key": "key"}).json()
        for _ in range(2)
    ]
    assert keys[0]["key"] == keys[1]["key"], "also where the answer is told only once"
    service.issued.append(keys[0]["key"])
    assert len(platform.get(f"{first.headers['Location']}/keys").json()["data"]) == 1


def test_the_same_post_at_once_acts_once(service: Served, platform: httpx.Client) -> None:
    def post(_number: int) -> httpx.Response:
        with service.client(platform.headers["Authorization"].removeprefix("Bearer ")) as client:
            return client.post(TENANTS, json={"name": "storm"}, headers={"Idempotency-Key": "storm"})

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(post, range(6)))
    statuses = {answer.status_code for answer in answers}
    assert statuses <= {201, 409}
    for answer in answers:
        if answer.status_code == 409:
            problem(answer, 409, "request_under_way")
    assert len({answer.json()["id"] for answer in answers if answer.status_code == 201}) == 1
    assert len(service.entries("storm")) == 1


def test_a_failed_post_can_be_sent_again_under_its_key(platform: httpx.Client, house: House) -> None:
    once = {"Idempotency-Key": "mended"}
    problem(platform.post(TENANTS, json={"name": house.name}, headers=once), 409, "tenant_exists")
    assert platform.post(TENANTS, json={"name": "mended"}, headers=once).status_code == 201


def test_two_callers_may_use_one_idempotency_key(
    service: Served, platform: httpx.Client, house: House
) -> None:
    once = {"Idempotency-Key": "shared"}
    ids = set()
    for client_key in (house.admin, None):
        if client_key is None:
            made = platform.post(f"{house.path}/keys", json={}, headers=once)
        else:
            with service.client(client_key) as client:
                made = client.post(f"{house.path}/keys", json={}, headers=once)
        assert made.status_code == 201
        ids.add(made.json()["id"])
    assert len(ids) == 2


def test_a_change_whose_entry_cannot_be_written_does_not_stand(
    service: Served, platform: httpx.Client, house: House, superuser_url: str
) -> None:
    change = "{} insert on pericarp.audit_inbox {} pericarp_app"
    asyncio.run(run_as_superuser(superuser_url, change.format("revoke", "from")))
    try:
        for method, path, body in (
            ("POST", f"{house.path}/suspend", {}),
            ("POST", f"{house.path}/contain", {}),
            ("POST", TENANTS, {"name": "unwritten"}),
            ("POST", f"{house.path}/keys", {}),
            ("DELETE", house.path, None),
        ):
            assert platform.request(method, path, json=body).status_code == 500, path
    finally:
        asyncio.run(run_as_superuser(superuser_url, change.format("grant", "to")))
    assert platform.get(house.path).json()["state"] == "active"
    assert platform.get(TENANTS, params={"name": "unwritten"}).json()["data"] == []
    assert len(platform.get(f"{house.path}/keys").json()["data"]) == 2


def test_a_tenants_administrator_sees_its_own_tenant_alone(
    service: Served, platform: httpx.Client, house: House
) -> None:
    other = build_house(service, platform)
    with service.client(house.admin) as own:
        assert own.get(house.path).json()["id"] == house.id
        assert [each["id"] for each in own.get(TENANTS).json()["data"]] == [house.id]
        assert own.get(TENANTS, params={"name": other.name}).json()["data"] == []
        assert own.get(TENANTS, params={"state": "deleted"}).json()["data"] == []
        for method, tail in (
            ("GET", ""),
            ("GET", "/policy"),
            ("GET", "/policy/versions"),
            ("GET", "/ceiling"),
            ("GET", "/keys"),
            ("GET", f"/keys/{other.search_id}"),
            ("GET", "/usage"),
            ("GET", "/sessions"),
            ("PUT", "/policy"),
            ("PATCH", "/policy"),
            ("POST", "/keys"),
            ("POST", "/contain"),
            ("POST", "/release"),
            ("DELETE", f"/keys/{other.search_id}"),
            ("POST", f"/keys/{other.search_id}/rotate"),
            ("POST", f"/keys/{other.search_id}/contain"),
        ):
            foreign = own.request(method, f"{TENANTS}/{other.id}{tail}")
            unknown = own.request(method, f"{TENANTS}/{UNKNOWN}{tail}")
            assert foreign.status_code == 404, (method, tail, foreign.text)
            assert without_ids(foreign) == without_ids(unknown), (method, tail)
        foreign = own.get(f"{house.path}/keys/{other.search_id}")
        assert without_ids(foreign) == without_ids(own.get(f"{house.path}/keys/AAAAAAAAAAAA"))
    assert service.rerank(ASK, other.search).status_code == 200


def test_what_only_the_platform_may_is_not_there_for_others(
    service: Served, platform: httpx.Client, house: House
) -> None:
    with service.client(house.admin) as own:
        nothing = without_ids(own.get("/admin/v1/no-such-thing"))
        assert nothing[0] == 404
        for method, path in (
            ("POST", TENANTS),
            ("GET", "/admin/v1/ceiling"),
            ("PUT", "/admin/v1/ceiling"),
            ("POST", f"{house.path}/suspend"),
            ("POST", f"{house.path}/resume"),
            ("DELETE", house.path),
            ("POST", f"{house.path}/restore"),
            ("PUT", f"{house.path}/ceiling"),
        ):
            assert without_ids(own.request(method, path, json={"name": "mine"})) == nothing, (method, path)


def test_other_roles_find_no_such_path(service: Served, platform: httpx.Client, house: House) -> None:
    auditor = make_key(platform, house.id, role="auditor")["key"]
    with service.client(auditor) as client:
        nothing = without_ids(client.get("/admin/v1/no-such-thing"))
        for path in (TENANTS, house.path, f"{house.path}/keys", "/admin/v1/workers"):
            assert without_ids(client.get(path)) == nothing
    with service.client(house.search) as client:
        for path in (TENANTS, house.path, "/admin/v1/no-such-thing"):
            problem(client.get(path), 401, "unauthenticated")
    with service.client("") as client:
        problem(client.get(TENANTS), 401, "unauthenticated")


def test_a_key_without_the_scope_is_told_which_it_lacks(
    service: Served, platform: httpx.Client, house: House
) -> None:
    narrow = make_key(platform, house.id, role="tenant_admin", scopes=["usage"])["key"]
    with service.client(narrow) as client:
        told = problem(client.get(f"{house.path}/keys"), 403, "forbidden")
        assert told["reason"] == "scope" and "keys" in told["detail"]


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ({}, {"name": "is missing"}),
        ({"name": 5}, {"name": "should be a valid string"}),
        ({"name": "x", "polices": {}}, {"polices": "is not a field"}),
        ({"policy": [], "owner": 1}, {"name": "is missing", "policy": "object", "owner": "not a field"}),
        (
            {"name": "x", "policy": {"sessions": -1, "kind": "pirates", "requests_per_minute": "many"}},
            {"sessions": "", "kind": "", "requests_per_minute": ""},
        ),
        ({"name": "x", "policy": {"isolation": "pooled"}}, {"group": ""}),
    ],
    ids=str,
)
def test_every_wrong_field_of_a_new_tenant_is_named(
    platform: httpx.Client, body: dict[str, object], wrong: dict[str, str]
) -> None:
    answer = platform.post(TENANTS, json=body)
    assert answer.status_code == 422, answer.text
    told = faults(answer.json())
    assert set(told) == set(wrong)
    for field, why in wrong.items():
        assert why in told[field], told
        assert told[field]


@pytest.mark.parametrize("name", ["", "Big", "a_b", "-a", "a" * 64, "ä", "a b"])
def test_a_name_that_is_none_is_refused_with_the_rule(platform: httpx.Client, name: str) -> None:
    told = problem(platform.post(TENANTS, json={"name": name}), 422, "invalid_name")
    assert told["field"] == "name" and "a-z" in told["detail"]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": "many"}, "limit"),
        ({"limit": 201}, "limit"),
        ({"state": "asleep"}, "state"),
        ({"cursor": "!!"}, "cursor"),
        ({"cursor": "WyJrZXlzIiwiYSJd"}, "cursor"),
        ({"cursor": "WyJ0ZW5hbnRzIl0"}, "cursor"),
    ],
)
def test_a_wrong_query_names_the_parameter(
    platform: httpx.Client, query: dict[str, str | int], field: str
) -> None:
    told = problem(platform.get(TENANTS, params=query), 422, "invalid_request")
    assert told["field"] == field


def test_a_body_that_is_no_json_is_refused(platform: httpx.Client) -> None:
    for body in (b"{", b"\xff", b"[1, 2]", b'"name"', b"null"):
        told = problem(platform.post(TENANTS, content=body), 422, "invalid_request")
        assert told["detail"]
    problem(platform.post(TENANTS, content=b"{" + b" " * 300_000 + b"}"), 413, "body_too_large")
    for name in ("", "x" * 256, "with space"):
        answer = platform.post(TENANTS, json={"name": "never"}, headers={"Idempotency-Key": name})
        assert problem(answer, 422, "invalid_request")["field"] == "Idempotency-Key"


@pytest.mark.parametrize("tenant", [UNKNOWN, "acme", "0", "%00", UNKNOWN.upper(), "{" + UNKNOWN + "}"])
def test_what_is_not_there_is_404(platform: httpx.Client, tenant: str) -> None:
    for method, tail in (
        ("GET", ""),
        ("DELETE", ""),
        ("POST", "/suspend"),
        ("POST", "/contain"),
        ("POST", "/restore"),
        ("GET", "/policy"),
        ("GET", "/keys"),
        ("POST", "/keys"),
        ("GET", "/usage"),
    ):
        answer = platform.request(method, f"{TENANTS}/{tenant}{tail}")
        problem(answer, 404, "tenant_not_found")
    problem(platform.request("PUT", f"{TENANTS}/{tenant}", json={}), 405, "method_not_allowed")
