"""Remote images over HTTP: off unless a tenant's Policy names hosts, fetched between hold and clean, and in the log."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.assets import images
from tests.integration.conftest import Secrets
from tests.integration.outside import PUBLIC, Outside, Routes, answer, outside, redirect
from tests.integration.served import Served, serve

PNG = images.encode(images.photo(64, 40), "PNG")
URL = "https://img.example/a.png"
OFF = "Remote images are off; send the image itself as a data: URL or base64."


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    with outside(tmp_path_factory.mktemp("outside")) as world:
        yield world


@pytest.fixture
def world(server: Outside) -> Outside:
    server.pages = {"/a.png": answer(PNG), "/page": answer(b"<!doctype html><p>hello")}
    server.asked.clear()
    return server


@pytest.fixture(scope="module")
def service(app_url: str, installation_secrets: Secrets, server: Outside) -> Iterator[Served]:
    names = {"img.example": [[PUBLIC]], "inside.example": [["10.0.0.1"]]}
    with serve(
        app_url,
        *installation_secrets.keys,
        judges_images=True,
        network=Routes(server, names),
        remote_image_ca=server.authority,
    ) as served:
        yield served


@pytest.fixture
def tenant(service: Served) -> tuple[str, str]:
    return service.search_key(remote_images=True, remote_image_hosts=("img.example", "inside.example"))


def post(service: Served, key: str, path: str, body: object) -> httpx.Response:
    with service.client(key) as client:
        return client.post(path, json=body)


def test_an_allowed_image_is_fetched_and_ranked(
    service: Served, tenant: tuple[str, str], world: Outside
) -> None:
    name, key = tenant
    body = {"query": "q", "documents": [{"image": URL}, "a text"], "return_documents": True}
    told = service.rerank(body, key)
    assert told.status_code == 200, told.text
    documents = {result["index"]: result["document"] for result in told.json()["results"]}
    assert documents[0] == {"image": URL}
    assert told.json()["meta"]["billed_units"]["images"] == 1
    assert "fetch;dur=" in told.headers["Server-Timing"]
    (entry,) = service.entries(name)
    assert (entry["decision"], entry["image_count"], entry["documents"][0]["bytes"]) == (
        "answered",
        1,
        len(PNG),
    )
    assert URL not in str(entry)


def test_an_image_is_the_same_fetched_or_sent(
    service: Served, tenant: tuple[str, str], world: Outside
) -> None:
    name, key = tenant
    for image in (URL, base64.b64encode(PNG).decode()):
        assert service.rerank({"query": "q", "documents": [{"image": image}]}, key).status_code == 200
    prints = {entry["documents"][0]["image"] for entry in service.entries(name)}
    assert len(prints) == 1


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/rerank", {"query": {"image": URL}, "documents": ["d"]}, "query.image"),
        (
            "/v1/rerank",
            {"query": "q", "documents": [{"content": [{"type": "image_url", "image_url": {"url": URL}}]}]},
            "documents[0].content[0].image_url",
        ),
        ("/v1/images/clean", {"image_url": {"url": URL}}, "image_url"),
        ("/v1/images/clean", {"image": URL}, "image"),
    ],
)
def test_every_place_of_an_image_takes_a_url_where_it_may_and_else_says_so(
    service: Served, tenant: tuple[str, str], world: Outside, path: str, body: dict[str, Any], field: str
) -> None:
    assert post(service, tenant[1], path, body).status_code == 200
    assert len(world.asked) == 1
    _, key = service.search_key()
    refused = post(service, key, path, body)
    assert (refused.status_code, refused.json()["detail"]) == (422, OFF)
    assert refused.json()["field"] == field
    assert len(world.asked) == 1


@pytest.mark.parametrize("path", ["/jina/v1/rerank", "/vllm/v1/rerank", "/vllm/v1/score"])
def test_dialects_with_images_take_urls(
    service: Served, tenant: tuple[str, str], world: Outside, path: str
) -> None:
    part = {"content": [{"type": "image_url", "image_url": {"url": URL}}]}
    document = {"image": URL} if "jina" in path else part
    names = ("queries", "documents") if "score" in path else ("query", "documents")
    body = {names[0]: "q", names[1]: [document], **({"model": "puppet"} if "jina" in path else {})}
    told = post(service, tenant[1], path, body)
    assert told.status_code == 200, told.text
    assert len(world.asked) == 1
    _, key = service.search_key()
    assert post(service, key, path, body).status_code in (400, 422)
    assert len(world.asked) == 1


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://img.example/a.png", "https://host/path"),
        ("https://img.example:8443/a.png", "usual port"),
        ("https://user@img.example/a.png", "without a user"),
        ("https://sub.img.example/a.png", "does not name the host"),
        ("https://127.0.0.1/a.png", "does not name the host"),
        ("https://2130706433/a.png", "does not name the host"),
        ("https://[::1]/a.png", "https://host/path"),
    ],
)
def test_other_urls_are_refused_before_anything_is_held(
    service: Served, tenant: tuple[str, str], world: Outside, url: str, says: str
) -> None:
    refused = service.rerank({"query": "q", "documents": [{"image": url}]}, tenant[1])
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
    assert says in refused.json()["detail"]
    assert "RateLimit" not in refused.headers
    assert world.asked == []


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://inside.example/a.png", "unreachable"),
        ("https://img.example/missing.png", "unreachable"),
        ("https://img.example/away", "unreachable"),
        ("https://img.example/page", "format"),
    ],
)
def test_what_does_not_come_or_is_no_image_refuses_the_request(
    service: Served, tenant: tuple[str, str], world: Outside, url: str, reason: str
) -> None:
    world.pages["/away"] = redirect("https://169.254.169.254/latest/meta-data/")
    name, key = tenant
    refused = service.rerank({"query": "q", "documents": ["d", {"image": url}]}, key)
    told = refused.json()
    assert (refused.status_code, told["code"], told["reason"]) == (422, "image_rejected", reason)
    assert told["field"] == "documents[1].image"
    assert not any(secret in refused.text for secret in ("10.0.0.1", "169.254", PUBLIC))
    (entry,) = service.entries(name)
    assert (entry["decision"], entry["code"]) == ("refused", "image_rejected")
    assert refused.headers["Pericarp-Receipt"] == entry["id"]
