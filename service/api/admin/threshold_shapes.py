"""Bodies and answers of thresholds and feedback, as the API's page describes them."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, Self
from uuid import UUID

from pydantic import BaseModel, Field, model_validator

from service.api.admin.shapes import Page, Setter, Strict
from tenants.adaptation import Reason
from tenants.reviews import Verdict
from tenants.risk import Category, Mode


class Feedback(Strict):
    """A reviewer's decision on an item, or an appeal that asks for one."""

    entry: UUID = Field(description="The receipt of the decision that the item was part of.")
    item: str = Field(min_length=1, max_length=64, description="Its place: `query`, `documents[3]`.")
    category: Category
    mode: Mode = Field(description="Its text or its image.")
    kind: Literal["label", "appeal"] = "label"
    verdict: Verdict | None = Field(
        None, description="Of a label; an appeal has none, a reviewer decides it."
    )

    @model_validator(mode="after")
    def _has_its_verdict(self) -> Self:
        if (self.kind == "label") == (self.verdict is None):
            raise ValueError("a label needs a verdict, and an appeal has none")
        return self


class Rollback(Strict):
    """Which thresholds go back."""

    category: Category | None = Field(None, description="Unset: all.")
    mode: Mode | None = Field(None, description="Unset: both.")
    version: int | None = Field(
        None, ge=1, description="To what it was after that change; unset: to the policy's own threshold."
    )

    @model_validator(mode="after")
    def _names_whose_version(self) -> Self:
        if self.version is not None and (self.category is None or self.mode is None):
            raise ValueError("a version needs its category and mode")
        return self


class CanaryShape(Strict):
    """A fixed item that must be stopped, by what it scored."""

    category: Category
    mode: Mode
    name: str = Field(description="1 to 100 printable characters; once in each category and mode.")
    score: float = Field(ge=0, le=1)
    detectors: str = Field(
        max_length=200, description="The version that measured it; it counts for no other."
    )


class CanarySet(Strict):
    """All canaries from now on."""

    canaries: list[CanaryShape] = Field(max_length=1000)


class ThresholdChange(BaseModel):
    """One change of a threshold."""

    object: Literal["threshold_change"]
    category: Category
    mode: Mode
    version: int
    changed_at: datetime
    before: float
    after: float
    anchor: float
    reason: Reason
    frozen: str = Field(description="Why it stands still from then on; empty: it does not.")
    evidence: dict[str, Any] = Field(
        description="`votes`, `harmful` of them, `aim`, and the canaries' `recall_before` and `recall_after`."
    )
    set_by: Setter


class ThresholdAnswer(BaseModel):
    """A threshold as it is now."""

    object: Literal["threshold"]
    category: Category
    mode: Mode
    threshold: float = Field(description="In force.")
    anchor: float = Field(description="The policy's own.")
    least: float | None = Field(description="How low it may become; `null`: it does not move.")
    most: float | None
    frozen: str
    version: int = Field(description="Of its last change; 0: it never changed.")


class ReviewAnswer(BaseModel):
    """An item that may be judged, or is. Its score is not told: who judges shall not lean on it."""

    object: Literal["review"]
    entry: UUID
    item: str
    category: Category
    mode: Mode
    stopped: bool
    drawn: bool = Field(description="At random; else it was stopped, and may be appealed.")
    screened_at: datetime
    appealed_at: datetime | None
    verdict: Verdict | None
    decided_at: datetime | None
    decided_by: Setter | None
    votes: bool = Field(
        description="Whether the verdict counts: the first of an end user, day, category and mode."
    )


class DecidedReview(ReviewAnswer):
    """A review after feedback on it."""

    change: ThresholdChange | None = Field(description="What it made stricter at once.")


class ReviewPage(Page):
    data: list[ReviewAnswer]


class ChangePage(Page):
    data: list[ThresholdChange]


class ThresholdsAnswer(BaseModel):
    """Every threshold, and a page of their history."""

    object: Literal["thresholds"]
    tenant: str
    thresholds: list[ThresholdAnswer]
    history: ChangePage = Field(description="Newest first.")


class RolledBack(BaseModel):
    """What a rollback changed; what was there already is not in it."""

    object: Literal["list"]
    data: list[ThresholdChange]


class CanariesAnswer(BaseModel):
    """The canaries of a tenant."""

    object: Literal["list"]
    data: list[CanaryShape]


BODIES: tuple[type[BaseModel], ...] = (Feedback, Rollback, CanarySet)
"""Read by ourselves, so the framework does not know them."""
