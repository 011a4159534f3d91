"""What a search engineer calls: rerank, the served model, health.

Bodies are read here and not by the framework, so that parsing costs one pass and every complaint is ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.requests import PROBLEMS, read_body, require
from service.api.schemas import RerankAnswer, read
from service.errors import ModelUnknown, NotReady
from service.watch import metrics
from tenants.access import Scope

if TYPE_CHECKING:
    from service.asks import Ask, Exchange, RawItem
    from service.fleet.router import Fleet
    from service.rerank import Ranking, Rerank
    from service.screening.pool import Screen
    from tenants.database import Database

RERANK_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/RerankRequest"},
                "examples": {
                    "text": {
                        "summary": "Text among text",
                        "value": {"query": "red fruit", "documents": ["a blue car", "an apple"], "top_n": 1},
                    },
                    "images": {
                        "summary": "Text and images among each other",
                        "value": {
                            "query": {"text": "a pet"},
                            "documents": [
                                {"image": "data:image/png;base64,…"},
                                {"text": "a cat", "image": "…"},
                            ],
                        },
                    },
                },
            }
        },
    }
}


def build_router(
    *, rerank: Rerank, fleet: Fleet, screen: Screen, database: Database, model: str, deadline_s: float
) -> APIRouter:
    """The routes of the data plane. `model` is the served model's name as callers see it."""
    router = APIRouter()

    @router.post(
        "/v1/rerank",
        response_model=RerankAnswer,
        response_model_exclude_none=True,
        responses=PROBLEMS,
        openapi_extra=RERANK_BODY,
        tags=["search"],
        summary="Put documents in order of relevance to a query",
    )
    async def rerank_documents(request: Request) -> Response:
        """Query and documents are each text, an image, or both; up to 1,000 documents in one request."""
        exchange: Exchange = request.state.exchange
        exchange.operation = "rerank"
        caller = require(exchange, "search", Scope.RERANK)
        policy = caller.policy
        body = await read_body(request, deadline_s)
        with exchange.stage("parse"):
            ask, named = read(
                body,
                text_length=policy.text_length,
                documents_limit=policy.documents_per_request,
                images_limit=policy.images_per_request,
            )
        if named is not None and (named != model or not policy.allows_model(model)):
            raise ModelUnknown(
                f"That model is not served here; leave `model` out or use {model!r}.", field="model"
            )
        if ask.session is not None:
            require(exchange, "search", Scope.SESSIONS)
        ranking = await rerank(exchange, ask)
        return Response(orjson.dumps(_answer(exchange, ask, ranking, model)), media_type="application/json")

    @router.get("/v1/models", responses={401: PROBLEMS[401]}, tags=["search"], summary="The served model")
    async def list_models(request: Request) -> dict[str, Any]:
        """OpenAI's list shape."""
        request.state.exchange.operation = "models"
        card = fleet.card
        told: dict[str, Any] = {"id": model, "object": "model", "owned_by": "pericarp"}
        if card is not None:
            told |= {
                "digest": card.digest,
                "parameters": card.parameters,
                "dtype": card.dtype,
                "attention": card.attention,
                "max_model_len": card.context_tokens,
            }
        return {"object": "list", "data": [told]}

    @router.get("/healthz", tags=["health"], summary="The process is alive")
    async def tell_health() -> dict[str, str]:
        """Says nothing of workers or the database: see /readyz."""
        return {"status": "ok"}

    @router.get(
        "/readyz", tags=["health"], summary="Requests can be answered", responses={503: PROBLEMS[503]}
    )
    async def tell_readiness() -> dict[str, Any]:
        """True only when a worker has scored a warm-up, screening runs and the database answers."""
        checks = {"worker": fleet.ready, "screening": screen.ready, "database": await database.answers()}
        if not all(checks.values()):
            missing = ", ".join(name for name, ready in checks.items() if not ready)
            raise NotReady(f"Not ready yet: {missing}.", reason=missing)
        weights = "unknown" if fleet.card is None else fleet.card.weights
        return {"status": "ready", "checks": checks, "weights": weights}

    @router.get("/metrics", tags=["operations"], summary="Prometheus metrics (platform_admin keys)")
    async def export_metrics(request: Request) -> Response:
        """Counts over all tenants, so only the platform's own keys may read them."""
        request.state.exchange.operation = "metrics"
        require(request.state.exchange, "platform_admin", Scope.METRICS)
        workers = fleet.workers()
        for state in ("assigned", "spare"):
            metrics.WORKERS.labels(state).set(sum(worker.state == state for worker in workers))
        metrics.WORKER_COMPILATIONS.set(sum(worker.compilations for worker in workers))
        lent = fleet.lent
        metrics.LENT_BYTES.set(lent.size_bytes)
        metrics.LENT_WORKERS.set(lent.workers)
        metrics.LENT_CHANGES.set(lent.changes)
        metrics.JOBS.labels("running").set(sum(worker.running for worker in workers))
        metrics.JOBS.labels("waiting").set(fleet.waiting)
        return Response(metrics.render(), media_type=metrics.CONTENT_TYPE)

    return router


def _answer(exchange: Exchange, ask: Ask, ranking: Ranking, model: str) -> dict[str, Any]:
    results = []
    for place in ranking.places:
        result: dict[str, Any] = {"index": place.index, "relevance_score": place.score}
        if ask.return_documents:
            result["document"] = _document(ask.documents[place.index])
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
        },
    }


def _session(ask: Ask, ranking: Ranking) -> dict[str, Any]:
    """What the session spared, where one was named."""
    if ask.session is None:
        return {}
    spared = {"reused_images": ranking.reused_images, "computed_tokens": ranking.computed_tokens}
    return {"session": {"id": ask.session, **spared}}


def _document(item: RawItem) -> dict[str, str]:
    document = {}
    if item.text is not None:
        document["text"] = item.text
    if item.sent_image is not None:
        document["image"] = item.sent_image
    return document
