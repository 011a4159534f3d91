"""A tenant's Policy: its limits and rights as one frozen, validated value.

Stored as one JSON object per version; every version is kept. Unknown fields are refused, absent ones take
today's default, so a policy written by an older version still reads.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from functools import lru_cache
from typing import Any

import orjson

from tenants.errors import InvalidPolicy

MOST_PER_MINUTE = 1_000_000
"""Above it, one request's share of a minute would round to nothing in Postgres' microseconds."""
MOST_CONCURRENT = 1_000
MOST_SESSIONS = 1_000
MOST_DOCUMENTS = 1_000
MOST_TEXT_LENGTH = 1_000_000
MODEL_NAME_LENGTH = 200


class Isolation(StrEnum):
    """How far a tenant's work stays apart from others'."""

    ISOLATED = "isolated"
    """Worker processes that serve no other tenant; the weights' pages are shared."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Limits and rights of one tenant. Raises `InvalidPolicy` where they contradict each other."""

    requests_per_minute: int = 600
    request_burst: int | None = None
    """Requests that may come at once after a pause; unset: a minute's worth."""
    images_per_minute: int = 20
    image_burst: int | None = None
    """Images that may come at once after a pause; unset: a minute's worth."""
    concurrent_requests: int = 5
    text_length: int = 10_000
    """Characters of one text."""
    documents_per_request: int = 1_000
    images_per_request: int = 20
    """Images of one request, the query's included; 0 refuses images."""
    sessions: int = 100
    """Sessions open at the same time; 0 refuses sessions."""
    isolation: Isolation = Isolation.ISOLATED
    keep_warm: bool = False
    """Keep a worker of this tenant loaded although it is idle."""
    allowed_models: tuple[str, ...] = ()
    """Empty: every served model."""

    def __post_init__(self) -> None:
        _check_range("requests_per_minute", self.requests_per_minute, 1, MOST_PER_MINUTE)
        _check_range("images_per_minute", self.images_per_minute, 1, MOST_PER_MINUTE)
        _check_range("concurrent_requests", self.concurrent_requests, 1, MOST_CONCURRENT)
        _check_range("text_length", self.text_length, 1, MOST_TEXT_LENGTH)
        _check_range("documents_per_request", self.documents_per_request, 1, MOST_DOCUMENTS)
        _check_range("images_per_request", self.images_per_request, 0, MOST_DOCUMENTS + 1)
        _check_range("sessions", self.sessions, 0, MOST_SESSIONS)
        if self.request_burst is not None:
            _check_range("request_burst", self.request_burst, 1, MOST_PER_MINUTE)
        if self.image_burst is not None:
            _check_range("image_burst", self.image_burst, 1, MOST_PER_MINUTE)
        if self.images_per_request > self.images_at_once:
            raise InvalidPolicy(
                f"images_per_request is {self.images_per_request}, but {self.images_at_once} images fit at"
                " once; lower it, or raise image_burst"
            )
        if not isinstance(self.isolation, Isolation):
            raise InvalidPolicy("isolation is not a known tier")
        if not isinstance(self.keep_warm, bool):
            raise InvalidPolicy("keep_warm must be true or false")
        if not isinstance(self.allowed_models, tuple) or not all(
            isinstance(name, str) and 0 < len(name) <= MODEL_NAME_LENGTH for name in self.allowed_models
        ):
            raise InvalidPolicy(f"allowed_models must be names of at most {MODEL_NAME_LENGTH} characters")

    @property
    def requests_at_once(self) -> int:
        """The burst of requests that is in force."""
        return self.requests_per_minute if self.request_burst is None else self.request_burst

    @property
    def images_at_once(self) -> int:
        """The burst of images that is in force."""
        return self.images_per_minute if self.image_burst is None else self.image_burst

    def allows_model(self, name: str) -> bool:
        return not self.allowed_models or name in self.allowed_models

    def to_json(self) -> str:
        """One JSON object; `from_json` reads it back equal."""
        return orjson.dumps(asdict(self), option=orjson.OPT_SORT_KEYS).decode()

    @staticmethod
    def from_json(text: str | bytes) -> Policy:
        """Read a policy. Raises `InvalidPolicy` for anything but one object of known fields."""
        return _read(text)


@lru_cache(maxsize=1024)  # a frozen value per distinct text: every request of a tenant reads the same one
def _read(text: str | bytes) -> Policy:
    try:
        raw = orjson.loads(text)
    except orjson.JSONDecodeError as exc:
        raise InvalidPolicy("the policy is not JSON") from exc
    if not isinstance(raw, dict):
        raise InvalidPolicy("the policy is not an object")
    known = {field.name for field in fields(Policy)}
    if unknown := sorted(set(raw) - known):
        raise InvalidPolicy(f"unknown fields: {', '.join(name[:64] for name in unknown[:10])}")
    given: dict[str, Any] = dict(raw)
    if "isolation" in given:
        try:
            given["isolation"] = Isolation(given["isolation"])
        except ValueError as exc:
            raise InvalidPolicy("isolation is not a known tier") from exc
    if isinstance(given.get("allowed_models"), list):
        given["allowed_models"] = tuple(given["allowed_models"])
    return Policy(**given)


def _check_range(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InvalidPolicy(f"{name} must be a whole number from {least} to {most}")
