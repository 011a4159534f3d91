"""Cohere's `/v1/rerank` and `/v2/rerank`, as its API page and the client library `cohere` 7 have them. Text alone.

Shapes, defaults and texts of errors: cohere-openapi.yaml of 20 August 2026. Its errors are 400, but for a field that
nobody knows, which is 422. `max_chunks_per_doc` and `priority` are taken and change nothing: a document is never
chunked, and who comes first is the tenant's affair.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError

from service.api.dialects.dialect import Complaint, Dialect, lowered, repeated
from service.api.items import (
    MAX_DOCUMENTS,
    Strict,
    check_count,
    check_text,
    first_wrong,
    read_item,
    string_or_object,
)
from service.asks import Ask, RawItem
from service.errors import BadRequest

if TYPE_CHECKING:
    from service.asks import Exchange
    from service.errors import Trouble
    from service.rerank import Ranking

TOKENS_PER_DOC = 4096
"""Cohere's default of v2; longer documents are cut."""


class RelevantSpans(Strict):
    mode: Literal["enabled", "disabled"]
    threshold: float | None = None
    max_spans: int | None = None


class CohereRequest(Strict):
    """What both versions take."""

    query: str
    top_n: int | None = Field(None, ge=1, description="All if absent, or if more than there are.")
    return_documents: bool | None = Field(
        None, description="False if absent. Of v2 only older clients send it."
    )


class CohereRequestV2(CohereRequest):
    """`co.rerank` of `cohere.ClientV2`."""

    model: str
    documents: list[str] = Field(min_length=1, max_length=MAX_DOCUMENTS)
    max_tokens_per_doc: int | None = Field(
        TOKENS_PER_DOC, ge=1, description="A document's text is cut after so many tokens."
    )
    priority: int | None = Field(None, ge=0, le=999, description="Changes nothing.")
    relevant_spans: RelevantSpans | None = Field(None, description="Only `disabled` is offered.")


Document = Annotated[
    Annotated[str, Tag("string")] | Annotated[dict[str, str], Tag("object")],
    Discriminator(
        string_or_object,
        custom_error_type="side",
        custom_error_message="must be a string or an object of strings",
    ),
]


class CohereRequestV1(CohereRequest):
    """`co.rerank` of `cohere.Client`."""

    model: str | None = None
    documents: list[Document] = Field(min_length=1, max_length=MAX_DOCUMENTS)
    rank_fields: list[str] | None = Field(
        None, min_length=1, description="Fields of a document that are read, in this order; `text` if absent."
    )
    max_chunks_per_doc: int | None = Field(None, ge=1, description="Changes nothing.")


class CohereResult(BaseModel):
    index: int
    relevance_score: float
    document: dict[str, str] | None = Field(None, description="Only with `return_documents`.")


class CohereVersion(BaseModel):
    version: str


class CohereUnits(BaseModel):
    search_units: int
    input_tokens: int


class CohereTokens(BaseModel):
    input_tokens: int


class CohereMeta(BaseModel):
    api_version: CohereVersion
    billed_units: CohereUnits
    tokens: CohereTokens
    warnings: list[str] | None = Field(None, description="Only where there are any.")


class CohereAnswer(BaseModel):
    """Results by falling relevance."""

    id: str
    results: list[CohereResult]
    meta: CohereMeta


class CohereError(BaseModel):
    """Every error of a Cohere path."""

    id: str
    message: str


def read_v1(
    body: bytes,
    *,
    text_length: int,
    documents_limit: int,
    images_limit: int,
    remote_hosts: tuple[str, ...] = (),
) -> tuple[Ask, str | None]:
    try:
        request = CohereRequestV1.model_validate_json(body)
    except ValidationError as exc:
        raise _wrong(exc) from None
    documents = tuple(
        _document(document, index, request.rank_fields) for index, document in enumerate(request.documents)
    )
    return _ask(request, documents, None, text_length, documents_limit), request.model


def read_v2(
    body: bytes,
    *,
    text_length: int,
    documents_limit: int,
    images_limit: int,
    remote_hosts: tuple[str, ...] = (),
) -> tuple[Ask, str | None]:
    try:
        request = CohereRequestV2.model_validate_json(body)
    except ValidationError as exc:
        raise _wrong(exc) from None
    if request.relevant_spans is not None and request.relevant_spans.mode != "disabled":
        raise BadRequest("relevant_spans are not offered; leave them out.", field="relevant_spans")
    documents = tuple((text, None) for text in request.documents)
    return _ask(request, documents, request.max_tokens_per_doc, text_length, documents_limit), request.model


def answer(exchange: Exchange, ask: Ask, ranking: Ranking, model: str, *, version: str) -> dict[str, Any]:
    results = []
    for place in ranking.places:
        result: dict[str, Any] = {"index": place.index, "relevance_score": place.score}
        if ask.return_documents:
            document = ask.documents[place.index]
            result["document"] = document.sent or {"text": document.text}
        results.append(result)
    return {
        "id": exchange.request_id,
        "results": results,
        "meta": {
            "api_version": {"version": version},
            "billed_units": {"search_units": 1, "input_tokens": ranking.input_tokens},
            "tokens": {"input_tokens": ranking.input_tokens},
            **({"warnings": list(ranking.warnings)} if ranking.warnings else {}),
        },
    }


def complain(trouble: Trouble, exchange: Exchange) -> Complaint:
    """Cohere's status and text. Its clients know no 502."""
    status, message = trouble.status, trouble.detail
    match trouble.code:
        case "unauthenticated":
            message = "no api key supplied" if exchange.keyless else "invalid api token"
        case "model_not_found":
            named = repeated(exchange.named_model or "")
            message = (
                f"model '{named}' not found, make sure the correct model ID was used"
                " and that you have access to the model."
            )
        case "quota_exceeded" if set(trouble.violated) <= {"requests", "key_requests"}:
            message = "You are past the per minute request limit, please wait and try again later."
        case "invalid_request" if trouble.reason == "unknown_field":
            pass
        case _ if status == 422:
            status, message = 400, f"invalid request: {lowered(message)}"
        case "model_failed":
            status = 500
    return Complaint(status, {"id": exchange.request_id, "message": message})


def _ask(
    request: CohereRequest,
    documents: tuple[tuple[str, object], ...],
    max_tokens_per_doc: int | None,
    text_length: int,
    documents_limit: int,
) -> Ask:
    """`documents` are each text and, where that is not all of it, what was sent."""
    check_count(len(documents), documents_limit)
    if not request.query.strip():
        raise BadRequest("query must not be empty or be only whitespace", field="query")
    items = []
    for index, (text, sent) in enumerate(documents):
        where = f"documents[{index}]"
        if not text.strip():
            raise BadRequest(f"document at index {index} cannot be empty", field=where)
        check_text(text, where, text_length)
        items.append(RawItem(where, text, sent=sent))
    return Ask(
        query=read_item(request.query, "query", text_length),
        documents=tuple(items),
        instruction=None,
        top_n=min(request.top_n or len(items), len(items)),
        return_documents=request.return_documents or False,
        max_tokens_per_doc=max_tokens_per_doc,
        truncate=True,
    )


def _document(
    document: str | dict[str, str], index: int, rank_fields: list[str] | None
) -> tuple[str, dict[str, str] | None]:
    """What is read of a document: the named fields that it has, each on a line of its own."""
    if isinstance(document, str):
        return document, None
    named = [name for name in rank_fields or ["text"] if name in document]
    if not named:
        missing = "any of rank_fields" if rank_fields else "the field text"
        raise BadRequest(f"document at index {index} does not have {missing}", field=f"documents[{index}]")
    return "\n".join(document[name] for name in named), document


def _wrong(exc: ValidationError) -> BadRequest:
    wrong = first_wrong(exc)
    field, reason = wrong.field, None
    match wrong.kind:
        case "json_invalid":
            words = f"the body is not valid JSON: {wrong.words}"
        case "missing":
            words = f"{field} is required"
        case "extra_forbidden":
            words, reason = f"unknown field: parameter '{field}' is not a valid field.", "unknown_field"
        case "too_short" if field == "documents":
            words = "list of documents must not be empty"
        case "too_short":
            words = f"{field} cannot be empty"
        case "too_long":
            words = f"number of {field} must be at most {wrong.limit}"
        case _:
            words = f"{field or 'the body'}: {lowered(wrong.words)}"
    return BadRequest(words, field=field or None, limit=wrong.limit, reason=reason)


COHERE_V1 = Dialect(
    name="cohere v1",
    paths=("/cohere/v1/rerank",),
    operation="rerank",
    read=read_v1,
    answer=partial(answer, version="1"),
    complain=complain,
    request=CohereRequestV1,
    answered=CohereAnswer,
    refused=CohereError,
    about="As Cohere's v1 API: text, or objects of strings of which `rank_fields` are read.",
    examples={
        "text": {"query": "red fruit", "documents": ["a blue car", {"text": "an apple", "id": "7"}]},
    },
)
COHERE_V2 = Dialect(
    name="cohere v2",
    paths=("/cohere/v2/rerank", "/v2/rerank"),
    operation="rerank",
    read=read_v2,
    answer=partial(answer, version="2"),
    complain=complain,
    request=CohereRequestV2,
    answered=CohereAnswer,
    refused=CohereError,
    about="As Cohere's v2 API: text alone.",
    examples={
        "text": {"model": "rerank-v3.5", "query": "red fruit", "documents": ["a blue car", "an apple"]},
    },
)
