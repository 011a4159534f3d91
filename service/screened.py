"""What was decided about the items of a request: for the ranking, for the caller, and for the log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.errors import ContentRefused, Touched
from service.screening.judge import Reason, Risk, Rules, Side, Verdict, hardest
from tenants.adaptation import is_for_review
from tenants.audit import micro_units
from tenants.evidence import Measure
from tenants.evidence import Screened as Evident
from tenants.risk import Action, Category, Mode

if TYPE_CHECKING:
    from uuid import UUID

    from models import Pixels
    from service.screening.signals import Findings
    from tenants.policy import Policy

DIGITS = 2
"""Of a score that a caller reads. More would help only those who feel their way to a threshold."""
PAST = {Action.FLAG: "flagged", Action.DEMOTE: "demoted", Action.MASK: "masked", Action.REFUSE: "refused"}


@dataclass(frozen=True, slots=True)
class Part:
    """One text or image of an item: the item's place among those that were screened, and the caller's name of it."""

    item: int
    where: str
    mode: Mode
    side: Side
    findings: Findings
    in_image: bool = False
    """A text that was read in an image: it is judged as a text."""


@dataclass(frozen=True, slots=True)
class Screened:
    """The verdicts on a request's items, in their order."""

    pixels: Mapping[str, Pixels]
    """The clean image of every item that has one, by the item's `where`."""
    parts: tuple[tuple[Part, Verdict], ...]
    """Each text, each image, and text that was read in one."""
    rules: Rules
    versions: Mapping[Mode, str]
    """Of the detectors, by what they look at."""

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """Whatever was touched, and why."""
        return tuple(reason for _, verdict in self.parts for reason in verdict.reasons)

    @property
    def action(self) -> Action:
        return hardest(verdict.action for _, verdict in self.parts)

    def items(self, action: Action) -> frozenset[int]:
        """The places of the items of which this is the hardest action."""
        hardest_of: dict[int, Action] = {}
        for part, verdict in self.parts:
            hardest_of[part.item] = hardest((hardest_of.get(part.item, Action.ALLOW), verdict.action))
        return frozenset(item for item, own in hardest_of.items() if own is action)

    def count(self) -> dict[str, int]:
        """How many items were masked, demoted, flagged, refused, where any were; the hardest first."""
        counts = {PAST[action]: len(self.items(action)) for action in reversed(PAST)}
        return {word: count for word, count in counts.items() if count}

    def tell(self) -> tuple[Touched, ...]:
        """The reasons as a caller may read them."""
        return tuple(map(_told, self.reasons))

    def refuse(self) -> None:
        """Raises `ContentRefused`, with all that refuses the request, where anything does."""
        refusing = tuple(reason for reason in self.reasons if reason.action is Action.REFUSE)
        if refusing:
            raise ContentRefused(tuple(map(_told, refusing)))

    def details(self) -> dict[str, object]:
        """What the entry says: by mode the highest risk of each category and its threshold, the action, and why.

        Scores are micro-units.
        """
        risks: dict[Mode, dict[Category, int]] = {}
        for part, verdict in self.parts:
            highest = risks.setdefault(part.mode, {})
            for risk in verdict.risks:
                highest[risk.category] = max(highest.get(risk.category, 0), micro_units(risk.score))
        told: dict[str, object] = {"action": str(self.action)}
        measured = {
            str(mode): {
                str(category): [score, micro_units(self.rules.thresholds[category, mode])]
                for category, score in sorted(highest.items())
            }
            for mode, highest in risks.items()
            if highest
        }
        if measured:
            told["risks"] = measured
        if self.reasons:
            told["touched"] = [
                {
                    "item": reason.where,
                    "category": "" if reason.category is None else str(reason.category),
                    "score": micro_units(reason.score),
                    "threshold": micro_units(reason.threshold),
                    "rule": reason.rule,
                    "action": str(reason.action),
                }
                for reason in self.reasons
            ]
        return told

    def evidence(self, entry_id: UUID, end_user: str, policy: Policy) -> tuple[Evident, ...]:
        """What thresholds may learn from, once the entry stands: scores and thresholds, nothing of any content."""

        def held(risk: Risk, mode: Mode) -> Measure:
            threshold = self.rules.thresholds[risk.category, mode]
            near = is_for_review(policy, threshold, risk.score)
            return Measure(risk.category, risk.score, threshold, near)

        return tuple(
            Evident(
                entry_id,
                part.where,
                part.mode,
                end_user,
                self.versions[part.mode],
                [held(risk, part.mode) for risk in verdict.risks],
            )
            for part, verdict in self.parts
        )


def _told(reason: Reason) -> Touched:
    return Touched(
        item=reason.where,
        category=None if reason.category is None else str(reason.category),
        score=round(reason.score, DIGITS),
        threshold=round(reason.threshold, DIGITS),
        rule=reason.rule,
        action=str(reason.action),
    )
