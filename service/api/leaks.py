"""Where anybody reports a key that they found: a secret scanner, a colleague, a stranger. No key is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from service.api.requests import PROBLEMS, read_body
from service.errors import BadRequest

if TYPE_CHECKING:
    from service.asks import Exchange
    from service.leaks import Leaks

LEAKED_PATH = "/v1/keys/leaked"
MOST_REPORTED = 100
LEAKED_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": MOST_REPORTED,
                    "items": {
                        "anyOf": [
                            {"type": "string"},
                            {
                                "type": "object",
                                "properties": {"token": {"type": "string"}},
                                "required": ["token"],
                            },
                        ]
                    },
                },
                "examples": {
                    "scanner": {
                        "summary": "As secret scanning sends it",
                        "value": [
                            {
                                "token": "prc_live_…",
                                "type": "pericarp",
                                "url": "https://…",
                                "source": "commit",
                            }
                        ],
                    }
                },
            }
        },
    }
}


class LeakedAnswer(BaseModel):
    """The same for every report."""

    received: int = Field(description="How many texts were taken.")


def build_leaks_router(*, leaks: Leaks, deadline_s: float) -> APIRouter:
    """The one route."""
    router = APIRouter(tags=["keys"])

    @router.post(
        LEAKED_PATH,
        status_code=202,
        response_model=LeakedAnswer,
        responses={status: PROBLEMS[status] for status in (408, 413, 422, 503)},
        openapi_extra=LEAKED_BODY,
        summary="Report keys that were found",
    )
    async def report_leaked(request: Request) -> Response:
        """A key whose text is shown is revoked within 2 s. The answer tells nothing about any key."""
        exchange: Exchange = request.state.exchange
        exchange.operation = "key_leaked"
        texts = read_reports(await read_body(request, deadline_s))
        await leaks.report(exchange, texts)
        return Response(orjson.dumps({"received": len(texts)}), 202, media_type="application/json")

    return router


def read_reports(body: bytes) -> list[str]:
    """The texts of a report. Raises `BadRequest`."""
    try:
        raw = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise BadRequest("The body is not valid JSON.") from None
    if not isinstance(raw, list) or not 0 < len(raw) <= MOST_REPORTED:
        raise BadRequest(f"Send a list of 1 to {MOST_REPORTED} keys.", limit=MOST_REPORTED)
    texts = []
    for index, each in enumerate(raw):
        text = each.get("token") if isinstance(each, dict) else each
        if not isinstance(text, str):
            raise BadRequest("A key is a text, or an object with `token`.", field=f"[{index}]")
        texts.append(text)
    return texts
