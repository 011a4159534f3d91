"""Sentences about groups of people, written for this project: neutral ones, and hostile ones that name the same groups.

A classifier that sees groups named in hostile posts alone takes the name for the insult. Each group is named here in many
more neutral sentences than hostile ones, so that what is said counts and not of whom. The sentences are in the file beside.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

FILE = Path(__file__).with_suffix(".txt")
REPEATED = 10
"""A sentence that names no group counts as often as one about ten groups."""


def neutral_sentences() -> Iterator[tuple[str, str]]:
    """Language and sentence of every neutral one."""
    sections = _read()
    for groups in ("en", "en-one", "zh"):
        yield from _fill(sections, "neutral", groups)
    for _ in range(REPEATED):
        for language in ("en", "zh"):
            yield from ((language, sentence) for sentence in sections[f"alone {language}"])


def hostile_sentences() -> Iterator[tuple[str, str]]:
    """Language and sentence of every hostile one."""
    sections = _read()
    for groups in ("en", "en-one", "zh"):
        yield from _fill(sections, "hostile", groups)


def _fill(sections: dict[str, list[str]], kind: str, groups: str) -> Iterator[tuple[str, str]]:
    for sentence in sections[f"{kind} {groups}"]:
        for group in sections[f"groups {groups}"]:
            yield groups[:2], sentence.replace("*", group)


def _read() -> dict[str, list[str]]:
    sections: dict[str, list[str]] = {}
    for line in FILE.read_text("utf-8").splitlines():
        if line.startswith("["):
            entries = sections.setdefault(line[1:-1], [])
        elif line and not line.startswith("#"):
            entries.append(line)
    return sections
