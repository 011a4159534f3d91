"""Finds hanzi terms by their sound: other characters that are read the same, or pinyin in Latin letters.

Only terms of three hanzi and more. Two syllables without tones are too few: on ordinary Chinese prose they raise
some hundred times more false finds than terms of three.
"""

from __future__ import annotations

from collections.abc import Iterable

from service.screening.signals import Signal
from service.screening.text.folding import sounds, syllables
from service.screening.text.lexicon import Automaton, Lexicon
from service.screening.text.terms import Level, Term
from service.screening.text.views import Views

DETECTOR = "homophone"
HANZI = 3
"""From this length on a term is looked for by sound."""
SCORE = 0.6
LONG_SCORE = 0.7
"""For four hanzi and more, where chance hardly plays a part."""


class Homophones:
    """The terms of a lexicon by sound. Weak terms are left out."""

    def __init__(self, lexicon: Lexicon) -> None:
        self._lists = lexicon.lists
        terms = [
            (index, term, term.text)
            for index, each in enumerate(lexicon.lists)
            for term in each.terms
            if term.level is not Level.WEAK
        ]
        by_syllable = syllables()
        spoken = [
            (index, term, hanzi)
            for index, term, hanzi in terms
            if len(hanzi) >= HANZI and all(character in by_syllable for character in hanzi)
        ]
        self._sounds = Automaton((sounds(hanzi), index, term) for index, term, hanzi in spoken)
        self._pinyin = Automaton(_spellings(spoken))

    def search(self, views: Views) -> tuple[Signal, ...]:
        """One signal for each list of which something was heard that is not written."""
        longest: dict[int, int] = {}
        if views.sounds:
            for find in self._sounds.find(views.sounds):
                written = views.hanzi[find.start : find.end]
                if written != find.term.text:
                    longest[find.list_index] = max(longest.get(find.list_index, 0), len(written))
        for find in self._pinyin.find(views.words):
            length = len(find.term.text)
            longest[find.list_index] = max(longest.get(find.list_index, 0), length)
        return tuple(
            Signal(
                DETECTOR,
                self._lists[index].category,
                LONG_SCORE if length > HANZI else SCORE,
                rule=f"{DETECTOR}.{self._lists[index].name}",
            )
            for index, length in sorted(longest.items())
        )


def _spellings(spoken: Iterable[tuple[int, Term, str]]) -> Iterable[tuple[str, int, Term]]:
    """Pinyin with and without spaces between syllables, as whole words."""
    by_syllable = syllables()
    for index, term, hanzi in spoken:
        parts = [by_syllable[character] for character in hanzi]
        yield f" {' '.join(parts)} ", index, term
        yield f" {''.join(parts)} ", index, term
