"""A key's own limits, below its tenant's: `KeyLimits`, a frozen, validated value.

Stored with the key as one JSON object that holds only what is set. Checked against the tenant's policy when it
is set; where the policy is lowered later, both are in force, so the lower one is what counts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import lru_cache

import orjson

from tenants.errors import Fault, InvalidKeyLimits
from tenants.policy import BURSTS, OPTIONAL_RANGES, RANGES, Policy, is_whole


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What one key may use of its tenant's limits; unset: all of it. Raises `InvalidKeyLimits`, with every fault."""

    requests_per_minute: int | None = None
    request_burst: int | None = None
    """Unset: a minute's worth of the key's own rate, or the tenant's where the key has none."""
    images_per_minute: int | None = None
    image_burst: int | None = None
    tokens_per_minute: int | None = None
    token_burst: int | None = None
    requests_per_month: int | None = None
    tokens_per_month: int | None = None
    concurrent_requests: int | None = None

    def __post_init__(self) -> None:
        faults = []
        for name, value in asdict(self).items():
            least, most = RANGES[name] if name in RANGES else (1, OPTIONAL_RANGES[name])
            if value is not None and not is_whole(value, least, most):
                faults.append(Fault(name, f"must be a whole number from {least} to {most}"))
        for burst, (rate, _) in BURSTS.items():
            if getattr(self, burst) is not None and getattr(self, rate) is None:
                faults.append(Fault(burst, f"needs {rate}"))
        if faults:
            raise InvalidKeyLimits(tuple(faults))

    def refuse_above(self, policy: Policy) -> None:
        """Raises `InvalidKeyLimits` that names every limit above the tenant's."""
        faults = []
        for name, own in asdict(self).items():
            theirs = getattr(policy, BURSTS[name][1] if name in BURSTS else name)
            if own is not None and theirs is not None and own > theirs:
                faults.append(Fault(name, f"is {own}, the tenant's is {theirs}"))
        if faults:
            raise InvalidKeyLimits(tuple(faults))

    def to_json(self) -> str:
        """One JSON object of what is set; `from_json` reads it back equal."""
        told = {name: value for name, value in asdict(self).items() if value is not None}
        return orjson.dumps(told, option=orjson.OPT_SORT_KEYS).decode()

    @staticmethod
    def from_json(text: str | bytes) -> KeyLimits:
        """Read limits. Raises `InvalidKeyLimits` for anything but one object of known fields."""
        return _read(text)


@lru_cache(maxsize=1024)  # a frozen value per distinct text: every request of a key reads the same one
def _read(text: str | bytes) -> KeyLimits:
    try:
        raw = orjson.loads(text)
    except orjson.JSONDecodeError as exc:
        raise InvalidKeyLimits("the limits are not JSON") from exc
    if not isinstance(raw, dict):
        raise InvalidKeyLimits("the limits are not an object")
    known = {field.name for field in fields(KeyLimits)}
    if unknown := sorted(set(raw) - known):
        raise InvalidKeyLimits(tuple(Fault(name[:64], "is no limit of a key") for name in unknown[:10]))
    return KeyLimits(**raw)


NO_LIMITS = KeyLimits()
