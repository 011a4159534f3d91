"""The fields of a Policy that are objects by category: their form, their checks, and the actions that are default."""

from __future__ import annotations

from typing import Any

from tenants.risk import Action, Category

MOST_WORDS = 1_000
"""Of a tenant's own lexicons, all categories together."""
WORD_CHARACTERS = (2, 64)

DEFAULT_ACTIONS: dict[Category, Action] = {
    **dict.fromkeys(Category, Action.MASK),
    Category.INJECTION: Action.FLAG,
    Category.CODE: Action.FLAG,
}
"""What is done with a document. Masked, not refused: one bad candidate must not deny a search to whoever asked. Text
about injection and code in documentation are what many a document is about: they are told and stay."""

FORMS: dict[str, str] = {
    "risk_thresholds": f"must be an object of categories ({', '.join(Category)}), each with a number from 0 to 1",
    "risk_actions": f"must be an object of categories ({', '.join(Category)}), each with one of {', '.join(Action)}",
    "lexicons": (
        f"must be an object of categories ({', '.join(Category)}), each with a list of words or phrases of"
        f" {WORD_CHARACTERS[0]} to {WORD_CHARACTERS[1]} printable characters, two letters or digits among them, at most"
        f" {MOST_WORDS} in all, none of them twice"
    ),
}
"""Each field, and what is said where it has not this form."""


def native_risk(name: str, value: Any) -> Any:
    """A JSON object as pairs, with enums where their values stand; the checks say what is wrong with any other."""
    if not isinstance(value, dict):
        return value
    return tuple(
        (
            Category(key) if key in set(Category) else key,
            Action(each)
            if name == "risk_actions" and isinstance(each, str) and each in set(Action)
            else tuple(each)
            if isinstance(each, list)
            else each,
        )
        for key, each in value.items()
    )


def are_thresholds(value: object) -> bool:
    return _are_pairs(value, _is_score)


def are_actions(value: object) -> bool:
    return _are_pairs(value, lambda each: isinstance(each, Action))


def are_lexicons(value: object) -> bool:
    if not _are_pairs(value, lambda words: isinstance(words, tuple) and all(map(_is_word, words))):
        return False
    assert isinstance(value, tuple)
    return (
        all(len(set(words)) == len(words) for _, words in value)
        and sum(len(words) for _, words in value) <= MOST_WORDS
    )


def _are_pairs(value: object, is_right: Any) -> bool:
    return (
        isinstance(value, tuple)
        and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value)
        and all(isinstance(category, Category) and is_right(each) for category, each in value)
        and len({category for category, _ in value}) == len(value)
    )


def _is_score(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_word(value: object) -> bool:
    least, most = WORD_CHARACTERS
    return (
        isinstance(value, str)
        and least <= len(value) <= most
        and value.isprintable()
        and sum(map(str.isalnum, value)) >= 2
        and value == value.strip()
    )
