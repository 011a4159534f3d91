"""How a threshold learns, and how far it may: pure arithmetic, no clock and no database.

What may move a threshold is a vote: an item that a reviewer has judged, out of a random sample or on appeal. Block
rates, clicks and complaints move nothing: whoever can send traffic can make those up. The promises, whatever the votes:

- it stays within 0.10 of the policy's own threshold (the anchor) and between 0.20 and 0.85, below the ceiling, and
  clear content of a severe category is stopped as the policy says;
- a day moves it by 0.005 at most towards looser and by 0.01 towards stricter;
- it moves on 50 votes at least, and few votes move it little (shrinkage to the anchor, n / (n + 200));
- it stands still while the traffic looks wrong (`tenants.traffic`), and is the anchor again once detectors change;
- it becomes looser only where the canaries, fixed items that must be stopped, still are.

The aim is the threshold of least cost on the votes, a miss weighing as `MISS_COST` false alarms. Weights undo the sampling
(Horvitz and Thompson 1952) and make an end user with many items count as one with few; they fade with e^(-age / 30 days).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING

import orjson

from tenants.risk import Category, Mode

if TYPE_CHECKING:
    from tenants.policy import Policy

MARGIN = 0.10
"""How far from its anchor a threshold may be."""
LEAST, MOST = 0.20, 0.85
"""Between which it may be. An anchor outside is what the tenant wants to the letter, and nothing is learnt."""
LOOSER_A_DAY, TIGHTER_A_DAY = 0.005, 0.01
FEWEST_VOTES = 50
PRIOR_VOTES = 200
"""How many votes the anchor counts for."""
MEMORY_DAYS = 30.0
"""After it a vote weighs 1/e."""
MISS_COST = 4.0
"""How many false alarms weigh as much as one miss."""
RECALL_LOSS = 0.01
"""The share of the canaries that one change may let pass."""
BAND = 0.02
"""Half the width of the band around a threshold in which items are for a reviewer, where the tenant wants that."""
CLEAR = 0.80
"""The score from which on two detectors agree, or one is certain."""
SEVERE = frozenset({Category.SEXUAL, Category.WEAPONS})
"""Here no vote lets pass what is clear and what the policy stops."""
FIXED = frozenset({(Category.WEAPONS, Mode.TEXT)})
"""Not learnt at all: trade in weapons is offered in words."""
GRID = tuple(round(0.10 + 0.005 * place, 3) for place in range(171))
"""What may be aimed at, 0.10 to 0.95. It reaches beyond the bounds: the aim is shrunk before it is bounded."""
DIGITS = 3
"""Thresholds are whole thousandths."""


class Reason(StrEnum):
    """Why a threshold is what it is after a step. Part of the API."""

    LOOSER = "looser"
    TIGHTER = "tighter"
    SETTLED = "settled"
    """It is where the votes want it."""
    FEW_VOTES = "few_votes"
    SPENT = "spent"
    """The day's way is done; it goes on tomorrow."""
    FROZEN = "frozen"
    THAWED = "thawed"
    NO_BASELINE = "no_baseline"
    """Votes want it looser, and there are too few days of traffic to tell whether today's is ordinary."""
    CANARIES = "canaries"
    """Votes want it looser, and too many canaries would pass, or there are none."""
    NEW_ANCHOR = "new_anchor"
    """The policy has changed its own threshold; learning began anew from it."""
    NEW_DETECTORS = "new_detectors"
    """Scores mean something else now; learning began anew from the anchor."""
    NEW_BOUNDS = "new_bounds"
    """It was outside of what a ceiling allows now."""
    FIXED = "fixed"
    """Nothing is learnt here: the policy's threshold stands."""
    ROLLBACK = "rollback"


@dataclass(frozen=True, slots=True)
class Learnt:
    """What one threshold has become, and what that was learnt from."""

    threshold: float
    anchor: float
    detectors: str


@dataclass(frozen=True, slots=True)
class Adapted:
    """All that a tenant's thresholds have learnt; travels with its Caller."""

    learnt: Mapping[tuple[Category, Mode], Learnt] = field(default_factory=dict)
    most: float = 1.0
    """No threshold may be above it: the ceiling's."""

    @staticmethod
    def from_json(text: str | None) -> Adapted:
        """As `find_key` tells it: `{"most": …, "learnt": [[category, mode, threshold, anchor, detectors], …]}`."""
        return _read(text) if text else NOTHING


NOTHING = Adapted()


@lru_cache(maxsize=1024)  # as policies: every request of a tenant reads the same one
def _read(text: str) -> Adapted:
    raw = orjson.loads(text)
    return Adapted(
        {
            (Category(category), Mode(mode)): Learnt(threshold, anchor, detectors)
            for category, mode, threshold, anchor, detectors in raw["learnt"]
        },
        1.0 if raw["most"] is None else raw["most"],
    )


@dataclass(frozen=True, slots=True)
class Vote:
    """One audited item."""

    score: float
    harmful: bool
    weight: float = 1.0
    """For how many items it stands; above 0."""
    age_days: float = 0.0


@dataclass(frozen=True, slots=True)
class Aim:
    """Where votes want a threshold to be, before any bound but the shrinkage."""

    threshold: float | None
    """None: too few votes to say."""
    votes: int
    harmful: int


@dataclass(frozen=True, slots=True)
class State:
    """A threshold and what it was learnt under."""

    threshold: float
    anchor: float
    day: date
    """Of the last step, UTC."""
    day_began_at: float
    """What it was when that day began."""
    detectors: str = ""
    frozen: str = ""
    """Why it stands still; empty: it does not."""


@dataclass(frozen=True, slots=True)
class Situation:
    """Everything that a step looks at."""

    anchor: float
    limits: tuple[float, float] | None
    detectors: str
    votes: Sequence[Vote]
    alarm: str = ""
    """What is wrong with the traffic."""
    has_baseline: bool = False
    canaries: Sequence[float] = ()
    """Scores of items that must be stopped."""


@dataclass(frozen=True, slots=True)
class Move:
    """What a step makes of a state, and why."""

    state: State
    reason: Reason
    aim: Aim
    recall: tuple[float, float] | None = None
    """Of the canaries, before and at what was tried; None where none were asked."""


def bounds(anchor: float, category: Category, mode: Mode, *, most: float = 1.0) -> tuple[float, float] | None:
    """Between which thresholds learning may move; None: the anchor stands. `most` is the ceiling's."""
    if (category, mode) in FIXED or not LEAST <= anchor <= MOST:
        return None
    high = min(anchor + MARGIN, MOST, most)
    if category in SEVERE:
        high = min(high, max(anchor, CLEAR))
    return _round(min(max(anchor - MARGIN, LEAST), high)), _round(high)


def effective(
    policy: Policy, adapted: Adapted, category: Category, mode: Mode, *, detectors: str | None = None
) -> float:
    """The score from which on content is stopped. Pure: a dictionary read and some comparisons.

    The policy's own threshold wherever nothing was learnt, the tenant wants none of it, what was learnt is from
    another anchor, or `detectors`, the version that measured, is given and not the one that was learnt from. Bounded
    here once more, so that no stored number can break the promises.
    """
    anchor = policy.threshold(category)
    found = adapted.learnt.get((category, mode))
    if (
        found is None
        or not policy.adaptive_thresholds
        or _round(found.anchor) != _round(anchor)
        or (detectors is not None and found.detectors != detectors)
    ):
        return anchor
    limits = bounds(anchor, category, mode, most=adapted.most)
    return anchor if limits is None else _clamp(found.threshold, *limits)


def is_for_review(policy: Policy, threshold: float, score: float) -> bool:
    """Whether an item is so near its threshold that a reviewer shall see it, where the tenant wants that.

    It changes no decision: at the threshold and above it is stopped all the same.
    """
    return policy.review_band and abs(score - threshold) <= BAND


def aim(votes: Sequence[Vote], anchor: float) -> Aim:
    """The threshold of least cost, shrunk towards the anchor by how many votes speak for the direction.

    A harmful vote more never makes it looser and a harmless one never stricter, once there are enough votes.
    """
    harmful = sum(vote.harmful for vote in votes)
    if len(votes) < FEWEST_VOTES:
        return Aim(None, len(votes), harmful)
    missed = _running((vote.score, _weight(vote)) for vote in votes if vote.harmful)
    alarmed = _running((vote.score, _weight(vote)) for vote in votes if not vote.harmful)
    harmless_weight = alarmed[-1]
    costs = [
        MISS_COST * miss + harmless_weight - passed
        for miss, passed in zip(missed[:-1], alarmed[:-1], strict=True)
    ]
    near = min(costs) + 1e-9 * (MISS_COST * missed[-1] + harmless_weight)
    best = [threshold for threshold, cost in zip(GRID, costs, strict=True) if cost <= near]
    raw = _clamp(anchor, best[0], best[-1])  # of equals the one that changes least
    speaking = sum(_fade(vote) for vote in votes if vote.harmful == (raw < anchor))
    return Aim(_round(anchor + speaking / (speaking + PRIOR_VOTES) * (raw - anchor)), len(votes), harmful)


def recall(canaries: Sequence[float], threshold: float) -> float:
    """The share of the canaries that a threshold stops. Raises `ZeroDivisionError` where there are none."""
    return sum(score >= threshold for score in canaries) / len(canaries)


def begin(anchor: float, today: date, detectors: str = "") -> State:
    """The state of a threshold that has learnt nothing."""
    return State(anchor, anchor, today, anchor, detectors)


def step(state: State, now: Situation, today: date, *, tighten_only: bool = False) -> Move:
    """One step; any number of them on one day go no further than the day's way.

    `tighten_only`: for a vote that has just come. Stricter is at once, looser waits for the daily step.
    """
    wanted = aim(now.votes, now.anchor)
    fresh = begin(now.anchor, today, now.detectors)
    if now.limits is None:
        return Move(replace(fresh, frozen=""), Reason.FIXED, wanted)
    if _round(state.anchor) != _round(now.anchor):
        return Move(fresh, Reason.NEW_ANCHOR, wanted)
    if state.detectors and now.detectors and state.detectors != now.detectors:
        return Move(fresh, Reason.NEW_DETECTORS, wanted)
    state = replace(state, detectors=now.detectors or state.detectors)
    if today > state.day:
        state = replace(state, day=today, day_began_at=state.threshold)
    low, high = now.limits
    if not low <= state.threshold <= high:
        inside = _clamp(state.threshold, low, high)
        return Move(replace(state, threshold=inside, day_began_at=inside), Reason.NEW_BOUNDS, wanted)
    if now.alarm:
        return Move(replace(state, frozen=now.alarm), Reason.FROZEN, wanted)
    rested, state = state.frozen, replace(state, frozen="")
    still = Reason.THAWED if rested else None
    if wanted.threshold is None:
        return Move(state, still or Reason.FEW_VOTES, wanted)
    bounded = _clamp(wanted.threshold, low, high)
    reached = _clamp(
        bounded, _round(state.day_began_at - TIGHTER_A_DAY), _round(state.day_began_at + LOOSER_A_DAY)
    )
    if reached == state.threshold or (reached > state.threshold and tighten_only):
        return Move(state, still or (Reason.SETTLED if bounded == reached else Reason.SPENT), wanted)
    if reached < state.threshold:
        return Move(replace(state, threshold=reached), Reason.TIGHTER, wanted)
    if not now.has_baseline:
        return Move(state, still or Reason.NO_BASELINE, wanted)
    if not now.canaries:
        return Move(state, still or Reason.CANARIES, wanted)
    kept = recall(now.canaries, state.threshold), recall(now.canaries, reached)
    if kept[1] < kept[0] - RECALL_LOSS:
        return Move(state, still or Reason.CANARIES, wanted, kept)
    return Move(replace(state, threshold=reached), Reason.LOOSER, wanted, kept)


def _running(scored: Iterable[tuple[float, float]]) -> list[float]:
    """At each threshold of the grid the weight of what scores below it, and at last the weight of all."""
    below = [0.0] * (len(GRID) + 1)
    for score, weight in scored:
        # The first threshold above the score; what scores above the whole grid is in the sum of all alone.
        first = math.floor(round((score - GRID[0]) / 0.005, 6)) + 1
        below[min(max(first, 0), len(GRID))] += weight
    total = 0.0
    for place, weight in enumerate(below):
        total += weight
        below[place] = total
    return below


def _weight(vote: Vote) -> float:
    return vote.weight * _fade(vote)


def _fade(vote: Vote) -> float:
    return math.exp(-max(vote.age_days, 0.0) / MEMORY_DAYS)


def _clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _round(value: float) -> float:
    return round(value, DIGITS)
