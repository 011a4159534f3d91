"""Voyage's `/v1/rerank`, as the client library `voyageai` 0.5 has it. Text alone.

Its errors are 400 for whatever is wrong with a request, a model's name included, and its clients raise by the status.
White space alone is a document there, an empty string is none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from service.api.dialects.dialect import Complaint, Dialect, repeated
from service.api.items import MAX_DOCUMENTS, Strict, Wrong, check_count, first_wrong, read_item
from service.asks import Ask
from service.errors import BadRequest

if TYPE_CHECKING:
    from service.asks import Exchange
    from service.errors import Trouble
    from service.rerank import Ranking

NOT_AS_SPECIFIED = "The request body is not valid JSON, or some arguments were not specified properly."
EMPTY = "Input cannot contain empty strings or empty lists"


class VoyageRequest(Strict):
    """`Client.rerank` of `voyageai`."""

    query: str
    documents: list[str] = Field(min_length=1, max_length=MAX_DOCUMENTS)
    model: str
    top_k: int | None = Field(None, ge=1, description="All if absent, or if more than there are.")
    return_documents: bool | None = Field(None, description="False if absent.")
    truncation: bool | None = Field(
        None, description="True if absent: what does not fit is cut; else the request is refused."
    )


class VoyageResult(BaseModel):
    index: int
    relevance_score: float
    document: str | None = Field(None, description="Only with `return_documents`.")


class VoyageUsage(BaseModel):
    total_tokens: int


class VoyageAnswer(BaseModel):
    """Results by falling relevance."""

    object: Literal["list"]
    data: list[VoyageResult]
    model: str
    usage: VoyageUsage


class VoyageError(BaseModel):
    """Every error of a Voyage path."""

    detail: str


def read(
    body: bytes,
    *,
    text_length: int,
    documents_limit: int,
    images_limit: int,
    remote_hosts: tuple[str, ...] = (),
) -> tuple[Ask, str | None]:
    try:
        request = VoyageRequest.model_validate_json(body)
    except ValidationError as exc:
        wrong = first_wrong(exc)
        raise BadRequest(_words(wrong), field=wrong.field or None, limit=wrong.limit) from None
    documents = request.documents
    check_count(len(documents), documents_limit)
    if not request.query or not all(documents):
        field = "query" if not request.query else f"documents[{documents.index('')}]"
        raise BadRequest(EMPTY, field=field)
    ask = Ask(
        query=read_item(request.query, "query", text_length, blank=True),
        documents=tuple(
            read_item(text, f"documents[{index}]", text_length, blank=True)
            for index, text in enumerate(documents)
        ),
        instruction=None,
        top_n=min(request.top_k or len(documents), len(documents)),
        return_documents=request.return_documents or False,
        max_tokens_per_doc=None,
        truncate=request.truncation is not False,
    )
    return ask, request.model


def answer(exchange: Exchange, ask: Ask, ranking: Ranking, model: str) -> dict[str, Any]:
    data = []
    for place in ranking.places:
        result: dict[str, Any] = {"relevance_score": place.score, "index": place.index}
        if ask.return_documents:
            result["document"] = ask.documents[place.index].text
        data.append(result)
    usage = {"total_tokens": ranking.input_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def complain(trouble: Trouble, exchange: Exchange) -> Complaint:
    status, detail = trouble.status, trouble.detail
    match trouble.code:
        case "unauthenticated":
            detail = "Provided API key is invalid."
        case "model_not_found":
            named = repeated(exchange.named_model or "")
            status, detail = 400, f"Model {named} is not supported, or not for this key."
        case _ if status == 422:
            status = 400
    return Complaint(status, {"detail": detail})


def _words(wrong: Wrong) -> str:
    match wrong.kind:
        case "json_invalid":
            return f"{NOT_AS_SPECIFIED} In particular, {wrong.words}."
        case "extra_forbidden":
            return f"{NOT_AS_SPECIFIED} In particular, argument '{wrong.field}' is not supported by our API."
        case "missing":
            return f"{NOT_AS_SPECIFIED} In particular, argument '{wrong.field}' is missing."
        case "too_short":
            return EMPTY
        case "too_long":
            return f"Argument '{wrong.field}' is too long; at most {wrong.limit} fit into one request."
        case _:
            return (
                f"{NOT_AS_SPECIFIED} In particular, the value supplied for argument"
                f" '{wrong.field}' is not valid: {wrong.words}."
            )


VOYAGE = Dialect(
    name="voyage",
    paths=("/voyage/v1/rerank",),
    operation="rerank",
    read=read,
    answer=answer,
    complain=complain,
    request=VoyageRequest,
    answered=VoyageAnswer,
    refused=VoyageError,
    about="As Voyage's API: text alone.",
    examples={
        "text": {"query": "red fruit", "documents": ["a blue car", "an apple"], "model": "rerank-2.5"},
    },
)
