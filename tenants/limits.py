"""The limits that admission charges: their names and numbers, and where one stands after a decision.

The functions in SQL know limits by number (`migrations/versions/0010_reservation.py`): 1 to 6 are the tenant's, 7 to
12 the key's own. Everything else knows them by name; a key's have `key_` before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tenants.access import Caller
    from tenants.key_limits import KeyLimits
    from tenants.policy import Policy

WINDOW_S: Final = 60
NAMES: Final = ("requests", "images", "tokens", "requests_month", "tokens_month", "concurrency")
KEY_NAMES: Final = tuple(f"key_{name}" for name in NAMES)
RATES: Final = 3
"""So many of them are rates with a burst; two are of a calendar month; the last is of requests at the same time."""

Numbers = tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Standing:
    """One limit right after a decision."""

    name: str
    limit: int
    """What fits at once; of a month, what fits into it."""
    window_s: int | None
    """What the limit counts over: a minute, or the days of this month; None for requests at the same time."""
    remaining: int
    more_in_s: int
    """Seconds, rounded up, until one more comes back; 0 where nothing is used, or no time is known."""
    per_window: int
    """What comes back over `window_s`; the same as `limit` unless the burst differs."""
    shadow: bool = False
    """It counts and never denies."""


@dataclass(frozen=True, slots=True)
class Limits:
    """A caller's limits by number: the tenant's six, then the key's own six. None is no limit."""

    most: Numbers
    bursts: Numbers
    shadow: tuple[int, ...]

    def at_once(self, name: str) -> int | None:
        """What a single request may cost at most of `requests`, `images` or `tokens`, tenant's and key's together."""
        place = NAMES.index(name)
        found = [
            burst for burst in (self.bursts[place], self.bursts[place + len(NAMES)]) if burst is not None
        ]
        return min(found, default=None)

    def name(self, number: int) -> str:
        return (*NAMES, *KEY_NAMES)[number - 1]

    def standings(
        self, remaining: Sequence[int | None], more_ms: Sequence[int | None], month_s: int
    ) -> tuple[Standing, ...]:
        """Every limit that there is, from what the functions say is left of it and when there is more."""
        told = []
        for place, (most, left, more) in enumerate(zip(self.most, remaining, more_ms, strict=False)):
            if most is None or left is None or more is None:
                continue
            kind = place % len(NAMES)
            window_s = WINDOW_S if kind < RATES else month_s if kind < len(NAMES) - 1 else None
            told.append(
                Standing(
                    name=self.name(place + 1),
                    limit=self.bursts[place] or most,
                    window_s=window_s,
                    remaining=left,
                    more_in_s=-(-more // 1000),
                    per_window=most,
                    shadow=place + 1 in self.shadow,
                )
            )
        return tuple(told)


def limits_of(caller: Caller) -> Limits:
    """What is in force for a caller: its tenant's policy, and its key's own limits beside it."""
    return Limits(
        most=(*_most(caller.policy), *_most(caller.key_limits)),
        bursts=(*_bursts(caller.policy), *_bursts(caller.key_limits)),
        shadow=tuple(NAMES.index(name) + 1 for name in caller.policy.shadow),
    )


def _most(limits: Policy | KeyLimits) -> Numbers:
    return (
        limits.requests_per_minute,
        limits.images_per_minute,
        limits.tokens_per_minute,
        limits.requests_per_month,
        limits.tokens_per_month,
        limits.concurrent_requests,
    )


def _bursts(limits: Policy | KeyLimits) -> Numbers:
    """A minute's worth where no burst is set; none of what is no rate."""
    pairs = (
        (limits.request_burst, limits.requests_per_minute),
        (limits.image_burst, limits.images_per_minute),
        (limits.token_burst, limits.tokens_per_minute),
    )
    return (*(rate if burst is None else burst for burst, rate in pairs), None, None, None)
