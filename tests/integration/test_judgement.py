"""What a tenant's policy does with risky texts, over HTTP, around workers whose model is a puppet.

The puppet scores a document by the length of its text, so that the order of a ranking is known.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from tenants.access import TenantId
from tests.integration.administrators import House, build_house, problem
from tests.integration.served import Served, until

RISKY = "here is how to make a bomb out of things from the kitchen, and it is a long text indeed"
PLAIN = ("an apple", "a pear and a plum", "a bowl of cherries on a table")


@pytest.fixture(scope="module")
def judges_images() -> bool:
    return True


@pytest.fixture(scope="module")
def platform(service: Served) -> Iterator[httpx.Client]:
    with service.client() as client:
        yield client


def house_of(service: Served, platform: httpx.Client, **policy: object) -> House:
    return build_house(service, platform, **policy)


@pytest.fixture(scope="module")
def house(service: Served, platform: httpx.Client) -> House:
    return house_of(service, platform)


def rank(service: Served, house: House, *documents: str, **body: Any) -> httpx.Response:
    return service.rerank({"query": "fruit", "documents": documents, **body}, house.search)


def indices(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    return [result["index"] for result in answer.json()["results"]]


def entry(service: Served, house: House) -> dict[str, Any]:
    return service.entries(house.name)[0]


def users(service: Served, house: House) -> set[str]:
    """Fingerprints of whose texts were counted."""

    async def read() -> set[str]:
        async with service.desk.database.transaction(TenantId(uuid.UUID(house.id))) as connection:
            return set(await connection.scalars(text("select end_user from pericarp.traffic_user")))

    found: set[str] = service.wait(read())
    return found


def test_what_is_harmless_is_not_mentioned(service: Served, house: House) -> None:
    answer = rank(service, house, *PLAIN)
    assert indices(answer) == [2, 1, 0]
    assert "screening" not in answer.json()["meta"]
    assert "Pericarp-Screening" not in answer.headers
    assert entry(service, house)["details"]["screening"] == {"action": "allow"}


def test_a_risky_document_is_masked_and_the_others_keep_their_indices(service: Served, house: House) -> None:
    answer = rank(service, house, PLAIN[0], RISKY, PLAIN[1], PLAIN[2])
    assert indices(answer) == [3, 2, 0]
    told = answer.json()["meta"]
    (touched,) = told["screening"]
    assert touched == {
        "item": "documents[1]",
        "category": "weapons",
        "score": 0.9,
        "threshold": 0.6,
        "rule": "lexicon.weapons-en",
        "action": "mask",
    }
    assert told["warnings"] == ["documents[1] was left out: its content is not allowed here."]
    assert answer.headers["Pericarp-Screening"] == "masked=1"
    screening = entry(service, house)["details"]["screening"]
    assert screening["action"] == "mask"
    assert screening["risks"] == {"text": {"weapons": [900_000, 600_000]}}
    assert screening["touched"] == [
        {
            "item": "documents[1]",
            "category": "weapons",
            "score": 900_000,
            "threshold": 600_000,
            "rule": "lexicon.weapons-en",
            "action": "mask",
        }
    ]
    assert [place[0] for place in entry(service, house)["places"]] == [3, 2, 0]


def test_top_n_counts_what_is_left(service: Served, house: House) -> None:
    assert indices(rank(service, house, RISKY, *PLAIN, top_n=2)) == [3, 2]


def test_where_every_document_is_masked_the_ranking_is_empty(service: Served, house: House) -> None:
    answer = rank(service, house, RISKY, f"{RISKY} again")
    assert indices(answer) == []
    assert answer.json()["usage"]["prompt_tokens"] == 0
    assert answer.headers["Pericarp-Screening"] == "masked=2"


def test_a_risky_query_is_refused_and_told_without_its_words(service: Served, house: House) -> None:
    answer = service.rerank({"query": RISKY, "documents": list(PLAIN)}, house.search)
    told = problem(answer, 403, "content_refused")
    assert (told["field"], told["reason"]) == ("query", "weapons")
    assert [(each["item"], each["action"]) for each in told["screening"]] == [("query", "refuse")]
    assert "bomb" not in answer.text
    assert answer.headers["Pericarp-Screening"] == "refused=1"
    refused = entry(service, house)
    assert (refused["decision"], refused["code"], refused["status"]) == ("denied", "content_refused", 403)
    assert refused["id"] == answer.headers["Pericarp-Receipt"]
    assert refused["details"]["screening"]["action"] == "refuse"
    assert "bomb" not in json.dumps(service.entries(house.name), default=str)


@pytest.mark.parametrize(
    ("action", "order", "header"),
    [
        ("allow", [1, 2, 0], None),
        ("flag", [1, 2, 0], "flagged=1"),
        ("demote", [2, 0, 1], "demoted=1"),
        ("mask", [2, 0], "masked=1"),
    ],
)
def test_each_action_does_what_it_says(
    service: Served, platform: httpx.Client, action: str, order: list[int], header: str | None
) -> None:
    house = house_of(service, platform, risk_actions={"weapons": action})
    answer = rank(service, house, PLAIN[0], RISKY, PLAIN[1])
    assert indices(answer) == order
    assert answer.headers.get("Pericarp-Screening") == header


def test_a_tenant_may_refuse_the_request_for_a_document(service: Served, platform: httpx.Client) -> None:
    house = house_of(service, platform, risk_actions={"weapons": "refuse"})
    told = problem(rank(service, house, *PLAIN, RISKY), 403, "content_refused")
    assert told["field"] == "documents[3]"


def test_strict_and_lenient_tenants_differ_on_the_same_text(service: Served, platform: httpx.Client) -> None:
    strict = house_of(service, platform, filter_mode="strict")
    moderate = house_of(service, platform, filter_mode="moderate")
    lenient = house_of(service, platform, filter_mode="lenient")
    likely, suggestive = "a pipe bomb in a film", "what a bomb of a party"
    told = [indices(rank(service, each, "fruit", likely, suggestive)) for each in (strict, moderate, lenient)]
    assert [sorted(each) for each in told] == [[0], [0, 2], [0, 1, 2]]


def test_where_scores_are_in_the_requests_order_a_gap_is_a_refusal(service: Served, house: House) -> None:
    with service.client(house.search) as client:
        answer = client.post("/v1/score", json={"queries": "fruit", "documents": [PLAIN[0], RISKY]})
        assert answer.status_code == 403
        assert "documents[1]" in answer.json()["error"]["message"]
        fine = client.post("/v1/score", json={"queries": "fruit", "documents": list(PLAIN)})
        assert [each["index"] for each in fine.json()["data"]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/cohere/v2/rerank", {"model": "puppet", "query": "q", "documents": [PLAIN[0], RISKY]}),
        ("/jina/v1/rerank", {"model": "puppet", "query": "q", "documents": [PLAIN[0], RISKY]}),
        ("/voyage/v1/rerank", {"model": "puppet", "query": "q", "documents": [PLAIN[0], RISKY]}),
        ("/vllm/rerank", {"query": "q", "documents": [PLAIN[0], RISKY]}),
    ],
)
def test_every_dialect_tells_by_its_header(service: Served, house: House, path: str, body: object) -> None:
    with service.client(house.search) as client:
        answer = client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        results = told["results"] if "results" in told else told["data"]
        assert [result["index"] for result in results] == [0]
        assert answer.headers["Pericarp-Screening"] == "masked=1"


def test_an_instruction_is_screened_but_may_speak_of_ranking(service: Served, house: House) -> None:
    told = problem(rank(service, house, *PLAIN, instruction=RISKY), 403, "content_refused")
    assert told["field"] == "instruction"
    spoken = "Judge by relevance: rank every passage that answers the query highest."
    assert "Pericarp-Screening" not in rank(service, house, *PLAIN, instruction=spoken).headers


def test_a_tenants_own_words_are_in_force_without_a_restart(service: Served, platform: httpx.Client) -> None:
    house, other = house_of(service, platform), house_of(service, platform)
    document = "a parcel of blue sugar for the weekend"
    assert indices(rank(service, house, document)) == [0]
    changed = platform.patch(
        f"{house.path}/policy", json={"lexicons": {"drugs": ["Blue Sugar"]}}, headers={"If-Match": "*"}
    )
    assert changed.status_code == 200, changed.text
    time.sleep(2.0)
    answer = rank(service, house, document)
    assert indices(answer) == []
    assert answer.json()["meta"]["screening"][0]["rule"] == "lexicon.own-drugs"
    assert "blue sugar" not in answer.text.lower()
    assert indices(rank(service, other, document)) == [0]


def test_metrics_count_risks_by_category_and_action(service: Served, house: House) -> None:
    rank(service, house, *PLAIN, RISKY)
    with service.client() as client:
        told = client.get("/metrics").text
    assert 'pericarp_risks_total{action="mask",category="weapons"}' in told


def test_readiness_tells_detectors_and_confinement(service: Served) -> None:
    with service.client("") as client:
        screening = client.get("/readyz").json()["screening"]
    names = {each["name"] for each in screening["detectors"] if each["active"]}
    assert "lexicon" in names
    assert screening["sandbox"]["texts"]["no_new_privs"] is True
    assert screening["sandbox"]["images"]["no_new_privs"] is True


def test_items_are_of_whom_the_backend_names(service: Served, platform: httpx.Client) -> None:
    house = house_of(service, platform)

    def seen(*names: str) -> None:
        for name in names:
            answer = service.rerank(
                {"query": "a text", "documents": [RISKY]},
                house.search,
                headers={b"Pericarp-End-User": name.encode()},
            )
            assert answer.status_code == 200, answer.text

    seen("ann", "ben", "ann")
    prints = [each["details"]["end_user"] for each in service.entries(house.name)[:3]]
    assert prints[0] == prints[2] != prints[1]
    assert {len(each) for each in prints} == {43}, "a fingerprint"
    rank(service, house, RISKY)
    assert "end_user" not in entry(service, house)["details"]
    until(lambda: len(users(service, house)) == 3)  # written in batches
    assert set(prints) < users(service, house), "ann, ben, and the key"


@pytest.mark.parametrize("name", ["two words", "", "x" * 256, "Ünal"])
def test_an_end_user_who_is_no_name_is_refused(service: Served, house: House, name: str) -> None:
    answer = service.rerank(
        {"query": "a text", "documents": ["a"]},
        house.search,
        headers={b"Pericarp-End-User": name.encode()},
    )
    assert answer.status_code == 422
    assert (answer.json()["code"], answer.json()["field"]) == ("invalid_request", "Pericarp-End-User")
    if name:
        assert name not in answer.text


def test_no_word_of_a_text_is_in_any_entry(service: Served, house: House) -> None:
    told = json.dumps(service.entries(house.name), default=str)
    assert not any(word in told for word in ("kitchen", "cherries", "apple"))
