"""The closed lists of what content is screened for, and of what may be done about it.

Names only: a Policy says by category what may stand, screening measures, and the entry of a decision repeats them.
"""

from __future__ import annotations

from enum import StrEnum


class Category(StrEnum):
    """What a risk is of. Part of the API."""

    SEXUAL = "sexual"
    VIOLENCE = "violence"
    GORE = "gore"
    WEAPONS = "weapons"
    DRUGS = "drugs"
    HATE = "hate"
    ILLEGAL = "illegal"
    INJECTION = "injection"
    """Text that speaks to the model about ranking, scores or roles instead of saying something."""
    CODE = "code"
    """SQL, HTML or paths that look like an attack on whoever stores or shows the text."""


class Action(StrEnum):
    """What is done about an item, from the mildest to the hardest."""

    ALLOW = "allow"
    FLAG = "flag"
    """It stays, and the answer says so."""
    DEMOTE = "demote"
    """It stays, behind every document that does not, and the answer says so."""
    MASK = "mask"
    """The document is left out of the ranking, the rest is ranked, and the answer says so."""
    REFUSE = "refuse"
    """The request is refused."""


class Mode(StrEnum):
    """Of what an item is made."""

    TEXT = "text"
    IMAGE = "image"
