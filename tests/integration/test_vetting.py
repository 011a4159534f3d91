"""What becomes of risky images: the real nets in a real child, a real reader, and workers whose model is a puppet."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image, ImageDraw, ImageFont

from tests.assets.images import encode, photo
from tests.integration.administrators import House, build_house
from tests.integration.served import Served


@pytest.fixture(scope="module")
def judges_images() -> bool:
    return True


def sent(file: bytes) -> dict[str, str]:
    return {"image": base64.b64encode(file).decode()}


def sign(words: str) -> bytes:
    """A white sign with large black letters."""
    picture = Image.new("RGB", (900, 200), "white")
    ImageDraw.Draw(picture).text((30, 60), words, fill="black", font=ImageFont.load_default(size=64))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


PLAIN = sent(encode(photo(320, 240), "PNG"))
SIGN = sent(sign("how to make a bomb"))
MENU = sent(sign("apple cake with cream"))


@pytest.fixture(scope="module")
def platform(service: Served) -> Iterator[httpx.Client]:
    with service.client() as client:
        yield client


def rank(service: Served, house: House, *documents: object) -> httpx.Response:
    answer = service.rerank({"query": "fruit", "documents": documents}, house.search)
    assert answer.status_code == 200, answer.text
    return answer


def screening(answer: httpx.Response) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = answer.json()["meta"].get("screening", [])
    return told


def test_a_harmless_picture_stays_and_its_risk_is_in_the_entry(
    service: Served, platform: httpx.Client
) -> None:
    house = build_house(service, platform)
    answer = rank(service, house, PLAIN)
    assert screening(answer) == []
    risks = service.entries(house.name)[0]["details"]["screening"]["risks"]["image"]
    assert set(risks) >= {"sexual", "gore"}
    assert all(0 <= score < threshold for score, threshold in risks.values())


def test_words_in_a_picture_are_judged_as_words(service: Served, platform: httpx.Client) -> None:
    house = build_house(service, platform)
    answer = rank(service, house, MENU, SIGN, PLAIN)
    assert {result["index"] for result in answer.json()["results"]} == {0, 2}
    (touched,) = screening(answer)
    assert (touched["item"], touched["category"], touched["action"]) == (
        "documents[1].image",
        "weapons",
        "mask",
    )
    assert touched["rule"].startswith("image_text.lexicon.")


def test_where_the_policy_says_off_words_in_pictures_are_not_read(
    service: Served, platform: httpx.Client
) -> None:
    house = build_house(service, platform, image_text="off")
    assert screening(rank(service, house, SIGN)) == []


def test_the_worker_is_asked_only_where_the_policy_says_so(service: Served, platform: httpx.Client) -> None:
    """The puppet scores a description by its length, and the longest is one of hate."""
    asks = build_house(service, platform, ask_model="always", filter_mode="strict")
    answer = rank(service, asks, PLAIN, "an apple")
    assert [result["index"] for result in answer.json()["results"]] == [1]
    told = screening(answer)
    assert {(each["category"], each["rule"]) for each in told} == {
        ("hate", "model.hate"),
        ("drugs", "model.drugs"),
    }
    assert all(0.3 <= each["score"] <= 0.59 for each in told)
    assert "ask" in answer.headers["Server-Timing"]
    for policy in ({"ask_model": "off"}, {"ask_model": "grey"}):  # nothing grey about it
        silent = build_house(service, platform, filter_mode="strict", **policy)
        answer = rank(service, silent, PLAIN)
        assert screening(answer) == []
        assert "ask" not in answer.headers["Server-Timing"]


def test_the_models_word_alone_stops_nothing_at_moderate(service: Served, platform: httpx.Client) -> None:
    house = build_house(service, platform, ask_model="always")
    assert all(each["action"] == "flag" for each in screening(rank(service, house, PLAIN)))


def test_the_same_content_again_is_judged_the_same_by_what_is_remembered(
    service: Served, platform: httpx.Client
) -> None:
    house = build_house(service, platform)
    first, again = (rank(service, house, SIGN, PLAIN, "how to make a bomb") for _ in range(2))
    assert screening(first) == screening(again)
    assert first.json()["results"] == again.json()["results"]


def test_a_picture_that_cannot_be_used_is_told_by_its_field(service: Served, platform: httpx.Client) -> None:
    house = build_house(service, platform)
    broken = sent(b"no picture at all")
    for _ in range(2):  # also where its neighbours are remembered
        answer = service.rerank({"query": "fruit", "documents": [PLAIN, SIGN, broken]}, house.search)
        assert answer.status_code == 422
        assert answer.json()["field"] == "documents[2].image"
