"""A search engineer ranks text and images among each other, over HTTP, against the running service."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.acceptance.service_process import REPOSITORY, Service
from tests.assets.images import encode, photo, secretive_jpeg, secretive_png, secretive_webp

SAMPLES = REPOSITORY / "docs" / "samples"
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def bare(file: bytes) -> str:
    return base64.b64encode(file).decode()


def data_url(file: bytes, form: str = "png") -> str:
    return f"data:image/{form};base64,{bare(file)}"


def sample(name: str) -> bytes:
    return (SAMPLES / name).read_bytes()


def drawn(colour: tuple[int, int, int], size: int = 64) -> bytes:
    return encode(Image.new("RGB", (size, size), colour), "PNG")


def answer(service: Service, **body: Any) -> dict[str, Any]:
    """The answer, once everything that holds for every answer was checked."""
    response = service.rerank(body)
    assert response.status_code == 200, response.text
    told: dict[str, Any] = response.json()
    scores = [result["relevance_score"] for result in told["results"]]
    places = [result["index"] for result in told["results"]]
    asked = body.get("top_n") or body.get("top_k") or len(body["documents"])
    assert scores == sorted(scores, reverse=True)
    assert all(0.0 <= score <= 1.0 for score in scores)
    assert len(places) == len(set(places)) == asked
    assert set(places) <= set(range(len(body["documents"])))
    assert told["id"] == response.headers["X-Request-Id"]
    return told


def scores_of(told: dict[str, Any]) -> dict[int, float]:
    return {result["index"]: result["relevance_score"] for result in told["results"]}


def test_the_printed_line_works_when_pasted_into_a_shell(service: Service) -> None:
    line = service.line.partition("Try: ")[2]
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    scores = [result["relevance_score"] for result in results]
    assert len(results) == 3
    assert scores == sorted(scores, reverse=True)
    assert {result["document"]["text"] for result in results} == {
        "a blue car",
        "strawberry",
        "rain and thunder",
    }


@pytest.mark.parametrize("query", ["words", "picture"])
@pytest.mark.parametrize("document", ["words", "picture"])
def test_text_and_images_are_ranked_on_either_side(service: Service, query: str, document: str) -> None:
    words = ["a red apple on a table", "a dog that runs", "an old bicycle"]
    pictures = [
        {"image": data_url(sample(f"{name}.webp"), "webp")} for name in ("red-apple", "dog", "bicycle")
    ]
    told = answer(
        service,
        query="a red fruit" if query == "words" else {"image": bare(sample("photo-chelsea.jpg"))},
        documents=words if document == "words" else pictures,
    )
    images = (query == "picture") + 3 * (document == "picture")
    assert told["meta"]["billed_units"]["images"] == images
    assert (told["usage"]["image_tokens"] > 0) == (images > 0)
    assert len(set(scores_of(told).values())) == 3, "three different documents have three scores"


def test_every_form_of_an_item_goes_into_one_mixed_request(service: Service) -> None:
    apple, cat, coffee = sample("red-apple.webp"), sample("cat.webp"), sample("photo-coffee.jpg")
    told = answer(
        service,
        query={"text": "something red to eat", "image": data_url(drawn((220, 30, 30)))},
        documents=[
            "an apple",
            {"text": "a cat"},
            {"image": bare(cat)},
            {"image": data_url(apple, "webp")},
            {"text": "coffee in a red cup", "image": data_url(coffee, "jpeg")},
            {"content": [{"type": "text", "text": "parts "}, {"type": "text", "text": "of text"}]},
            {
                "content": [
                    {"type": "image_url", "image_url": {"url": data_url(drawn((20, 200, 40)))}},
                    {"type": "text", "text": "a lime"},
                ]
            },
            {"content": [{"type": "image", "image": bare(drawn((20, 20, 200)))}]},
        ],
        return_documents=True,
    )
    assert told["meta"]["billed_units"]["images"] == 6
    documents = {result["index"]: result["document"] for result in told["results"]}
    assert documents[0] == {"text": "an apple"}
    assert documents[2] == {"image": bare(cat)}
    assert documents[4] == {"text": "coffee in a red cup", "image": data_url(coffee, "jpeg")}
    assert documents[5] == {"text": "parts of text"}


def test_the_same_item_gets_the_same_score_in_every_form(service: Service) -> None:
    file = drawn((200, 120, 10))
    told = answer(
        service,
        query="orange",
        documents=[
            {"image": bare(file)},
            {"image": data_url(file)},
            {"image": data_url(file, "webp")},
            {"content": [{"type": "image_url", "image_url": {"url": data_url(file)}}]},
            {"content": [{"type": "image_url", "image_url": data_url(file)}]},
            {"content": [{"type": "image", "image": bare(file)}]},
        ],
    )
    assert len(set(scores_of(told).values())) == 1
    assert [result["index"] for result in told["results"]] == list(range(6)), "equal scores keep their order"


def test_instruction_and_instruct_mean_the_same_and_matter(service: Service) -> None:
    ask = {"query": "jaguar", "documents": ["a fast car", "a wild cat", "a village in the rain"]}
    plain = scores_of(answer(service, **ask))
    first = scores_of(answer(service, **ask, instruction="Find the animal that the query names."))
    second = scores_of(answer(service, **ask, instruct="Find the animal that the query names."))
    both = scores_of(answer(service, **ask, instruction="Find cars.", instruct="Find cars."))
    assert first == second
    assert len({tuple(scores.values()) for scores in (plain, first, both)}) == 3


@pytest.mark.parametrize("name", ["top_n", "top_k"])
def test_only_as_many_results_as_asked_for_come_back(service: Service, name: str) -> None:
    ask: dict[str, Any] = {"query": "a bird", "documents": ["sparrow", "granite", "crow", "motorway"]}
    every = answer(service, **ask)["results"]
    best = answer(service, **ask, **{name: 2})["results"]
    assert best == every[:2]
    assert "document" not in best[0], "documents come back only where asked for"


def test_a_document_that_was_cut_is_told_in_the_warnings(service: Service) -> None:
    told = answer(service, query="rain", documents=["rain " * 60, "sun"], max_tokens_per_doc=4)
    assert told["meta"]["warnings"] == ["documents[0] was cut to fit."]
    whole = answer(service, query="rain", documents=["rain " * 60, "sun"])
    assert whole["meta"]["warnings"] == []
    assert whole["usage"]["prompt_tokens"] > told["usage"]["prompt_tokens"]


def test_a_document_that_fits_needs_no_cut(service: Service) -> None:
    ask: dict[str, Any] = {"query": "rain", "documents": ["rain " * 60, "sun"]}
    assert answer(service, **ask, truncation=False)["results"] == answer(service, **ask)["results"]


def test_a_thousand_documents_fit_into_one_request(service: Service) -> None:
    told = answer(service, query="number 512", documents=[f"no. {number}" for number in range(1000)])
    assert len(told["results"]) == 1000
    assert sorted(result["index"] for result in told["results"]) == list(range(1000))


def test_the_answer_says_who_answered_what_it_cost_and_where_the_time_went(service: Service) -> None:
    response = service.rerank(
        {"query": "tea", "documents": ["green tea", {"image": bare(drawn((9, 99, 9)))}]}
    )
    told = response.json()
    assert set(told) == {"id", "model", "results", "usage", "meta"}
    assert told["model"] == "pericarp-demo"
    assert UUID.fullmatch(told["id"])
    usage = told["usage"]
    assert usage["prompt_tokens"] == usage["total_tokens"] > usage["image_tokens"] > 0
    assert told["meta"] == {
        "api_version": {"version": "1"},
        "billed_units": {"search_units": 1, "images": 1, "input_tokens": usage["prompt_tokens"]},
        "warnings": [],
    }
    assert response.headers["X-Request-Id"] == told["id"]
    assert UUID.fullmatch(response.headers["Pericarp-Receipt"])
    stages = dict(part.split(";dur=") for part in response.headers["Server-Timing"].split(", "))
    assert {"parse", "hold", "clean", "score", "settle", "queue", "worker"} <= set(stages)
    assert all(float(elapsed_ms) >= 0 for elapsed_ms in stages.values())


def test_the_model_may_be_named_and_equal_requests_get_equal_answers(service: Service) -> None:
    ask: dict[str, Any] = {"query": "snow", "documents": ["winter", "beach"]}
    assert answer(service, **ask)["results"] == answer(service, **ask, model="pericarp-demo")["results"]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_an_image_scores_the_same_with_and_without_its_metadata(service: Service, form: str) -> None:
    picture = photo(120, 90, seed=7)
    plain = encode(picture, form)
    planted = {
        "JPEG": lambda: secretive_jpeg(plain),
        "PNG": lambda: secretive_png(plain),
        "WEBP": lambda: secretive_webp(plain, picture.size),
    }[form]()
    assert len(planted) > len(plain) + 200, "metadata was planted"
    told = answer(service, query="stripes", documents=[{"image": bare(plain)}, {"image": bare(planted)}])
    assert scores_of(told)[0] == scores_of(told)[1]
    apart = [answer(service, query="stripes", documents=[{"image": bare(file)}]) for file in (plain, planted)]
    assert scores_of(apart[0]) == scores_of(apart[1])


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_an_image_that_its_exif_turns_scores_as_the_upright_one(service: Service, form: str) -> None:
    lying = photo(120, 80, seed=3)
    turn = secretive_png if form == "PNG" else secretive_jpeg
    stored = encode(lying, form)
    seen = Image.open(io.BytesIO(stored)).convert("RGB").transpose(Image.Transpose.ROTATE_270)
    told = answer(
        service,
        query={"image": bare(encode(seen, "PNG"))},
        documents=[
            {"image": bare(encode(seen, "PNG"))},
            {"image": bare(turn(stored, orientation=6))},
            {"image": bare(stored)},
        ],
    )
    scores = scores_of(told)
    assert scores[0] == scores[1], "turned by its EXIF"
    assert scores[0] != scores[2], "not turned: another picture"


def test_the_samples_of_the_documentation_can_all_be_ranked(service: Service) -> None:
    names = sorted(path.name for path in Path(SAMPLES).iterdir() if path.suffix in (".webp", ".jpg"))
    told = answer(service, query="a pet", documents=[{"image": bare(sample(name))} for name in names])
    assert len(told["results"]) == len(names) >= 10
