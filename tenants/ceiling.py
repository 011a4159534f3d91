"""A Ceiling: the most that a tenant's Policy may allow, as one frozen, validated value.

The platform sets it, for one tenant or for every tenant. What it leaves unset is bounded by the Policy's own ranges
for the platform, and for a tenant's administrator by what the platform has granted: the last Policy that it set.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any

import orjson

from tenants.errors import Fault, InvalidPolicy
from tenants.kinds import FilterMode, ImageText, MissingDetectors
from tenants.policy import (
    BURSTS,
    GROUP_NAME,
    MOST_NAMES,
    MOST_RETENTION_DAYS,
    OPTIONAL_RANGES,
    RANGES,
    SHADOWS,
    Isolation,
    Policy,
    is_whole,
)
from tenants.risk import Action, Category
from tenants.risk_fields import FORMS, are_actions, native_risk

LEAST_RETENTION_DAYS = 30
"""What a tenant's administrator may shorten the log to, unless a ceiling says otherwise: who took over an
administrator's key must not be able to erase the traces."""

ACTIONS, LOOKS = tuple(Action), tuple(ImageText)
"""From the mildest, and from the least, on."""
MONTHS = ("requests_per_month", "tokens_per_month")
LISTS = ("isolation", "groups", "shadow", "allowed_models", "remote_image_hosts")


@dataclass(frozen=True, slots=True)
class Ceiling:
    """Unset fields bound nothing. Raises `InvalidPolicy`, with every fault, where a field is wrong."""

    requests_per_minute: int | None = None
    request_burst: int | None = None
    """Unset: a minute's worth of the ceiling's rate, where it has one. So for images and tokens."""
    images_per_minute: int | None = None
    image_burst: int | None = None
    tokens_per_minute: int | None = None
    token_burst: int | None = None
    requests_per_month: int | None = None
    tokens_per_month: int | None = None
    concurrent_requests: int | None = None
    text_length: int | None = None
    documents_per_request: int | None = None
    images_per_request: int | None = None
    sessions: int | None = None
    retention_days: int | None = None
    least_retention_days: int | None = None
    isolation: tuple[Isolation, ...] | None = None
    """The tiers that may be chosen."""
    groups: tuple[str, ...] | None = None
    """The groups that the tenant may be pooled in."""
    keep_warm: bool | None = None
    """False: no worker may be kept warm."""
    shadow: tuple[str, ...] | None = None
    """The limits that may count without denying."""
    allowed_models: tuple[str, ...] | None = None
    risk_threshold: float | None = None
    """No category's threshold may be above it."""
    risk_actions: tuple[tuple[Category, Action], ...] | None = None
    """By category the mildest action that may be chosen. An object in JSON."""
    missing_detectors: MissingDetectors | None = None
    """`refuse`: nothing may be judged without a detector that should have looked."""
    image_text: ImageText | None = None
    """As closely as text in images may be looked for: it takes the service's time."""
    remote_images: bool | None = None
    """False: no image may be fetched."""
    remote_image_hosts: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if faults := tuple(_faults(self)):
            raise InvalidPolicy(faults)

    def over(self, below: Ceiling) -> Ceiling:
        """This ceiling, and where it says nothing the one `below` it."""
        set_here = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) is not None
        }
        for burst, (rate, _) in BURSTS.items():
            if rate in set_here and burst not in set_here:
                set_here[burst] = None  # a rate brings its own burst with it
        for name, other, pulled in (
            ("retention_days", "least_retention_days", min),
            ("least_retention_days", "retention_days", max),
        ):
            if name in set_here and other not in set_here and (bound := getattr(below, other)) is not None:
                set_here[other] = pulled(bound, set_here[name])
        return replace(below, **set_here)

    def faults(self, policy: Policy) -> tuple[Fault, ...]:
        """All in which `policy` is above this ceiling."""
        lowered = self.lower(policy)
        return tuple(
            Fault(field.name, f"may not be {_say(getattr(policy, field.name))}: {self._say_most(field.name)}")
            for field in fields(Policy)
            if getattr(policy, field.name) != getattr(lowered, field.name)
        )

    def lower(self, policy: Policy) -> Policy:
        """`policy` where it is within this ceiling, else the nearest that is.

        Raises `InvalidPolicy` where the policy allows none of the models that the ceiling allows.
        """
        changes: dict[str, Any] = {}
        for name in RANGES:
            most = getattr(self, name)
            if most is not None and getattr(policy, name) > most:
                changes[name] = most
        for name in MONTHS:
            most, own = getattr(self, name), getattr(policy, name)
            if most is not None and (own is None or own > most):
                changes[name] = most
        bare = {"images_per_request": 0, "remote_images": False}  # what lower rates might contradict
        changes |= self._lower_bursts(replace(policy, **{**changes, **bare}))
        if self.least_retention_days is not None and policy.retention_days < self.least_retention_days:
            changes["retention_days"] = self.least_retention_days
        changes |= self._lower_tier(policy)
        if self.keep_warm is False:
            changes["keep_warm"] = False
        if self.shadow is not None:
            changes["shadow"] = tuple(name for name in policy.shadow if name in self.shadow)
        if self.allowed_models is not None:
            own = policy.allowed_models or self.allowed_models
            changes["allowed_models"] = tuple(name for name in own if name in self.allowed_models)
            if not changes["allowed_models"]:
                raise InvalidPolicy(
                    (Fault("allowed_models", f"none of them is {_say(self.allowed_models)}"),)
                )
        if self.risk_threshold is not None:
            changes |= self._lower_thresholds(policy, self.risk_threshold)
        changes |= self._harden(policy)
        changes |= self._lower_remote(policy)
        return _settle(policy, changes)

    @staticmethod
    def granted(policy: Policy) -> Ceiling:
        """What a tenant's administrator may choose within, where the platform has set `policy` and no ceiling.

        Thresholds, kinds of users and web origins are the tenant's own affair.
        """
        limits: dict[str, Any] = {name: getattr(policy, name) for name in (*RANGES, *MONTHS)}
        limits |= {burst: getattr(policy, at_once) for burst, (_, at_once) in BURSTS.items()}
        return Ceiling(
            **limits,
            least_retention_days=min(policy.retention_days, LEAST_RETENTION_DAYS),
            isolation=(policy.isolation,),
            groups=None if policy.group is None else (policy.group,),
            keep_warm=policy.keep_warm,
            shadow=policy.shadow,
            allowed_models=policy.allowed_models or None,
            remote_images=policy.remote_images,
            remote_image_hosts=policy.remote_image_hosts,
        )

    def to_json(self) -> str:
        """One JSON object of what is set; `from_json` reads it back equal."""
        told = {name: value for name, value in asdict(self).items() if value is not None}
        if self.risk_actions is not None:
            told["risk_actions"] = {str(category): action for category, action in self.risk_actions}
        return orjson.dumps(told, option=orjson.OPT_SORT_KEYS).decode()

    @staticmethod
    def from_json(text: str | bytes) -> Ceiling:
        """Read a ceiling. Raises `InvalidPolicy` for anything but one object of known fields."""
        try:
            raw = orjson.loads(text)
        except orjson.JSONDecodeError as exc:
            raise InvalidPolicy("the ceiling is not JSON") from exc
        if not isinstance(raw, dict):
            raise InvalidPolicy("the ceiling is not an object")
        known = {field.name for field in fields(Ceiling)}
        unknown = [
            Fault(name[:64], "there is no such field") for name in sorted(set(raw) - known)[:MOST_NAMES]
        ]
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()
        }
        for name, kind in _ENUMS.items():
            if isinstance(given.get(name), str) and given[name] in set(kind):
                given[name] = kind(given[name])
        if "risk_actions" in given:
            given["risk_actions"] = native_risk("risk_actions", given["risk_actions"])
        tiers = given.get("isolation")
        if isinstance(tiers, tuple) and all(
            isinstance(tier, str) and tier in set(Isolation) for tier in tiers
        ):
            given["isolation"] = tuple(map(Isolation, tiers))
        try:
            ceiling = Ceiling(**{name: value for name, value in given.items() if name in known})
        except InvalidPolicy as exc:
            raise InvalidPolicy((*unknown, *exc.faults)) from None
        if unknown:
            raise InvalidPolicy(tuple(unknown))
        return ceiling

    def _lower_bursts(self, policy: Policy) -> dict[str, Any]:
        """`policy` has its rates lowered already; an unset burst follows its rate."""
        changes = {}
        for burst, (rate, at_once) in BURSTS.items():
            most = getattr(self, burst) or getattr(self, rate)
            if most is not None and getattr(policy, at_once) > most:
                changes[burst] = most
        return changes

    def _lower_tier(self, policy: Policy) -> dict[str, Any]:
        tiers = set(Isolation if self.isolation is None else self.isolation)
        if self.groups == ():
            tiers.discard(Isolation.POOLED)
        if policy.isolation in tiers and (
            policy.group is None or self.groups is None or policy.group in self.groups
        ):
            return {}
        if policy.isolation is Isolation.POOLED and Isolation.POOLED in tiers and self.groups:
            return {"group": self.groups[0]}
        if Isolation.ISOLATED in tiers:
            return {"isolation": Isolation.ISOLATED, "group": None}
        if Isolation.POOLED in tiers and self.groups:
            return {"isolation": Isolation.POOLED, "group": self.groups[0]}
        return {"isolation": Isolation.DEDICATED, "group": None}

    @staticmethod
    def _lower_thresholds(policy: Policy, most: float) -> dict[str, Any]:
        changes: dict[str, Any] = {
            "risk_thresholds": tuple((name, min(score, most)) for name, score in policy.risk_thresholds)
        }
        if policy.mode.threshold > most:
            allowed = [mode for mode in FilterMode if mode.threshold <= most]
            changes["filter_mode"] = max(allowed, key=lambda mode: mode.threshold)
        return changes

    def _harden(self, policy: Policy) -> dict[str, Any]:
        """Actions no milder than allowed, missing detectors no less serious, images no closer looked at."""
        changes: dict[str, Any] = {}
        milder = {
            category: least
            for category, least in self.risk_actions or ()
            if ACTIONS.index(policy.action(category)) < ACTIONS.index(least)
        }
        if milder:
            changes["risk_actions"] = tuple(sorted((dict(policy.risk_actions) | milder).items()))
        if self.missing_detectors is MissingDetectors.REFUSE:
            changes["missing_detectors"] = MissingDetectors.REFUSE
        if self.image_text is not None:
            changes["image_text"] = min(policy.image_text, self.image_text, key=LOOKS.index)
        return changes

    def _lower_remote(self, policy: Policy) -> dict[str, Any]:
        hosts = policy.remote_image_hosts
        if self.remote_image_hosts is not None:
            hosts = tuple(host for host in hosts if host in self.remote_image_hosts)
        allowed = policy.remote_images and self.remote_images is not False and bool(hosts)
        return {"remote_image_hosts": hosts, "remote_images": allowed}

    def _say_most(self, name: str) -> str:
        """What the ceiling says of a policy's field."""
        if name == "retention_days":
            least = self.least_retention_days or 1
            return f"the platform allows {least} to {self.retention_days or MOST_RETENTION_DAYS}"
        if name == "group":
            return f"the platform allows {_say(self.groups)}"
        if name == "risk_actions":
            mildest = ", ".join(f"{category} {action}" for category, action in self.risk_actions or ())
            return f"the platform asks at least for {mildest}"
        if name in ("filter_mode", "risk_thresholds"):
            return f"the platform allows no threshold above {self.risk_threshold}"
        most = getattr(self, name, None)
        if most is None and name in BURSTS:
            most = getattr(self, BURSTS[name][0])
        return f"the platform allows {_say(most)}"


def _settle(policy: Policy, changes: dict[str, Any]) -> Policy:
    """`policy` with these changes and, where one makes another field impossible, that one lowered as well."""
    bare = replace(policy, **{**changes, "images_per_request": 0, "remote_images": False})
    images = changes.get("images_per_request", policy.images_per_request)
    if "images" not in bare.shadow:
        images = min(images, bare.images_at_once)
    remote = changes.get("remote_images", policy.remote_images) and images > 0
    return replace(bare, images_per_request=images, remote_images=remote)


def _faults(ceiling: Ceiling) -> list[Fault]:
    faults = []
    ranges = RANGES | {name: (1, most) for name, most in OPTIONAL_RANGES.items()}
    for name, (least, most) in (ranges | {"least_retention_days": (1, MOST_RETENTION_DAYS)}).items():
        value = getattr(ceiling, name)
        if value is not None and not is_whole(value, least, most):
            faults.append(Fault(name, f"must be a whole number from {least} to {most}"))
    for name in ("keep_warm", "remote_images"):
        if not isinstance(getattr(ceiling, name), bool | None):
            faults.append(Fault(name, "must be true or false"))
    for name in LISTS:
        values = getattr(ceiling, name)
        if values is None:
            continue
        if not isinstance(values, tuple) or len(values) > MOST_NAMES or not all(map(_MEMBERS[name], values)):
            faults.append(Fault(name, f"must be a list of at most {MOST_NAMES} {_WORDS[name]}"))
    for name, kind in _ENUMS.items():
        if not isinstance(getattr(ceiling, name), kind | None):
            faults.append(Fault(name, f"must be one of {', '.join(kind)}"))
    if ceiling.risk_actions is not None and not are_actions(ceiling.risk_actions):
        faults.append(Fault("risk_actions", FORMS["risk_actions"]))
    threshold: object = ceiling.risk_threshold
    if threshold is not None and (
        not isinstance(threshold, int | float)
        or isinstance(threshold, bool)
        or not FilterMode.STRICT.threshold <= threshold <= 1
    ):
        faults.append(Fault("risk_threshold", f"must be a number from {FilterMode.STRICT.threshold} to 1"))
    return faults or _contradictions(ceiling)


def _contradictions(ceiling: Ceiling) -> list[Fault]:
    faults = []
    if ceiling.isolation == ():
        faults.append(Fault("isolation", "must name a tier"))
    if ceiling.isolation == (Isolation.POOLED,) and not ceiling.groups:
        faults.append(Fault("groups", "must name a group where pooled is the only tier"))
    if ceiling.allowed_models == ():
        faults.append(Fault("allowed_models", "must name a model"))
    least, most = ceiling.least_retention_days, ceiling.retention_days
    if least is not None and most is not None and least > most:
        faults.append(Fault("least_retention_days", f"is {least}, but retention_days is {most}"))
    return faults


def _say(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)


_ENUMS: dict[str, type[StrEnum]] = {"missing_detectors": MissingDetectors, "image_text": ImageText}
_MEMBERS: dict[str, Any] = {
    "isolation": lambda value: isinstance(value, Isolation),
    "groups": lambda value: isinstance(value, str) and GROUP_NAME.fullmatch(value),
    "shadow": lambda value: value in SHADOWS,
    "allowed_models": lambda value: isinstance(value, str) and value,
    "remote_image_hosts": lambda value: isinstance(value, str) and value,
}
_WORDS = {
    "isolation": f"tiers of {', '.join(Isolation)}",
    "groups": "group names",
    "shadow": f"limits of {', '.join(SHADOWS)}",
    "allowed_models": "names",
    "remote_image_hosts": "host names",
}
