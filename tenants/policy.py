"""A tenant's Policy: its limits and rights as one frozen, validated value.

Stored as one JSON object per version; every version is kept. Unknown fields are refused, absent ones take
today's default, so a policy written by an older version still reads. What is wrong is told whole: every field,
every contradiction, not the first one alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from functools import lru_cache
from typing import Any

import orjson

from tenants.errors import Fault, InvalidPolicy
from tenants.kinds import AskModel, FilterMode, ImageText, Kind, MissingDetectors
from tenants.risk import Action, Category
from tenants.risk_fields import DEFAULT_ACTIONS, are_actions, are_lexicons, are_thresholds, native_risk
from tenants.risk_fields import FORMS as RISK_FORMS

MOST_PER_MINUTE = 1_000_000
"""Above it, one request's share of a minute would round to nothing in Postgres' microseconds."""
MOST_TOKENS_PER_MINUTE = 60_000_000
"""One token a microsecond, for the same reason."""
MOST_PER_MONTH = 1_000_000_000_000
MOST_CONCURRENT = 1_000
MOST_SESSIONS = 1_000
MOST_DOCUMENTS = 1_000
MOST_TEXT_LENGTH = 1_000_000
MOST_RETENTION_DAYS = 36_500
MOST_NAMES = 100
"""In any one list of a policy."""
MODEL_NAME_LENGTH = 200

GROUP_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_LABEL = "[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_HOST = rf"(?:{_LABEL}\.)+[a-z](?:[a-z0-9-]{{0,61}}[a-z0-9])"
HOST_NAME = re.compile(rf"(?!.{{254}}){_HOST}")
"""In lower case, with a dot, its last label beginning with a letter: neither an address nor this host itself."""
ORIGIN = re.compile(rf"(?!.{{270}})https://{_HOST}(?::[1-9][0-9]{{0,4}})?")

RANGES = {
    "requests_per_minute": (1, MOST_PER_MINUTE),
    "images_per_minute": (1, MOST_PER_MINUTE),
    "tokens_per_minute": (1, MOST_TOKENS_PER_MINUTE),
    "concurrent_requests": (1, MOST_CONCURRENT),
    "text_length": (1, MOST_TEXT_LENGTH),
    "documents_per_request": (1, MOST_DOCUMENTS),
    "images_per_request": (0, MOST_DOCUMENTS + 1),
    "sessions": (0, MOST_SESSIONS),
    "retention_days": (1, MOST_RETENTION_DAYS),
}
"""The least and the most of each limit that is a whole number."""
OPTIONAL_RANGES = {
    "request_burst": MOST_PER_MINUTE,
    "image_burst": MOST_PER_MINUTE,
    "token_burst": MOST_TOKENS_PER_MINUTE,
    "requests_per_month": MOST_PER_MONTH,
    "tokens_per_month": MOST_PER_MONTH,
}
"""The most of each that may be unset."""
ALERT_RANGES = {"anomaly_requests_per_minute": MOST_PER_MINUTE}
"""The most of each number that only alerts look at: nothing is refused for it, and no ceiling bounds it."""
BURSTS = {
    "request_burst": ("requests_per_minute", "requests_at_once"),
    "image_burst": ("images_per_minute", "images_at_once"),
    "token_burst": ("tokens_per_minute", "tokens_at_once"),
}
"""A burst, its rate, and what says how much may come at once."""
SHADOWS = ("requests", "images", "tokens", "concurrency", "requests_month", "tokens_month")
"""The limits that can count without denying."""


class Isolation(StrEnum):
    """How far a tenant's work stays apart from others'."""

    POOLED = "pooled"
    """Worker processes that serve the tenants of one named group and nobody else; caches are the tenant's own."""
    ISOLATED = "isolated"
    """Worker processes that serve no other tenant; the weights' pages are shared."""
    DEDICATED = "dedicated"
    """Worker processes that serve no other tenant and hold a copy of the weights that no other process sees."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Limits and rights of one tenant. Raises `InvalidPolicy`, with every fault, where they contradict each other."""

    requests_per_minute: int = 600
    request_burst: int | None = None
    """Requests that may come at once after a pause; unset: a minute's worth."""
    images_per_minute: int = 20
    image_burst: int | None = None
    """Images that may come at once after a pause; unset: a minute's worth."""
    tokens_per_minute: int = 2_000_000
    token_burst: int | None = None
    """Tokens that may come at once after a pause; unset: a minute's worth."""
    requests_per_month: int | None = None
    """Of a calendar month in UTC; unset: no limit."""
    tokens_per_month: int | None = None
    """Of a calendar month in UTC; unset: no limit."""
    concurrent_requests: int = 5
    text_length: int = 10_000
    """Characters of one text."""
    documents_per_request: int = 1_000
    images_per_request: int = 20
    """Images of one request, the query's included; 0 refuses images."""
    sessions: int = 100
    """Sessions open at the same time; 0 refuses sessions."""
    shadow: tuple[str, ...] = ()
    """Limits, of `SHADOWS`, that count and never deny."""
    isolation: Isolation = Isolation.ISOLATED
    group: str | None = None
    """Whom a pooled tenant shares its workers with: the other pooled tenants of this group."""
    keep_warm: bool = False
    """Keep a worker of this tenant loaded although it is idle."""
    allowed_models: tuple[str, ...] = ()
    """Empty: every served model."""
    kind: Kind = Kind.DEFAULT
    filter_mode: FilterMode | None = None
    """Unset: what the kind recommends."""
    risk_thresholds: tuple[tuple[Category, float], ...] = ()
    """Category and score from 0 to 1, by category; what is not named has the mode's threshold. An object in JSON."""
    risk_actions: tuple[tuple[Category, Action], ...] = ()
    """Category and what is done with a document from its threshold on; what is not named has the default. An object."""
    missing_detectors: MissingDetectors = MissingDetectors.REFUSE
    image_text: ImageText = ImageText.GATED
    ask_model: AskModel = AskModel.OFF
    lexicons: tuple[tuple[Category, tuple[str, ...]], ...] = ()
    """Category and words or phrases of the tenant's own, besides the lists that come with the service. An object."""
    adaptive_thresholds: bool = True
    """Whether reviewed items may move a threshold, within the bounds of `tenants.adaptation`."""
    review_band: bool = False
    """Whether items near their threshold are for a reviewer, whatever was decided."""
    retention_days: int = 400
    """How long entries and usage are kept."""
    anomaly_requests_per_minute: int | None = None
    """Requests of one key a minute that are an anomaly however ordinary; unset: as the service finds alone."""
    remote_images: bool = False
    """Whether images may be fetched, from `remote_image_hosts` alone."""
    remote_image_hosts: tuple[str, ...] = ()
    console_origins: tuple[str, ...] = ()
    """Web origins, `https://host` or `https://host:port`, whose pages may call in a user's name."""

    def __post_init__(self) -> None:
        if faults := tuple(_faults(self)):
            raise InvalidPolicy(faults)
        for name in RISK_FORMS:
            object.__setattr__(self, name, tuple(sorted(getattr(self, name))))

    @property
    def requests_at_once(self) -> int:
        """The burst of requests that is in force."""
        return self.requests_per_minute if self.request_burst is None else self.request_burst

    @property
    def images_at_once(self) -> int:
        """The burst of images that is in force."""
        return self.images_per_minute if self.image_burst is None else self.image_burst

    @property
    def tokens_at_once(self) -> int:
        """The burst of tokens that is in force."""
        return self.tokens_per_minute if self.token_burst is None else self.token_burst

    @property
    def fetches_from(self) -> tuple[str, ...]:
        """The hosts that images may be fetched from; none where remote images are off."""
        return self.remote_image_hosts if self.remote_images else ()

    @property
    def mode(self) -> FilterMode:
        """The filter mode that is in force."""
        return self.kind.recommended if self.filter_mode is None else self.filter_mode

    def threshold(self, category: Category) -> float:
        """The score, 0 to 1, from which on content of this category is stopped."""
        return dict(self.risk_thresholds).get(category, self.mode.threshold)

    def action(self, category: Category) -> Action:
        """What is done with a document whose score of this category has reached its threshold."""
        return dict(self.risk_actions).get(category, DEFAULT_ACTIONS[category])

    @property
    def refuses_missing_detectors(self) -> bool:
        return self.missing_detectors is MissingDetectors.REFUSE

    def allows_model(self, name: str) -> bool:
        return not self.allowed_models or name in self.allowed_models

    def to_json(self) -> str:
        """One JSON object; `from_json` reads it back equal."""
        raw = asdict(self)
        raw |= {name: {str(key): value for key, value in getattr(self, name)} for name in RISK_FORMS}
        return orjson.dumps(raw, option=orjson.OPT_SORT_KEYS).decode()

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
    unknown = tuple(
        Fault(name[:64], "there is no such field") for name in sorted(set(raw) - known)[:MOST_NAMES]
    )
    given = {name: _native(name, value) for name, value in raw.items() if name in known}
    try:
        policy = Policy(**given)
    except InvalidPolicy as exc:
        raise InvalidPolicy(unknown + exc.faults) from None
    if unknown:
        raise InvalidPolicy(unknown)
    return policy


def _native(name: str, value: Any) -> Any:
    """A JSON value as the field's own type where it has that form; the checks say what is wrong with any other."""
    if name in _ENUMS and isinstance(value, str) and value in set(_ENUMS[name]):
        return _ENUMS[name](value)
    if name in RISK_FORMS:
        return native_risk(name, value)
    return tuple(value) if isinstance(value, list) else value


def _faults(policy: Policy) -> Iterator[Fault]:
    """All that is wrong: each field by itself, then, where each is right, what contradicts what."""
    alone = list(_faults_alone(policy))
    yield from alone if alone else _contradictions(policy)


def _faults_alone(policy: Policy) -> Iterator[Fault]:
    for name, (least, most) in RANGES.items():
        if not is_whole(getattr(policy, name), least, most):
            yield Fault(name, f"must be a whole number from {least} to {most}")
    for name, most in (OPTIONAL_RANGES | ALERT_RANGES).items():
        value = getattr(policy, name)
        if value is not None and not is_whole(value, 1, most):
            yield Fault(name, f"must be null or a whole number from 1 to {most}")
    for name in ("keep_warm", "adaptive_thresholds", "review_band", "remote_images"):
        if not isinstance(getattr(policy, name), bool):
            yield Fault(name, "must be true or false")
    for name, kind in _ENUMS.items():
        value = getattr(policy, name)
        if not isinstance(value, kind) and not (value is None and name == "filter_mode"):
            yield Fault(name, f"must be one of {', '.join(kind)}")
    if policy.group is not None and not _matches(GROUP_NAME, policy.group):
        yield Fault("group", "must be null or 1 to 63 of a-z, 0-9 and inner hyphens")
    for name, is_right, form in _LISTS:
        values = getattr(policy, name)
        if not isinstance(values, tuple) or len(values) > MOST_NAMES or not all(map(is_right, values)):
            yield Fault(name, f"must be a list of at most {MOST_NAMES} {form}")
        elif len(set(values)) < len(values):
            yield Fault(name, "names one twice")
    for name, are_right in _RISKS:
        if not are_right(getattr(policy, name)):
            yield Fault(name, RISK_FORMS[name])


def _contradictions(policy: Policy) -> Iterator[Fault]:
    if policy.images_per_request > policy.images_at_once and "images" not in policy.shadow:
        yield Fault(
            "images_per_request",
            f"is {policy.images_per_request}, but {policy.images_at_once} images fit at once;"
            " lower it, or raise image_burst",
        )
    if policy.isolation is Isolation.POOLED and policy.group is None:
        yield Fault("group", "a pooled tenant needs a group")
    if policy.isolation is not Isolation.POOLED and policy.group is not None:
        yield Fault("group", f"must be null where isolation is {policy.isolation}")
    if policy.remote_images and not policy.remote_image_hosts:
        yield Fault("remote_image_hosts", "must name a host where remote_images is true")
    if policy.remote_images and not policy.images_per_request:
        yield Fault("remote_images", "must be false where images_per_request is 0")
    for shadow, limit in (("requests_month", "requests_per_month"), ("tokens_month", "tokens_per_month")):
        if shadow in policy.shadow and getattr(policy, limit) is None:
            yield Fault("shadow", f"names {shadow}, but {limit} is not set")


def is_whole(value: object, least: int, most: int) -> bool:
    """A whole number in this range, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


_ENUMS: dict[str, type[StrEnum]] = {
    "isolation": Isolation,
    "kind": Kind,
    "filter_mode": FilterMode,
    "missing_detectors": MissingDetectors,
    "image_text": ImageText,
    "ask_model": AskModel,
}
_RISKS: tuple[tuple[str, Callable[[object], bool]], ...] = (
    ("risk_thresholds", are_thresholds),
    ("risk_actions", are_actions),
    ("lexicons", are_lexicons),
)

_LISTS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("shadow", lambda value: isinstance(value, str) and value in SHADOWS, f"of {', '.join(SHADOWS)}"),
    (
        "allowed_models",
        lambda value: isinstance(value, str) and 0 < len(value) <= MODEL_NAME_LENGTH,
        f"names of at most {MODEL_NAME_LENGTH} characters",
    ),
    (
        "remote_image_hosts",
        lambda value: _matches(HOST_NAME, value),
        "host names in lower case, no addresses",
    ),
    (
        "console_origins",
        lambda value: _matches(ORIGIN, value),
        "origins like https://host or https://host:port",
    ),
)
