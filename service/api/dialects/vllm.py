"""vLLM's `/rerank` and `/score`, as version 0.32 has them: text and content parts on either side.

A side is a string, which may be empty, or `{"content": [parts]}`; where a list of them is due, one alone is a list of
one. What vLLM takes and would change scores in ways that are not offered here is refused by its name, never dropped.
What cannot change them (`user`, `request_id`, `cache_salt`, `return_documents`) is taken and not read.
"""

from __future__ import annotations

import time
from dataclasses import replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, ValidationError

from service.api.dialects.dialect import Complaint, Dialect, repeated
from service.api.items import (
    MAX_DOCUMENTS,
    Content,
    Strict,
    check_count,
    check_images,
    check_text,
    complaint,
    read_item,
    string_or_object,
)
from service.asks import Ask
from service.errors import BadRequest

if TYPE_CHECKING:
    from service.asks import Exchange, RawItem
    from service.errors import Trouble
    from service.rerank import Ranking

Side = Annotated[
    Annotated[str, Tag("string")] | Annotated[Content, Tag("object")],
    Discriminator(
        string_or_object,
        custom_error_type="side",
        custom_error_message='must be a string or {"content": [parts]}',
    ),
]


def _several(value: object) -> object:
    return value if isinstance(value, list) else [value]


Sides = Annotated[
    list[Side],
    BeforeValidator(_several, json_schema_input_type=list[Side] | Side),
    Field(max_length=MAX_DOCUMENTS),
]
PAIRS = (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2"))
"""The names that the two sides of a score may have."""


class VllmRequest(Strict):
    """What rerank and score both take."""

    model: str | None = None
    max_tokens_per_doc: int | None = Field(
        None, ge=0, le=131_072, description="A document's text is cut after so many tokens; 0: never."
    )
    truncate_prompt_tokens: int | None = Field(
        None,
        ge=-1,
        description="-1 cuts a document's text where the context ends; absent, such a request is refused.",
    )
    instruction: str | None = Field(None, min_length=1, description="What relevant means.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Only `instruction`, which goes before the field of that name."
    )
    use_activation: bool | None = Field(None, description="Only true: scores are sigmoids.")
    max_tokens_per_query: int | None = Field(None, description="Only 0.")
    truncation_side: Literal["left", "right"] | None = Field(None, description="Only `right`.")
    padding: Literal["max_length", "do_not_pad"] | None = Field(None, description="Only `do_not_pad`.")
    priority: int | None = Field(None, description="Only 0.")
    mm_processor_kwargs: dict[str, Any] | None = Field(None, description="Only an empty object.")
    user: str | None = Field(None, description="Not read.")
    request_id: str | None = Field(None, description="Not read.")
    cache_salt: str | None = Field(None, description="Not read: what is kept is the tenant's own anyway.")


class VllmRerankRequest(VllmRequest):
    """What `/rerank` takes."""

    query: Side
    documents: Sides
    top_n: int | None = Field(None, ge=0, description="All if absent, 0, or more than there are.")
    return_documents: bool | None = Field(None, description="Not read: documents always come back.")


class VllmScoreRequest(VllmRequest):
    """What `/score` takes: one pair of names, 1:1, 1:N or N:N."""

    data_1: Sides | None = None
    data_2: Sides | None = None
    text_1: Sides | None = None
    text_2: Sides | None = None
    queries: Sides | None = None
    documents: Sides | None = None
    items: Sides | None = None


class VllmDocument(BaseModel):
    """One of the two is null."""

    text: str | None
    multi_modal: list[dict[str, Any]] | None


class VllmResult(BaseModel):
    index: int
    document: VllmDocument
    relevance_score: float


class VllmUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class VllmRerankAnswer(BaseModel):
    """Results by falling relevance."""

    id: str
    model: str
    usage: VllmUsage
    results: list[VllmResult]


class VllmScore(BaseModel):
    index: int
    object: Literal["score"]
    score: float


class VllmScoreUsage(VllmUsage):
    completion_tokens: Literal[0]
    prompt_tokens_details: None


class VllmScoreAnswer(BaseModel):
    """Scores in the request's order."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[VllmScore]
    usage: VllmScoreUsage


class VllmErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None
    code: int


class VllmError(BaseModel):
    """Every error of a vLLM path."""

    error: VllmErrorInfo


def read_rerank(
    body: bytes,
    *,
    text_length: int,
    documents_limit: int,
    images_limit: int,
    remote_hosts: tuple[str, ...] = (),
) -> tuple[Ask, str | None]:
    try:
        request = VllmRerankRequest.model_validate_json(body)
    except ValidationError as exc:
        raise complaint(exc) from None
    documents = request.documents
    if not documents:
        raise BadRequest("documents is empty; send at least 1.", field="documents", limit=1)
    check_count(len(documents), documents_limit)
    ask = Ask(
        query=_item(request.query, "query", text_length, remote_hosts),
        documents=_items(documents, "documents", text_length, remote_hosts),
        instruction=_instruction(request, text_length),
        top_n=min(request.top_n or len(documents), len(documents)),
        return_documents=True,
        max_tokens_per_doc=request.max_tokens_per_doc or None,
        truncate=_truncates(request),
    )
    check_images(ask, images_limit)
    return ask, request.model


def read_score(
    body: bytes,
    *,
    text_length: int,
    documents_limit: int,
    images_limit: int,
    remote_hosts: tuple[str, ...] = (),
) -> tuple[Ask, str | None]:
    try:
        request = VllmScoreRequest.model_validate_json(body)
    except ValidationError as exc:
        raise complaint(exc) from None
    first, second = _names(request)
    queries: list[str | Content] = getattr(request, first)
    documents: list[str | Content] = getattr(request, second)
    for name, sides in ((first, queries), (second, documents)):
        if not sides:
            raise BadRequest(f"{name} is empty; send at least 1.", field=name, limit=1)
    check_count(len(documents), documents_limit, second)
    if len(queries) not in (1, len(documents)):
        raise BadRequest(
            f"{first} has {len(queries)} and {second} {len(documents)}:"
            " input lengths must be either 1:1, 1:N or N:N.",
            field=first,
        )
    asked = _items(queries, first, text_length, remote_hosts)
    ask = Ask(
        query=asked[0],
        documents=_items(documents, second, text_length, remote_hosts),
        instruction=_instruction(request, text_length),
        top_n=len(documents),
        return_documents=False,
        max_tokens_per_doc=request.max_tokens_per_doc or None,
        truncate=_truncates(request),
        queries=asked if len(asked) > 1 else (),
        ranked=False,
    )
    check_images(ask, images_limit)
    return ask, request.model


def answer_rerank(exchange: Exchange, ask: Ask, ranking: Ranking, model: str) -> dict[str, Any]:
    results = []
    for place in ranking.places:
        item = ask.documents[place.index]
        document = {"text": None if item.sent else item.text, "multi_modal": item.sent}
        results.append({"index": place.index, "document": document, "relevance_score": place.score})
    return {
        "id": f"rerank-{exchange.request_id}",
        "model": model,
        "usage": {"prompt_tokens": ranking.input_tokens, "total_tokens": ranking.input_tokens},
        "results": results,
    }


def answer_score(exchange: Exchange, ask: Ask, ranking: Ranking, model: str) -> dict[str, Any]:
    return {
        "id": f"score-{exchange.request_id}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": [{"index": place.index, "object": "score", "score": place.score} for place in ranking.places],
        "usage": {
            "prompt_tokens": ranking.input_tokens,
            "total_tokens": ranking.input_tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
        },
    }


def complain(trouble: Trouble, exchange: Exchange) -> Complaint:
    """vLLM says 400 to whatever is wrong with a body, and 404 to a model that it does not have."""
    status, message = trouble.status, trouble.detail
    match trouble.code:
        case "model_not_found":
            message = f"The model `{repeated(exchange.named_model or '')}` does not exist."
        case "document_too_long":
            message = (
                f"Of the text of {trouble.field}, {trouble.limit} tokens fit."
                " Shorten it, or set truncate_prompt_tokens to -1."
            )
    if status == 422:
        status = 400
    match status:
        case 400:
            kind = "BadRequestError"
        case 404:
            kind = "NotFoundError"
        case 500 | 502:
            kind = "InternalServerError"
        case 499:
            kind = trouble.title
        case _:
            kind = HTTPStatus(status).phrase
    info = {"message": message, "type": kind, "param": trouble.field, "code": status}
    return Complaint(status, {"error": info})


def _items(
    sides: list[str | Content], name: str, text_length: int, remote_hosts: tuple[str, ...]
) -> tuple[RawItem, ...]:
    return tuple(
        _item(side, f"{name}[{index}]", text_length, remote_hosts) for index, side in enumerate(sides)
    )


def _item(side: str | Content, where: str, text_length: int, remote_hosts: tuple[str, ...]) -> RawItem:
    item = read_item(side, where, text_length, blank=True, remote_hosts=remote_hosts)
    if isinstance(side, str):
        return item
    parts = [part.model_dump(exclude_unset=True) for part in side.content]
    return replace(item, sent=parts)


def _names(request: VllmScoreRequest) -> tuple[str, str]:
    """The pair of names that is used: all of it, and no other."""
    given = {name for pair in PAIRS for name in pair if getattr(request, name) is not None}
    for pair in PAIRS:
        if given == set(pair):
            return pair
    told = ", ".join("+".join(pair) for pair in PAIRS)
    raise BadRequest(f"Send one pair of {told}.", field=min(given, default=None))


def _instruction(request: VllmRequest, text_length: int) -> str | None:
    """What the request asks for; whatever else would change scores is refused here."""
    for field, value, offered in (
        ("truncate_prompt_tokens", request.truncate_prompt_tokens, (None, -1)),
        ("use_activation", request.use_activation, (None, True)),
        ("max_tokens_per_query", request.max_tokens_per_query, (None, 0)),
        ("truncation_side", request.truncation_side, (None, "right")),
        ("padding", request.padding, (None, "do_not_pad")),
        ("priority", request.priority, (None, 0)),
        ("mm_processor_kwargs", request.mm_processor_kwargs, (None, {})),
    ):
        if value not in offered:
            raise BadRequest(f"{field} is not offered with this value; leave it out.", field=field)
    template = request.chat_template_kwargs or {}
    if template.keys() - {"instruction"}:
        raise BadRequest(
            "Of chat_template_kwargs only instruction is offered; leave the others out.",
            field="chat_template_kwargs",
        )
    instruction = template.get("instruction", request.instruction)
    if instruction is None:
        return None
    if not isinstance(instruction, str) or not instruction:
        raise BadRequest(
            "chat_template_kwargs.instruction must be a string that is not empty.",
            field="chat_template_kwargs.instruction",
        )
    check_text(instruction, "instruction", text_length)
    return instruction


def _truncates(request: VllmRequest) -> bool:
    """vLLM refuses what exceeds the context, unless it is asked to cut."""
    return request.truncate_prompt_tokens == -1 or bool(request.max_tokens_per_doc)


VLLM_RERANK = Dialect(
    name="vllm rerank",
    paths=("/vllm/rerank", "/vllm/v1/rerank", "/vllm/v2/rerank"),
    operation="rerank",
    read=read_rerank,
    answer=answer_rerank,
    complain=complain,
    request=VllmRerankRequest,
    answered=VllmRerankAnswer,
    refused=VllmError,
    about="As vLLM's rerank API: text and content parts on either side.",
    examples={
        "images": {
            "query": "a pet",
            "documents": [
                "a cat",
                {"content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}}]},
            ],
        },
    },
)
VLLM_SCORE = Dialect(
    name="vllm score",
    paths=("/score", "/v1/score", "/vllm/score", "/vllm/v1/score"),
    operation="score",
    read=read_score,
    answer=answer_score,
    complain=complain,
    request=VllmScoreRequest,
    answered=VllmScoreAnswer,
    refused=VllmError,
    about="As vLLM's score API: one query for all documents, or one for each; scores in the request's order.",
    examples={
        "one query": {"queries": "a pet", "documents": ["a cat", "an apple"]},
        "a query for each": {"queries": ["a pet", "red fruit"], "documents": ["a cat", "an apple"]},
    },
)
