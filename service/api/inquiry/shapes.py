"""Queries, bodies and answers of `/audit/v1` as the API's page describes them. Unknown fields are refused."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal, Self
from uuid import UUID

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from service.exports import FORMS
from tenants.audit import Decision
from tenants.risk import Action, Category
from tenants.search import LEAST_RISK, Filter

WORD = r"^[\x21-\x7e]{1,200}$"
MOST = 1000
FIRST, LAST = datetime(1970, 1, 1, tzinfo=UTC), datetime(9000, 1, 1, tzinfo=UTC)
"""Times that every time zone can tell."""


class Filters(BaseModel):
    """Which entries: all that is set holds of each of them."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    since: AwareDatetime | None = Field(
        None,
        alias="from",
        ge=FIRST,
        lt=LAST,
        description="Recorded then or later, by the database's clock; with a time zone.",
    )
    until: AwareDatetime | None = Field(
        None, alias="to", ge=FIRST, lt=LAST, description="Recorded before then."
    )
    last_days: int | None = Field(
        None, ge=1, le=36_500, description="Recorded within so many times 24 hours of now."
    )
    tenant: UUID | None = Field(
        None, description="Of that tenant alone. For platform keys; an auditor's may name its own."
    )
    actor: str | None = Field(
        None, pattern=WORD, description="The id of the key, or `jwt:NAME`, `mtls:NAME`."
    )
    operation: str | None = Field(
        None, pattern=WORD, description="As entries call it: `rerank`, `admin.contain`."
    )
    decision: Decision | None = Field(None, description="What became of the request.")
    action: Action | None = Field(None, description="The hardest that screening did.")
    category: Category | None = Field(
        None, description=f"Whose highest score is above `risk_above`, or at least {LEAST_RISK}."
    )
    risk_above: float | None = Field(
        None, ge=LEAST_RISK, lt=1, description="The highest score is above it; without `category`, of any."
    )
    request_id: UUID | None = Field(None, description="`X-Request-Id` of the answer.")
    session: str | None = Field(None, pattern=WORD, description="A session's id.")
    fingerprint: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_-]{43}$", description="Of a text or image, as an entry has it."
    )

    @field_validator("until")
    @classmethod
    def _comes_later(cls, until: AwareDatetime | None, told: ValidationInfo) -> AwareDatetime | None:
        since = told.data.get("since")
        if since is not None and until is not None and until <= since:
            raise PydanticCustomError("range", "must be later than from")
        return until

    def filter(self) -> Filter:
        """The same for `tenants.search`."""
        return Filter(
            since=self.since,
            until=self.until,
            last_days=self.last_days,
            key_id=self.actor,
            operation=self.operation,
            decision=self.decision,
            action=self.action,
            session=self.session,
            request_id=self.request_id,
            category=self.category,
            risk_above=self.risk_above,
            fingerprint=self.fingerprint,
        )


class Wanted(Filters):
    """Which entries; a saved search may say it in part."""

    search: str | None = Field(
        None, max_length=63, description="The name of a saved search; what is set beside it counts instead."
    )


class WantedPage(Wanted):
    """A page of entries."""

    limit: int = Field(100, ge=1, le=MOST, description="Entries on a page.")
    cursor: str | None = Field(None, max_length=1000, description="`next_cursor` of the page before.")


class WantedExport(Wanted):
    """Entries as a file."""

    format: str = Field("jsonl", description=f"{', '.join(f'`{form}`' for form in FORMS)}.")


class InputShape(BaseModel):
    """A text, or an image."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    text: str | None = Field(None, description="In any Unicode normal form; else exactly as it was sent.")
    image: str | None = Field(
        None, description="The file that was sent, byte for byte: a `data:` URL or bare base64."
    )

    @model_validator(mode="after")
    def _is_one_thing(self) -> Self:
        if (self.text is None) == (self.image is None):
            raise PydanticCustomError("one_of", "must have either a text or an image")
        return self


class EntrySearch(WantedPage):
    """A page of entries, by what was sent as well."""

    input: InputShape | None = Field(None, description="A text or image that the entry tells of.")

    @field_validator("input")
    @classmethod
    def _is_looked_for_once(cls, looked_for: InputShape | None, told: ValidationInfo) -> InputShape | None:
        if looked_for is not None and told.data.get("fingerprint") is not None:
            raise PydanticCustomError("twice", "is the same filter as fingerprint; send one of them")
        return looked_for


class NewSearch(BaseModel):
    """A search to save."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="1 to 63 of a-z, 0-9 and inner hyphens.")
    filters: Filters = Field(description="As in a query; an input only as its `fingerprint`.")


class SearchAnswer(BaseModel):
    """A saved search."""

    object: Literal["search"]
    name: str
    filters: dict[str, Any]
    saved_at: AwareDatetime
    saved_by: str | None = Field(description="The key's id.")


class SearchList(BaseModel):
    """The saved searches of the caller's tenant, by name."""

    object: Literal["list"]
    data: list[SearchAnswer]


class EntryAnswer(BaseModel):
    """An entry as it stands in the log."""

    object: Literal["entry"]
    id: UUID = Field(description="The receipt of the answer, in `Pericarp-Receipt`.")
    tenant: UUID
    recorded_at: AwareDatetime = Field(description="By the database's clock; entries are in this order.")
    schema_version: int
    body: dict[str, Any] = Field(description="The entry: its bytes as they were hashed are this JSON.")


class EntryPage(BaseModel):
    """A page of entries, newest first."""

    object: Literal["list"]
    data: list[EntryAnswer]
    has_more: bool
    next_cursor: str | None


class FoundPage(EntryPage):
    """A page of entries, and by what fingerprint the input was looked for."""

    fingerprint: str | None = Field(description="Of `input`, where one tenant was asked; else `null`.")


class DayCount(BaseModel):
    """How many entries of one day, operation and decision."""

    day: str = Field(description="In UTC.")
    operation: str
    decision: str
    count: int


class CountsAnswer(BaseModel):
    """How many entries, newest day first."""

    object: Literal["counts"]
    total: int
    data: list[DayCount]


BODIES: tuple[type[BaseModel], ...] = (EntrySearch, NewSearch)
"""Read by ourselves, so the framework does not know them."""
