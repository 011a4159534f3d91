"""Bodies and answers of `/admin/v1` as the API's page describes them. Unknown fields of a body are refused."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, Self
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from tenants.access import Role, Scope
from tenants.adaptation import Reason
from tenants.reviews import Verdict
from tenants.risk import Category, Mode


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NewTenant(_Strict):
    """A tenant to make."""

    name: str = Field(
        description="1 to 63 of a-z, 0-9 and inner hyphens; it stays taken until the tenant is purged."
    )
    policy: dict[str, Any] = Field(
        default_factory=dict, description="Fields of its Policy that differ from the defaults."
    )


class NewKey(_Strict):
    """A key to make."""

    role: Role = Field(Role.SEARCH, description="What it is for; no role includes another.")
    name: str | None = Field(None, description="1 to 100 printable characters to tell it by.")
    expires_at: AwareDatetime | None = Field(
        None, description="When it ends, with a time zone; unset: never."
    )
    scopes: list[Scope] | None = Field(
        None, description="Its rights; unset: all that the role may have and you have."
    )
    allowed_cidrs: list[str] = Field(
        default_factory=list, description="Networks that it may be used from; empty: every address."
    )
    limits: dict[str, Any] = Field(default_factory=dict, description="Limits of its own, below the tenant's.")


class KeyChange(_Strict):
    """What to change of a key. What is left out stays."""

    name: str | None = Field(None, description="As in a new key.")
    expires_at: AwareDatetime | None = Field(None, description="A new end; `null` takes the end away.")
    scopes: list[Scope] | None = Field(None, description="All of its rights from now on.")
    allowed_cidrs: list[str] | None = Field(
        None, description="All networks from now on; `[]`: every address."
    )
    limits: dict[str, Any] | None = Field(
        None, description="All limits of its own from now on; `{}`: the tenant's alone."
    )


class Rotation(_Strict):
    """How a key gets a new secret."""

    overlap_s: int = Field(
        86_400,
        ge=0,
        le=30 * 86_400,
        description="Seconds for which the old secret opens the door beside the new one; 0 ends all old ones now.",
    )


class Incident(_Strict):
    """Why something is contained or released. It stands in the log, so no secret belongs in it."""

    reason: str = Field("", max_length=200, description="A sentence for whoever reads the log.")


class Feedback(_Strict):
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


class Rollback(_Strict):
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


class CanaryShape(_Strict):
    """A fixed item that must be stopped, by what it scored."""

    category: Category
    mode: Mode
    name: str = Field(description="1 to 100 printable characters; once in each category and mode.")
    score: float = Field(ge=0, le=1)
    detectors: str = Field(
        max_length=200, description="The version that measured it; it counts for no other."
    )


class CanarySet(_Strict):
    """All canaries from now on."""

    canaries: list[CanaryShape] = Field(max_length=1000)


class TenantAnswer(BaseModel):
    """A tenant. Times are UTC, by the database's clock."""

    id: str
    object: Literal["tenant"]
    name: str
    state: Literal["active", "suspended", "contained", "deleted"] = Field(
        description="Of several the last one: what is deleted is refused even if it was never suspended."
    )
    created_at: datetime
    suspended_at: datetime | None
    contained_at: datetime | None
    deleted_at: datetime | None
    purge_after: datetime | None = Field(description="Until then a deletion can be undone.")


class Setter(BaseModel):
    """Who set something."""

    role: str = Field(description="`operator` for the command line, `ceiling` for what a ceiling lowered.")
    key_id: str | None


class PolicyAnswer(BaseModel):
    """A version of a policy. Its number is also the answer's ETag."""

    object: Literal["policy"]
    tenant: str
    version: int
    set_at: datetime
    set_by: Setter
    policy: dict[str, Any]
    notes: list[str] = Field(description="After a change: what of the present use is above the new limits.")


class CeilingAnswer(BaseModel):
    """A ceiling. Its version is also the answer's ETag; version 0 is before any was set."""

    object: Literal["ceiling"]
    version: int
    set_at: datetime | None
    set_by: Setter
    ceiling: dict[str, Any]
    bounds: dict[str, Any] = Field(description="All that bounds what you may set.")
    lowered: list[str] = Field(description="After a change: the tenants whose policies were above it.")


class KeyAnswer(BaseModel):
    """A key without its secret."""

    id: str
    object: Literal["key"]
    tenant: str
    role: Role
    name: str | None
    state: Literal["active", "expired", "contained", "revoked"]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    revoked_reason: str | None
    contained_at: datetime | None
    scopes: list[Scope]
    allowed_cidrs: list[str]
    limits: dict[str, int]
    last_used_at: datetime | None = Field(description="Some seconds late.")
    last_used_address: str | None


class IssuedKey(KeyAnswer):
    """A key with its text, which is told this once."""

    key: str
    old_ends_at: datetime | None = Field(None, description="After a rotation.")


class UsageDay(BaseModel):
    """What one key used on one day, in UTC."""

    day: str
    key_id: str
    requests: int
    images: int
    tokens: int
    refused: int
    shadowed: int


class SessionOf(BaseModel):
    """An open session of a tenant."""

    id: str
    object: Literal["session"]
    created_at: datetime
    expires_at: datetime
    ends_at: datetime
    ttl_s: int
    last_used_at: datetime | None
    requests: int


class WorkerAnswer(BaseModel):
    """A worker process, as its gateway told of it some seconds ago."""

    object: Literal["worker"]
    gateway: str
    pid: int
    state: Literal["assigned"]
    tenant: str
    running: int = Field(description="Jobs at it now.")
    jobs: int = Field(description="Jobs that it has answered.")
    since: datetime = Field(description="When it was given to its tenant.")
    reported_at: datetime


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


class Page(BaseModel):
    object: Literal["list"]
    has_more: bool
    next_cursor: str | None = Field(description="For `cursor` of the next request; `null` on the last page.")


class TenantPage(Page):
    data: list[TenantAnswer]


class PolicyPage(Page):
    data: list[PolicyAnswer]


class KeyPage(Page):
    data: list[KeyAnswer]


class UsagePage(Page):
    data: list[UsageDay]


class SessionPage(Page):
    data: list[SessionOf]


class WorkerPage(Page):
    data: list[WorkerAnswer]


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


BODIES: tuple[type[BaseModel], ...] = (
    NewTenant,
    NewKey,
    KeyChange,
    Rotation,
    Incident,
    Feedback,
    Rollback,
    CanarySet,
)
"""Read by ourselves, so the framework does not know them."""
