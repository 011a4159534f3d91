"""Who can move a threshold by sending traffic: the poisoning of adaptive thresholds, simulated.

60 days of 2,000 items in one category, its policy's threshold (the anchor) at 0.60. One item in ten is harmful; scores are
drawn from Beta distributions, so that 0.60 lets some 15 % of the harmful pass. From day 20 on three items in ten are
an attacker's:

    harmful     clearly harmful items of 60 accounts, which are stopped, and each stop is appealed
    lookalikes  harmless items that score 0.60 to 0.78, to teach that what scores so is harmless
    early       the same from the first day on, so that nothing else was ever ordinary: the worst case
    calm        no attacker
    clinic      no attacker, and a tenant whose harmless items score high by nature: here looser is right

Five ways to set the threshold see the same items:

    static      the anchor
    quantile    follows the score that stops as large a share of the traffic as at the beginning
    clamped     the same, within 0.10 of the anchor
    appeals     an appeal makes it looser, a report of what was passed stricter; nobody judges them
    ours        `tenants.adaptation` with its draws, votes, traffic alarms and canaries; reviewers err on one item in 50

Told are the last threshold, the share of the harmful that passes there and the share of the harmless that is stopped, on items of
the tenant's own users that the run has not seen. The figures depend on the seeds alone. No real content and no detector takes
part: this says how rules behave under these assumptions, not how often detectors are right.

    python bench/thresholds.py [--quick] [--save]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.report import circumstances, close  # noqa: E402
from bench.request import console  # noqa: E402
from tenants.adaptation import Situation, Vote, begin, bounds, step  # noqa: E402
from tenants.evidence import Measure, odds_of  # noqa: E402
from tenants.reviews import COUNTS_DAYS  # noqa: E402
from tenants.risk import Category, Mode  # noqa: E402
from tenants.traffic import BINS, Day, has_baseline, look  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "thresholds.json"
DAYS, ITEMS, ANCHOR = 60, 2_000, 0.60
POISON_FROM, POISON = 20, 0.30
USERS, ATTACKERS = 1_500, 60
ERRORS = 0.02
"""The share of items on which a reviewer errs."""
PACE = 0.1
"""How fast the unguarded ways follow, in a day."""
SEEDS, QUICK_SEEDS = 20, 3
QUICK_S = 50.0
FIRST_DAY = date(2026, 1, 1)
PLACE = (Category.HATE, Mode.TEXT)


@dataclass(frozen=True, slots=True)
class Scenario:
    """Whose items these are, and what they score."""

    name: str
    attack: str = ""
    attack_from: int = POISON_FROM
    harmful_share: float = 0.10
    harmful: tuple[float, float] = (5.2, 1.6)
    """Beta parameters of the scores."""
    harmless: tuple[float, float] = (2.0, 14.0)


SCENARIOS = (
    Scenario("harmful", "harmful"),
    Scenario("lookalikes", "lookalikes"),
    Scenario("early", "lookalikes", attack_from=0),
    Scenario("calm"),
    Scenario("clinic", harmful_share=0.02, harmful=(14.0, 2.0), harmless=(7.0, 6.0)),
)


@dataclass(frozen=True, slots=True)
class Items:
    """One day's items, one number in each array for each."""

    scores: np.ndarray
    harmful: np.ndarray
    users: np.ndarray
    poison: np.ndarray


def make_day(scenario: Scenario, day: int, rng: np.random.Generator) -> Items:
    poison = np.arange(ITEMS) < (ITEMS * POISON if scenario.attack and day >= scenario.attack_from else 0)
    harmful = rng.random(ITEMS) < scenario.harmful_share
    scores = np.where(harmful, rng.beta(*scenario.harmful, ITEMS), rng.beta(*scenario.harmless, ITEMS))
    users = rng.integers(0, USERS, ITEMS)
    if scenario.attack == "harmful":
        scores = np.where(poison, rng.beta(40, 2, ITEMS), scores)
    else:
        scores = np.where(poison, rng.uniform(0.60, 0.78, ITEMS), scores)
    harmful = np.where(poison, scenario.attack == "harmful", harmful)
    users = np.where(poison, USERS + rng.integers(0, ATTACKERS, ITEMS), users)
    return Items(scores, harmful.astype(bool), users, poison)


# -- ways to set a threshold ---------------------------------------------------------------------------------------

Way = Callable[[int, Items], float]
"""What it makes of a day: the threshold of the next one."""


def static(_rng: np.random.Generator) -> Way:
    return lambda _day, _items: ANCHOR


@dataclass(slots=True)
class Quantile:
    """Follows the score above which the first day's share of the traffic lies."""

    margin: float
    threshold: float = ANCHOR
    share: float | None = None

    def __call__(self, _day: int, items: Items) -> float:
        if self.share is None:
            self.share = float((items.scores >= ANCHOR).mean())
        wanted = float(np.quantile(items.scores, 1 - self.share))
        self.threshold += PACE * (wanted - self.threshold)
        self.threshold = min(max(self.threshold, ANCHOR - self.margin), ANCHOR + self.margin)
        return self.threshold


@dataclass(slots=True)
class Appeals:
    """Every attacker appeals each stop and half of the harmless who are stopped do; one in ten of those who meet
    something harmful reports it."""

    rng: np.random.Generator
    threshold: float = ANCHOR

    def __call__(self, _day: int, items: Items) -> float:
        stopped = items.scores >= self.threshold
        ours = ~items.poison
        asked = (stopped & items.poison).sum() + 0.5 * (stopped & ours & ~items.harmful).sum()
        reported = 0.1 * (~stopped & items.harmful).sum()
        pull = (asked - reported) / max(1, stopped.sum() + reported)
        self.threshold = min(max(self.threshold + 0.02 * float(pull), 0.02), 0.98)
        return self.threshold


@dataclass(slots=True)
class Ours:
    """The service's own rules, fed as the service feeds them."""

    rng: np.random.Generator
    canaries: tuple[float, ...]
    votes: list[tuple[int, Vote]] = field(default_factory=list)
    days: list[Day] = field(default_factory=list)
    state: Any = None
    reasons: Counter[str] = field(default_factory=Counter)
    reviewed: int = 0
    loosest: float = ANCHOR

    def __call__(self, day: int, items: Items) -> float:
        today = FIRST_DAY + timedelta(days=day)
        state = self.state or begin(ANCHOR, today, "1")
        threshold = state.threshold
        stopped = items.scores >= threshold
        bins = np.minimum((items.scores * BINS).astype(int), BINS - 1)
        histogram = tuple(int(count) for count in np.bincount(bins, minlength=BINS))
        self.days = [*self.days, Day(today, len(items.scores), int(stopped.sum()), histogram)][-30:]
        volumes = Counter(items.users.tolist())
        self._review(day, items, threshold, volumes)
        since = day - COUNTS_DAYS
        now = Situation(
            ANCHOR,
            bounds(ANCHOR, *PLACE),
            "1",
            [
                Vote(vote.score, vote.harmful, vote.weight, day - cast)
                for cast, vote in self.votes
                if cast > since
            ],
            look(self.days, [Counter(volumes.values())], today) or "",
            has_baseline(self.days, today),
            self.canaries,
        )
        move = step(state, now, today)
        self.state = move.state
        self.reasons[str(move.reason)] += 1
        self.loosest = max(self.loosest, move.state.threshold)
        return float(move.state.threshold)

    def _review(self, day: int, items: Items, threshold: float, volumes: Counter[int]) -> None:
        """Each item is drawn with the service's odds, or appealed; of an end user the first vote of the day counts."""
        voted: set[int] = set()
        appealed = items.poison & (items.scores >= threshold) & (self.rng.random(ITEMS) < 0.1)
        for place in self.rng.permutation(ITEMS):
            score = float(items.scores[place])
            odds = odds_of(Measure(PLACE[0], score, threshold))
            drawn = odds > 0 and self.rng.random() < odds
            user = int(items.users[place])
            if not drawn and not appealed[place]:
                continue
            self.reviewed += 1
            if user in voted:
                continue
            voted.add(user)
            harmful = bool(items.harmful[place]) ^ (self.rng.random() < ERRORS)
            weight = 1 / ((odds if drawn else 1.0) * volumes[user])
            self.votes.append((day, Vote(score, harmful, weight)))


# -- runs ------------------------------------------------------------------------------------------------------------


def run(scenario: Scenario, seed: int) -> dict[str, dict[str, Any]]:
    """What each way ends with."""
    rng = np.random.default_rng([seed, 1])
    canaries = tuple(map(float, np.random.default_rng([seed, 2]).beta(14, 2, 100)))
    ours = Ours(np.random.default_rng([seed, 3]), canaries)
    ways: dict[str, Way] = {
        "static": static(rng),
        "quantile": Quantile(margin=1.0),
        "clamped": Quantile(margin=0.10),
        "appeals": Appeals(rng),
        "ours": ours,
    }
    thresholds = dict.fromkeys(ways, ANCHOR)
    for day in range(DAYS):
        items = make_day(scenario, day, rng)
        for name, way in ways.items():
            thresholds[name] = way(day, items)
    unseen = np.random.default_rng([seed, 4])
    harmful, harmless = unseen.beta(*scenario.harmful, 200_000), unseen.beta(*scenario.harmless, 200_000)
    ended: dict[str, dict[str, Any]] = {
        name: {
            "threshold": round(threshold, 4),
            "harmful_passed_pct": round(100 * float((harmful < threshold).mean()), 2),
            "harmless_stopped_pct": round(100 * float((harmless >= threshold).mean()), 3),
        }
        for name, threshold in thresholds.items()
    }
    ended["ours"] |= {
        "reviewed_a_day": round(ours.reviewed / DAYS, 1),
        "days_frozen": ours.reasons["frozen"],
        "loosest": ours.loosest,
    }
    return ended


def sum_up(runs: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The median over the seeds, and the worst of what may not be bad."""
    told: dict[str, dict[str, Any]] = {}
    for name in runs[0]:
        figures = {key: [each[name][key] for each in runs] for key in runs[0][name]}
        told[name] = {key: round(statistics.median(values), 4) for key, values in figures.items()}
        told[name]["worst_harmful_passed_pct"] = max(figures["harmful_passed_pct"])
        told[name]["worst_threshold"] = max(figures["threshold"])
    return told


def aims_of(figures: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
    poisoned, lookalikes, clinic = (figures[name] for name in ("harmful", "lookalikes", "clinic"))

    def at_most(what: str, aim: float, measured: float, unit: str) -> dict[str, Any]:
        return {"what": what, "aim": f"<= {aim:g} {unit}", "measured": measured, "ok": measured <= aim}

    def at_least(what: str, aim: float, measured: float) -> dict[str, Any]:
        return {"what": what, "aim": f">= {aim:g}", "measured": measured, "ok": measured >= aim}

    others = min(poisoned[name]["harmful_passed_pct"] for name in poisoned if name != "ours")
    return [
        at_least(
            "the attack moves the unguarded quantile: threshold", 0.9, poisoned["quantile"]["threshold"]
        ),
        at_least("the attack moves unjudged appeals: threshold", 0.9, poisoned["appeals"]["threshold"]),
        at_most(
            "harmful: ours lets pass, in the worst seed, less than the best of the others",
            others,
            poisoned["ours"]["worst_harmful_passed_pct"],
            "%",
        ),
        at_most("harmful: ours lets pass", 8.0, poisoned["ours"]["harmful_passed_pct"], "%"),
        at_most("harmful: ours stops of the harmless", 0.1, poisoned["ours"]["harmless_stopped_pct"], "%"),
        at_most(
            "lookalikes: ours lets pass no more than the policy's own threshold",
            lookalikes["static"]["harmful_passed_pct"],
            lookalikes["ours"]["worst_harmful_passed_pct"],
            "%",
        ),
        at_most(
            "never looser than the anchor by more than 0.10, on any day of any seed",
            ANCHOR + 0.10,
            max(each["ours"]["loosest"] for each in figures.values()),
            "",
        ),
        at_most(
            "clinic: ours stops of the harmless, over what the policy's own threshold stops",
            0.6,
            round(clinic["ours"]["harmless_stopped_pct"] / clinic["static"]["harmless_stopped_pct"], 3),
            "x",
        ),
        at_most("a quick run takes", QUICK_S, round(seconds, 1), "s"),
    ]


def main() -> int:
    began_s = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SEEDS} seeds instead of {SEEDS}")
    parser.add_argument(
        "--save", action="store_true", help="keep a full run in bench/results/thresholds.json"
    )
    options = parser.parse_args()
    if options.quick and options.save:
        parser.error("only full runs are saved")
    load_before = round(os.getloadavg()[0], 2)
    seeds = QUICK_SEEDS if options.quick else SEEDS
    figures: dict[str, Any] = {}
    quick_s = 0.0
    for scenario in SCENARIOS:
        runs = []
        for seed in range(seeds):
            at_s = time.monotonic()
            runs.append(run(scenario, seed))
            quick_s += (time.monotonic() - at_s) * (QUICK_SEEDS / seeds)
        figures[scenario.name] = sum_up(runs)
        console.print(f"{scenario.name}: {figures[scenario.name]['ours']}")
    took_s = time.monotonic() - began_s
    aims = aims_of(figures, took_s if options.quick else quick_s)
    report = {
        **circumstances("thresholds", ("numpy",), quick=options.quick, load_before=load_before),
        "seconds": round(took_s, 1),
        "simulated": {"days": DAYS, "items_a_day": ITEMS, "anchor": ANCHOR, "poison": POISON, "seeds": seeds},
        "figures": figures,
        "aims": aims,
    }
    return close(report, RESULTS if options.save else None)


if __name__ == "__main__":
    raise SystemExit(main())
