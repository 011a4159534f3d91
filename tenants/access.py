"""Who calls: a key's text, a token or a certificate → `Caller`.

What was found of a key or an identity is kept for at most `kept.KEPT_S` seconds, counted from before it was read, so
a revocation, a suspension or a new policy is in force everywhere within that time whatever happens; a gateway
that listens (`tenants.changes`) forgets at once. `TenantId` is minted here, in `directory.py`, `keys.py` and
`lifecycle.py`, nowhere else.
"""

from __future__ import annotations

import hmac
import ipaddress
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, NewType
from uuid import UUID

from tenants.adaptation import NOTHING, Adapted
from tenants.errors import KeyUnknown, TenantSuspended
from tenants.kept import Kept
from tenants.key_limits import NO_LIMITS, KeyLimits
from tenants.key_text import PEPPER_BYTES, PEPPER_VERSION, Plane, digest_secret, parse_key
from tenants.policy import Policy

if TYPE_CHECKING:
    from asyncpg import Record

    from tenants.database import Database

TenantId = NewType("TenantId", UUID)
INSTALLATION = TenantId(UUID(int=0))
"""Whose rows are the installation's own. No tenant has it: a tenant's id is random."""


class Role(StrEnum):
    """What a caller is for. One role a key; none includes another."""

    SEARCH = "search"
    TENANT_ADMIN = "tenant_admin"
    AUDITOR = "auditor"
    PLATFORM_ADMIN = "platform_admin"


class Scope(StrEnum):
    """One right of a caller. Which ones a role may have at most, `ROLE_SCOPES` says."""

    RERANK = "rerank"
    SESSIONS = "sessions"
    USAGE = "usage"
    KEYS = "keys"
    POLICY = "policy"
    CONTAIN = "contain"
    AUDIT = "audit"
    TENANTS = "tenants"
    METRICS = "metrics"


class Means(StrEnum):
    """How a caller proved who it is."""

    KEY = "key"
    JWT = "jwt"
    MTLS = "mtls"


ROLE_SCOPES: Mapping[Role, frozenset[Scope]] = MappingProxyType(
    {
        Role.SEARCH: frozenset({Scope.RERANK, Scope.SESSIONS, Scope.USAGE}),
        Role.TENANT_ADMIN: frozenset(
            {Scope.RERANK, Scope.SESSIONS, Scope.USAGE, Scope.KEYS, Scope.POLICY, Scope.CONTAIN}
        ),
        Role.AUDITOR: frozenset({Scope.AUDIT, Scope.USAGE}),
        Role.PLATFORM_ADMIN: frozenset(Scope),
    }
)
"""The scopes of a role at most. An administrator's `rerank` and `sessions` are there to be handed on to the keys
that it makes: no key has a scope that its creator lacks, and no role works on the other plane."""


def plane_of(role: Role) -> Plane:
    """Where a role works: search on the data plane, everyone else on the admin plane."""
    return Plane.DATA if role is Role.SEARCH else Plane.ADMIN


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: proven by a key, a token or a certificate, as of the moment `authenticate` returned it."""

    tenant: TenantId
    tenant_name: str
    key_id: str
    """The key's id; of a token `jwt:` and its issuer's name, of a certificate `mtls:` and its entry's name."""
    role: Role
    policy: Policy
    key_limits: KeyLimits = NO_LIMITS
    scopes: frozenset[Scope] = frozenset()
    means: Means = Means.KEY
    subject: str = ""
    """Of a token its `sub`, of a certificate the name that was mapped; empty for a key."""
    adapted: Adapted = NOTHING
    """What the tenant's thresholds have learnt; `tenants.adaptation.effective` reads it with the policy."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a verified token or certificate speaks for; whether that holds, the database says."""

    means: Means
    name: str
    """Of the issuer, or of the certificate's entry, as the configuration calls it."""
    tenant_name: str
    role: Role
    scopes: frozenset[Scope]
    subject: str
    jti: str
    """What a deny-list knows it by: the token's id, or the certificate's SHA-256."""

    @property
    def key_id(self) -> str:
        return f"{self.means}:{self.name}"


class Access:
    """Tells who holds a key, or whom a verified identity speaks for."""

    def __init__(
        self,
        database: Database,
        *,
        pepper: bytes,
        kept_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`kept_s`: seconds for which what was read may serve again; 0 asks the database each time."""
        if len(pepper) < PEPPER_BYTES:
            raise ValueError(f"the pepper must be at least {PEPPER_BYTES} bytes")
        self._database = database
        self._pepper = pepper
        self._found: Kept[list[Record]] = Kept(kept_s, clock)

    async def authenticate(self, token: str, *, plane: Plane = Plane.DATA, address: str = "") -> Caller:
        """The caller that the key `token` proves on that plane, from that address. At most one read, no write.

        Raises `KeyMalformed` (no database was asked), `KeyUnknown` (unknown, wrong secret, of the other plane,
        revoked, expired, from an address that is not allowed: the same message, the same work), `TenantSuspended`,
        `DatabaseUnavailable`.
        """
        form, key_id, secret = parse_key(token)
        given = digest_secret(self._pepper, secret)
        rows, age_s = await self._found.get(("key", key_id), lambda: self._read_key(key_id))
        if not rows:
            hmac.compare_digest(given, bytes(len(given)))  # an unknown id costs what a wrong secret costs
            raise KeyUnknown(reason="unknown")
        matching = [
            row
            for row in rows
            if hmac.compare_digest(given, row["secret_digest"]) and row["pepper_version"] == PEPPER_VERSION
        ]
        row = rows[0]
        tenant = TenantId(row["tenant_id"])

        def refused(reason: str) -> KeyUnknown:
            return KeyUnknown(reason=reason, tenant=tenant, key_id=key_id)

        if not matching:
            raise refused("wrong_secret")
        if row["kind"] != form or form != plane:
            raise refused("plane")
        if row["revoked"]:
            raise refused("revoked")
        if _is_over(row["expires_in_s"], age_s):
            raise refused("expired")
        if all(_is_over(match["secret_expires_in_s"], age_s) for match in matching):
            raise refused("rotated")
        if not _is_allowed(address, row["allowed_cidrs"]):
            raise refused("address")
        if row["suspended"]:
            raise TenantSuspended(tenant=tenant, key_id=key_id)
        role = Role(row["role"])
        return Caller(
            tenant,
            row["tenant_name"],
            key_id,
            role,
            Policy.from_json(row["policy"]),
            KeyLimits.from_json(row["limits"]),
            frozenset(map(Scope, row["scopes"])) & ROLE_SCOPES[role],
            adapted=Adapted.from_json(row["adapted"]),
        )

    async def admit(self, identity: Identity, *, plane: Plane) -> Caller:
        """The caller that a verified identity speaks for on that plane. At most one read, no write.

        Raises `KeyUnknown` (of the other plane, denied, no such tenant), `TenantSuspended`, `DatabaseUnavailable`.
        """
        asked = (identity.tenant_name, f"{identity.means}:{identity.name}", identity.jti)
        rows, _ = await self._found.get(("identity", *asked), lambda: self._read_identity(asked))
        if not rows:
            raise KeyUnknown(reason="no_tenant")
        row = rows[0]
        tenant = TenantId(row["tenant_id"])
        if plane_of(identity.role) != plane:
            raise KeyUnknown(reason="plane", tenant=tenant, key_id=identity.key_id)
        if row["denied"]:
            raise KeyUnknown(reason="denied", tenant=tenant, key_id=identity.key_id)
        if row["suspended"]:
            raise TenantSuspended(tenant=tenant, key_id=identity.key_id)
        return Caller(
            tenant,
            row["tenant_name"],
            identity.key_id,
            identity.role,
            Policy.from_json(row["policy"]),
            scopes=identity.scopes & ROLE_SCOPES[identity.role],
            means=identity.means,
            subject=identity.subject,
            adapted=Adapted.from_json(row["adapted"]),
        )

    def forget(self, change: str) -> None:
        """Read anew what a change told by the database is about: `key:` and an id, or `tenant:` and an id."""
        what, _, which = change.partition(":")
        if what == "key":
            self._found.drop(lambda asked, _rows: asked == ("key", which))
        else:
            # An unknown name may be this tenant's, just made.
            self._found.drop(lambda _asked, rows: not rows or str(rows[0]["tenant_id"]) == which)

    def forget_all(self) -> None:
        """Read everything anew: changes may have been missed."""
        self._found.drop(lambda _asked, _rows: True)

    async def _read_key(self, key_id: str) -> list[Record]:
        return await self._database.call("select * from pericarp.find_key($1)", key_id)

    async def _read_identity(self, asked: tuple[str, str, str]) -> list[Record]:
        return await self._database.call("select * from pericarp.find_identity($1, $2, $3)", *asked)


def _is_over(in_s: float | None, age_s: float) -> bool:
    """Whether a time that was `in_s` seconds away, `age_s` seconds ago, has come."""
    return (math.inf if in_s is None else in_s) <= age_s


def _is_allowed(address: str, allowed: Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network]) -> bool:
    """Whether a key with that list may be used from there; an empty list allows every address, also none."""
    if not allowed:
        return True
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return any(found in network for network in allowed)
