"""What kind of users a tenant has, the filter mode that is recommended for them, and how closely content is looked at.

Values only: who judges content compares a category's score, calibrated to 0..1, with the threshold from here.
"""

from __future__ import annotations

from enum import StrEnum


class FilterMode(StrEnum):
    """How much risk a tenant's content may carry."""

    STRICT = "strict"
    MODERATE = "moderate"
    LENIENT = "lenient"

    @property
    def threshold(self) -> float:
        """The score from which on content is stopped, for every category without a threshold of its own."""
        return _THRESHOLDS[self]


class Kind(StrEnum):
    """The kind of users that a tenant serves. It recommends; the Policy decides."""

    ENTERPRISE = "enterprise"
    EDUCATION = "education"
    RESEARCH = "research"
    DEFAULT = "default"

    @property
    def recommended(self) -> FilterMode:
        return _RECOMMENDED[self]


class MissingDetectors(StrEnum):
    """What becomes of an item that a detector should have looked at and could not."""

    REFUSE = "refuse"
    """Its request is refused."""
    JUDGE = "judge"
    """It is judged by what is left, below the moderate threshold, and flagged."""


class ImageText(StrEnum):
    """Whether text in images is read, to be screened as any text."""

    OFF = "off"
    GATED = "gated"
    """Where edges say that there may be text; of a page full of it, the largest lines."""
    STRICT = "strict"
    """In every image, and once more with its contrast stretched, for text that is all but invisible. Where there is too
    much to read, its detector has failed."""


class AskModel(StrEnum):
    """Whether the tenant's own worker is asked what an image shows."""

    OFF = "off"
    GREY = "grey"
    """Where the detectors are neither sure that it is harmless nor that it is not."""
    ALWAYS = "always"


_THRESHOLDS = {FilterMode.STRICT: 0.3, FilterMode.MODERATE: 0.6, FilterMode.LENIENT: 0.8}
_RECOMMENDED = {
    Kind.ENTERPRISE: FilterMode.STRICT,
    Kind.EDUCATION: FilterMode.MODERATE,
    Kind.RESEARCH: FilterMode.LENIENT,
    Kind.DEFAULT: FilterMode.MODERATE,
}
