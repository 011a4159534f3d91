"""Whether a tenant's traffic looks as it did: what a threshold looks at before it trusts the day's evidence. Pure.

A flood that is made to move a threshold shows: more is stopped, scores lie elsewhere, or few users send much of it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from enum import StrEnum

BINS = 10
"""Of equal width, of scores from 0 to 1."""
BASELINE_DAYS = 28
FEWEST_DAYS = 7
"""Days of traffic without which nothing can be called ordinary."""
FEWEST_ITEMS = 100
"""Items without which a day says nothing."""
SIGMAS = 3.0
PSI = 0.25
"""From here on a distribution has shifted, by the rule of thumb of credit scoring (Siddiqi, Credit Risk Scorecards)."""
CROWD_SHARE, CROWD_USERS = 0.20, 0.01


class Alarm(StrEnum):
    """What is wrong. Part of the API."""

    BLOCK_RATE = "block_rate"
    """A day's share of stopped items is more than three standard deviations from the days before."""
    SCORES = "scores"
    """The scores' population stability index is above 0.25."""
    FEW_USERS = "few_users"
    """Fewer than one in a hundred end users send more than a fifth."""


@dataclass(frozen=True, slots=True)
class Day:
    """What was screened in one category and mode on one day, UTC."""

    day: date
    items: int
    stopped: int
    histogram: tuple[int, ...]
    """Items by score, in `BINS` bins."""


def bin_of(score: float) -> int:
    """The bin of a score."""
    return min(int(score * BINS), BINS - 1)


def has_baseline(days: Sequence[Day], today: date) -> bool:
    """Whether enough days came before yesterday to tell what is ordinary."""
    return len(_baseline(days, today)) >= FEWEST_DAYS


def look(days: Sequence[Day], crowds: Sequence[Mapping[int, int]], today: date) -> Alarm | None:
    """What is wrong with today or yesterday. `crowds`: of each of the two, how many end users sent so many items."""
    before = _baseline(days, today)
    if len(before) >= FEWEST_DAYS:
        usual = [sum(bins) for bins in zip(*(day.histogram for day in before), strict=True)]
        for day in days:
            if day.day < today - timedelta(days=1) or day.items < FEWEST_ITEMS:
                continue
            if _jumped(before, day):
                return Alarm.BLOCK_RATE
            if stability(usual, day.histogram) > PSI:
                return Alarm.SCORES
    return Alarm.FEW_USERS if any(map(_is_crowded, crowds)) else None


def stability(before: Sequence[int], now: Sequence[int]) -> float:
    """The population stability index of two histograms; half an item is added to each bin, so that none is empty."""
    total_before, total_now = sum(before) + len(before) / 2, sum(now) + len(now) / 2
    index = 0.0
    for was, is_now in zip(before, now, strict=True):
        expected, found = (was + 0.5) / total_before, (is_now + 0.5) / total_now
        index += (found - expected) * math.log(found / expected)
    return index


def _baseline(days: Sequence[Day], today: date) -> list[Day]:
    first, last = today - timedelta(days=BASELINE_DAYS + 1), today - timedelta(days=1)
    return [day for day in days if first <= day.day < last and day.items >= FEWEST_ITEMS]


def _jumped(before: Sequence[Day], day: Day) -> bool:
    rates = [each.stopped / each.items for each in before]
    mean = statistics.fmean(rates)
    # Days may be more alike than chance allows to count on: a day of so few items differs by this much anyway.
    chance = math.sqrt(max(mean * (1 - mean), 1 / day.items) / day.items)
    return abs(day.stopped / day.items - mean) > SIGMAS * max(statistics.stdev(rates), chance)


def _is_crowded(crowd: Mapping[int, int]) -> bool:
    total = sum(items * users for items, users in crowd.items())
    few = math.ceil(sum(crowd.values()) * CROWD_USERS) - 1  # the most that is less than one in a hundred
    of_few = 0
    for items in sorted(crowd, reverse=True):
        taken = min(crowd[items], max(few, 0))
        of_few += taken * items
        few -= taken
    return total >= FEWEST_ITEMS and of_few > CROWD_SHARE * total
