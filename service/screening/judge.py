"""What is to be done about an item: findings and a tenant's rules in, a verdict out. Pure.

**Measure.** Each signal is calibrated by its detector's table (`calibration.py`). Of one detector the strongest signal
counts. Detectors of one category that `vote` are fused by their weighted geometric mean, never by noisy-or: they are
wrong about the same pictures, and noisy-or takes two halves of one mistake for two witnesses. What a detector `finds`
stands by itself; one that `confirms` may raise the mean and never lowers it. From 0.8 on a score needs two detectors
that agree, or one signal that is certain; else it stops at `ONE_WITNESS`.

**Total.** Across categories 1 - prod(1 - w_c * s_c), and no less than the highest s_c: several mild risks together are
more than each. It flags where it reaches the mode's threshold; masking and refusing are for the category that did it.

**Failure.** A detector that should have run and could not is never a score of 0. By policy the request is refused; or
the categories in which it could have spoken are judged without it, no higher than `WITHOUT_ONE` but for signals that are
certain, and the item is flagged whatever comes out.

Every score is monotone: a stronger signal never makes a verdict milder.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import reduce
from typing import TYPE_CHECKING

from service.screening.calibration import Calibration, Role
from service.screening.signals import Findings, Signal
from tenants.risk import Action, Category, Mode

if TYPE_CHECKING:
    from collections.abc import Callable

    from tenants.policy import Policy

CLEAR = 0.8
"""From here on a score says that there is no doubt."""
ONE_WITNESS = 0.79
"""As high as one detector gets by itself, unless it is certain."""
AGREES = 0.5
"""A calibrated score from which on a detector counts as a witness."""
WITHOUT_ONE = 0.59
"""As high as what is left gets where a detector failed: below the moderate threshold."""
LEAST = 0.01
"""A detector that sees nothing pulls a geometric mean down as far as this, not to 0."""

ORDER = tuple(Action)
"""From the mildest to the hardest."""
MISSING = "detector_missing"
TOTAL = "total"


class Side(StrEnum):
    """What an item is for its request."""

    QUERY = "query"
    DOCUMENT = "document"


@dataclass(frozen=True, slots=True)
class Risk:
    """What was measured in one category, 0 to 1, and the rule that weighed most."""

    category: Category
    score: float
    rule: str


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for one tenant: thresholds and actions by category, and what a missing detector means."""

    thresholds: Mapping[tuple[Category, Mode], float]
    actions: Mapping[Category, Action]
    total: float
    """The total that flags: the mode's threshold."""
    refuses_missing: bool

    @staticmethod
    def of(policy: Policy, threshold: Callable[[Category, Mode], float] | None = None) -> Rules:
        """The policy's own rules; `threshold` has its place where thresholds were adapted."""
        in_force = threshold or (lambda category, _mode: policy.threshold(category))
        return Rules(
            {(category, mode): in_force(category, mode) for category in Category for mode in Mode},
            {category: policy.action(category) for category in Category},
            policy.mode.threshold,
            policy.refuses_missing_detectors,
        )

    def told_only(self) -> Rules:
        """The same thresholds, where nothing is done but telling."""
        actions = {name: min(action, Action.FLAG, key=ORDER.index) for name, action in self.actions.items()}
        return replace(self, actions=actions, refuses_missing=False)


@dataclass(frozen=True, slots=True)
class Reason:
    """Why an item was touched. Never what was found in it."""

    where: str
    """The item as its caller calls it: `documents[3]`, `query.image`."""
    category: Category | None
    """None where it is about no category: a detector is missing."""
    score: float
    threshold: float
    rule: str
    action: Action


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be done about one text or one image."""

    action: Action
    risks: tuple[Risk, ...]
    """Of the categories in which anything was said."""
    total: float
    reasons: tuple[Reason, ...]
    """Whatever reached its threshold; empty where nothing was touched."""


def measure(findings: Findings, tables: Calibration) -> tuple[Risk, ...]:
    """The fused score of each category in which a detector spoke. Raises ValueError for a raw score that is none."""
    spoken: dict[Category, list[Signal]] = {}
    for signal in findings.signals:
        if not 0.0 <= signal.score <= 1.0:
            raise ValueError(f"{signal.detector} says {signal.score}")
        spoken.setdefault(signal.category, []).append(signal)
    unheard = {category for name in findings.failed for category in tables.categories_of(name)}
    return tuple(
        _fuse(category, signals, tables, most=WITHOUT_ONE if category in unheard else 1.0)
        for category, signals in spoken.items()
    )


def total_of(risks: Iterable[Risk], tables: Calibration) -> float:
    """One number for an item: noisy-or over the weighted categories, no less than the highest of them."""
    left, highest = 1.0, 0.0
    for risk in risks:
        left *= 1.0 - tables.weights[risk.category] * risk.score
        highest = max(highest, risk.score)
    return max(1.0 - left, highest)


def judge(
    findings: Findings,
    rules: Rules,
    tables: Calibration,
    *,
    where: str,
    mode: Mode,
    side: Side,
) -> Verdict:
    """The verdict on one text or one image. Raises ValueError for a signal that is no number from 0 to 1."""
    risks = measure(findings, tables)
    total = total_of(risks, tables)
    reasons = []
    for risk in risks:
        threshold = rules.thresholds[risk.category, mode]
        action = on_side(rules.actions[risk.category], side)
        if risk.score >= threshold and action is not Action.ALLOW:
            reasons.append(Reason(where, risk.category, risk.score, threshold, risk.rule, action))
    counted = [risk for risk in risks if rules.actions[risk.category] is not Action.ALLOW]
    together = total_of(counted, tables)
    if not reasons and len(counted) > 1 and together >= rules.total:
        strongest = max(counted, key=lambda risk: risk.score)
        reasons.append(Reason(where, strongest.category, together, rules.total, TOTAL, Action.FLAG))
    if findings.failed:
        action = Action.REFUSE if rules.refuses_missing else Action.FLAG
        reasons.append(Reason(where, None, 0.0, 0.0, MISSING, action))
    return Verdict(hardest(reason.action for reason in reasons), risks, total, tuple(reasons))


def on_side(action: Action, side: Side) -> Action:
    """A query cannot be left out of its own ranking, nor put behind others."""
    if side is Side.DOCUMENT:
        return action
    return {Action.MASK: Action.REFUSE, Action.DEMOTE: Action.FLAG}.get(action, action)


def hardest(actions: Iterable[Action]) -> Action:
    """The hardest of them, `allow` where there is none."""
    return max(actions, key=ORDER.index, default=Action.ALLOW)


def _fuse(category: Category, signals: Sequence[Signal], tables: Calibration, *, most: float) -> Risk:
    scored = [(tables.table(each.detector, category).calibrate(each.score), each) for each in signals]
    strongest: dict[str, float] = {}
    for score, signal in scored:
        strongest[signal.detector] = max(score, strongest.get(signal.detector, 0.0))

    def those(*roles: Role) -> list[tuple[float, float]]:
        """Score and weight of each detector in these roles."""
        found = ((score, tables.table(name, category)) for name, score in strongest.items())
        return [(score, table.weight) for score, table in found if table.role in roles]

    votes = those(Role.VOTES)
    # The best first: whoever saw less than the mean of those before would lower it, and is left out of the highest.
    others = sorted(those(Role.FINDS, Role.CONFIRMS), reverse=True)
    heard = votes + others
    if heard:
        alone = max((score for score, _ in those(Role.FINDS)), default=0.0)
        score = max(alone, *(_mean(votes + others[:count]) for count in range(len(others) + 1)))
    else:
        score = _mean(those(Role.FALLBACK))
    witnesses = sum(score >= AGREES for score, _ in heard)
    if witnesses < 2:
        score = min(score, ONE_WITNESS)
    score = min(score, most)
    # What is certain needs no second witness, and no missing one takes it back.
    certain = max((each for each, signal in scored if signal.certain), default=0.0)
    top = max(scored, key=lambda each: (each[1].certain and each[0] >= score, each[0]))[1]
    return Risk(category, max(score, certain), top.rule or top.detector)


def _mean(weighted: Sequence[tuple[float, float]]) -> float:
    """The weighted geometric mean; 0 of nothing, and where nobody saw anything."""
    if not any(score for score, _ in weighted):
        return 0.0
    logs = reduce(lambda sum_, each: sum_ + each[1] * math.log(max(each[0], LEAST)), weighted, 0.0)
    return min(1.0, math.exp(logs / sum(weight for _, weight in weighted)))
