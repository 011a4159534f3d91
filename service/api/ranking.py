"""What ranks and scores, at the paths of every dialect.

Bodies are read here and not by the framework, so that parsing costs one pass and every complaint is ours.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.dialects import DIALECTS
from service.api.dialects.union import UNION
from service.api.requests import FOR_AN_END_USER, PROBLEMS, Responses, read_body, require
from service.errors import ModelUnknown
from tenants.access import Scope

if TYPE_CHECKING:
    from service.api.dialects import Dialect
    from service.asks import Exchange
    from service.rerank import Rerank


def build_ranking_router(
    *, rerank: Rerank, model: str, aliases: frozenset[str], deadline_s: float
) -> APIRouter:
    """`model` is the served model's name as callers see it; on the dialects' paths it goes by `aliases` too."""
    router = APIRouter()

    def serve(dialect: Dialect) -> Callable[[Request], Awaitable[Response]]:
        async def rank_documents(request: Request) -> Response:
            exchange: Exchange = request.state.exchange
            exchange.operation = dialect.operation
            policy = require(exchange, "search", Scope.RERANK).policy
            body = await read_body(request, deadline_s)
            with exchange.stage("parse"):
                ask, named = dialect.read(
                    body,
                    text_length=policy.text_length,
                    documents_limit=policy.documents_per_request,
                    images_limit=policy.images_per_request,
                    remote_hosts=policy.fetches_from,
                )
            exchange.named_model = named or model
            if not policy.allows_model(model):
                raise ModelUnknown("No model that this tenant may use is served here.", field="model")
            if named not in (None, model, *(() if dialect is UNION else aliases)):
                raise ModelUnknown(
                    f"That model is not served here; leave `model` out or use {model!r}.", field="model"
                )
            if ask.session is not None:
                require(exchange, "search", Scope.SESSIONS)
            ranking = await rerank(exchange, ask)
            told = dialect.answer(exchange, ask, ranking, model)
            return Response(orjson.dumps(told), media_type="application/json")

        return rank_documents

    for dialect in DIALECTS:
        for path in dialect.paths:
            router.add_api_route(
                path,
                serve(dialect),
                methods=["POST"],
                response_model=dialect.answered,
                responses=_refusals(dialect),
                openapi_extra=_body(dialect),
                tags=["search" if dialect is UNION else dialect.name],
                name=f"{dialect.operation}_documents",
                summary=SUMMARIES[dialect.operation],
                description=dialect.about,
            )
    return router


SUMMARIES = {
    "rerank": "Put documents in order of relevance to a query",
    "score": "Score each document for a query, or for one of its own",
}


def _refusals(dialect: Dialect) -> Responses:
    """Every status that the dialect's clients may meet."""
    if dialect is UNION:
        return PROBLEMS
    told: Responses = {400: PROBLEMS[422], **PROBLEMS, 500: {"description": "Something broke on our side."}}
    return {status: {**each, "model": dialect.refused} for status, each in told.items()}


def _body(dialect: Dialect) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{dialect.request.__name__}"}
    examples = {name: {"summary": name, "value": value} for name, value in dialect.examples.items()}
    return FOR_AN_END_USER | {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schema, "examples": examples}},
        }
    }
