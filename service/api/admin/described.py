"""How the API's page describes what every administrator's path has in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from service.api.requests import PROBLEMS, Responses
from service.api.schemas import Problem

_TOLD = {
    404: "No such tenant, key or session, or one that is not yours to see: one answer for all.",
    409: "The name is taken, or the first request with this `Idempotency-Key` is not answered yet.",
    412: "Somebody else has changed it meanwhile: read it again.",
    422: "Something is wrong; `errors` has each field, and why.",
    428: "`If-Match` is missing.",
}

IDEMPOTENT: dict[str, Any] = {
    "parameters": [
        {
            "name": "Idempotency-Key",
            "in": "header",
            "required": False,
            "schema": {"type": "string", "minLength": 1, "maxLength": 255},
            "description": "A name of yours for this request. Sent again within a day with the same body, nothing is "
            "done again, and the answer is the first one with `Idempotency-Replayed: true`.",
        }
    ]
}


def refusals(*statuses: int) -> Responses:
    """Which refusals a path has, beside those that every path has."""
    told: Responses = {status: PROBLEMS[status] for status in (401, 403, 503)}
    return told | {
        status: {"model": Problem, "description": _TOLD[status]} for status in sorted({404, 422, *statuses})
    }


def body_of(shape: type[BaseModel], **examples: dict[str, Any]) -> dict[str, Any]:
    """The description of a body that we read ourselves, with examples by name."""
    return {
        "requestBody": {
            "required": any(field.is_required() for field in shape.model_fields.values()),
            "content": {
                "application/json": {
                    "schema": {"$ref": f"#/components/schemas/{shape.__name__}"},
                    "examples": {name: {"value": value} for name, value in examples.items()},
                }
            },
        }
    }


IF_MATCH: dict[str, Any] = {
    "parameters": [
        {
            "name": "If-Match",
            "in": "header",
            "required": True,
            "schema": {"type": "string"},
            "description": "The ETag of the version that you have seen; `*` for any.",
        }
    ]
}


def raw_body(description: str, **examples: dict[str, Any]) -> dict[str, Any]:
    """The description of a body that is one object of a policy's or a ceiling's fields."""
    return {
        "requestBody": {
            "required": True,
            "description": description,
            "content": {
                "application/json": {
                    "schema": {"type": "object", "additionalProperties": True},
                    "examples": {name: {"value": value} for name, value in examples.items()},
                }
            },
        }
    }
