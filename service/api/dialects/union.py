"""The bare `/v1/rerank`: the documented union, with problem details (RFC 9457) for every error."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from service.api.dialects.dialect import Complaint, Dialect
from service.api.schemas import Problem, RerankAnswer, RerankRequest, read

if TYPE_CHECKING:
    from service.asks import Ask, Exchange, RawItem
    from service.errors import Trouble
    from service.rerank import Ranking


def answer(exchange: Exchange, ask: Ask, ranking: Ranking, model: str) -> dict[str, Any]:
    results = []
    for place in ranking.places:
        result: dict[str, Any] = {"index": place.index, "relevance_score": place.score}
        if ask.return_documents:
            result["document"] = text_and_image(ask.documents[place.index])
        results.append(result)
    return {
        "id": exchange.request_id,
        "model": model,
        "results": results,
        "usage": {
            "prompt_tokens": ranking.input_tokens,
            "total_tokens": ranking.input_tokens,
            "image_tokens": ranking.image_tokens,
        },
        "meta": {
            "api_version": {"version": "1"},
            "billed_units": {
                "search_units": 1,
                "images": len(ask.images),
                "input_tokens": ranking.input_tokens,
            },
            "warnings": list(ranking.warnings),
            **_session(ask, ranking),
            **_screening(exchange),
        },
    }


def complain(trouble: Trouble, exchange: Exchange) -> Complaint:
    """Problem details, with the field and the limit where there is one."""
    body = {
        "type": trouble.type_uri,
        "title": trouble.title,
        "status": trouble.status,
        "detail": trouble.detail,
        "code": trouble.code,
        "request_id": exchange.request_id,
        "field": trouble.field,
        "limit": trouble.limit,
        "reason": trouble.reason,
        "violated-policies": list(trouble.violated) or None,
        "screening": [asdict(touched) for touched in trouble.screening] or None,
        "errors": [{"field": fault.field, "detail": fault.why} for fault in trouble.faults] or None,
    }
    told = {key: value for key, value in body.items() if value is not None}
    return Complaint(trouble.status, told, "application/problem+json")


def text_and_image(item: RawItem) -> dict[str, str]:
    """A side as it was sent."""
    document = {}
    if item.text is not None:
        document["text"] = item.text
    if item.sent_image is not None:
        document["image"] = item.sent_image
    return document


def _session(ask: Ask, ranking: Ranking) -> dict[str, Any]:
    """What the session spared, where one was named."""
    if ask.session is None:
        return {}
    spared = {"reused_images": ranking.reused_images, "computed_tokens": ranking.computed_tokens}
    return {"session": {"id": ask.session, **spared}}


def _screening(exchange: Exchange) -> dict[str, Any]:
    """What was touched, where anything was."""
    told = exchange.screened.tell() if exchange.screened is not None else ()
    return {"screening": [asdict(touched) for touched in told]} if told else {}


UNION = Dialect(
    name="pericarp",
    paths=("/v1/rerank",),
    operation="rerank",
    read=read,
    answer=answer,
    complain=complain,
    request=RerankRequest,
    answered=RerankAnswer,
    refused=Problem,
    about="Query and documents are each text, an image, or both; up to 1,000 documents in one request.",
    examples={
        "text": {"query": "red fruit", "documents": ["a blue car", "an apple"], "top_n": 1},
        "images": {
            "query": {"text": "a pet"},
            "documents": [{"image": "data:image/png;base64,…"}, {"text": "a cat", "image": "…"}],
        },
    },
)
