"""Policies and ceilings over `/admin/v1`: versions, If-Match, every fault at once, and who may go how far."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.integration.administrators import ASK, House, build_house, faults, problem
from tests.integration.served import Served, until


@pytest.fixture(scope="module")
def platform(service: Served) -> Iterator[httpx.Client]:
    with service.client() as client:
        yield client


@pytest.fixture(scope="module")
def house(service: Served, platform: httpx.Client) -> House:
    return build_house(service, platform, images_per_minute=600)


@pytest.fixture
def own(service: Served, house: House) -> Iterator[httpx.Client]:
    """The tenant's own administrator."""
    with service.client(house.admin) as client:
        yield client


def version(client: httpx.Client, house: House) -> str:
    tag: str = client.get(f"{house.path}/policy").headers["ETag"]
    return tag


def test_a_policy_is_changed_from_the_version_that_was_seen(
    service: Served, own: httpx.Client, house: House
) -> None:
    path = f"{house.path}/policy"
    read = own.get(path)
    assert read.headers["ETag"] == f'"{read.json()["version"]}"'
    assert own.get(path, headers={"If-None-Match": read.headers["ETag"]}).status_code == 304
    told = problem(own.patch(path, json={"text_length": 100}), 428, "precondition_missing")
    assert told["field"] == "If-Match"
    problem(own.patch(path, json={"text_length": 100}, headers={"If-Match": '"0"'}), 412, "policy_changed")
    changed = own.patch(path, json={"text_length": 100}, headers={"If-Match": read.headers["ETag"]})
    assert changed.status_code == 200, changed.text
    told = changed.json()
    assert told["version"] == read.json()["version"] + 1
    assert changed.headers["ETag"] == f'"{told["version"]}"'
    assert told["policy"] == {**read.json()["policy"], "text_length": 100}
    assert told["set_by"]["role"] == "tenant_admin" and told["set_by"]["key_id"] in house.admin
    problem(
        own.patch(path, json={"sessions": 1}, headers={"If-Match": read.headers["ETag"]}),
        412,
        "policy_changed",
    )
    until(
        lambda: service.rerank({"query": "q" * 101, "documents": ["a"]}, house.search).status_code == 422, 10
    )
    entry = next(
        each
        for each in service.entries(house.name)
        if (each["operation"], each["decision"]) == ("admin.policy_change", "answered")
    )
    assert entry["details"] == {"version": told["version"], "changed": ["text_length"]}


def test_null_is_the_default_and_put_replaces_all(platform: httpx.Client, house: House) -> None:
    path = f"{house.path}/policy"
    platform.patch(path, json={"sessions": 3, "text_length": 50}, headers={"If-Match": "*"})
    amended = platform.patch(path, json={"text_length": None}, headers={"If-Match": "*"}).json()["policy"]
    assert (amended["sessions"], amended["text_length"]) == (3, 10_000)
    replaced = platform.put(path, json={"images_per_minute": 600}, headers={"If-Match": "*"}).json()["policy"]
    assert (replaced["sessions"], replaced["images_per_minute"]) == (100, 600)


def test_of_two_changes_at_once_one_is_refused(service: Served, own: httpx.Client, house: House) -> None:
    seen = version(own, house)

    def change(length: int) -> int:
        with service.client(house.admin) as client:
            answer = client.patch(
                f"{house.path}/policy", json={"text_length": length}, headers={"If-Match": seen}
            )
            return answer.status_code

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(change, (901, 902, 903, 904))) == [200, 412, 412, 412]


def test_every_version_is_kept_with_who_set_it(
    platform: httpx.Client, own: httpx.Client, house: House
) -> None:
    for length in (11, 12, 13):
        own.patch(f"{house.path}/policy", json={"text_length": length}, headers={"If-Match": "*"})
    path = f"{house.path}/policy/versions"
    seen = []
    cursor = None
    while True:
        told = own.get(path, params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        seen += told["data"]
        cursor = told["next_cursor"]
        if cursor is None:
            break
    assert [each["version"] for each in seen] == list(range(len(seen), 0, -1))
    assert [each["policy"]["text_length"] for each in seen[:3]] == [13, 12, 11]
    assert seen[-1]["set_by"]["role"] == "platform_admin"
    assert all(each["set_at"] for each in seen)


def test_a_policy_that_contradicts_itself_is_refused_whole(own: httpx.Client, house: House) -> None:
    before = own.get(f"{house.path}/policy").json()
    for body, wrong in (
        (
            {"isolation": "pooled", "images_per_request": 900, "text_length": 7},
            {"group", "images_per_request"},
        ),
        ({"sessions": "some", "wings": 2, "kind": "x", "text_length": 7}, {"sessions", "wings", "kind"}),
    ):
        answer = own.patch(f"{house.path}/policy", json=body, headers={"If-Match": "*"})
        assert set(faults(problem(answer, 422, "invalid_policy"))) == wrong
    assert own.get(f"{house.path}/policy").json() == before, "what was right of it is not in force either"


def test_an_administrator_of_the_tenant_may_lower_and_not_exceed(
    platform: httpx.Client, own: httpx.Client, house: House
) -> None:
    path = f"{house.path}/policy"
    platform.put(path, json={"sessions": 50, "images_per_minute": 600}, headers={"If-Match": "*"})
    assert own.patch(path, json={"sessions": 5}, headers={"If-Match": "*"}).status_code == 200
    assert own.patch(path, json={"sessions": 50}, headers={"If-Match": "*"}).status_code == 200
    told = problem(
        own.patch(path, json={"sessions": 51, "requests_per_minute": 601}, headers={"If-Match": "*"}),
        422,
        "invalid_policy",
    )
    assert set(faults(told)) >= {"sessions", "requests_per_minute"}
    bounds = own.get(f"{house.path}/ceiling").json()["bounds"]
    assert bounds["sessions"] == 50


def test_a_ceiling_lowers_what_is_above_it(service: Served, platform: httpx.Client, house: House) -> None:
    path = f"{house.path}/policy"
    platform.patch(path, json={"concurrent_requests": 40}, headers={"If-Match": "*"})
    ceiling = f"{house.path}/ceiling"
    problem(platform.put(ceiling, json={"concurrent_requests": 8}), 428, "precondition_missing")
    told = problem(
        platform.put(ceiling, json={"sessions": "x", "wings": 1}, headers={"If-Match": "*"}),
        422,
        "invalid_policy",
    )
    assert set(faults(told)) == {"sessions", "wings"}
    set_to = platform.put(ceiling, json={"concurrent_requests": 8}, headers={"If-Match": '"0"'})
    assert set_to.status_code == 200, set_to.text
    assert (set_to.json()["ceiling"], set_to.json()["lowered"]) == ({"concurrent_requests": 8}, [house.id])
    policy = platform.get(path).json()
    assert policy["policy"]["concurrent_requests"] == 8
    assert policy["set_by"]["role"] == "ceiling"
    refused = platform.patch(path, json={"concurrent_requests": 9}, headers={"If-Match": "*"})
    assert "concurrent_requests" in faults(problem(refused, 422, "invalid_policy"))
    entries = [entry for entry in service.entries(house.name) if entry["operation"] == "admin.ceiling_change"]
    assert entries[0]["details"] == {"version": 1, "lowered": [house.id]}


def test_a_ceiling_of_every_tenant_is_the_platforms(service: Served, platform: httpx.Client) -> None:
    house = build_house(service, platform, retention_days=4000)
    before = platform.get("/admin/v1/ceiling")
    try:
        answer = platform.put(
            "/admin/v1/ceiling", json={"retention_days": 3650}, headers={"If-Match": before.headers["ETag"]}
        )
        assert house.id in answer.json()["lowered"]
        assert platform.get(f"{house.path}/policy").json()["policy"]["retention_days"] == 3650
        operations = [entry["operation"] for entry in service.entries(house.name)]
        assert operations[0] == "admin.policy_lower"
    finally:
        platform.put("/admin/v1/ceiling", json=before.json()["ceiling"], headers={"If-Match": "*"})


def test_lowering_below_present_use_is_allowed_and_explained(service: Served, platform: httpx.Client) -> None:
    house = build_house(service, platform)
    with service.client(house.search) as search:
        opened = [search.post("/v1/sessions").json()["id"] for _ in range(3)]
    for _ in range(2):
        assert service.rerank(ASK, house.search).status_code == 200
    lowered = platform.patch(
        f"{house.path}/policy", json={"sessions": 1, "requests_per_month": 1}, headers={"If-Match": "*"}
    )
    assert lowered.status_code == 200, lowered.text
    notes = lowered.json()["notes"]
    assert any("sessions is now 1, and 3 are open" in note for note in notes), notes
    with service.client(house.search) as search:
        assert search.get(f"/v1/sessions/{opened[0]}").status_code == 200, "what is open stays open"
        until(lambda: search.post("/v1/sessions").status_code == 429)
    raised = platform.patch(f"{house.path}/policy", json={"sessions": 9}, headers={"If-Match": "*"})
    assert not any("sessions" in note for note in raised.json()["notes"])
