"""Each dialect takes what its clients send, answers in its shape, and complains in its words; nothing is dropped silently."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from service.api.dialects import DIALECTS, dialect_of
from service.api.dialects.cohere import COHERE_V1, COHERE_V2
from service.api.dialects.dialect import Dialect
from service.api.dialects.jina import JINA
from service.api.dialects.union import UNION
from service.api.dialects.vllm import VLLM_RERANK, VLLM_SCORE
from service.api.dialects.voyage import VOYAGE
from service.asks import Ask, Exchange, RawItem
from service.errors import CLIENT_CLOSED, TABLE, BadRequest, ModelUnknown, Trouble, describe
from service.rerank import Place, Ranking
from tenants.errors import KeyMalformed, QuotaExceeded

PICTURE = b"\x89PNG not looked at here"
BARE = base64.b64encode(PICTURE).decode()
URL = f"data:image/png;base64,{BARE}"
PART: dict[str, Any] = {"type": "image_url", "image_url": {"url": URL}}
EXCHANGE = Exchange(request_id="0c68c38a", client_address="", operation="", named_model="rerank-v9")
OTHERS = [dialect for dialect in DIALECTS if dialect is not UNION]
MODEL = {"model": "m"}

plainest: dict[str, dict[str, Any]] = {
    COHERE_V1.name: {"query": "q", "documents": ["a", "b", "c"]},
    COHERE_V2.name: {**MODEL, "query": "q", "documents": ["a", "b", "c"]},
    JINA.name: {**MODEL, "query": "q", "documents": ["a", "b", "c"]},
    VOYAGE.name: {**MODEL, "query": "q", "documents": ["a", "b", "c"]},
    VLLM_RERANK.name: {"query": "q", "documents": ["a", "b", "c"]},
    VLLM_SCORE.name: {"queries": "q", "documents": ["a", "b", "c"]},
}
by_name = pytest.mark.parametrize("dialect", OTHERS, ids=lambda dialect: dialect.name)


def asked(dialect: Dialect, body: object = None, /, **fields: Any) -> Ask:
    return read(dialect, {**plainest[dialect.name], **fields} if body is None else body)[0]


def read(dialect: Dialect, body: object, **limits: int) -> tuple[Ask, str | None]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    bounds: dict[str, Any] = {"text_length": 100, "documents_limit": 10, "images_limit": 3}
    return dialect.read(raw, **(bounds | limits))


def refused(dialect: Dialect, body: object = None, /, **fields: Any) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        asked(dialect, body, **fields)
    return caught.value


def told(dialect: Dialect, exc: Exception, exchange: Exchange = EXCHANGE) -> tuple[int, dict[str, Any]]:
    complaint = dialect.complain(describe(exc), exchange)
    return complaint.status, complaint.body


def message(dialect: Dialect, body: object = None, /, **fields: Any) -> tuple[int, Any]:
    """Status and words of a refusal, as the client gets them."""
    status, complaint = told(dialect, refused(dialect, body, **fields))
    return status, complaint.get("message") or complaint.get("detail") or complaint["error"]["message"]


@by_name
def test_the_plainest_request_takes_every_default(dialect: Dialect) -> None:
    ask, named = read(dialect, plainest[dialect.name])
    assert [item.text for item in ask.documents] == ["a", "b", "c"]
    assert (ask.query.text, ask.queries, ask.instruction, ask.session) == ("q", (), None, None)
    assert ask.top_n == 3
    assert ask.ranked == (dialect is not VLLM_SCORE)
    assert named == plainest[dialect.name].get("model")
    assert ask.return_documents == (dialect in (JINA, VLLM_RERANK))
    assert ask.max_tokens_per_doc == (4096 if dialect is COHERE_V2 else None)
    assert ask.truncate == (dialect not in (VLLM_RERANK, VLLM_SCORE))


@by_name
def test_null_is_as_good_as_absent_where_a_field_may_be_left_out(dialect: Dialect) -> None:
    optional = {
        name: None
        for name, field in dialect.request.model_fields.items()
        if not field.is_required() and name not in plainest[dialect.name]
    }
    assert optional
    ask = asked(dialect, **optional)
    assert replace(ask, max_tokens_per_doc=None) == replace(asked(dialect), max_tokens_per_doc=None)


@by_name
@pytest.mark.parametrize("field", ["top_nn", "instrukt", "rank_field", "x"])
def test_a_field_that_nobody_knows_is_refused_by_name(dialect: Dialect, field: str) -> None:
    exc = refused(dialect, **{field: 1})
    assert exc.field == field and field in exc.detail


@pytest.mark.parametrize(
    ("dialect", "field"),
    [(COHERE_V1, "top_n"), (COHERE_V2, "top_n"), (JINA, "top_n"), (VOYAGE, "top_k"), (VLLM_RERANK, "top_n")],
)
def test_more_results_than_documents_are_all(dialect: Dialect, field: str) -> None:
    assert [asked(dialect, **{field: count}).top_n for count in (1, 3, 4, 10**6)] == [1, 3, 3, 3]


@by_name
def test_limits_are_the_tenants(dialect: Dialect) -> None:
    body = plainest[dialect.name]
    for limits, limit in (({"documents_limit": 2}, 2), ({"text_length": 0}, 0)):
        with pytest.raises(BadRequest) as caught:
            read(dialect, body, **limits)
        assert caught.value.limit == limit


@pytest.mark.parametrize(
    ("dialect", "fields"),
    [
        (JINA, {"query": {"image": BARE}, "documents": [{"image": URL}, {"text": "a", "id": "7"}]}),
        (JINA, {"query": URL, "documents": [URL, "a"]}),
        (VLLM_RERANK, {"query": {"content": [PART]}, "documents": [{"content": [PART]}, "a"]}),
        (VLLM_SCORE, {"queries": {"content": [PART]}, "documents": [{"content": [PART]}, "a"]}),
    ],
)
def test_images_go_on_either_side(dialect: Dialect, fields: dict[str, Any]) -> None:
    ask = asked(dialect, **fields)
    assert ask.query.image == ask.documents[0].image == PICTURE
    assert (ask.documents[1].text, len(ask.images)) == ("a", 2)
    with pytest.raises(BadRequest) as caught:
        read(dialect, {**plainest[dialect.name], **fields}, images_limit=1)
    assert caught.value.limit == 1


@pytest.mark.parametrize("dialect", [COHERE_V2, VOYAGE], ids=lambda dialect: dialect.name)
def test_where_a_vendor_takes_text_alone_an_image_is_no_text(dialect: Dialect) -> None:
    assert refused(dialect, documents=[{"image": URL}]).field == "documents[0]"


# Cohere


def test_cohere_reads_the_named_fields_in_their_order_and_gives_all_of_them_back() -> None:
    document = {"title": "Apples", "text": "are red", "author": "Ada"}
    ask = asked(COHERE_V1, documents=[document, "plain"], return_documents=True)
    assert [item.text for item in ask.documents] == ["are red", "plain"]
    ask = asked(COHERE_V1, documents=[document, "plain"], rank_fields=["author", "none", "title"])
    assert [item.text for item in ask.documents] == ["Ada\nApples", "plain"]
    ask = replace(ask, return_documents=True)
    results = answered(COHERE_V1, ask)["results"]
    assert [result["document"] for result in results] == [{"text": "plain"}, document]


@pytest.mark.parametrize(
    ("dialect", "fields", "status", "words"),
    [
        (COHERE_V2, {"documents": []}, 400, "invalid request: list of documents must not be empty"),
        (COHERE_V2, {"query": " "}, 400, "invalid request: query must not be empty or be only whitespace"),
        (COHERE_V1, {"documents": ["a", ""]}, 400, "invalid request: document at index 1 cannot be empty"),
        (COHERE_V1, {"rank_fields": []}, 400, "invalid request: rank_fields cannot be empty"),
        (COHERE_V2, {"top_k": 1}, 422, "unknown field: parameter 'top_k' is not a valid field."),
        (
            COHERE_V1,
            {"documents": [{"title": "a"}]},
            400,
            "invalid request: document at index 0 does not have the field text",
        ),
        (
            COHERE_V2,
            {"relevant_spans": {"mode": "enabled"}},
            400,
            "invalid request: relevant_spans are not offered; leave them out.",
        ),
        (VOYAGE, {"documents": []}, 400, "Input cannot contain empty strings or empty lists"),
        (VOYAGE, {"documents": ["a", ""]}, 400, "Input cannot contain empty strings or empty lists"),
        (
            VOYAGE,
            {"top_n": 1},
            400,
            "The request body is not valid JSON, or some arguments were not specified properly."
            " In particular, argument 'top_n' is not supported by our API.",
        ),
        (JINA, {"documents": []}, 422, "documents is empty; send at least 1."),
        (VLLM_RERANK, {"documents": []}, 400, "documents is empty; send at least 1."),
        (
            VLLM_SCORE,
            {"queries": ["a", "b"]},
            400,
            "queries has 2 and documents 3: input lengths must be either 1:1, 1:N or N:N.",
        ),
    ],
)
def test_complaints_are_in_the_vendors_words(
    dialect: Dialect, fields: dict[str, Any], status: int, words: str
) -> None:
    assert message(dialect, **fields) == (status, words)


def test_cohere_v2_takes_spans_that_are_not_wanted() -> None:
    assert asked(COHERE_V2, relevant_spans={"mode": "disabled"}, priority=999) == asked(COHERE_V2)


# Voyage


def test_voyage_takes_white_space_for_a_document() -> None:
    assert asked(VOYAGE, documents=["a", " "]).documents[1].text == " "
    assert not asked(VOYAGE, truncation=False).truncate


# vLLM


def test_vllm_takes_a_side_where_a_list_is_due() -> None:
    assert len(asked(VLLM_RERANK, documents="a").documents) == 1
    assert len(asked(VLLM_RERANK, documents={"content": [PART]}).images) == 1
    assert asked(VLLM_RERANK, documents=[""]).documents[0].text == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("truncate_prompt_tokens", 512),
        ("use_activation", False),
        ("max_tokens_per_query", 64),
        ("truncation_side", "left"),
        ("padding", "max_length"),
        ("priority", 1),
        ("mm_processor_kwargs", {"min_pixels": 1}),
        ("chat_template_kwargs", {"enable_thinking": True}),
        ("chat_template_kwargs", {"instruction": 7}),
    ],
)
@pytest.mark.parametrize("dialect", [VLLM_RERANK, VLLM_SCORE], ids=lambda dialect: dialect.name)
def test_vllm_refuses_what_would_change_scores_and_is_not_offered(
    dialect: Dialect, field: str, value: Any
) -> None:
    assert (refused(dialect, **{field: value}).field or "").startswith(field)


@pytest.mark.parametrize("dialect", [VLLM_RERANK, VLLM_SCORE], ids=lambda dialect: dialect.name)
def test_vllm_takes_an_instruction_by_either_name_and_the_templates_goes_first(dialect: Dialect) -> None:
    assert asked(dialect, instruction="i").instruction == "i"
    template = {"instruction": "t"}
    assert asked(dialect, chat_template_kwargs=template).instruction == "t"
    assert asked(dialect, chat_template_kwargs=template, instruction="i").instruction == "t"


@pytest.mark.parametrize("dialect", [VLLM_RERANK, VLLM_SCORE], ids=lambda dialect: dialect.name)
def test_vllm_cuts_only_where_it_is_asked_to(dialect: Dialect) -> None:
    assert asked(dialect, truncate_prompt_tokens=-1).truncate
    cut = asked(dialect, max_tokens_per_doc=7)
    assert (cut.max_tokens_per_doc, cut.truncate) == (7, True)
    assert asked(dialect, max_tokens_per_doc=0) == asked(dialect)


@pytest.mark.parametrize(
    "names", [("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2")]
)
def test_a_score_has_one_pair_of_names(names: tuple[str, str]) -> None:
    first, second = names
    ask = asked(VLLM_SCORE, {first: "q", second: ["a", "b"]})
    assert (ask.query.text, [item.text for item in ask.documents], ask.queries) == ("q", ["a", "b"], ())
    ask = asked(VLLM_SCORE, {first: ["p", "q"], second: ["a", {"content": [PART]}]})
    assert [item.text for item in ask.queries] == ["p", "q"]
    assert ask.query == ask.queries[0]
    assert [item.where for item in ask.items] == [
        f"{first}[0]",
        f"{first}[1]",
        f"{second}[0]",
        f"{second}[1]",
    ]
    assert asked(VLLM_SCORE, {first: ["p"], second: ["a"]}).queries == ()
    for wrong in ({first: "q"}, {first: "q", second: "a", "text_9": "b"}, {}):
        refused(VLLM_SCORE, wrong)


def test_two_pairs_of_names_are_refused() -> None:
    assert refused(VLLM_SCORE, {"data_1": "a", "data_2": "b", "text_1": "a", "text_2": "b"}).field == "data_1"
    assert refused(VLLM_SCORE, {"queries": "a", "documents": "b", "items": "c"}).field == "documents"


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_the_examples_of_the_description_are_requests(dialect: Dialect) -> None:
    assert dialect.examples
    for example in dialect.examples.values():
        body = (
            json.dumps(example, ensure_ascii=False).replace("data:image/png;base64,…", URL).replace("…", BARE)
        )
        read(dialect, body.encode())


# Answers


def answered(dialect: Dialect, ask: Ask) -> dict[str, Any]:
    """The ask's documents from the last to the first; in the request's order where it is not ranked."""
    indices = list(range(len(ask.documents)))
    if ask.ranked:
        indices.reverse()
    places = tuple(Place(index, 0.5) for index in indices)
    ranking = Ranking(places, 120, 40, ("documents[0] was cut to fit.",), 90, 0)
    return dialect.answer(EXCHANGE, ask, ranking, "pericarp-demo")


@by_name
def test_an_answer_has_the_described_shape_and_nothing_beside_it(dialect: Dialect) -> None:
    for fields in ({}, {"return_documents": True}, {"return_documents": False}):
        if fields and "return_documents" not in dialect.request.model_fields:
            continue
        body = answered(dialect, asked(dialect, **fields))
        assert exact(dialect.answered, body), body
        assert all(result.get("document", "") is not None for result in body.get("results", []))


@by_name
def test_an_error_has_the_described_shape_and_nothing_beside_it(dialect: Dialect) -> None:
    for kind in TABLE:
        trouble = Trouble(TABLE[kind].status, TABLE[kind].code, "It went wrong.", "documents[0].text", 7)
        complaint = dialect.complain(trouble, EXCHANGE)
        assert exact(dialect.refused, complaint.body), complaint.body
        assert complaint.status >= 400
        assert (complaint.status >= 500) == (trouble.status >= 500)
        assert complaint.status in (trouble.status, 400, 422, 500)
        assert trouble.status in (422, 404, 502) or complaint.status == trouble.status


def exact(shape: type[BaseModel], body: dict[str, Any]) -> bool:
    """Whether the body is of the shape, and the shape says all of it."""
    return shape.model_validate(body).model_dump(exclude_unset=True) == body


def test_documents_come_back_as_each_vendor_gives_them() -> None:
    whole: list[tuple[Dialect, dict[str, Any], list[Any]]] = [
        (COHERE_V1, {"return_documents": True}, [{"text": "c"}, {"text": "b"}, {"text": "a"}]),
        (COHERE_V2, {"return_documents": True}, [{"text": "c"}, {"text": "b"}, {"text": "a"}]),
        (VOYAGE, {"return_documents": True}, ["c", "b", "a"]),
        (JINA, {"documents": ["a", {"image": BARE}]}, [{"image": BARE}, {"text": "a"}]),
        (
            VLLM_RERANK,
            {"documents": ["a", {"content": [PART]}]},
            [{"text": None, "multi_modal": [PART]}, {"text": "a", "multi_modal": None}],
        ),
    ]
    for dialect, fields, documents in whole:
        body = answered(dialect, asked(dialect, **fields))
        assert [each["document"] for each in body.get("results") or body["data"]] == documents
    for dialect in (COHERE_V1, COHERE_V2, VOYAGE):
        body = answered(dialect, asked(dialect))
        assert not any("document" in each for each in body.get("results") or body["data"])
    assert "document" not in answered(JINA, asked(JINA, return_documents=False))["results"][0]


# Errors


def test_the_path_chooses_the_dialect_also_where_there_is_nothing() -> None:
    for dialect in DIALECTS:
        for path in dialect.paths:
            assert dialect_of(path) is dialect
    for path, dialect in (
        ("/cohere/v1/chat", COHERE_V2),
        ("/v2/anything", COHERE_V2),
        ("/jina", JINA),
        ("/voyage/", VOYAGE),
        ("/vllm/v1/embeddings", VLLM_RERANK),
        ("/", UNION),
        ("", UNION),
        ("/cohereish", UNION),
        ("/v1/rerank/x", UNION),
        ("/docs", UNION),
    ):
        assert dialect_of(path).complain is dialect.complain, path


def test_a_missing_key_and_a_wrong_one() -> None:
    keyless = replace(EXCHANGE, keyless=True)
    assert told(COHERE_V2, KeyMalformed(), keyless)[1]["message"] == "no api key supplied"
    assert told(COHERE_V2, KeyMalformed())[1]["message"] == "invalid api token"
    assert told(VOYAGE, KeyMalformed()) == (401, {"detail": "Provided API key is invalid."})
    assert told(JINA, KeyMalformed())[0] == 401
    assert told(VLLM_SCORE, KeyMalformed())[1]["error"]["type"] == "Unauthorized"


def test_a_model_that_is_not_served() -> None:
    assert told(COHERE_V1, ModelUnknown()) == (
        404,
        {
            "id": "0c68c38a",
            "message": "model 'rerank-v9' not found, make sure the correct model ID was used"
            " and that you have access to the model.",
        },
    )
    assert told(VOYAGE, ModelUnknown())[0] == 400
    assert told(JINA, ModelUnknown())[0] == 422
    error = {"message": "The model `rerank-v9` does not exist.", "type": "NotFoundError", "code": 404}
    assert told(VLLM_RERANK, ModelUnknown()) == (404, {"error": {**error, "param": None}})
    long = replace(EXCHANGE, named_model="x" * 10_000)
    for dialect in OTHERS:
        assert len(json.dumps(told(dialect, ModelUnknown(), long)[1])) < 400


def test_a_limit_that_is_used_up() -> None:
    per_minute = QuotaExceeded(violated=("requests",), retry_after_s=7)
    status, body = told(COHERE_V2, per_minute)
    assert (status, body["message"]) == (
        429,
        "You are past the per minute request limit, please wait and try again later.",
    )
    for dialect in OTHERS:
        status, body = told(dialect, QuotaExceeded(violated=("concurrency",), retry_after_s=7))
        assert status == 429 and "concurrency" in json.dumps(body) and "7 s" in json.dumps(body)


def test_nobody_reads_what_is_said_to_a_closed_connection() -> None:
    for dialect in DIALECTS:
        trouble = Trouble(CLIENT_CLOSED, "client_closed", "Gone.")
        assert dialect.complain(trouble, EXCHANGE).status == CLIENT_CLOSED


# Anything at all

words = st.text(st.characters(codec=None, exclude_categories=()), max_size=8)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words | st.just(URL) | st.just(PART),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
sides: Any = words | st.fixed_dictionaries(
    {}, optional={"text": words, "image": st.sampled_from([URL, BARE, "x"]) | words, "id": words | anything}
)
sides |= st.fixed_dictionaries({"content": st.lists(st.just(PART) | anything, max_size=3)}) | anything
NAMES = sorted({name for dialect in OTHERS for name in dialect.request.model_fields})
SIDES = {"query", "queries", "documents", "items", "data_1", "data_2", "text_1", "text_2"}
close = st.fixed_dictionaries(
    {},
    optional={
        name: sides | st.lists(sides, max_size=4) if name in SIDES else anything | st.integers(-1, 3)
        for name in NAMES
    },
)


@given(dialect=st.sampled_from(OTHERS), value=close | anything)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_json_is_an_ask_or_a_complaint_of_the_dialect(dialect: Dialect, value: Any) -> None:
    if isinstance(value, dict):  # nearer to what is taken: the fields that it has, and all that it needs
        known = {name: each for name, each in value.items() if name in dialect.request.model_fields}
        value = {**plainest[dialect.name], **known} if len(value) % 2 else value
    try:
        ask, named = read(dialect, json.dumps(value).encode())
    except BadRequest as exc:
        complaint = dialect.complain(describe(exc), EXCHANGE)
        assert complaint.status in (400, 422)
        assert exact(dialect.refused, complaint.body)
        assert len(json.dumps(complaint.body, ensure_ascii=False).encode()) < 800
        return
    assert named is None or isinstance(named, str)
    assert 1 <= ask.top_n <= len(ask.documents) <= 10
    assert not ask.queries or len(ask.queries) == len(ask.documents)
    assert len(ask.images) <= 3
    assert len({item.where for item in ask.items}) == len(ask.items), "every side has a name of its own"
    for item in ask.items:
        assert isinstance(item, RawItem)
        assert item.text is not None or item.image is not None
        assert item.text is None or ("\0" not in item.text and item.text.encode() is not None)
    assert exact(dialect.answered, answered(dialect, ask))
