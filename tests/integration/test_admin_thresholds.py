"""Thresholds and feedback over `/admin/v1`: what a reviewer sees and says, what moves, and who may not."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tenants.evidence import Evidence, Measure, Screened
from tenants.lifecycle import Lifecycle
from tenants.risk import Category, Mode
from tests.integration.administrators import House, build_house, faults, problem, without_ids
from tests.integration.served import Served

DETECTORS = "lexicon 1"


@pytest.fixture(scope="module")
def platform(service: Served) -> Iterator[httpx.Client]:
    with service.client() as client:
        yield client


@pytest.fixture
def house(service: Served, platform: httpx.Client) -> House:
    return build_house(service, platform)


@pytest.fixture
def own(service: Served, house: House) -> Iterator[httpx.Client]:
    """The tenant's own administrator."""
    with service.client(house.admin) as client:
        yield client


def screen(
    service: Served, house: House, scores: list[float], *, drawn: bool = True, end_user: str | None = None
) -> list[dict[str, Any]]:
    """Items of one decision, as feedback names them."""
    entry = uuid.uuid4()

    async def note() -> None:
        tenant = await Lifecycle(service.desk.database).find(uuid.UUID(house.id))
        evidence = Evidence(service.desk.database, draw=lambda: 0.999)
        evidence.note(
            tenant.id,
            [
                Screened(
                    entry,
                    f"documents[{place}]",
                    Mode.TEXT,
                    end_user or secrets.token_hex(8),
                    DETECTORS,
                    [Measure(Category.HATE, score, 0.6, for_review=drawn)],
                )
                for place, score in enumerate(scores)
            ],
        )
        await evidence.write()

    service.wait(note())
    return [
        {"entry": str(entry), "item": f"documents[{place}]", "category": "hate", "mode": "text"}
        for place in range(len(scores))
    ]


def standing(client: httpx.Client, house: House) -> dict[str, Any]:
    answer = client.get(f"{house.path}/thresholds", params={"category": "hate", "mode": "text"})
    assert answer.status_code == 200, answer.text
    (found,) = answer.json()["thresholds"]
    return dict(found)


def test_fifty_labels_of_misses_make_the_threshold_stricter_at_once(
    service: Served, own: httpx.Client, house: House
) -> None:
    items = screen(service, house, [0.4] * 50)
    waiting = own.get(f"{house.path}/feedback", params={"limit": 200}).json()
    assert [(each["entry"], each["drawn"], each["verdict"]) for each in waiting["data"]] == [
        (items[0]["entry"], True, None)
    ] * 50
    assert "score" not in waiting["data"][0], "who judges shall not lean on it"
    answers = [own.post(f"{house.path}/feedback", json={**item, "verdict": "harmful"}) for item in items]
    assert {answer.status_code for answer in answers} == {201}, answers[0].text
    assert all(answer.json()["votes"] for answer in answers)
    assert [answer.json()["change"] for answer in answers[:49]] == [None] * 49
    change = answers[49].json()["change"]
    assert (change["before"], change["after"], change["reason"]) == (0.6, 0.59, "tighter")
    assert change["evidence"] == {"votes": 50, "harmful": 50, "aim": 0.56}
    assert change["set_by"]["role"] == "tenant_admin" and change["set_by"]["key_id"] in house.admin
    now = standing(own, house)
    assert (now["threshold"], now["anchor"], now["least"], now["most"], now["version"]) == (
        *(0.59, 0.6, 0.5, 0.7),
        1,
    )
    history = own.get(f"{house.path}/thresholds").json()["history"]
    assert [each["version"] for each in history["data"]] == [1] and history["next_cursor"] is None
    entry = service.entries(house.name)[0]
    assert entry["id"] == answers[49].headers["Pericarp-Receipt"]
    assert entry["operation"] == "admin.threshold_label"
    assert entry["details"]["changes"][0]["after"] == 590_000
    assert own.get(f"{house.path}/feedback").json()["data"] == []

    rolled = own.post(f"{house.path}/thresholds/rollback", json={})
    assert rolled.status_code == 200, rolled.text
    assert [(each["before"], each["after"], each["reason"]) for each in rolled.json()["data"]] == [
        (0.59, 0.6, "rollback")
    ]
    assert standing(own, house)["threshold"] == 0.6
    assert service.entries(house.name)[0]["operation"] == "admin.threshold_rollback"
    first = own.get(f"{house.path}/thresholds", params={"limit": 1}).json()["history"]
    second = own.get(f"{house.path}/thresholds", params={"limit": 1, "cursor": first["next_cursor"]}).json()[
        "history"
    ]
    assert [first["data"][0]["version"], second["data"][0]["version"]] == [2, 1]


def test_an_appeal_moves_nothing_until_a_reviewer_decides_it(
    service: Served, own: httpx.Client, house: House
) -> None:
    (item,) = screen(service, house, [0.9], drawn=False)
    told = problem(
        own.post(f"{house.path}/feedback", json={**item, "verdict": "harmless"}), 409, "review_refused"
    )
    assert "drawn" in told["detail"]
    filed = own.post(f"{house.path}/feedback", json={**item, "kind": "appeal"})
    assert (filed.status_code, filed.json()["verdict"], filed.json()["votes"]) == (201, None, False)
    assert filed.json()["appealed_at"] is not None
    assert own.post(f"{house.path}/feedback", json={**item, "kind": "appeal"}).status_code == 200
    decided = own.post(f"{house.path}/feedback", json={**item, "verdict": "harmless"})
    assert (decided.status_code, decided.json()["votes"]) == (201, True)
    assert decided.json()["decided_by"]["role"] == "tenant_admin"
    again = own.post(f"{house.path}/feedback", json={**item, "verdict": "harmless"})
    assert (again.status_code, again.json()) == (200, decided.json())
    assert (
        "Pericarp-Receipt" not in again.headers
        or again.headers["Pericarp-Receipt"] != decided.headers["Pericarp-Receipt"]
    )
    problem(own.post(f"{house.path}/feedback", json={**item, "verdict": "harmful"}), 409, "review_refused")
    assert standing(own, house)["threshold"] == 0.6


def test_an_end_users_second_item_of_a_day_does_not_vote(
    service: Served, own: httpx.Client, house: House
) -> None:
    items = screen(service, house, [0.9, 0.8], end_user="one")
    answers = [own.post(f"{house.path}/feedback", json={**item, "verdict": "harmless"}) for item in items]
    assert [(answer.status_code, answer.json()["votes"]) for answer in answers] == [(201, True), (201, False)]


def test_the_callers_own_tenant_needs_no_id(service: Served, own: httpx.Client, house: House) -> None:
    (item,) = screen(service, house, [0.9])
    assert own.get("/admin/v1/feedback").json() == own.get(f"{house.path}/feedback").json()
    assert own.post("/admin/v1/feedback", json={**item, "verdict": "harmful"}).status_code == 201
    assert own.get("/admin/v1/thresholds").json() == own.get(f"{house.path}/thresholds").json()
    assert own.get("/admin/v1/thresholds").json()["tenant"] == house.id
    assert own.post("/admin/v1/thresholds/rollback", json={}).json() == {"object": "list", "data": []}


def test_the_same_feedback_under_one_name_is_done_once(
    service: Served, own: httpx.Client, house: House
) -> None:
    (item,) = screen(service, house, [0.9])
    body, headers = {**item, "verdict": "harmful"}, {"Idempotency-Key": secrets.token_hex(8)}
    first = own.post(f"{house.path}/feedback", json=body, headers=headers)
    second = own.post(f"{house.path}/feedback", json=body, headers=headers)
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.content == second.content and second.headers["Idempotency-Replayed"] == "true"


def test_what_is_wrong_is_told_field_by_field(own: httpx.Client, house: House) -> None:
    path = f"{house.path}/feedback"
    told = problem(
        own.post(path, json={"entry": "x", "item": "", "category": "politics", "wings": 1}),
        422,
        "invalid_request",
    )
    assert set(faults(told)) == {"entry", "item", "category", "mode", "wings"}
    item = {"entry": str(uuid.uuid4()), "item": "query", "category": "hate", "mode": "text"}
    for body in (item, {**item, "kind": "appeal", "verdict": "harmful"}):
        told = problem(own.post(path, json=body), 422, "invalid_request")
        assert "a label needs a verdict" in told["detail"]
    problem(own.post(path, json={**item, "verdict": "harmful"}), 404, "review_not_found")
    rollback = f"{house.path}/thresholds/rollback"
    told = problem(own.post(rollback, json={"version": 1}), 422, "invalid_request")
    assert "needs its category and mode" in told["detail"]
    problem(own.post(rollback, json={"category": "hate", "mode": "text"}), 404, "threshold_not_found")
    for listing in ("feedback", "thresholds"):
        problem(own.get(f"{house.path}/{listing}", params={"cursor": "x"}), 422, "invalid_request")


def test_canaries_are_replaced_and_read(service: Served, own: httpx.Client, house: House) -> None:
    path = f"{house.path}/thresholds/canaries"
    canary = {"category": "hate", "mode": "text", "name": "slur-1", "score": 0.93, "detectors": DETECTORS}
    answer = own.put(path, json={"canaries": [canary]})
    assert (answer.status_code, answer.json()["data"]) == (200, [canary]), answer.text
    assert service.entries(house.name)[0]["details"] == {"count": 1}
    told = problem(own.put(path, json={"canaries": [canary, canary]}), 422, "invalid_request")
    assert "2 times" in told["detail"]
    assert own.get(path).json()["data"] == [canary]


def test_another_tenants_thresholds_are_as_unknown_as_none(
    service: Served, platform: httpx.Client, own: httpx.Client, house: House
) -> None:
    other = build_house(service, platform)
    (item,) = screen(service, other, [0.9])
    nobody = f"/admin/v1/tenants/{uuid.uuid4()}"
    for method, path, body in (
        ("GET", "thresholds", None),
        ("GET", "feedback", None),
        ("POST", "feedback", {**item, "verdict": "harmful"}),
        ("POST", "thresholds/rollback", {}),
        ("PUT", "thresholds/canaries", {"canaries": []}),
    ):
        theirs = own.request(method, f"{other.path}/{path}", json=body)
        none = own.request(method, f"{nobody}/{path}", json=body)
        problem(theirs, 404, "tenant_not_found")
        assert without_ids(theirs) == without_ids(none)
    problem(own.post(f"{house.path}/feedback", json={**item, "verdict": "harmful"}), 404, "review_not_found")
    with service.client(house.search) as search:
        assert search.get(f"{house.path}/thresholds").status_code == 401
    assert platform.get(f"{other.path}/feedback").json()["data"][0]["entry"] == item["entry"]
