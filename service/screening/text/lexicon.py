"""Finds the terms of all lists in all views of a text, by Aho-Corasick: time does not grow with the lists.

Latin terms carry the spaces around them in the pattern, so that an automaton finds whole words by itself. Three
automata: over words, over skeletons (digits for letters, stretched letters), over letters that were spelled out;
and one for hanzi. All overlapping matches are taken, so that no find hides another; then those within a longer
benign phrase are left out.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from ahocorasick_rs import AhoCorasick

from service.screening.signals import Signal
from service.screening.text.terms import MAX_LISTS, MAX_TERMS, Level, Term, TermList, built_in
from service.screening.text.views import Views, bend, skeleton

DETECTOR = "lexicon"
TWO_WEAK = 0.5
"""Score where two different weak terms of one list are found: more than one, less than likely."""
SPELLED_CHARACTERS = 4
"""Spelled-out terms are looked for within a run from this length on; shorter ones must be all of it."""

OPENING = 3
"""Letters of a bent word by which it is looked at more closely, or not."""


@dataclass(frozen=True, slots=True)
class _Find:
    term: Term
    list_index: int
    start: int
    end: int


class Automaton:
    """Patterns that stand for terms; finds all of them in one pass."""

    def __init__(self, patterns: Iterable[tuple[str, int, Term]]) -> None:
        """`patterns`: what to find, the number of the list, the term that it means."""
        meant: dict[str, list[tuple[int, Term]]] = {}
        for pattern, list_index, term in patterns:
            meant.setdefault(pattern, []).append((list_index, term))
        self._meant = tuple(meant.values())
        # Leaner than a DFA by far, and as fast on text with few finds.
        self._search = AhoCorasick(list(meant), store_patterns=False) if meant else None

    def find(self, text: str) -> list[_Find]:
        """Every find that no longer benign phrase of the same list covers."""
        if not text or self._search is None:
            return []
        matches = self._search.find_matches_as_indexes(text, overlapping=True)
        if not matches:
            return []
        finds = [
            _Find(term, list_index, start, end)
            for number, start, end in matches
            for list_index, term in self._meant[number]
        ]
        return _uncovered(finds)


class Lexicon:
    """All lists, ready to be searched. Immutable: `with_lists` gives another one."""

    def __init__(self, lists: Sequence[TermList]) -> None:
        """Raises `ValueError` beyond `MAX_LISTS` lists, `MAX_TERMS` terms, or for a name that comes twice."""
        if len(lists) > MAX_LISTS or sum(len(each.terms) for each in lists) > MAX_TERMS:
            raise ValueError(f"A lexicon holds at most {MAX_LISTS} lists and {MAX_TERMS:,} terms.")
        if len({each.name for each in lists}) != len(lists):
            raise ValueError("Two lists have the same name.")
        self.lists = tuple(lists)
        latin = [(i, term) for i, each in enumerate(lists) for term in each.terms if _is_latin(term)]
        hanzi = [(i, term) for i, each in enumerate(lists) for term in each.terms if not _is_latin(term)]
        self._words = Automaton(
            (pattern, i, term) for i, term in latin for pattern in _word_patterns(term.text, term.open_end)
        )
        self._bent = Automaton(
            (pattern, i, term)
            for i, term in latin
            for pattern in _word_patterns(skeleton(term.text), term.open_end)
        )
        self._bent_openings = {word[:OPENING] for _, term in latin for word in skeleton(term.text).split()}
        self._runs = Automaton(_run_patterns(latin))
        self._hanzi = Automaton((term.text, i, term) for i, term in hanzi)
        self.digest = _digest(lists)

    @classmethod
    def load(cls) -> Lexicon:
        """The lists that come with the service."""
        return cls(built_in())

    def with_lists(self, extra: Sequence[TermList]) -> Lexicon:
        """This lexicon with `extra`: a list of a name that is here already takes its place, others are added."""
        replaced = {each.name for each in extra}
        return Lexicon([*(each for each in self.lists if each.name not in replaced), *extra])

    def search(self, views: Views) -> tuple[Signal, ...]:
        """One signal for each list of which something was found."""
        finds = self._words.find(views.words)
        if views.odd and (bent := [index for index in views.odd if self._may_be_bent(views.tokens[index])]):
            text, spans = bend(views, bent)
            finds += _touching(self._bent.find(text), spans)
        if views.runs:
            finds += self._runs.find(f"\n{views.runs}\n")
        if views.hanzi:
            finds += self._hanzi.find(views.hanzi)
        if not finds:
            return ()
        by_list: dict[int, list[Term]] = {}
        for find in finds:
            by_list.setdefault(find.list_index, []).append(find.term)
        return tuple(self._signal(self.lists[index], terms) for index, terms in sorted(by_list.items()))

    def _may_be_bent(self, token: str) -> bool:
        """Whether any word of any term opens like this one's skeleton: most numbers and names do not."""
        return skeleton(token)[:OPENING] in self._bent_openings

    def _signal(self, found_in: TermList, terms: list[Term]) -> Signal:
        level = max((term.level for term in terms), key=lambda level: level.score)
        score = level.score
        if level is Level.WEAK and len({term.text for term in terms}) > 1:
            score = TWO_WEAK
        return Signal(
            DETECTOR,
            found_in.category,
            score,
            rule=f"{DETECTOR}.{found_in.name}",
            certain=level is Level.SEVERE,
        )


def _is_latin(term: Term) -> bool:
    return term.text.isascii()


def _word_patterns(text: str, open_end: bool) -> tuple[str, ...]:
    if open_end:
        return (f" {text}",)
    plural = "es" if text.endswith(("s", "x", "ch", "sh")) else "s"
    return (f" {text} ", f" {text}{plural} ")


def _run_patterns(latin: Sequence[tuple[int, Term]]) -> Iterable[tuple[str, int, Term]]:
    for list_index, term in latin:
        bare = skeleton(term.text.replace(" ", ""))
        if len(bare) >= SPELLED_CHARACTERS:
            yield bare, list_index, term
        else:
            yield f"\n{bare}\n", list_index, term


def _uncovered(finds: list[_Find]) -> list[_Find]:
    """The finds that say something, but for those within a benign phrase of their list."""
    reach: dict[int, tuple[list[int], list[int]]] = {}
    for benign in sorted(
        (find for find in finds if find.term.level is Level.BENIGN), key=lambda find: find.start
    ):
        # By list: where benign phrases start, and how far those that started until there reach at most.
        starts, ends = reach.setdefault(benign.list_index, ([], []))
        starts.append(benign.start)
        ends.append(max(benign.end, ends[-1] if ends else 0))
    return [
        find
        for find in finds
        if find.term.level is not Level.BENIGN and not _is_within(find, reach.get(find.list_index))
    ]


def _is_within(find: _Find, reach: tuple[list[int], list[int]] | None) -> bool:
    if reach is None:
        return False
    starts, ends = reach
    before = bisect_right(starts, find.start)
    return before > 0 and ends[before - 1] >= find.end


def _touching(finds: list[_Find], spans: Sequence[tuple[int, int]]) -> list[_Find]:
    """Those finds that touch a bent word; `spans` are in order and apart."""
    ends = [end for _, end in spans]
    return [
        find
        for find in finds
        if (first := bisect_right(ends, find.start)) < len(spans) and spans[first][0] < find.end
    ]


def _digest(lists: Sequence[TermList]) -> str:
    """SHA-256 over names, categories, levels and terms, in an order that does not depend on the files'."""
    lines = chain.from_iterable(
        (
            f"{each.name}\t{each.category}\t{term.level.value}\t{term.text}\t{term.open_end}"
            for term in each.terms
        )
        for each in lists
    )
    return hashlib.sha256("\n".join(sorted(lines)).encode("utf-8", "surrogatepass")).hexdigest()
