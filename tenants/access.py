"""API keys, and who calls: a key's text → `Caller`.

A key reads `prc_live_` + 12 characters of key id + `_` + 43 of secret (256 bits) + 6 of CRC32 over all before
it, in base62. The checksum is checked before any database is asked; only HMAC-SHA-256(pepper, secret) is
stored. `TenantId` is minted here and in `directory.py`, nowhere else.
"""

from __future__ import annotations

import hmac
import re
import secrets
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, NewType
from uuid import UUID

from tenants.errors import KeyMalformed, KeyUnknown, TenantSuspended
from tenants.key_limits import NO_LIMITS, KeyLimits
from tenants.policy import Policy

if TYPE_CHECKING:
    from tenants.database import Database

BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
KEY_PREFIX = "prc_live_"
KEY_ID_LENGTH = 12
SECRET_LENGTH = 43
CHECKSUM_LENGTH = 6
KEY_PATTERN = re.compile(
    r"(?P<head>prc_live_(?P<id>[0-9A-Za-z]{12})_(?P<secret>[0-9A-Za-z]{43}))(?P<crc>[0-9A-Za-z]{6})"
)
"""What a leak scanner looks for; `parse_key` checks the checksum as well."""
PEPPER_VERSION = 1
PEPPER_BYTES = 32

TenantId = NewType("TenantId", UUID)


class Role(StrEnum):
    """What a caller is for. One role a key; none includes another."""

    SEARCH = "search"
    TENANT_ADMIN = "tenant_admin"
    AUDITOR = "auditor"
    PLATFORM_ADMIN = "platform_admin"


class Plane(StrEnum):
    """Which half of the surface a path belongs to. A role works on one of them and is unknown on the other."""

    DATA = "data"
    """Rerank, sessions, usage, models."""
    ADMIN = "admin"
    """`/admin/…` and `/metrics`."""


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


class Access:
    """Tells who holds a key. Keeps nothing: a revocation is in force for the next call."""

    def __init__(self, database: Database, *, pepper: bytes) -> None:
        if len(pepper) < PEPPER_BYTES:
            raise ValueError(f"the pepper must be at least {PEPPER_BYTES} bytes")
        self._database = database
        self._pepper = pepper

    async def authenticate(self, token: str) -> Caller:
        """The caller that `token` proves. One read, no write; cancel-safe.

        Raises `KeyMalformed` (no database was asked), `KeyUnknown` (unknown, wrong secret, revoked, expired:
        the same message, the same work), `TenantSuspended`, `DatabaseUnavailable`.
        """
        key_id, secret = parse_key(token)
        given = digest_secret(self._pepper, secret)
        rows = await self._database.call("select * from pericarp.find_key($1)", key_id)
        if not rows:
            hmac.compare_digest(given, bytes(len(given)))  # an unknown id costs what a wrong secret costs
            raise KeyUnknown(reason="unknown")
        matching = [
            row
            for row in rows
            if hmac.compare_digest(given, row["secret_digest"]) and row["pepper_version"] == PEPPER_VERSION
        ]
        tenant = TenantId(rows[0]["tenant_id"])
        if not matching:
            raise KeyUnknown(reason="wrong_secret", tenant=tenant, key_id=key_id)
        row = matching[0]
        if row["revoked"]:
            raise KeyUnknown(reason="revoked", tenant=tenant, key_id=key_id)
        if row["expired"] or all(match["secret_expired"] for match in matching):
            raise KeyUnknown(reason="expired", tenant=tenant, key_id=key_id)
        if row["suspended"]:
            raise TenantSuspended(tenant=tenant, key_id=key_id)
        return Caller(
            tenant,
            row["tenant_name"],
            key_id,
            Role(row["role"]),
            Policy.from_json(row["policy"]),
            scopes=ROLE_SCOPES[Role(row["role"])],
        )


def make_key() -> tuple[str, str, str]:
    """A new key: its id, its secret, and the text that the tenant gets, once."""
    key_id = random_base62(KEY_ID_LENGTH)
    secret = random_base62(SECRET_LENGTH)
    head = f"{KEY_PREFIX}{key_id}_{secret}"
    return key_id, secret, head + checksum(head)


def parse_key(token: str) -> tuple[str, str]:
    """Key id and secret of a key's text. Raises `KeyMalformed` for a wrong shape or checksum."""
    match = KEY_PATTERN.fullmatch(token)
    if match is None or checksum(match["head"]) != match["crc"]:
        raise KeyMalformed
    return match["id"], match["secret"]


def checksum(head: str) -> str:
    """CRC32 in six base62 digits. It finds typos and random probes; it proves nothing."""
    rest = zlib.crc32(head.encode())
    digits = []
    for _ in range(CHECKSUM_LENGTH):
        rest, digit = divmod(rest, len(BASE62))
        digits.append(BASE62[digit])
    return "".join(reversed(digits))


def digest_secret(pepper: bytes, secret: str) -> bytes:
    """What is stored of a secret. Worthless without the pepper, which is kept outside the database."""
    return hmac.digest(pepper, secret.encode(), "sha256")


def random_base62(length: int) -> str:
    """`length` characters that nobody guesses, 5.95 bits each."""
    return "".join(secrets.choice(BASE62) for _ in range(length))
