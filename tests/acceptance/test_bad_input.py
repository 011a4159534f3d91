"""Whatever is wrong with a request: a 4xx that says what, where and how much, and one entry in the log.

All of it is sent once, by one tenant, in the order of `CASES`; each test then looks at one answer.
"""

from __future__ import annotations

import base64
import http.client
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.acceptance.service_process import Service, Tenant
from tests.assets.images import animation, encode, huge_png, photo
from tests.conftest import BODY_LIMIT_BYTES, IMAGE_LIMIT_BYTES

Send = Callable[[httpx.Client], httpx.Response]


@dataclass(frozen=True, slots=True)
class Case:
    """One wrong request, and what its answer must say."""

    name: str
    send: Send
    status: int = 422
    code: str = "invalid_request"
    field: str | None = None
    limit: int | str | None = None
    reason: str | None = None
    operation: str = "rerank"


def posted(**body: Any) -> Send:
    return lambda client: client.post("/v1/rerank", json={"query": "q", "documents": ["a", "b"], **body})


def raw(body: bytes | Iterator[bytes], **headers: str) -> Send:
    return lambda client: client.post("/v1/rerank", content=body, headers=headers)


def without(name: str) -> Send:
    body = {"query": "q", "documents": ["a", "b"]}
    return lambda client: client.post("/v1/rerank", json={key: body[key] for key in body if key != name})


def image(file: bytes) -> dict[str, str]:
    return {"image": base64.b64encode(file).decode()}


def pictured(file: bytes) -> Send:
    """The image among the documents, behind one that is well."""
    return posted(documents=["a", image(file)])


def chunks(total_bytes: int) -> Iterator[bytes]:
    """A body without a length, too long."""
    for _ in range(total_bytes // 65536):
        yield b" " * 65536


JPEG = encode(photo(96, 64), "JPEG")
PNG = encode(photo(96, 64), "PNG")
NOISE = encode(Image.effect_noise((1100, 1100), 200).convert("RGB"), "PNG")
PICTURE: dict[str, Any] = {"status": 422, "code": "image_rejected", "field": "documents[1].image"}
PART = "documents[1].content[0]"

CASES = (
    Case("no query", without("query"), field="query"),
    Case("no documents", without("documents"), field="documents"),
    Case("no document in the list", posted(documents=[]), field="documents", limit=1),
    Case("1,001 documents", posted(documents=["a"] * 1001), field="documents", limit=1000),
    Case("documents are a string", posted(documents="a"), field="documents"),
    Case("documents are an object", posted(documents={"0": "a"}), field="documents"),
    Case("documents are null", posted(documents=None), field="documents"),
    Case("a document is a number", posted(documents=["a", 5]), field="documents[1]"),
    Case("a document is a list", posted(documents=["a", ["b"]]), field="documents[1]"),
    Case("a document is null", posted(documents=["a", None]), field="documents[1]"),
    Case("a document is empty", posted(documents=["a", ""]), field="documents[1]"),
    Case("a document is only blanks", posted(documents=["a", " \n\t"]), field="documents[1]"),
    Case("a document has nothing in it", posted(documents=["a", {}]), field="documents[1]"),
    Case("a document's text is a number", posted(documents=["a", {"text": 1}]), field="documents[1].text"),
    Case("a document's image is a list", posted(documents=["a", {"image": []}]), field="documents[1].image"),
    Case("a document has an unknown field", posted(documents=["a", {"txt": "b"}]), field="documents[1].txt"),
    Case("the query is a number", posted(query=1), field="query"),
    Case("the query is true", posted(query=True), field="query"),
    Case("the query is empty", posted(query=""), field="query"),
    Case(
        "no content in the parts",
        posted(documents=["a", {"content": []}]),
        field="documents[1].content",
        limit=1,
    ),
    Case("content is a string", posted(documents=["a", {"content": "b"}]), field="documents[1].content"),
    Case("a part of an unknown type", posted(documents=["a", {"content": [{"type": "video"}]}]), field=PART),
    Case("a part without a type", posted(documents=["a", {"content": [{"text": "b"}]}]), field=PART),
    Case(
        "an image part without an image",
        posted(documents=["a", {"content": [{"type": "image"}]}]),
        field=PART,
    ),
    Case(
        "two images in one document",
        posted(
            documents=["a", {"content": [{"type": "image", **image(PNG)}, {"type": "image", **image(PNG)}]}]
        ),
        field="documents[1].content[1].image_url",
        limit=1,
    ),
    Case("an unknown field", posted(documentz=["a"]), field="documentz"),
    Case("a field that is a path", posted(x={"y": 1}), field="x"),
    Case("top_n is 0", posted(top_n=0), field="top_n", limit=1),
    Case("top_n is negative", posted(top_n=-1), field="top_n", limit=1),
    Case("top_n is above the count", posted(top_n=3), field="top_n", limit=2),
    Case("top_k is above the count", posted(top_k=3), field="top_k", limit=2),
    Case("top_n is a word", posted(top_n="two"), field="top_n"),
    Case("top_n is a fraction", posted(top_n=1.5), field="top_n"),
    Case("top_n is true", posted(top_n=True), field="top_n"),
    Case("top_n is beyond any integer", raw(b'{"query":"q","documents":["a"],"top_n":' + b"9" * 5000 + b"}")),
    Case("top_n and top_k differ", posted(top_n=1, top_k=2), field="top_k"),
    Case("instruction and instruct differ", posted(instruction="a", instruct="b"), field="instruct"),
    Case("the instruction is empty", posted(instruction=""), field="instruction", limit=1),
    Case("return_documents is a word", posted(return_documents="yes"), field="return_documents"),
    Case("max_tokens_per_doc is 0", posted(max_tokens_per_doc=0), field="max_tokens_per_doc", limit=1),
    Case("truncation is a word", posted(truncation="END"), field="truncation"),
    Case(
        "a document that may not be cut",
        posted(documents=["b", "b", "a b c " * 5], max_tokens_per_doc=4, truncation=False),
        code="document_too_long",
        field="documents[2]",
        limit=4,
    ),
    Case(
        "a text of a million characters",
        posted(documents=["a", "x" * 10**6]),
        field="documents[1]",
        limit=10_000,
    ),
    Case("a query of 10,001 characters", posted(query="x" * 10_001), field="query", limit=10_000),
    Case(
        "an instruction of 10,001 characters",
        posted(instruction="x" * 10_001),
        field="instruction",
        limit=10_000,
    ),
    Case("a NUL in a document", posted(documents=["a", "b\0c"]), field="documents[1]"),
    Case("a NUL in the query", posted(query="\0"), field="query"),
    Case("a NUL in the instruction", posted(instruction="a\0"), field="instruction"),
    Case("a lone surrogate in a document", raw(b'{"query":"q","documents":["a","\\ud83d"]}')),
    Case("a lone low surrogate", raw(b'{"query":"\\udc00","documents":["a"]}')),
    Case("a lone surrogate in a field's name", raw(b'{"query":"q","documents":["a"],"\\ud800":1}')),
    Case("bytes that are not UTF-8", raw(b'{"query":"\xff\xfe","documents":["a"]}')),
    Case("surrogates as UTF-8", raw(b'{"query":"\xed\xa0\x80","documents":["a"]}')),
    Case("not JSON", raw(b"query=q&documents=a")),
    Case("JSON that breaks off", raw(b'{"query":"q","documents":["a"')),
    Case("JSON of a hundred thousand brackets", raw(b"[" * 100_000)),
    Case("a body that is a list", raw(b"[]")),
    Case("a body that is null", raw(b"null")),
    Case("an empty body", raw(b"")),
    Case(
        "a model that does not exist", posted(model="gpt"), status=404, code="model_not_found", field="model"
    ),
    Case("a model that is a number", posted(model=7), field="model"),
    Case("broken base64", posted(documents=["a", {"image": "iVBOR!w0KGgo="}]), field="documents[1].image"),
    Case(
        "base64 without its padding",
        posted(documents=["a", {"image": "aGVsbG8"}]),
        field="documents[1].image",
    ),
    Case(
        "base64 with line breaks",
        posted(documents=["a", {"image": "aGVs\nbG8="}]),
        field="documents[1].image",
    ),
    Case("an empty image", posted(documents=["a", {"image": ""}]), field="documents[1].image"),
    Case("a data URL without base64", posted(query={"image": "data:image/png,abc"}), field="query.image"),
    Case("a remote image", posted(query={"image": "https://example.com/a.png"}), field="query.image"),
    Case(
        "a remote image in a part",
        posted(query={"content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}),
        field="query.content[0].image_url",
    ),
    Case("a file's address", posted(query={"image": "file:///etc/passwd"}), field="query.image"),
    Case("a file's path", posted(query={"image": "/etc/passwd"}), field="query.image"),
    Case(
        "a text file named .png",
        posted(documents=["a", {"image": "data:image/png;base64," + image(b"just a text\n" * 9)["image"]}]),
        **PICTURE,
        reason="format",
    ),
    Case("a JPEG that breaks off", pictured(JPEG[: len(JPEG) // 2]), **PICTURE, reason="damaged"),
    Case("a PNG that breaks off", pictured(PNG[: len(PNG) // 2]), **PICTURE, reason="damaged"),
    Case("a JPEG's first bytes", pictured(JPEG[:20]), **PICTURE, reason="damaged"),
    Case(
        "12,000 × 12,000 pixels", pictured(huge_png()), **PICTURE, limit=40_000_000, reason="too_many_pixels"
    ),
    Case("an animated WebP", pictured(animation("WEBP")), **PICTURE, limit=1, reason="animated"),
    Case("an animated PNG", pictured(animation("PNG")), **PICTURE, limit=1, reason="animated"),
    Case("an animated GIF", pictured(animation("GIF")), **PICTURE, reason="format"),
    Case("a BMP", pictured(encode(photo(32, 32), "BMP")), **PICTURE, reason="format"),
    Case(
        "an image over the limit",
        pictured(NOISE),
        **PICTURE,
        limit=IMAGE_LIMIT_BYTES,
        reason="too_many_bytes",
    ),
    Case(
        "an image 300 times as long",
        pictured(encode(photo(3000, 10), "PNG")),
        **PICTURE,
        limit=200,
        reason="aspect",
    ),
    Case("21 images", posted(documents=[image(PNG)] * 21), field="documents[20].image", limit=20),
    Case(
        "a body above the cap",
        raw(b" " * (BODY_LIMIT_BYTES + 1)),
        status=413,
        code="body_too_large",
        limit=BODY_LIMIT_BYTES,
        operation="POST /v1/rerank",
    ),
    Case(
        "a body above the cap that does not say its length",
        lambda client: raw(chunks(BODY_LIMIT_BYTES + 2**20))(client),
        status=413,
        code="body_too_large",
        limit=BODY_LIMIT_BYTES,
    ),
    *(
        Case(
            f"the method {method}",
            lambda client, method=method: client.request(method, "/v1/rerank"),  # type: ignore[misc]
            status=405,
            code="method_not_allowed",
            limit="POST",
            operation=f"{method} /v1/rerank",
        )
        for method in ("GET", "PUT", "PATCH", "DELETE", "OPTIONS")
    ),
    Case(
        "a path that does not exist",
        lambda client: client.post("/v3/rerank", json={}),
        status=404,
        code="not_found",
        operation="POST /v3/rerank",
    ),
)

INNOCENT = ("data:image/png;base64,", "/docs lists them", "pericarp-demo")
LEAKS = re.compile(
    r"traceback|site-packages|\.py\b|\bselect\b.+\bfrom\b|\binsert into\b|asyncpg|sqlalchemy|pydantic|postgres"
    r"|pericarp_app|errors\.pydantic|0x[0-9a-f]{6}|\bline \d+, in\b|[A-Za-z]+Error\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Sent:
    """What came of all cases."""

    answers: dict[str, httpx.Response]
    entries: list[dict[str, Any]]
    strangers: tuple[str, ...]
    """Names and ids of other tenants."""


@pytest.fixture(scope="module")
def sent(service: Service, demo: Tenant, acme: Tenant) -> Sent:
    """Every case sent by a tenant of its own, and then that tenant's log."""
    careless = service.make_tenant("careless")
    answers = {}
    for case in CASES:
        with service.client(careless.key) as client:
            answers[case.name] = case.send(client)
    strangers = (
        demo.name,
        demo.id,
        acme.name,
        acme.id,
        careless.name,
        careless.id,
        "secrets",
        str(service.home),
    )
    entries = service.entries(careless.name)
    asked = [each for each in entries if not each["operation"].startswith("admin.")]  # not how it was made
    return Sent(answers, asked, strangers)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_wrong_request_is_refused_in_words_and_leaves_one_entry(case: Case, sent: Sent) -> None:
    answer = sent.answers[case.name]
    assert answer.status_code == case.status, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    told = answer.json()
    assert set(told) >= {"type", "title", "status", "detail", "code", "request_id"}
    assert told["status"] == case.status
    assert told["code"] == case.code
    assert told.get("field") == case.field
    assert told.get("limit") == case.limit
    assert told.get("reason") == case.reason
    assert told["request_id"] == answer.headers["X-Request-Id"]
    assert 15 <= len(told["detail"]) <= 300, "one sentence or two"
    entries = [entry for entry in sent.entries if entry["request_id"] == told["request_id"]]
    assert len(entries) == 1
    assert entries[0]["id"] == answer.headers["Pericarp-Receipt"]
    assert (entries[0]["status"], entries[0]["code"]) == (case.status, case.code)
    assert (entries[0]["decision"], entries[0]["operation"]) == ("refused", case.operation)
    assert entries[0]["places"] == [], "nothing is scored"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_refusal_gives_nothing_away(case: Case, sent: Sent) -> None:
    body = sent.answers[case.name].text
    assert not LEAKS.search(body), body
    for words in INNOCENT:
        body = body.replace(words, "")
    assert "/" not in body, "looks like a path"
    assert not [stranger for stranger in sent.strangers if stranger in body]
    headers = str(sent.answers[case.name].headers)
    assert not [stranger for stranger in sent.strangers if stranger in headers]


def test_as_many_entries_as_requests_and_none_holds_any_input(sent: Sent) -> None:
    assert len(sent.entries) == len(CASES)
    assert len({entry["request_id"] for entry in sent.entries}) == len(CASES)
    log = json.dumps(sent.entries)
    for words in ("just a text", "169.254", "passwd", "documentz", "gpt"):
        assert words not in log


def test_the_names_of_unknown_fields_come_back_cut_short(service: Service) -> None:
    response = service.rerank({"query": "q", "documents": ["a"], "x" * 100_000: 1})
    assert response.status_code == 422
    assert len(response.content) < 2000


def test_a_tenant_without_a_word_of_wrong_is_answered_right_after(service: Service, sent: Sent) -> None:
    assert service.rerank({"query": "q", "documents": ["a"]}).status_code == 200


@pytest.mark.parametrize(("key", "status"), [(None, 413), ("", 401)], ids=["with a key", "without one"])
def test_a_client_that_sends_all_before_it_reads_gets_its_refusal_too(
    service: Service, key: str | None, status: int
) -> None:
    host, port = service.url.removeprefix("http://").split(":")
    for _ in range(3):
        line = http.client.HTTPConnection(host, int(port), timeout=60)
        bearer = {"Authorization": f"Bearer {service.key if key is None else key}"}
        line.request("POST", "/v1/rerank", b" " * (8 * BODY_LIMIT_BYTES), bearer)
        answer = line.getresponse()
        assert answer.status == status
        assert json.loads(answer.read())["status"] == status
        line.close()
