"""What kind of users a tenant has, and the filter mode that is recommended for them.

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


_THRESHOLDS = {FilterMode.STRICT: 0.3, FilterMode.MODERATE: 0.6, FilterMode.LENIENT: 0.8}
_RECOMMENDED = {
    Kind.ENTERPRISE: FilterMode.STRICT,
    Kind.EDUCATION: FilterMode.MODERATE,
    Kind.RESEARCH: FilterMode.LENIENT,
    Kind.DEFAULT: FilterMode.MODERATE,
}
