"""What tells about the service: health, the model, the API's own description, the log on stderr."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import pytest

from service.api.dialects import DIALECTS, Dialect
from service.api.schemas import RerankRequest
from service.errors import TABLE
from tests.acceptance.service_process import Service, Tenant, until
from tests.assets.images import encode, photo, secretive_jpeg


@pytest.fixture(scope="module")
def openapi(service: Service) -> dict[str, Any]:
    with service.client("") as client:
        schema: dict[str, Any] = client.get("/openapi.json").json()
    return schema


def test_health_and_readiness_need_no_key(service: Service) -> None:
    with service.client("") as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        ready = client.get("/readyz")
    assert ready.status_code == 200
    told = ready.json()
    screening = told.pop("screening")
    assert {each["name"] for each in screening["detectors"] if each["active"]} >= {
        "skin",
        "open_nsfw",
        "lexicon",
    }
    model = told.pop("model")
    assert (model["id"], model["manifest"]) == ("pericarp-demo", None)
    confined = told.pop("workers")["sandbox"]
    assert confined["core"] and confined["landlock_files"] and set(confined.values()) <= {True, False}
    assert told == {
        "status": "ready",
        "checks": {"worker": True, "screening": True, "database": True, "log": True},
        "weights": "sealed",
    }


def test_the_served_model_says_what_it_is(service: Service) -> None:
    with service.client() as client:
        told = client.get("/v1/models").json()
    assert told["object"] == "list"
    (model,) = told["data"]
    assert (model["id"], model["object"]) == ("pericarp-demo", "model")
    assert re.fullmatch(r"[0-9a-f]{64}", model["digest"])
    assert 6_000_000 <= model["parameters"] <= 12_000_000
    assert model["max_model_len"] >= 8192


def test_the_api_describes_all_of_itself(openapi: dict[str, Any]) -> None:
    assert openapi["openapi"].startswith("3.1")
    assert {"/v1/rerank", "/v1/models", "/healthz", "/readyz", "/metrics"} <= set(openapi["paths"])
    assert set(openapi["paths"]["/v1/sessions"]) == {"post", "get"}
    assert set(openapi["paths"]["/v1/sessions/{session_id}"]) == {"get", "delete"}
    assert set(openapi["paths"]["/v1/rerank"]) == {"post"}
    scheme = openapi["components"]["securitySchemes"]["key"]
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            assert operation["operationId"], (path, method)
            assert operation["summary"], (path, method)
            for status, response in operation["responses"].items():
                assert HTTPStatus(int(status))
                assert response["description"]


def test_every_reference_in_the_description_leads_somewhere(openapi: dict[str, Any]) -> None:
    references = set(references_in(openapi))
    assert references
    for reference in references:
        target: Any = openapi
        for step in reference.removeprefix("#/").split("/"):
            target = target[step]
        assert isinstance(target, dict)
    assert "$defs" not in str(openapi)


def test_the_description_has_every_field_of_a_request(openapi: dict[str, Any]) -> None:
    post = openapi["paths"]["/v1/rerank"]["post"]
    content = post["requestBody"]["content"]["application/json"]
    assert content["schema"] == {"$ref": "#/components/schemas/RerankRequest"}
    request = openapi["components"]["schemas"]["RerankRequest"]
    assert set(request["properties"]) == set(RerankRequest.model_fields)
    assert set(request["properties"]) >= {
        *("model", "query", "documents", "instruction", "instruct", "top_n", "top_k"),
        *("return_documents", "max_tokens_per_doc", "truncation"),
    }
    assert set(request["required"]) == {"query", "documents"}
    assert request["properties"]["documents"]["maxItems"] == 1000
    for name, field in request["properties"].items():
        assert field["description"], name


def test_the_description_has_every_refusal(openapi: dict[str, Any]) -> None:
    responses = openapi["paths"]["/v1/rerank"]["post"]["responses"]
    # Of another method; of administrators' changes; of a caller who reads nothing.
    refusals = {meaning.status for meaning in TABLE.values()} - {405, 409, 412, 428, 499}
    assert set(map(int, responses)) >= {200, *refusals}
    for status in refusals:
        (media,) = responses[str(status)]["content"].values()
        assert media["schema"] == {"$ref": "#/components/schemas/Problem"}
    answer = responses["200"]["content"]["application/json"]["schema"]
    assert answer == {"$ref": "#/components/schemas/RerankAnswer"}


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_the_description_has_every_dialect_s_shapes(openapi: dict[str, Any], dialect: Dialect) -> None:
    for path in dialect.paths:
        (post,) = openapi["paths"][path].values()
        body = post["requestBody"]["content"]["application/json"]["schema"]
        answer = post["responses"]["200"]["content"]["application/json"]["schema"]
        for schema, model in ((body, dialect.request), (answer, dialect.answered)):
            assert schema == {"$ref": f"#/components/schemas/{model.__name__}"}
            described = openapi["components"]["schemas"][model.__name__]
            assert set(described["properties"]) == set(model.model_fields)
        refused = dict.fromkeys(("401", "422", "429", "503"), dialect.refused.__name__)
        assert {
            status: post["responses"][status]["content"]["application/json"]["schema"]["$ref"].rpartition(
                "/"
            )[2]
            for status in refused
        } == refused


def test_the_examples_of_the_description_work(service: Service, openapi: dict[str, Any]) -> None:
    post = openapi["paths"]["/v1/rerank"]["post"]
    examples = post["requestBody"]["content"]["application/json"]["examples"]
    assert service.rerank(examples["text"]["value"]).status_code == 200
    RerankRequest.model_validate(examples["images"]["value"])


def test_the_documentation_page_comes_from_here_alone(service: Service) -> None:
    with service.client("") as client:
        page = client.get("/docs")
        assert page.status_code == 200
        assert page.headers["Content-Type"].startswith("text/html")
        assert not re.findall(r"(?:https?:)?//[a-z0-9]", page.text), "something is loaded from elsewhere"
        linked = re.findall(r'(?:src|href)="(/[^"]+)"', page.text)
        assert len(linked) == 2
        for path in linked:
            part = client.get(path)
            assert part.status_code == 200
            assert len(part.content) > 10_000


def test_nothing_of_a_request_is_in_the_log_on_stderr_or_in_the_audit_log(
    service: Service, acme: Tenant
) -> None:
    words = "canary-7Fq1-text"
    picture = secretive_jpeg(encode(photo(64, 64, seed=5), "JPEG"))
    sent = base64.b64encode(picture).decode()
    torn = base64.b64encode(picture[:700]).decode()
    bodies: list[dict[str, Any]] = [
        {"query": words, "documents": [words, {"text": words, "image": sent}], "instruction": words},
        {"query": words, "documents": [{"image": torn}]},
        {"query": words, "documents": [words], "model": words},
        {"query": words, "documents": [words], words: words},
        {"query": words, "documents": [{"image": f"https://{words}.example/"}]},
        {"query": words + "\0", "documents": [words]},
    ]
    statuses = [service.rerank(body, acme.key).status_code for body in bodies]
    assert statuses == [200, 422, 404, 422, 422, 422]
    with service.client(acme.key) as client:
        client.get(f"/v1/{words}")
        client.get("/v1/models", params={"q": words})
        client.get("/v1/models", headers={"User-Agent": words, "X-Request-Id": words})
    with service.client("prc_live_" + words) as client:
        client.get("/v1/models")
    until(lambda: service.stderr.count('"action": "request"') >= len(bodies) + 4, 30)
    logged = service.stderr
    entries = str(service.entries(acme.name))
    for secret in (words, sent[:40], torn[-40:], "secret-exif", acme.key, *service.issued, service.key):
        assert secret not in logged
    for secret in (sent[:40], torn[-40:], acme.key, "127.0.0.1"):
        assert secret not in entries
    assert "Traceback" not in logged


def references_in(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "$ref":
                yield value
            else:
                yield from references_in(value)
    elif isinstance(node, list):
        for value in node:
            yield from references_in(value)
