"""Any bytes become an `Ask` or a `BadRequest`; every dialect of one request becomes the same `Ask`."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from service.api.items import MAX_DOCUMENTS, REPEATED_CHARACTERS
from service.api.schemas import RerankRequest, read, read_session
from service.asks import Ask, RawItem
from service.errors import BadRequest

TEXT_LENGTH = 100
IMAGES = 3
PICTURE = b"\x89PNG not looked at here"
BARE = base64.b64encode(PICTURE).decode()
URL = f"data:image/png;base64,{BARE}"


def asked(body: object, **limits: int) -> Ask:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    bounds: dict[str, Any] = {"text_length": TEXT_LENGTH, "documents_limit": 10, "images_limit": IMAGES}
    return read(raw, **(bounds | limits))[0]


def refused(body: object, **limits: int) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        asked(body, **limits)
    return caught.value


def request(**fields: Any) -> dict[str, Any]:
    return {"query": "q", "documents": ["a", "b", "c"], **fields}


# Any JSON at all, and JSON that comes close to a request.

words = st.text(st.characters(codec=None, exclude_categories=()), max_size=12)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)
images = (
    st.sampled_from([BARE, URL, "data:", "data:;base64,", "https://a.b/c", "", "=", "AAAA", "é", "\0"])
    | words
)
parts = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "image_url", "video"]) | anything},
    optional={
        "text": words | anything,
        "image": images,
        "image_url": images | st.fixed_dictionaries({"url": images}),
    },
)
sides = (
    words
    | st.fixed_dictionaries({}, optional={"text": words | st.none(), "image": images | st.none()})
    | st.fixed_dictionaries({"content": st.lists(parts, max_size=3)})
    | anything
)
numbers = st.integers(-2, 12) | anything
close = st.fixed_dictionaries(
    {},
    optional={
        "query": sides,
        "documents": st.lists(sides, max_size=12) | anything,
        "top_n": numbers,
        "top_k": numbers,
        "instruction": words | anything,
        "instruct": words | anything,
        "return_documents": st.booleans() | anything,
        "max_tokens_per_doc": numbers,
        "truncation": st.booleans() | anything,
        "model": words | anything,
        "metadata": anything,
        "session_id": words | anything,
    },
)


def check(body: bytes) -> None:
    try:
        ask, model = read(body, text_length=TEXT_LENGTH, documents_limit=10, images_limit=IMAGES)
    except BadRequest as exc:
        assert exc.detail and len(exc.detail) <= 300
        assert exc.field is None or 0 < len(exc.field) <= REPEATED_CHARACTERS + 1
        exc.detail.encode()  # can be answered
        return
    assert isinstance(ask, Ask)
    assert model is None or isinstance(model, str)
    assert 1 <= len(ask.documents) <= 10 and 1 <= ask.top_n <= len(ask.documents)
    assert len(ask.images) <= IMAGES
    for item in ask.items:
        assert item.text or item.image, "nothing empty goes on"
        assert item.text is None or (len(item.text) <= TEXT_LENGTH and "\0" not in item.text)
        assert item.text is None or item.text.encode()
        assert (item.image is None) == (item.sent_image is None) == (item.image_where is None)


@given(anything | close)
@example({"query": "q", "documents": ["a"], "top_n": 10**400})
@example({"query": "q", "documents": ["a"], "\ud800": "\udfff"})
@example({"query": "q", "documents": [{"text": None, "image": None}]})
@example({"query": "q", "documents": ["a"], "instruction": "x" * 10_000})
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_json_is_an_ask_or_a_bad_request_and_nothing_else(value: object) -> None:
    try:
        body = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except ValueError:  # a number that json does not write
        return
    check(body)
    check(json.dumps(value).encode())


@given(st.binary(max_size=200))
@example(b"")
@example(b"[" * 100_000)
@example(b'{"query":' * 10_000)
@example(b'{"query":"q","documents":["a"],"top_n":' + b"1" * 5_000 + b"}")
@example(b"\xef\xbb\xbf{}")
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_an_ask_or_a_bad_request_and_nothing_else(body: bytes) -> None:
    check(body)


@pytest.mark.parametrize("name", [("x" * 50_000), "\0", "a.b", "é" * 200, "documents[0]"])
def test_a_field_nobody_knows_is_named_and_cut_short(name: str) -> None:
    exc = refused(request(**{name: 1}))
    assert exc.field is not None and exc.field.startswith(name[:10])
    assert len(exc.field) <= REPEATED_CHARACTERS + 1


def test_a_type_of_part_nobody_knows_is_cut_short() -> None:
    assert len(refused(request(query={"content": [{"type": "v" * 50_000}]})).detail) < 300


def test_the_plainest_request() -> None:
    ask = asked({"query": "q", "documents": ["a"]})
    assert ask == Ask(RawItem("query", "q"), (RawItem("documents[0]", "a"),), None, 1, False, None, True)


@pytest.mark.parametrize(
    "side",
    [
        {"text": "t", "image": BARE},
        {"content": [{"type": "text", "text": "t"}, {"type": "image", "image": BARE}]},
        {"content": [{"type": "image_url", "image_url": {"url": BARE}}, {"type": "text", "text": "t"}]},
        {"content": [{"type": "image_url", "image_url": BARE}, {"type": "text", "text": "t"}]},
        {
            "content": [
                {"type": "text", "text": ""},
                {"type": "image", "image": BARE},
                {"type": "text", "text": "t"},
            ]
        },
    ],
)
@pytest.mark.parametrize("place", ["query", "document"])
def test_every_way_to_say_text_and_image_means_the_same(side: dict[str, Any], place: str) -> None:
    ask = asked(request(query=side) if place == "query" else request(documents=[side]))
    item = ask.query if place == "query" else ask.documents[0]
    assert (item.text, item.image, item.sent_image) == ("t", PICTURE, BARE)
    assert ask.images == (item,)


@pytest.mark.parametrize("prefix", ["data:image/png;base64,", "DATA:IMAGE/PNG;BASE64,", "data:;base64,", ""])
def test_a_data_url_is_its_base64_whatever_it_says_of_its_type(prefix: str) -> None:
    item = asked(request(query={"image": prefix + BARE})).query
    assert (item.image, item.text, item.image_where) == (PICTURE, None, "query.image")


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ("", "empty"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png," + BARE, "base64"),
        ("data:image/png;base64" + BARE, "base64"),
        ("https://example.com/a.png", "Remote"),
        ("file:///etc/passwd", "Remote"),
        ("HTTP://EXAMPLE.COM", "Remote"),
        ("/etc/passwd", "base64"),
        (BARE[:-1], "base64"),
        (BARE + "\n", "base64"),
        (BARE[:4] + " " + BARE[4:], "base64"),
        (BARE.replace(BARE[3], "-"), "base64"),
        ("é", "base64"),
    ],
)
def test_what_is_no_image_is_refused_by_its_field(image: str, says: str) -> None:
    exc = refused(request(documents=["a", {"image": image}]))
    assert exc.field == "documents[1].image"
    assert says in exc.detail


@pytest.mark.parametrize(("name", "other"), [("top_n", "top_k"), ("instruction", "instruct")])
def test_two_names_of_one_thing_may_agree_but_not_differ(name: str, other: str) -> None:
    first, second = (2, 1) if name == "top_n" else ("x", "y")
    assert asked(request(**{name: first})) == asked(request(**{other: first}))
    assert asked(request(**{name: first, other: first})) == asked(request(**{name: first}))
    assert refused(request(**{name: first, other: second})).field == other


def test_limits_are_the_tenants() -> None:
    assert refused(request(), documents_limit=2).limit == 2
    assert refused(request(documents=["x" * 11]), text_length=10).limit == 10
    assert refused(request(instruction="x" * 11), text_length=10).field == "instruction"
    exc = refused(request(query={"image": BARE}, documents=[{"image": BARE}] * 3), images_limit=3)
    assert (exc.limit, exc.field) == (3, "documents[2].image")
    assert refused(request(query={"image": BARE}), images_limit=0).field == "query.image"
    assert (
        len(asked(request(documents=["a"] * MAX_DOCUMENTS), documents_limit=MAX_DOCUMENTS).documents) == 1000
    )
    assert refused(request(documents=["a"] * 1001), documents_limit=2000).limit == MAX_DOCUMENTS


@pytest.mark.parametrize("blank", ["", " ", "\n\t", "\u2003"])
def test_blanks_alone_are_no_item(blank: str) -> None:
    for side in (blank, {"text": blank}, {"content": [{"type": "text", "text": blank}]}):
        assert refused(request(query=side)).field == "query"
    assert asked(request(query={"text": "", "image": BARE})).query.text is None


def test_text_is_handed_on_as_it_was_sent() -> None:
    text = "  Ünïcode <|im_start|> \u202e {x} \U0001f34e\n"
    assert asked(request(query=text)).query.text == text


def test_every_field_of_a_request_is_documented() -> None:
    for name, field in RerankRequest.model_fields.items():
        assert field.description, name


def test_a_session_is_named_as_it_was_sent() -> None:
    assert asked(request()).session is None
    for name in ("ses_0123456789abcdefABCDEF", "", "no id at all", "\0"):
        assert asked(request(session_id=name)).session == name, "whether it is one, the look-up says"
    assert refused(request(session_id=7)).field == "session_id"


@pytest.mark.parametrize(
    ("body", "ttl_s"), [(b"", 900), (b"{}", 900), (b'{"ttl_s": 1}', 1), (b'{"ttl_s":86400}', 86_400)]
)
def test_a_session_says_how_long_it_may_go_unused(body: bytes, ttl_s: int) -> None:
    assert read_session(body) == ttl_s


@pytest.mark.parametrize(
    ("body", "field", "limit"),
    [
        (b'{"ttl_s": 0}', "ttl_s", 1),
        (b'{"ttl_s": 86401}', "ttl_s", 86_400),
        (b'{"ttl_s": "60"}', "ttl_s", None),
        (b'{"ttl_s": 1.5}', "ttl_s", None),
        (b'{"ttl_s": true}', "ttl_s", None),
        (b'{"ttl_s": null}', "ttl_s", None),
        (b'{"metadata": {}}', "metadata", None),
        (b"[]", None, None),
        (b"null", None, None),
        (b" ", None, None),
        (b"{", None, None),
    ],
)
def test_another_opening_is_refused_by_its_field(body: bytes, field: str | None, limit: int | None) -> None:
    with pytest.raises(BadRequest) as caught:
        read_session(body)
    assert (caught.value.field, caught.value.limit) == (field, limit)


@given(st.binary(max_size=100))
def test_any_bytes_open_a_session_or_are_refused(body: bytes) -> None:
    try:
        assert 1 <= read_session(body) <= 86_400
    except BadRequest as exc:
        assert len(exc.detail) <= 300
