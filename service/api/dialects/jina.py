"""Jina's `/v1/rerank`: text and images on either side; documents come back unless they are declined.

A query or a document is a string, `{"text"}` or `{"image"}`; one that holds both is taken as well, and an `id` in it
is not read. A query may also be a `data:` URL of an image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError

from service.api.dialects.dialect import Complaint, Dialect, repeated
from service.api.dialects.union import text_and_image
from service.api.items import (
    MAX_DOCUMENTS,
    Strict,
    TextAndImage,
    check_count,
    check_images,
    complaint,
    read_item,
    string_or_object,
)
from service.asks import Ask

if TYPE_CHECKING:
    from service.asks import Exchange, RawItem
    from service.errors import Trouble
    from service.rerank import Ranking


class JinaSide(TextAndImage):
    """A text or an image."""

    id: str | int | None = Field(None, description="Not read.")


Side = Annotated[
    Annotated[str, Tag("string")] | Annotated[JinaSide, Tag("object")],
    Discriminator(
        string_or_object,
        custom_error_type="side",
        custom_error_message='must be a string, {"text"} or {"image"}',
    ),
]


class JinaRequest(Strict):
    """What `https://api.jina.ai/v1/rerank` takes."""

    model: str
    query: Side
    documents: list[Side] = Field(min_length=1, max_length=MAX_DOCUMENTS)
    top_n: int | None = Field(None, ge=1, description="All if absent, or if more than there are.")
    return_documents: bool | None = Field(None, description="True if absent.")


class JinaResult(BaseModel):
    index: int
    relevance_score: float
    document: dict[str, str] | None = Field(None, description="`text` or `image`, unless declined.")


class JinaUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class JinaAnswer(BaseModel):
    """Results by falling relevance."""

    model: str
    object: Literal["list"]
    usage: JinaUsage
    results: list[JinaResult]


class JinaError(BaseModel):
    """Every error of a Jina path."""

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
        request = JinaRequest.model_validate_json(body)
    except ValidationError as exc:
        raise complaint(exc) from None
    count = len(request.documents)
    check_count(count, documents_limit)
    ask = Ask(
        query=_item(request.query, "query", text_length, remote_hosts),
        documents=tuple(
            _item(side, f"documents[{index}]", text_length, remote_hosts)
            for index, side in enumerate(request.documents)
        ),
        instruction=None,
        top_n=min(request.top_n or count, count),
        return_documents=request.return_documents is not False,
        max_tokens_per_doc=None,
        truncate=True,
    )
    check_images(ask, images_limit)
    return ask, request.model


def answer(exchange: Exchange, ask: Ask, ranking: Ranking, model: str) -> dict[str, Any]:
    results = []
    for place in ranking.places:
        result: dict[str, Any] = {"index": place.index, "relevance_score": place.score}
        if ask.return_documents:
            result["document"] = text_and_image(ask.documents[place.index])
        results.append(result)
    usage = {"total_tokens": ranking.input_tokens, "prompt_tokens": ranking.input_tokens}
    return {"model": model, "object": "list", "usage": usage, "results": results}


def complain(trouble: Trouble, exchange: Exchange) -> Complaint:
    """Jina's status of a model that it does not serve is 422, as of any other wrong value."""
    if trouble.code == "model_not_found":
        return Complaint(422, {"detail": f"Model {repeated(exchange.named_model or '')} is not found."})
    return Complaint(trouble.status, {"detail": trouble.detail})


def _item(side: str | JinaSide, where: str, text_length: int, remote_hosts: tuple[str, ...]) -> RawItem:
    if isinstance(side, str) and side[:11].lower() == "data:image/":
        side = JinaSide(image=side)
    return read_item(side, where, text_length, remote_hosts=remote_hosts)


JINA = Dialect(
    name="jina",
    paths=("/jina/v1/rerank",),
    operation="rerank",
    read=read,
    answer=answer,
    complain=complain,
    request=JinaRequest,
    answered=JinaAnswer,
    refused=JinaError,
    about="As Jina's API: text and images on either side; documents come back unless they are declined.",
    examples={
        "images": {
            "model": "jina-reranker-m0",
            "query": "a pet",
            "documents": [{"image": "data:image/png;base64,…"}, {"text": "a cat"}],
        },
    },
)
