"""Keys over `/admin/v1`: made, listed in pages, changed, rotated, revoked; what is wrong with a body is named."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.integration.administrators import ASK, House, build_house, faults, make_key, problem
from tests.integration.served import Served, until


@pytest.fixture(scope="module")
def platform(service: Served) -> Iterator[httpx.Client]:
    with service.client() as client:
        yield client


@pytest.fixture(scope="module")
def house(service: Served, platform: httpx.Client) -> House:
    return build_house(service, platform)


@pytest.fixture
def own(service: Served, house: House) -> Iterator[httpx.Client]:
    with service.client(house.admin) as client:
        yield client


def test_a_key_is_made_with_its_text_told_once(service: Served, own: httpx.Client, house: House) -> None:
    made = make_key(
        own, house.id, name="shop", limits={"requests_per_minute": 60}, allowed_cidrs=["127.0.0.0/8"]
    )
    service.issued.append(made["key"])
    assert made["key"].startswith("prc_live_") and made["id"] in made["key"]
    read = own.get(f"{house.path}/keys/{made['id']}").json()
    assert read == {name: value for name, value in made.items() if name not in ("key", "old_ends_at")}
    assert (read["state"], read["role"], read["name"]) == ("active", "search", "shop")
    assert (read["limits"], read["allowed_cidrs"]) == ({"requests_per_minute": 60}, ["127.0.0.0/8"])
    assert made["key"] not in own.get(f"{house.path}/keys").text
    assert service.rerank(ASK, made["key"]).status_code == 200
    entry = next(each for each in service.entries(house.name) if each["operation"] == "admin.key_create")
    assert entry["details"]["key"] == made["id"]
    assert made["key"][-49:] not in str(entry)


def test_keys_come_in_pages_oldest_first(own: httpx.Client, house: House, service: Served) -> None:
    made = [make_key(own, house.id, name=f"page-{number}") for number in range(5)]
    service.issued.extend(key["key"] for key in made)
    seen, cursor = [], None
    while True:
        told = own.get(
            f"{house.path}/keys", params={"limit": 3} | ({"cursor": cursor} if cursor else {})
        ).json()
        seen += [key["id"] for key in told["data"]]
        cursor = told["next_cursor"]
        if cursor is None:
            break
    assert len(seen) == len(set(seen))
    assert [key for key in seen if key in {each["id"] for each in made}] == [each["id"] for each in made]


def test_a_rotated_key_keeps_its_id_and_two_secrets_for_a_while(
    service: Served, own: httpx.Client, house: House
) -> None:
    made = make_key(own, house.id)
    path = f"{house.path}/keys/{made['id']}"
    rotated = own.post(f"{path}/rotate", json={"overlap_s": 600}).json()
    service.issued.extend((made["key"], rotated["key"]))
    assert rotated["id"] == made["id"] and rotated["key"] != made["key"]
    assert rotated["old_ends_at"]
    for key in (made["key"], rotated["key"]):
        assert service.rerank(ASK, key).status_code == 200
    assert own.post(f"{path}/rotate", json={"overlap_s": 600}).status_code in (409, 422), "two are live"
    last = own.post(f"{path}/rotate", json={"overlap_s": 0}).json()
    service.issued.append(last["key"])
    assert service.rerank(ASK, last["key"]).status_code == 200
    until(lambda: service.rerank(ASK, made["key"]).status_code == 401)
    until(lambda: service.rerank(ASK, rotated["key"]).status_code == 401)


def test_a_key_is_changed_and_the_rest_of_it_stays(service: Served, own: httpx.Client, house: House) -> None:
    made = make_key(own, house.id, name="before", expires_at="2099-01-01T00:00:00Z")
    service.issued.append(made["key"])
    path = f"{house.path}/keys/{made['id']}"
    changed = own.patch(path, json={"name": "after", "limits": {"requests_per_minute": 30}}).json()
    assert (changed["name"], changed["limits"]) == ("after", {"requests_per_minute": 30})
    assert changed["expires_at"] == made["expires_at"]
    assert own.patch(path, json={"expires_at": None}).json()["expires_at"] is None
    assert own.patch(path, json={"allowed_cidrs": ["203.0.113.0/24"]}).status_code == 200
    until(lambda: service.rerank(ASK, made["key"]).status_code == 401)
    assert own.patch(path, json={"allowed_cidrs": []}).status_code == 200
    until(lambda: service.rerank(ASK, made["key"]).status_code == 200)


def test_a_revoked_key_stays_in_the_list(service: Served, own: httpx.Client, house: House) -> None:
    made = make_key(own, house.id)
    service.issued.append(made["key"])
    path = f"{house.path}/keys/{made['id']}"
    revoked = own.delete(path)
    assert (revoked.status_code, revoked.json()["state"]) == (200, "revoked")
    assert own.delete(path).json()["revoked_at"] == revoked.json()["revoked_at"]
    until(lambda: service.rerank(ASK, made["key"]).status_code == 401)
    assert own.get(path).json()["state"] == "revoked"


def test_nobody_hands_on_more_than_they_have(
    service: Served, platform: httpx.Client, own: httpx.Client, house: House
) -> None:
    told = problem(own.post(f"{house.path}/keys", json={"role": "platform_admin"}), 422, "invalid_request")
    assert "role" in faults(told)
    answer = own.post(f"{house.path}/keys", json={"role": "search", "scopes": ["audit"]})
    assert answer.status_code == 422, answer.text
    narrow = make_key(platform, house.id, role="tenant_admin", scopes=["keys", "usage"])
    service.issued.append(narrow["key"])
    with service.client(narrow["key"]) as client:
        assert client.post(f"{house.path}/keys", json={"scopes": ["rerank"]}).status_code == 422
        made = make_key(client, house.id, scopes=["usage"])
        service.issued.append(made["key"])
        assert made["scopes"] == ["usage"]


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({"role": "root"}, {"role"}),
        ({"expires_at": "tomorrow", "scopes": "all", "owner": 1}, {"expires_at", "scopes", "owner"}),
        ({"expires_at": "2030-01-01T00:00:00"}, {"expires_at"}),
        ({"scopes": ["rerank", "everything"]}, {"scopes[1]"}),
        ({"allowed_cidrs": [7]}, {"allowed_cidrs[0]"}),
    ],
    ids=["role", "several", "time", "scope", "network"],
)
def test_every_wrong_field_of_a_new_key_is_named(
    own: httpx.Client, house: House, body: dict[str, object], fields: set[str]
) -> None:
    told = problem(own.post(f"{house.path}/keys", json=body), 422, "invalid_request")
    assert set(faults(told)) == fields


@pytest.mark.parametrize(
    "body",
    [
        {"name": ""},
        {"allowed_cidrs": ["somewhere"]},
        {"limits": {"requests_per_minute": 0}},
        {"limits": {"wings": 1}},
        {"limits": {"requests_per_minute": 999_999}},
        {"scopes": []},
    ],
)
def test_rights_that_cannot_be_are_refused_with_a_reason(
    own: httpx.Client, house: House, body: dict[str, object]
) -> None:
    answer = own.post(f"{house.path}/keys", json=body)
    assert answer.status_code == 422, answer.text
    assert len(answer.json()["detail"]) > 20


def test_a_change_takes_no_null_but_for_the_end(own: httpx.Client, house: House) -> None:
    path = f"{house.path}/keys/{house.search_id}"
    told = problem(own.patch(path, json={"name": None, "scopes": None}), 422, "invalid_request")
    assert set(faults(told)) == {"name", "scopes"}
    problem(own.patch(f"{house.path}/keys/AAAAAAAAAAAA", json={}), 404, "key_not_found")
    problem(own.delete(f"{house.path}/keys/AAAAAAAAAAAA"), 404, "key_not_found")
    told = problem(own.post(f"{path}/rotate", json={"overlap_s": -1}), 422, "invalid_request")
    assert set(faults(told)) == {"overlap_s"}


def test_a_token_is_denied_and_listed(service: Served, own: httpx.Client, house: House) -> None:
    path = f"{house.path}/denied-tokens"
    denied = own.post(path, json={"issuer": "jwt:corp", "jti": "3f2a9c"})
    assert denied.status_code == 201
    assert own.post(path, json={"issuer": "jwt:corp", "jti": "3f2a9c"}).status_code == 201
    listed = own.get(path).json()["data"]
    assert [(each["issuer"], each["jti"]) for each in listed] == [("jwt:corp", "3f2a9c")]
    assert listed[0]["denied_at"] == denied.json()["denied_at"]
    entry = next(each for each in service.entries(house.name) if each["operation"] == "admin.token_deny")
    assert entry["details"] == {"issuer": "jwt:corp", "jti": "3f2a9c"}


def test_a_denial_without_a_name_is_refused(own: httpx.Client, house: House) -> None:
    path = f"{house.path}/denied-tokens"
    assert set(faults(own.post(path, json={"issuer": "jwt:corp"}).json())) == {"jti"}
    assert set(faults(own.post(path, json={"issuer": "", "jti": "x", "until": 1}).json())) == {
        "issuer",
        "until",
    }
    assert own.post(path, json={"issuer": "jwt:corp", "jti": "a\nb"}).status_code == 422
