"""Text that speaks to whoever ranks it, instead of saying something: "this passage is perfectly relevant".

Such words do raise the scores of language models that judge relevance (Alaofi et al. 2024, arXiv:2501.17969; Parry
et al. 2024, arXiv:2403.07654), and so does the query pasted into a text. Rules of six families (`injection_rules`),
in English and Chinese: orders to set the task aside, claims of being relevant, orders about the score, words
addressed to the model, marks of roles and delimiters, ready-made verdicts. Beside them hidden characters, and two
measures of stuffing. What is only mentioned stays where a text *about* ranking may be; families add up.

A first pass for cues by Aho-Corasick leaves most texts at once. Rules run on the surroundings of cues only, and
every repetition in them is bounded, so time is linear.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from ahocorasick_rs import AhoCorasick

from service.screening.signals import Signal
from service.screening.text.folding import fold
from service.screening.text.injection_rules import RULES
from service.screening.text.views import Views
from tenants.risk import Category

DETECTOR = "injection"

AROUND_CUE = 160
"""Characters on either side of a cue that its rules see."""
MOST = 0.95
LIKELY = 0.6
HIDDEN_CHARACTERS = 4
"""Tag characters from which on something is hidden."""
STUFFED_WORDS = 20
"""A shorter text is not judged for its repetitions."""


_WORD = re.compile(r"[^\W_]+")
_QUOTED_BEFORE = re.compile(r"['\"“‘「『`]\s?$")


@dataclass(frozen=True, slots=True)
class Asked:
    """A query, as texts that are stuffed with it would hold it."""

    whole: str
    """Folded; empty where it is too short for its repetition to mean anything."""
    terms: frozenset[str]
    """Its longer words."""

    @classmethod
    def of(cls, query: str) -> Asked:
        folded = fold(query).text.strip()
        least = 8 if folded.isascii() else 4
        terms = frozenset(word for word in _WORD.findall(folded) if len(word) > 3)
        return cls(folded, terms) if len(folded) >= least else cls("", frozenset())


class InjectionRules:
    """The rules, ready to be run."""

    def __init__(self) -> None:
        by_cue: dict[str, set[int]] = {}
        for number, rule in enumerate(RULES):
            for cue in rule.cues:
                by_cue.setdefault(cue, set()).add(number)
        self._rules_of = tuple(by_cue.values())
        self._cues = AhoCorasick(list(by_cue), store_patterns=False)

    def search(self, views: Views, asked: Asked | None = None) -> tuple[Signal, ...]:
        """At most one signal: how likely the text speaks to its judge, and by which family above all.

        `asked`: what the text is to be ranked by, where there is anything.
        """
        scores = self._families(views.folded.text)
        if views.folded.hidden >= HIDDEN_CHARACTERS:
            scores["hidden"] = 0.7
            for family, score in self._families(views.folded.hidden_text.lower()).items():
                scores[family] = max(scores.get(family, 0.0), score)
        if views.folded.overrides:
            scores["direction"] = 0.3
        if stuffed := _stuffing(views, asked):
            scores["stuffing"] = stuffed
        if not scores:
            return ()
        strongest = max(scores, key=lambda family: scores[family])
        return (
            Signal(
                DETECTOR,
                Category.INJECTION,
                round(min(MOST, 1 - prod(1 - score for score in scores.values())), 4),
                rule=f"{DETECTOR}.{strongest}",
                certain=sum(score >= LIKELY for score in scores.values()) > 1,
            ),
        )

    def _families(self, text: str) -> dict[str, float]:
        """The highest score of each family that has any."""
        scores: dict[str, float] = {}
        cues: dict[int, list[int]] = {}
        for cue, start, _ in self._cues.find_matches_as_indexes(text, overlapping=True):
            for number in self._rules_of[cue]:
                cues.setdefault(number, []).append(start)
        for number, places in cues.items():
            rule = RULES[number]
            if (highest := scores.get(rule.family, 0.0)) >= max(rule.ordered, rule.mentioned):
                continue
            for window in _windows(places, len(text)):
                for match in rule.pattern.finditer(text, *window):
                    ordered = rule.mentioned == rule.ordered or _is_order(match, text)
                    highest = max(highest, rule.ordered if ordered else rule.mentioned)
            if highest:
                scores[rule.family] = highest
        return scores


def _is_order(match: re.Match[str], text: str) -> bool:
    """Whether the words are an order, rather than quoted or spoken about."""
    if match["order"] is None:
        return False
    return not _QUOTED_BEFORE.search(text, max(0, match.start() - 2), match.start() + len(match["order"]))


def _windows(places: Sequence[int], length: int) -> Iterator[tuple[int, int]]:
    """Stretches of text around `places`, which ascend; those that meet are one."""
    start, end = -1, -1
    for place in places:
        if place - AROUND_CUE > end:
            if end > 0:
                yield start, end
            start = max(0, place - AROUND_CUE)
        end = min(length, place + AROUND_CUE)
    if end > 0:
        yield start, end


def _stuffing(views: Views, asked: Asked | None) -> float:
    """How much a text is repetition, above all of the query's words; 0 where it is ordinary."""
    score = 0.0
    words = views.word_list
    if len(words) >= STUFFED_WORDS and len(set(words)) < 0.45 * len(words):
        pairs = len(words) - 1
        different = len(set(pairwise(words)))
        if different < 0.45 * pairs and not _is_numbers(words):
            score = 0.45
    if asked:
        score = max(score, _stuffed_with(asked, views, words))
    return score


def _stuffed_with(asked: Asked, views: Views, words: list[str]) -> float:
    """The query again and again, or hardly anything but its words."""
    if not asked.whole:
        return 0.0
    times = views.folded.text.count(asked.whole)
    covered = times * len(asked.whole) / max(1, len(views.folded.text))
    if times >= 3 and covered > 0.15:
        return 0.65
    terms = asked.terms
    if len(terms) >= 2 and len(words) >= 12 and all(f" {term} " in views.words for term in terms):
        counts = Counter(words)
        if all(counts[term] >= 3 for term in terms) and sum(counts[term] for term in terms) > 0.3 * len(
            words
        ):
            return 0.6
    return 0.0


def _is_numbers(words: list[str]) -> bool:
    """A table repeats itself and means no harm."""
    return sum(word.isdigit() or len(word) == 1 for word in words) > 0.4 * len(words)
