"""The clients of Cohere, Jina, Voyage and vLLM, as they are, against the running service."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cohere
import httpx
import pytest
import voyageai
from cohere.core.api_error import ApiError
from voyageai.client import Client as VoyageClient

from tests.acceptance.service_process import REPOSITORY, Service, Tenant
from tests.assets.images import encode, photo
from tests.closed_sessions import closed_sessions
from tests.conftest import BODY_LIMIT_BYTES

SAMPLES = REPOSITORY / "docs" / "samples"
API = (REPOSITORY / "docs" / "api.md").read_text()
SNIPPETS = {
    heading: re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    for heading, section in re.findall(r"^### (\w+)\n(.*?)(?=^##)", API, flags=re.DOTALL | re.MULTILINE)
}
QUERY = "red fruit"
DOCUMENTS = ["a blue car", "strawberry", "rain and thunder"]


def image(name: str) -> str:
    return base64.b64encode((SAMPLES / name).read_bytes()).decode()


def part(name: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/webp;base64,{image(name)}"}}


@pytest.fixture(scope="module")
def used_up(service: Service) -> Tenant:
    """A tenant whose one request of this month is spent."""
    tenant = service.make_tenant("used-up")
    service.tell("tenant", "policy", tenant.name, "requests_per_month=1")
    assert service.rerank({"query": "q", "documents": ["a"]}, tenant.key).status_code == 200
    return tenant


@pytest.fixture(scope="module")
def narrow(service: Service, acme: Tenant) -> str:
    """A key that may not rank."""
    key: str = service.tell("key", "create", acme.name, "--scope", "sessions")["key"]
    service.issued.append(key)
    return key


@pytest.fixture(autouse=True)
def sessions() -> Iterator[None]:
    with closed_sessions():
        yield


def cohere_v2(service: Service, key: str | None = None) -> cohere.ClientV2:
    return cohere.ClientV2(key or service.key, base_url=f"{service.url}/cohere", max_retries=0)


def cohere_v1(service: Service, key: str | None = None) -> cohere.Client:
    return cohere.Client(key or service.key, base_url=f"{service.url}/cohere", max_retries=0)


def voyage(service: Service, key: str | None = None) -> VoyageClient:
    return VoyageClient(
        api_key=key or service.key, base_url=f"{service.url}/voyage/v1", max_retries=1, timeout=60
    )


def post(service: Service, path: str, body: Any, key: str | None = None) -> httpx.Response:
    with service.client(key) as client:
        return client.post(path, json=body)


def answered(service: Service, path: str, body: Any) -> Any:
    answer = post(service, path, body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def check_order(scores: list[float]) -> None:
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)


@pytest.mark.parametrize(
    ("heading", "snippet"),
    [(heading, snippet) for heading, snippets in SNIPPETS.items() for snippet in snippets],
)
def test_the_snippets_of_the_api_page_work_when_pasted(service: Service, heading: str, snippet: str) -> None:
    assert len(snippet.splitlines()) <= 8, "an import, a blank, and six lines"
    done = subprocess.run(
        [sys.executable, "-c", snippet.replace("http://127.0.0.1:8080", service.url)],
        cwd=REPOSITORY,
        env={**os.environ, "KEY": service.key},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"0\.\d+", done.stdout), done.stdout


def test_every_vendor_has_a_snippet() -> None:
    assert {name: len(found) for name, found in SNIPPETS.items() if found} == {
        "Cohere": 1,
        "Jina": 1,
        "Voyage": 1,
        "vLLM": 2,
    }


# Cohere


@pytest.mark.parametrize("model", ["pericarp-demo", "rerank-v3.5"])
@pytest.mark.parametrize("path", ["/cohere", ""])
def test_cohere_s_v2_client_ranks(service: Service, model: str, path: str) -> None:
    with cohere.ClientV2(service.key, base_url=service.url + path, max_retries=0) as client:
        answer = client.rerank(model=model, query=QUERY, documents=DOCUMENTS, top_n=2)
    assert answer.results[0].index == 1
    assert len(answer.results) == 2
    check_order([result.relevance_score for result in answer.results])
    assert answer.meta is not None and answer.meta.api_version is not None
    assert answer.meta.api_version.version == "2"
    union = service.rerank({"query": QUERY, "documents": DOCUMENTS}).json()["results"]
    assert [result.relevance_score for result in answer.results] == pytest.approx(
        [result["relevance_score"] for result in union[:2]], abs=1e-6
    )


def test_cohere_s_v1_client_gets_whole_documents_back(service: Service) -> None:
    documents = [{"title": "car", "text": "strawberry"}, {"title": "strawberry", "text": "car"}]
    with cohere_v1(service) as client:
        answer = client.rerank(query=QUERY, documents=documents, return_documents=True)
        read = client.rerank(query=QUERY, documents=documents, rank_fields=["title"], max_chunks_per_doc=10)
    assert answer.results[0].index == 0
    assert answer.results[0].document is not None
    assert answer.results[0].document.dict() == documents[0]
    assert read.results[0].index == 1
    assert read.results[0].document is None
    raw = answered(service, "/cohere/v1/rerank", {"query": QUERY, "documents": documents})
    assert all(set(result) == {"index", "relevance_score"} for result in raw["results"])


def test_cohere_s_clients_raise_their_own_errors(service: Service, used_up: Tenant, narrow: str) -> None:
    def rank(client: Any, **fields: Any) -> None:
        with client:
            client.rerank(**{"model": "pericarp-demo", "query": QUERY, "documents": DOCUMENTS, **fields})

    for make in (cohere_v2, cohere_v1):
        with pytest.raises(cohere.UnauthorizedError) as unauthorized:
            rank(make(service, "prc_live_wrong"))
        assert unauthorized.value.body["message"] == "invalid api token"
        with pytest.raises(cohere.ForbiddenError):
            rank(make(service, narrow))
        with pytest.raises(cohere.NotFoundError) as unknown:
            rank(make(service), model="rerank-v9")
        assert "model 'rerank-v9' not found" in unknown.value.body["message"]
        with pytest.raises(cohere.BadRequestError) as bad:
            rank(make(service), documents=[])
        assert bad.value.body["message"] == "invalid request: list of documents must not be empty"
        with pytest.raises(cohere.UnprocessableEntityError) as odd:
            rank(make(service), request_options={"additional_body_parameters": {"top_k": 1}})
        assert "unknown field: parameter 'top_k'" in odd.value.body["message"]
        with pytest.raises(cohere.TooManyRequestsError) as many:
            rank(make(service, used_up.key))
        assert int((many.value.headers or {})["retry-after"]) >= 1
        assert many.value.body["id"] == (many.value.headers or {})["x-request-id"]
        with pytest.raises(ApiError) as large:
            rank(make(service), documents=["x" * (BODY_LIMIT_BYTES + 1)])
        assert large.value.status_code == 413
        assert isinstance(large.value.body, dict) and set(large.value.body) == {"id", "message"}


# Voyage


@pytest.mark.parametrize("model", ["pericarp-demo", "rerank-2.5"])
def test_voyage_s_client_ranks(service: Service, model: str) -> None:
    answer = voyage(service).rerank(QUERY, DOCUMENTS, model=model, top_k=2)
    assert answer.results[0].document == "strawberry"
    assert len(answer.results) == 2
    check_order([result.relevance_score for result in answer.results])
    assert answer.total_tokens > 0
    assert len(voyage(service).rerank(QUERY, ["a", " "], model=model, top_k=5).results) == 2


def test_voyage_s_client_raises_its_own_errors(service: Service, used_up: Tenant, narrow: str) -> None:
    with pytest.raises(voyageai.error.AuthenticationError) as unknown:
        voyage(service, "prc_live_wrong").rerank(QUERY, DOCUMENTS, model="rerank-2.5")
    assert str(unknown.value) == "Provided API key is invalid."
    for documents, model in (([], "rerank-2.5"), (["a", ""], "rerank-2.5"), (DOCUMENTS, "rerank-9")):
        with pytest.raises(voyageai.error.InvalidRequestError):
            voyage(service).rerank(QUERY, documents, model=model)
    with pytest.raises(voyageai.error.RateLimitError) as many:
        voyage(service, used_up.key).rerank(QUERY, DOCUMENTS, model="rerank-2.5")
    assert int(many.value.headers["retry-after"]) >= 1
    for key, documents in ((narrow, DOCUMENTS), (service.key, ["x" * (BODY_LIMIT_BYTES + 1)])):
        with pytest.raises(voyageai.error.APIError) as other:
            voyage(service, key).rerank(QUERY, documents, model="rerank-2.5")
        assert other.value.http_status in (403, 413)
        assert set(other.value.json_body) == {"detail"}


# Jina, as its own examples and LangChain's client send it


@pytest.mark.parametrize("model", ["pericarp-demo", "jina-reranker-m0"])
def test_jina_s_requests_rank_images_and_texts(service: Service, model: str) -> None:
    documents = [
        {"image": image("car.webp")},
        {"image": image("red-apple.webp")},
        {"text": "thunder"},
        "rain",
    ]
    body = {"model": model, "query": "an apple", "documents": documents, "top_n": 3}
    answer = answered(service, "/jina/v1/rerank", body)
    assert set(answer) == {"model", "object", "usage", "results"}
    assert answer["model"] == "pericarp-demo"
    assert answer["results"][0]["index"] == 1
    check_order([result["relevance_score"] for result in answer["results"]])
    assert len(answer["results"]) == 3
    for result in answer["results"]:
        sent = documents[result["index"]]
        assert result["document"] == ({"text": sent} if isinstance(sent, str) else sent)
    told = answered(service, "/jina/v1/rerank", {**body, "return_documents": False})
    assert all(set(result) == {"index", "relevance_score"} for result in told["results"])
    by_image = post(service, "/jina/v1/rerank", {**body, "query": {"image": image("red-apple.webp")}})
    assert by_image.status_code == 200


# vLLM, as its own examples send it


def test_vllm_s_rerank_example(service: Service) -> None:
    with service.client() as client:
        model = client.get("/vllm/v1/models").json()["data"][0]["id"]
    assert model == "pericarp-demo"
    documents = [
        "a blue car",
        {"content": [part("red-apple.webp")]},
        {"content": [{"type": "text", "text": "rain"}]},
    ]
    body = {"model": model, "query": "an apple", "documents": documents}
    for path in ("/vllm/rerank", "/vllm/v1/rerank", "/vllm/v2/rerank"):
        answer = answered(service, path, body)
        assert set(answer) == {"id", "model", "usage", "results"}
        assert answer["results"][0]["index"] == 1
        assert [
            each["document"] for each in sorted(answer["results"], key=lambda each: int(each["index"]))
        ] == [
            {"text": "a blue car", "multi_modal": None},
            *({"text": None, "multi_modal": side["content"]} for side in documents if isinstance(side, dict)),
        ]
    whole = {"content": [{"type": "text", "text": "an apple"}, part("red-apple.webp")]}
    answer = answered(service, "/vllm/rerank", {"query": whole, "documents": whole, "top_n": 5})
    assert len(answer["results"]) == 1
    assert len(answered(service, "/vllm/rerank", {"query": "q", "documents": ["", " ", "a"]})["results"]) == 3


def test_vllm_s_score_example(service: Service) -> None:
    for path in ("/score", "/v1/score", "/vllm/score", "/vllm/v1/score"):
        answer = answered(service, path, {"text_1": QUERY, "text_2": DOCUMENTS})
        assert set(answer) == {"id", "object", "created", "model", "data", "usage"}
        assert [each["index"] for each in answer["data"]] == [0, 1, 2]
    ranked = answered(service, "/vllm/rerank", {"query": QUERY, "documents": DOCUMENTS})["results"]
    by_rank = {each["index"]: each["relevance_score"] for each in ranked}
    assert [each["score"] for each in answer["data"]] == pytest.approx(
        [by_rank[at] for at in range(3)], abs=1e-6
    )


def test_pairs_score_as_they_would_one_by_one_and_are_one_request(service: Service) -> None:
    tenant = service.make_tenant("pairs")
    service.tell("tenant", "policy", tenant.name, "requests_per_month=4")
    apple = {"content": [part("red-apple.webp")]}
    pairs: list[tuple[Any, Any]] = [
        ("an apple", apple),
        (apple, "an apple"),
        ("an apple", "rain"),
        ("weather", "rain"),
        (apple, "thunder"),
    ]
    queries, documents = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    answer = post(service, "/v1/score", {"data_1": queries, "data_2": documents}, tenant.key)
    assert answer.status_code == 200, answer.text
    scores = [each["score"] for each in answer.json()["data"]]
    alone = [
        answered(service, "/v1/score", {"data_1": [query], "data_2": [document]})["data"][0]["score"]
        for query, document in pairs
    ]
    assert scores == pytest.approx(alone, abs=0.02), "bf16 packs round differently"
    assert len(set(scores)) == len(pairs)
    (entry,) = (each for each in service.entries(tenant.name) if each["operation"] == "score")
    assert (entry["operation"], entry["code"], entry["image_count"]) == ("score", "ok", 3)
    assert [index for index, _ in entry["places"]] == [0, 1, 2, 3, 4]
    assert (entry["document_count"], entry["query"]) == (5, None)
    prints = entry["details"]["queries"]
    assert (prints[0], prints[1]) == (prints[2], prints[4])
    assert prints[1]["image"] == entry["documents"][0]["image"]
    assert entry["input_tokens"] == answer.json()["usage"]["prompt_tokens"]
    again = [
        post(service, "/v1/score", {"data_1": "q", "data_2": "d"}, tenant.key).status_code for _ in range(4)
    ]
    assert again == [200, 200, 200, 429], "five pairs were one request of four"


# Errors, before there is a route too

SHAPES: dict[str, Any] = {
    "/cohere/v1/rerank": {"id", "message"},
    "/cohere/v2/rerank": {"id", "message"},
    "/v2/rerank": {"id", "message"},
    "/jina/v1/rerank": {"detail"},
    "/voyage/v1/rerank": {"detail"},
    "/vllm/rerank": {"error"},
    "/v1/score": {"error"},
}
FIRST = {"/v1/score": "/score", "/v2/rerank": "/v2/nothing"}


@contextmanager
def asked(service: Service, key: str | None, **headers: str) -> Iterator[httpx.Client]:
    with service.client(key, **headers) as client:
        yield client


@pytest.mark.parametrize("path", SHAPES)
def test_every_error_of_the_door_is_in_the_dialect_of_the_path(
    service: Service, used_up: Tenant, narrow: str, path: str
) -> None:
    shape = SHAPES[path]
    body: Any = {"model": "pericarp-demo", "query": "q", "documents": ["a"]}
    if shape == {"error"} and "score" in path:
        body = {"queries": "q", "documents": ["a"]}
    first = FIRST.get(path, path.rpartition("/")[0] + "/nothing")
    nothing = {"/v1/score": "/vllm/nothing"}.get(path, first)
    with asked(service, "") as stranger, asked(service, None) as client:
        answers = {
            401: stranger.post(path, json=body),
            404: client.post(nothing, json=body),
            405: client.get(path),
            413: client.post(path, content=b" " * (BODY_LIMIT_BYTES + 1)),
        }
    answers[403] = post(service, path, body, narrow)
    answers[429] = post(service, path, body, used_up.key)
    for status, answer in answers.items():
        assert answer.status_code == status, answer.text
        assert answer.headers["Content-Type"] == "application/json"
        told = answer.json()
        assert set(told) == shape
        if shape == {"error"}:
            assert set(told["error"]) == {"message", "type", "param", "code"}
            assert told["error"]["code"] == status
        if "id" in shape:
            assert told["id"] == answer.headers["X-Request-Id"]
            if status == 401:
                assert told["message"] == "no api key supplied"
    assert answers[401].headers["WWW-Authenticate"] == "Bearer"
    assert answers[405].headers["Allow"] == "POST"
    assert int(answers[429].headers["Retry-After"]) >= 1
    assert "RateLimit" in answers[429].headers


@pytest.mark.parametrize(
    ("path", "status", "body"),
    [
        (
            "/jina/v1/rerank",
            422,
            {"model": "pericarp-demo", "query": "q", "documents": ["a", {"image": "AAAA"}]},
        ),
        (
            "/vllm/rerank",
            400,
            {"query": "q", "documents": ["a", {"content": [{"type": "image_url", "image_url": "AAAA"}]}]},
        ),
        (
            "/v1/score",
            400,
            {"data_1": [{"content": [{"type": "image", "image": "AAAA"}]}, "b"], "data_2": ["a", "b"]},
        ),
    ],
)
def test_an_image_that_is_none_is_refused_by_its_place(
    service: Service, path: str, status: int, body: Any
) -> None:
    answer = post(service, path, body)
    assert answer.status_code == status
    assert "JPEG, PNG and WebP" in answer.text or "format" in answer.text or "image" in answer.text
    if "error" in answer.json():
        assert answer.json()["error"]["param"] in (
            "documents[1].content[0].image_url",
            "data_1[0].content[0].image_url",
        )


@pytest.mark.parametrize(
    "url", ["https://example.com/a.png", "http://169.254.169.254/", "file:///etc/passwd"]
)
def test_no_dialect_fetches_anything(service: Service, url: str) -> None:
    piece = {"content": [{"type": "image_url", "image_url": {"url": url}}]}
    for path, body in (
        ("/jina/v1/rerank", {"model": "pericarp-demo", "query": {"image": url}, "documents": ["a"]}),
        ("/vllm/rerank", {"query": "q", "documents": [piece]}),
        ("/score", {"queries": piece, "documents": ["a"]}),
    ):
        answer = post(service, path, body)
        assert answer.status_code in (400, 422)
        assert "Remote images are off" in answer.text


def test_a_model_that_its_tenant_may_not_use_is_not_found_whether_it_is_named_or_not(
    service: Service,
) -> None:
    tenant = service.make_tenant("picky")
    service.tell("tenant", "policy", tenant.name, 'allowed_models=["another"]')
    body = {"query": "q", "documents": ["a"]}
    assert post(service, "/v1/rerank", body, tenant.key).status_code == 404
    assert post(service, "/cohere/v1/rerank", body, tenant.key).status_code == 404
    assert post(service, "/vllm/rerank", body, tenant.key).status_code == 404
    named = {**body, "model": "rerank-2.5"}
    assert post(service, "/voyage/v1/rerank", named, tenant.key).status_code == 400
    assert post(service, "/jina/v1/rerank", named, tenant.key).status_code == 422


def test_an_alias_is_no_name_on_the_bare_path(service: Service) -> None:
    answer = service.rerank({"model": "rerank-v3.5", "query": "q", "documents": ["a"]})
    assert (answer.status_code, answer.json()["code"]) == (404, "model_not_found")


def test_the_picture_of_a_photo_goes_through_a_dialect_like_any_other(service: Service) -> None:
    file = base64.b64encode(encode(photo(64, 48), "JPEG")).decode()
    body = {"model": "jina-reranker-m0", "query": "a photo", "documents": [{"image": file}]}
    answer = post(service, "/jina/v1/rerank", body)
    assert answer.status_code == 200
    assert answer.json()["usage"]["total_tokens"] > 0
