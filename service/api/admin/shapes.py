"""Bodies and answers of `/admin/v1` as the API's page describes them. Unknown fields of a body are refused."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from tenants.access import Role, Scope


class Strict(BaseModel):
    """A body: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class NewTenant(Strict):
    """A tenant to make."""

    name: str = Field(
        description="1 to 63 of a-z, 0-9 and inner hyphens; it stays taken until the tenant is purged."
    )
    policy: dict[str, Any] = Field(
        default_factory=dict, description="Fields of its Policy that differ from the defaults."
    )


class NewKey(Strict):
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


class KeyChange(Strict):
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


class Rotation(Strict):
    """How a key gets a new secret."""

    overlap_s: int = Field(
        86_400,
        ge=0,
        le=30 * 86_400,
        description="Seconds for which the old secret opens the door beside the new one; 0 ends all old ones now.",
    )


class TokenDenial(Strict):
    """A token, or a client certificate, that is to be refused."""

    issuer: str = Field(
        min_length=1,
        max_length=256,
        description="`jwt:NAME` of an issuer in the configuration, or `mtls:NAME` of a certificate's entry.",
    )
    jti: str = Field(
        min_length=1,
        max_length=256,
        description="The token's `jti`, or the certificate's SHA-256 in lower-case hex.",
    )


class Incident(Strict):
    """Why something is contained or released. It stands in the log, so no secret belongs in it."""

    reason: str = Field("", max_length=200, description="A sentence for whoever reads the log.")


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
    contained_until: datetime | None = Field(
        description="When a rule's containment ends by itself; null: somebody has to."
    )
    scopes: list[Scope]
    allowed_cidrs: list[str]
    limits: dict[str, int]
    last_used_at: datetime | None = Field(description="Some seconds late.")
    last_used_address: str | None


class IssuedKey(KeyAnswer):
    """A key with its text, which is told this once."""

    key: str
    old_ends_at: datetime | None = Field(None, description="After a rotation.")


class DeniedToken(BaseModel):
    """A token or a client certificate that is refused although it is valid."""

    object: Literal["denied_token"]
    issuer: str
    jti: str
    denied_at: datetime
    until: datetime


class DeniedTokens(BaseModel):
    object: Literal["list"]
    data: list[DeniedToken]


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


BODIES: tuple[type[BaseModel], ...] = (
    NewTenant,
    NewKey,
    KeyChange,
    Rotation,
    TokenDenial,
    Incident,
)
"""Read by ourselves, so the framework does not know them."""
