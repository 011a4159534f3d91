"""`POST /v1/moderations`: OpenAI's shape, so that its clients can use the screen alone.

Request and answer are those of `omni-moderation` as OpenAI's API reference and its client library have them. Categories
that nothing here measures are false with a score of 0 and no input types; ours that it has no name for stand beside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Request
from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError
from starlette.responses import Response

from service.api.items import (
    MAX_DOCUMENTS,
    ImageUrl,
    Strict,
    TextPart,
    check_count,
    check_images,
    complaint,
    read_image,
    read_item,
)
from service.api.requests import FOR_AN_END_USER, PROBLEMS, read_body, require
from service.asks import Ask
from service.errors import BadRequest, ModelUnknown
from tenants.access import Scope
from tenants.risk import Category

if TYPE_CHECKING:
    from service.asks import Exchange, RawItem
    from service.moderation import Moderation, Opinion
    from tenants.policy import Policy

MODEL = "pericarp-screen"
OPENAIS = (
    "omni-moderation-latest",
    "omni-moderation-2024-09-26",
    "text-moderation-latest",
    "text-moderation-stable",
)
"""What OpenAI's clients name by default. The answer names what looked."""

NAMES: dict[str, tuple[Category, ...]] = {
    "harassment": (),
    "harassment/threatening": (),
    "hate": (Category.HATE,),
    "hate/threatening": (),
    "illicit": (Category.ILLEGAL, Category.DRUGS),
    "illicit/violent": (Category.WEAPONS,),
    "self-harm": (),
    "self-harm/intent": (),
    "self-harm/instructions": (),
    "sexual": (Category.SEXUAL,),
    "sexual/minors": (),
    "violence": (Category.VIOLENCE,),
    "violence/graphic": (Category.GORE,),
    **{
        str(category): (category,)
        for category in Category
        if category not in (Category.SEXUAL, Category.HATE, Category.VIOLENCE)
    },
}
"""OpenAI's categories and ours, and of which of ours each is the highest. Empty: nothing here measures it."""


class ModeratedImage(Strict):
    """An image among the parts."""

    type: Literal["image_url"]
    image_url: ImageUrl


ModeratedPart = Annotated[TextPart | ModeratedImage, Discriminator("type")]
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_DOCUMENTS)]
Parts = Annotated[list[ModeratedPart], Field(min_length=1, max_length=MAX_DOCUMENTS)]


def _kind(value: object) -> str | None:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        return "parts" if value and isinstance(value[0], dict) else "texts"
    return None


class ModerationRequest(Strict):
    """What is to be screened."""

    input: Annotated[
        Annotated[str, Tag("text")] | Annotated[Texts, Tag("texts")] | Annotated[Parts, Tag("parts")],
        Discriminator(
            _kind,
            custom_error_type="input",
            custom_error_message="must be a string, a list of strings, or a list of parts",
        ),
    ] = Field(
        description="A text; texts, each with a result of its own; or parts, which are one input together."
    )
    model: str | None = Field(
        None, description=f"`{MODEL}`, or a name of OpenAI's moderation models; may be left out."
    )


class ModerationResult(BaseModel):
    """What was measured of one input. The keys are OpenAI's categories, and ours."""

    flagged: bool = Field(
        description="Whether anything reached a threshold of the tenant, or a detector failed."
    )
    categories: dict[str, bool] = Field(description="Whether the category reached its threshold.")
    category_scores: dict[str, float] = Field(description="0 to 1, rounded to two digits.")
    category_applied_input_types: dict[str, list[Literal["text", "image"]]] = Field(
        description="In which inputs a detector had something to say on it; empty where none had."
    )
    missing_detectors: list[str] | None = Field(
        None, description="Detectors that should have looked and could not; only where there are any."
    )


class ModerationAnswer(BaseModel):
    id: str
    model: str
    results: list[ModerationResult]


def build_moderations_router(*, moderation: Moderation, deadline_s: float) -> APIRouter:
    """The one route. It needs the role `search` and the scope `rerank`."""
    router = APIRouter(tags=["search"])

    @router.post(
        "/v1/moderations",
        response_model=ModerationAnswer,
        responses={status: each for status, each in PROBLEMS.items() if status != 502},
        openapi_extra=_BODY,
        summary="Measure risks of texts and images",
    )
    async def moderate(request: Request) -> Response:
        """As OpenAI's moderations. Screened as in a ranking, by the tenant's thresholds; nothing is ranked or refused."""
        exchange: Exchange = request.state.exchange
        exchange.operation = "moderation"
        policy = require(exchange, "search", Scope.RERANK).policy
        body = await read_body(request, deadline_s)
        with exchange.stage("parse"):
            ask, inputs = read(body, policy)
        opinions = await moderation(exchange, ask, inputs)
        told = {
            "id": f"modr-{exchange.request_id}",
            "model": MODEL,
            "results": [tell(opinion) for opinion in opinions],
        }
        return Response(orjson.dumps(told), media_type="application/json")

    return router


def read(body: bytes, policy: Policy) -> tuple[Ask, list[list[int]]]:
    """The body as an ask without documents, and the places of each input's items. Raises `BadRequest`, `ModelUnknown`."""
    try:
        request = ModerationRequest.model_validate_json(body)
    except ValidationError as exc:
        raise complaint(exc) from None
    if request.model not in (None, MODEL, *OPENAIS):
        raise ModelUnknown(
            f"That model is not served here; leave `model` out or use {MODEL!r}.", field="model"
        )
    given = request.input
    sides = [given] if isinstance(given, str) else given
    names = ["input"] if isinstance(given, str) else [f"input[{index}]" for index in range(len(sides))]
    check_count(len(sides), policy.documents_per_request, "input")
    items = tuple(_item(side, name, policy) for side, name in zip(sides, names, strict=True))
    ask = Ask(
        query=items[0],
        documents=(),
        instruction=None,
        top_n=0,
        return_documents=False,
        max_tokens_per_doc=None,
        truncate=True,
        queries=items,
    )
    check_images(ask, policy.images_per_request)
    places = list(range(len(items)))
    together = not isinstance(sides[0], str)
    return ask, [places] if together else [[place] for place in places]


def tell(opinion: Opinion) -> dict[str, Any]:
    """One result."""
    told: dict[str, Any] = {
        "flagged": opinion.flagged,
        "categories": {},
        "category_scores": {},
        "category_applied_input_types": {},
    }
    for name, categories in NAMES.items():
        found = [opinion.measured[category] for category in categories if category in opinion.measured]
        told["categories"][name] = any(each.stopped for each in found)
        told["category_scores"][name] = round(max((each.score for each in found), default=0.0), 2)
        told["category_applied_input_types"][name] = sorted(
            {str(mode) for each in found for mode in each.modes}, reverse=True
        )
    if opinion.missing:
        told["missing_detectors"] = list(opinion.missing)
    return told


def _item(side: str | TextPart | ModeratedImage, where: str, policy: Policy) -> RawItem:
    if isinstance(side, ModeratedImage):
        return read_image(
            side.image_url.url, f"{where}.image_url", where=where, remote_hosts=policy.fetches_from
        )
    text = side if isinstance(side, str) else side.text
    if not text:
        raise BadRequest(f"{where} is empty; send a text.", field=where)
    return read_item(text, where, policy.text_length, blank=True)


_BODY: dict[str, Any] = FOR_AN_END_USER | {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/ModerationRequest"},
                "examples": {
                    "texts": {"summary": "texts", "value": {"input": ["an apple", "a pear"]}},
                    "parts": {
                        "summary": "text and image",
                        "value": {
                            "input": [
                                {"type": "text", "text": "an apple"},
                                {"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}},
                            ]
                        },
                    },
                },
            }
        },
    }
}
