"""What each detector's raw scores mean: piecewise-linear tables from a versioned JSON, checked when they are loaded.

A table belongs to one detector and one category. It maps a raw score to the scale that thresholds are on: below 0.3
benign, to 0.6 suggestive, to 0.8 likely a violation, from 0.8 on a clear one. It also says how the detector takes part:

    votes      measures every item; a low score speaks against the risk
    finds      speaks only where it found something; silence says nothing, and no other detector takes it back
    confirms   weak by itself: may raise what others say, never lower it
    fallback   heard only where no other detector spoke

The file says of each table what it rests on. A table that is not monotone, leaves 0 to 1, or does not cover all raw
scores is refused at the start: a wrong table is worse than none.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib.resources import files
from itertools import pairwise
from typing import Any

import orjson

from tenants.risk import Category

VERSION = 1
MOST_UNKNOWN = 0.59
"""A detector without a table (a plug-in, say) may raise suspicion and stops nothing at the moderate threshold."""


class CalibrationInvalid(Exception):
    """The calibration tables are not valid."""


class Role(StrEnum):
    """How a detector takes part in a category's score."""

    VOTES = "votes"
    FINDS = "finds"
    CONFIRMS = "confirms"
    FALLBACK = "fallback"


@dataclass(frozen=True, slots=True)
class Table:
    """One detector's scores in one category. `points` are (raw, calibrated), from raw 0 to raw 1."""

    role: Role
    weight: float
    points: tuple[tuple[float, float], ...]
    basis: str
    """What the numbers rest on."""

    def calibrate(self, raw: float) -> float:
        """The score for `raw`, which is cut to 0..1; in between the points it is linear."""
        if not raw > 0.0:  # NaN too, which no detector may send; `judge` refuses it before
            return self.points[0][1]
        place = bisect_right(self.points, raw, key=lambda point: point[0])
        if place == len(self.points):
            return self.points[-1][1]
        (left, low), (right, high) = self.points[place - 1], self.points[place]
        return low + (high - low) * (raw - left) / (right - left)


UNKNOWN = Table(
    Role.CONFIRMS, 0.5, ((0.0, 0.0), (MOST_UNKNOWN, MOST_UNKNOWN), (1.0, MOST_UNKNOWN)), "no table: by rule"
)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Every table there is. `digest` changes with any of them: what was judged by one is not valid by another."""

    digest: str
    tables: dict[tuple[str, Category], Table]
    weights: dict[Category, float]
    """How much a category counts in an item's total, 0 to 1."""

    def table(self, detector: str, category: Category) -> Table:
        """The detector's table, or the careful one of a detector that is not known."""
        return self.tables.get((detector, category), UNKNOWN)

    def categories_of(self, detector: str) -> frozenset[Category]:
        """In which categories the detector could have spoken: all of them where it is not known."""
        known = frozenset(category for name, category in self.tables if name == detector)
        return known or frozenset(Category)


@cache
def load_calibration() -> Calibration:
    """The tables of this version. Raises `CalibrationInvalid`."""
    return read_calibration((files("service.screening") / "calibration.json").read_bytes())


def read_calibration(body: bytes) -> Calibration:
    """Tables from JSON. Raises `CalibrationInvalid` with the detector and category whose table is wrong."""
    try:
        raw = orjson.loads(body)
        if raw["version"] != VERSION:
            raise CalibrationInvalid(f"version {raw['version']}, not {VERSION}")
        weights = {Category(name): float(weight) for name, weight in raw["weights"].items()}
        tables = {
            (detector, Category(name)): _table(table, f"{detector}.{name}")
            for detector, categories in raw["detectors"].items()
            for name, table in categories.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise CalibrationInvalid("not a calibration file") from exc
    if set(weights) != set(Category) or not all(0.0 <= weight <= 1.0 for weight in weights.values()):
        raise CalibrationInvalid("weights: one from 0 to 1 for each category")
    return Calibration(hashlib.sha256(body).hexdigest()[:16], tables, weights)


def _table(raw: dict[str, Any], name: str) -> Table:
    points = tuple((float(x), float(y)) for x, y in raw["points"])
    rising = all(left[0] < right[0] and left[1] <= right[1] for left, right in pairwise(points))
    whole = len(points) >= 2 and points[0][0] == 0.0 and points[-1][0] == 1.0
    if not rising or not whole or not all(0.0 <= y <= 1.0 for _, y in points):
        raise CalibrationInvalid(f"{name}: points must rise from raw 0 to raw 1 and stay within 0 and 1")
    weight = float(raw["weight"])
    if not 0.0 < weight <= 10.0:
        raise CalibrationInvalid(f"{name}: the weight must be above 0 and at most 10")
    if not raw["basis"]:
        raise CalibrationInvalid(f"{name}: no basis")
    return Table(Role(raw["role"]), weight, points, str(raw["basis"]))
