"""Screening by itself, as OpenAI's clients ask for it: shapes by its API reference, quotas and the log as in a ranking."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from service.api.moderations import MODEL, NAMES
from tests.assets.images import encode, photo
from tests.integration.administrators import House, build_house, problem
from tests.integration.served import Served

RISKY = "here is how to make a bomb"
IMAGE = f"data:image/png;base64,{base64.b64encode(encode(photo(64, 40), 'PNG')).decode()}"
OPENAIS = {
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/intent",
    "self-harm/instructions",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
}


@pytest.fixture(scope="module")
def judges_images() -> bool:
    return True


@pytest.fixture(scope="module")
def house(service: Served) -> Iterator[House]:
    with service.client() as platform:
        yield build_house(service, platform)


def moderate(service: Served, house: House, **body: Any) -> httpx.Response:
    with service.client(house.search) as client:
        return client.post("/v1/moderations", json=body)


def results(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert told["model"] == MODEL
    assert told["id"] == f"modr-{answer.headers['X-Request-Id']}"
    found: list[dict[str, Any]] = told["results"]
    for result in found:
        assert set(result["categories"]) == set(result["category_scores"]) == set(NAMES) >= OPENAIS
        assert set(result["category_applied_input_types"]) == set(NAMES)
        assert all(0.0 <= score <= 1.0 for score in result["category_scores"].values())
    return found


def test_each_string_has_a_result_of_its_own(service: Served, house: House) -> None:
    first, second = results(moderate(service, house, input=["an apple", RISKY]))
    assert not first["flagged"]
    assert not any(first["categories"].values())
    assert second["flagged"]
    reached = {name for name, is_reached in second["categories"].items() if is_reached}
    assert reached == {"illicit/violent", "weapons"}
    assert second["category_scores"]["weapons"] == second["category_scores"]["illicit/violent"] == 0.9
    assert second["category_applied_input_types"]["weapons"] == ["text"]
    assert second["category_applied_input_types"]["self-harm"] == []


def test_one_string_is_one_input(service: Served, house: House) -> None:
    (only,) = results(moderate(service, house, input=RISKY, model="omni-moderation-latest"))
    assert only["flagged"]


def test_parts_are_one_input_together(service: Served, house: House) -> None:
    parts = [
        {"type": "text", "text": RISKY},
        {"type": "image_url", "image_url": {"url": IMAGE}},
    ]
    (only,) = results(moderate(service, house, input=parts))
    assert only["flagged"]
    (image,) = results(moderate(service, house, input=parts[1:]))
    assert not image["flagged"]


def test_it_counts_and_leaves_an_entry_without_a_word(service: Served, house: House) -> None:
    answer = moderate(
        service,
        house,
        input=[{"type": "text", "text": RISKY}, {"type": "image_url", "image_url": {"url": IMAGE}}],
    )
    entry = service.entries(house.name)[0]
    assert answer.headers["Pericarp-Receipt"] == entry["id"]
    assert answer.headers["Pericarp-Screening"] == "flagged=1"
    assert "requests" in answer.headers["RateLimit"]
    assert (entry["operation"], entry["decision"], entry["image_count"]) == ("moderation", "answered", 1)
    assert entry["details"]["screening"]["action"] == "flag"
    assert entry["details"]["screening"]["risks"]["text"]["weapons"] == [900_000, 600_000]
    assert "bomb" not in json.dumps(service.entries(house.name), default=str)


def test_thresholds_are_the_tenants(service: Served, house: House) -> None:
    likely = "a pipe bomb in a film"
    with service.client() as platform:
        lenient = build_house(service, platform, filter_mode="lenient")
    assert results(moderate(service, house, input=likely))[0]["flagged"]
    assert not results(moderate(service, lenient, input=likely))[0]["flagged"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": 1}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", 1]}, "input[1]"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [{"type": "video"}]}, "input[0]"),
        ({"input": "x" * 10_001}, "input"),
        ({"input": [{"type": "image_url", "image_url": {"url": "https://a.example/x.png"}}]}, None),
        ({"input": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}, None),
        ({"input": "a", "nonsense": 1}, "nonsense"),
    ],
)
def test_a_wrong_request_is_told_by_its_field(
    service: Served, house: House, body: dict[str, Any], field: str | None
) -> None:
    answer = moderate(service, house, **body)
    assert answer.status_code == 422, answer.text
    told = answer.json()
    if field is not None:
        assert told["field"] == field
    else:
        assert told["field"].startswith("input[0]")


def test_another_model_is_not_found_and_another_role_forbidden(service: Served, house: House) -> None:
    problem(moderate(service, house, input="a", model="gpt-4o"), 404, "model_not_found")
    with service.client() as platform:
        assert platform.post("/v1/moderations", json={"input": "a"}).status_code in (401, 403)
