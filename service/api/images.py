"""`POST /v1/images/clean`: an image as a file of its pixels alone, for a backend that stores it."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any, Literal

import orjson
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, ValidationError
from starlette.responses import Response

from service.api.items import ImageUrl, Strict, check_images, complaint, read_image
from service.api.requests import FOR_AN_END_USER, PROBLEMS, Responses, read_body, require
from service.asks import Ask
from service.errors import BadRequest
from service.screening import FORMATS
from tenants.access import Scope

if TYPE_CHECKING:
    from service.asks import Exchange
    from service.clean import CleanImage
    from service.screening import ImageFormat, Reencoded
    from tenants.policy import Policy

CLEAN_PATH = "/v1/images/clean"
MEDIA_TYPES: dict[ImageFormat, str] = {form: f"image/{form}" for form in FORMATS}
TRAILING = "trailing"
"""How bytes after the image's end are told among what was removed."""
CLEAN_BODY: dict[str, Any] = FOR_AN_END_USER | {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/CleanImageRequest"},
                "examples": {
                    "same format": {
                        "summary": "As it came, without metadata",
                        "value": {"image": "data:image/jpeg;base64,…"},
                    },
                    "as WebP": {"summary": "As WebP", "value": {"image": "…", "format": "webp"}},
                },
            }
        },
    }
}
ANSWERS: Responses = {
    200: {
        "description": "The clean image; as JSON where `Accept` names `application/json`.",
        "content": {
            media_type: {"schema": {"type": "string", "format": "binary"}}
            for media_type in MEDIA_TYPES.values()
        },
        "headers": {
            "Pericarp-Removed": {
                "description": "What was removed, separated by commas; absent where there was nothing.",
                "schema": {"type": "string"},
            }
        },
    },
    **{status: PROBLEMS[status] for status in (401, 403, 408, 413, 422, 429, 503, 504)},
}


class CleanImageRequest(Strict):
    """One image, as in a rerank request."""

    image: str | None = Field(
        None,
        description="A `data:` URL or bare base64 of a JPEG, PNG or WebP, or its `https:` URL where the policy allows.",
    )
    image_url: ImageUrl | str | None = Field(None, description="Another name of `image`, as OpenAI has it.")
    format: Literal["jpeg", "png", "webp"] | None = Field(
        None, description="Format of the clean image; the image's own if absent."
    )


class CleanImageAnswer(BaseModel):
    """The clean image, where `Accept` names `application/json`."""

    id: str
    object: Literal["image"]
    format: Literal["jpeg", "png", "webp"]
    width: int = Field(description="Pixels, upright.")
    height: int
    image: str = Field(description="The file in base64.")
    removed: list[str] = Field(
        description="Kinds of metadata that it had, and `trailing` for bytes after its end."
    )
    trailing_bytes: int = Field(description="How many bytes stood after its end.")


def build_images_router(*, clean: CleanImage, deadline_s: float) -> APIRouter:
    """The one route."""
    router = APIRouter(tags=["images"])

    @router.post(
        CLEAN_PATH,
        response_model=CleanImageAnswer,
        responses=ANSWERS,
        openapi_extra=CLEAN_BODY,
        summary="Remove everything but an image's pixels",
    )
    async def clean_image(request: Request) -> Response:
        """Decoded in a locked process and written again from pixels alone, at full size, upright, on white."""
        exchange: Exchange = request.state.exchange
        exchange.operation = "clean_image"
        policy = require(exchange, "search", Scope.RERANK).policy
        body = await read_body(request, deadline_s)
        with exchange.stage("parse"):
            ask, form = read_clean(body, policy)
        cleaned = await clean(exchange, ask, form)
        removed = [*cleaned.metadata, *([TRAILING] if cleaned.trailing_bytes else [])]
        headers = {"X-Content-Type-Options": "nosniff", "Vary": "Accept"}
        if removed:
            headers["Pericarp-Removed"] = ", ".join(removed)
        if not wants_json(request.headers.get("accept", "")):
            return Response(cleaned.image, headers=headers, media_type=MEDIA_TYPES[cleaned.format])
        told = orjson.dumps(_tell(exchange, cleaned, removed))
        return Response(told, headers=headers, media_type="application/json")

    return router


def read_clean(body: bytes, policy: Policy) -> tuple[Ask, ImageFormat | None]:
    """An ask whose query is the image, and the format that is asked for. Raises `BadRequest`."""
    try:
        request = CleanImageRequest.model_validate_json(body)
    except ValidationError as exc:
        raise complaint(exc) from None
    url = request.image_url.url if isinstance(request.image_url, ImageUrl) else request.image_url
    given = {"image": request.image, "image_url": url}
    named = [(name, value) for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise BadRequest("Send exactly one of image and image_url.", field="image")
    name, value = named[0]
    ask = Ask(
        query=read_image(value, name, where=name, remote_hosts=policy.fetches_from),
        documents=(),
        instruction=None,
        top_n=0,
        return_documents=False,
        max_tokens_per_doc=None,
        truncate=True,
    )
    check_images(ask, policy.images_per_request)
    return ask, request.format


def wants_json(accept: str) -> bool:
    """Whether an `Accept` header names `application/json` and does not weigh it 0 (RFC 9110, section 12.5.1)."""
    for each in accept.lower().split(","):
        media_type, *parameters = (part.strip() for part in each.split(";"))
        if media_type == "application/json":
            weights = [parameter[2:] for parameter in parameters if parameter.startswith("q=")]
            return not weights or weights[0].strip("0.") != ""
    return False


def _tell(exchange: Exchange, cleaned: Reencoded, removed: list[str]) -> dict[str, Any]:
    return {
        "id": exchange.request_id,
        "object": "image",
        "format": cleaned.format,
        "width": cleaned.width,
        "height": cleaned.height,
        "image": base64.b64encode(cleaned.image).decode(),
        "removed": removed,
        "trailing_bytes": cleaned.trailing_bytes,
    }
