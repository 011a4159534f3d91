"""Lists of terms: files of one term a line, by category, with their source and licence at the top.

    # category: weapons          one of `tenants.risk.Category`
    # language: en
    # source: ...
    # licence: Apache-2.0
    [severe]                     clear by itself, and counts for two signals
    [strong]                     likely meant
    [weak]                       may be meant; two different ones say a little more
    [benign]                     longer phrases that hold a term and mean nothing: bomb squad

    make|build a|_ pipe-bomb     one of each: make a pipe bomb, make pipe bomb, build a ...; `_` is nothing

A term of Latin letters is found as whole words, in any spacing and punctuation; `*` at its end stands for any
ending of its last word. A term of hanzi is found anywhere. Terms are folded as texts are (`folding`), so a list
holds the plain simplified form only. A tenant's own lists have the same shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import product
from pathlib import Path

from service.screening.text.folding import fold
from service.screening.text.views import PHRASE_WORDS
from tenants.risk import Category

FOLDER = Path(__file__).with_name("lexicons")

MAX_TERMS = 20_000
"""Of one list. An automaton of so many takes 20 MB and a tenth of a second."""
MAX_TERM_CHARACTERS = 64
MAX_LISTS = 64

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,47}")
_WORD = re.compile(r"[^\W_]+")
_HEADERS = ("category", "language", "source", "licence")


class Level(Enum):
    """What a term says, from nothing to enough by itself. The value is the section's name in a file."""

    BENIGN = "benign"
    WEAK = "weak"
    STRONG = "strong"
    SEVERE = "severe"

    @property
    def score(self) -> float:
        """From 0 to 1, on the judge's scale: 0.3 suggestive, 0.6 likely, 0.8 clear."""
        return {"benign": 0.0, "weak": 0.35, "strong": 0.7, "severe": 0.9}[self.value]


@dataclass(frozen=True, slots=True)
class Term:
    """One entry, folded. Words are parted by single spaces."""

    text: str
    level: Level
    open_end: bool = False
    """Whether the last word may go on."""


@dataclass(frozen=True, slots=True)
class TermList:
    """A list of one category. `name` is what a signal's rule says."""

    name: str
    category: Category
    language: str
    source: str
    licence: str
    terms: tuple[Term, ...]


def read_list(name: str, text: str) -> TermList:
    """The list that `text` holds. Raises `ValueError`, with the number of the line and no word of it."""
    if not _NAME.fullmatch(name):
        raise ValueError("A list's name is of lower-case letters, digits and hyphens, at most 48.")
    headers: dict[str, str] = {}
    level: Level | None = None
    terms: dict[str, Term] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if line.startswith("#"):
            key, _, value = line[1:].partition(":")
            if key.strip() in _HEADERS and key.strip() not in headers:
                headers[key.strip()] = value.strip()
        elif line.startswith("["):
            try:
                level = Level(line[1:-1])
            except ValueError:
                raise ValueError(f"Line {number}: sections are severe, strong, weak, benign.") from None
        elif line:
            if level is None:
                raise ValueError(f"Line {number}: a term stands before the first section.")
            for term in _terms(line, level, number):
                terms[term.text] = term
                if len(terms) > MAX_TERMS:
                    raise ValueError(f"A list holds at most {MAX_TERMS:,} terms.")
    if missing := [header for header in _HEADERS if not headers.get(header)]:
        raise ValueError(f"The list does not say its {', '.join(missing)}.")
    return TermList(
        name,
        Category(headers["category"]),
        headers["language"],
        headers["source"],
        headers["licence"],
        tuple(terms.values()),
    )


def built_in() -> tuple[TermList, ...]:
    """The lists that come with the service, in the order of their names."""
    return tuple(_files())


def _files() -> Iterator[TermList]:
    for path in sorted(FOLDER.glob("*.txt")):
        yield read_list(path.stem, path.read_text("utf-8"))


def _terms(line: str, level: Level, number: int) -> Iterator[Term]:
    """All terms that a line stands for, one after the other: a line of many choices is never held whole."""
    choices = [choice.split("|") for choice in line.split()]
    for chosen in product(*choices):
        yield _term(" ".join(word for word in chosen if word != "_"), level, number)


def _term(written: str, level: Level, number: int) -> Term:
    if len(written) > MAX_TERM_CHARACTERS:
        raise ValueError(f"Line {number}: a term has at most {MAX_TERM_CHARACTERS} characters.")
    text = " ".join(_WORD.findall(fold(written).text))
    if not text.isascii():
        text = text.replace(" ", "")
    if len(text) < 2:
        raise ValueError(f"Line {number}: a term has at least two letters.")
    if text.count(" ") >= PHRASE_WORDS:
        raise ValueError(f"Line {number}: a term has at most {PHRASE_WORDS} words.")
    return Term(text, level, written.endswith("*"))
