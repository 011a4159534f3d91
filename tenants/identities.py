"""Whose tokens and certificates are believed, and whom they speak for: one TOML file, read once, refused whole.

    [[issuer]]                                  # an OpenID Connect provider
    name = "corp"                               # in key ids and the log: jwt:corp
    issuer = "https://login.example.com/"       # `iss`, compared as it stands
    audience = ["pericarp"]
    algorithms = ["RS256"]                      # asymmetric ones alone
    keys_url = "https://login.example.com/keys" # or keys_file = "…"; keys_ca = "…" for a CA of your own
    tenant_claim = "org"                        # or tenant = "acme"
    tenants = { "org-17" = "acme" }             # unset: the claim is a tenant's name
    role_claim = "groups"                       # or role = "search"
    roles = { "searchers" = "search" }          # the first that the token has, for the plane that is asked

    [[certificate]]
    name = "backend"                            # mtls:backend
    uri = "spiffe://example.org/backend"        # or dns = "backend.example.org"
    tenant = "acme"
    role = "search"

Pure: nothing is fetched here.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tenants.access import ROLE_SCOPES, Role, Scope
from tenants.errors import InvalidIdentities

NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")
ALGORITHMS = frozenset(
    {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}
)
LONGEST_LIFETIME_S = 86_400
LONGEST_LEEWAY_S = 300


@dataclass(frozen=True, slots=True)
class Issuer:
    """One provider of tokens."""

    name: str
    issuer: str
    audience: tuple[str, ...]
    algorithms: frozenset[str]
    keys_file: str | None = None
    keys_url: str | None = None
    keys_ca: str | None = None
    tenant: str | None = None
    tenant_claim: str | None = None
    tenants: Mapping[str, str] | None = None
    role: Role | None = None
    role_claim: str | None = None
    roles: Mapping[str, Role] = field(default_factory=dict)
    scopes: frozenset[Scope] = frozenset(Scope)
    """At most; what the role may not have is not granted by it."""
    types: frozenset[str] = frozenset({"jwt", "at+jwt"})
    """Values of `typ`, in lower case and without `application/`; a token without `typ` is taken."""
    jti_claim: str = "jti"
    leeway_s: int = 30
    longest_s: int = 3_600
    """Between `iat` and `exp` at most."""


@dataclass(frozen=True, slots=True)
class CertificateEntry:
    """One client certificate's name, and whom it speaks for."""

    name: str
    uri: str | None
    dns: str | None
    tenant: str
    role: Role
    scopes: frozenset[Scope] = frozenset(Scope)


@dataclass(frozen=True, slots=True)
class Identities:
    """The whole file."""

    issuers: tuple[Issuer, ...] = ()
    certificates: tuple[CertificateEntry, ...] = ()


def read_identities(text: str) -> Identities:
    """Read the file. Raises `InvalidIdentities` that names every fault."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise InvalidIdentities(f"not TOML: {exc}") from exc
    faults: list[str] = []
    if unknown := sorted(set(raw) - {"issuer", "certificate"}):
        faults.append(f"unknown tables: {', '.join(unknown)}")
    issuers = [
        _issuer(_Table(each, f"issuer[{i}]", faults)) for i, each in enumerate(_list(raw, "issuer", faults))
    ]
    certificates = [
        _certificate(_Table(each, f"certificate[{i}]", faults))
        for i, each in enumerate(_list(raw, "certificate", faults))
    ]
    for what, values in (
        ("issuer.name", [each.name for each in issuers]),
        ("issuer.issuer", [each.issuer for each in issuers]),
        ("certificate.name", [each.name for each in certificates]),
        ("certificate.uri", [each.uri for each in certificates if each.uri]),
        ("certificate.dns", [each.dns for each in certificates if each.dns]),
    ):
        if len(set(values)) < len(values):
            faults.append(f"{what} is there twice")
    if faults:
        raise InvalidIdentities("; ".join(faults))
    return Identities(tuple(issuers), tuple(certificates))


class _Table:
    """One table of the file: each value is taken once, and what is wrong or left over is a fault."""

    def __init__(self, raw: Mapping[str, Any], where: str, faults: list[str]) -> None:
        self._raw = dict(raw) if isinstance(raw, dict) else {}
        self._where = where
        self._faults = faults

    def fault(self, name: str, what: str) -> None:
        self._faults.append(f"{self._where}.{name} {what}")

    def text(self, name: str, *, needed: bool = False) -> str | None:
        value = self._raw.pop(name, None)
        if value is None and not needed:
            return None
        if not isinstance(value, str) or not 0 < len(value) <= 2_000:
            self.fault(name, "must be a text")
            return None
        return value

    def texts(self, name: str, default: frozenset[str] | None = None) -> tuple[str, ...]:
        value = self._raw.pop(name, None)
        if value is None and default is not None:
            return tuple(sorted(default))
        value = [value] if isinstance(value, str) else value
        if (
            not isinstance(value, list)
            or not value
            or not all(isinstance(each, str) and each for each in value)
        ):
            self.fault(name, "must be a text or a list of texts")
            return ()
        return tuple(value)

    def number(self, name: str, default: int, most: int) -> int:
        value = self._raw.pop(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            self.fault(name, f"must be a whole number from 0 to {most}")
            return default
        return value

    def mapping(self, name: str) -> dict[str, str] | None:
        value = self._raw.pop(name, None)
        if value is None:
            return None
        if (
            not isinstance(value, dict)
            or not value
            or not all(isinstance(each, str) for each in value.values())
        ):
            self.fault(name, "must be a table of texts")
            return None
        return value

    def choose(self, name: str, value: str | None, kind: Callable[[str], Any]) -> Any:
        """A word of a closed list."""
        try:
            return None if value is None else kind(value)
        except ValueError:
            self.fault(name, f"is unknown: {value[:64] if value else value}")
            return None

    def one_of(self, *names: str) -> None:
        """Exactly one of them must be there."""
        if sum(name in self._raw for name in names) != 1:
            self._faults.append(f"{self._where} needs one of {' and '.join(names)}, and not both")

    def end(self) -> None:
        if self._raw:
            self._faults.append(f"{self._where} has unknown fields: {', '.join(sorted(self._raw))}")


def _issuer(table: _Table) -> Issuer:
    table.one_of("keys_file", "keys_url")
    table.one_of("tenant", "tenant_claim")
    table.one_of("role", "role_claim")
    name = _name(table)
    algorithms = frozenset(table.texts("algorithms"))
    if wrong := sorted(algorithms - ALGORITHMS):
        table.fault("algorithms", f"must be of {', '.join(sorted(ALGORITHMS))}, not {', '.join(wrong)}")
    url = table.text("keys_url")
    if url is not None and (urlsplit(url).scheme != "https" or not urlsplit(url).hostname):
        table.fault("keys_url", "must be an https URL")
    role_claim, roles = table.text("role_claim"), table.mapping("roles")
    if role_claim is not None and roles is None:
        table.fault("roles", "is needed with role_claim")
    if role_claim is None and roles is not None:
        table.fault("roles", "needs role_claim")
    tenant_claim, tenants = table.text("tenant_claim"), table.mapping("tenants")
    if tenants is not None and tenant_claim is None:
        table.fault("tenants", "needs tenant_claim")
    longest_s = table.number("longest_s", 3_600, LONGEST_LIFETIME_S)
    issuer = Issuer(
        name=name,
        issuer=table.text("issuer", needed=True) or "",
        audience=table.texts("audience"),
        algorithms=algorithms,
        keys_file=table.text("keys_file"),
        keys_url=url,
        keys_ca=table.text("keys_ca"),
        tenant=table.text("tenant"),
        tenant_claim=tenant_claim,
        tenants=tenants,
        role=table.choose("role", table.text("role"), Role),
        role_claim=role_claim,
        roles={value: table.choose("roles", role, Role) for value, role in (roles or {}).items()},
        scopes=_scopes(table),
        types=frozenset(each.lower() for each in table.texts("types", frozenset({"jwt", "at+jwt"}))),
        jti_claim=table.text("jti_claim") or "jti",
        leeway_s=table.number("leeway_s", 30, LONGEST_LEEWAY_S),
        longest_s=longest_s,
    )
    table.end()
    return issuer


def _certificate(table: _Table) -> CertificateEntry:
    table.one_of("uri", "dns")
    dns = table.text("dns")
    role = table.choose("role", table.text("role", needed=True), Role)
    entry = CertificateEntry(
        name=_name(table),
        uri=table.text("uri"),
        dns=dns.lower() if dns is not None else None,
        tenant=table.text("tenant", needed=True) or "",
        role=role or Role.SEARCH,
        scopes=_scopes(table),
    )
    table.end()
    return entry


def _name(table: _Table) -> str:
    name = table.text("name", needed=True) or ""
    if name and NAME.fullmatch(name) is None:
        table.fault("name", "is 1 to 32 of a-z, 0-9 and inner hyphens")
    return name


def _scopes(table: _Table) -> frozenset[Scope]:
    chosen = [table.choose("scopes", each, Scope) for each in table.texts("scopes", frozenset(Scope))]
    return frozenset(each for each in chosen if each is not None)


def _list(raw: Mapping[str, Any], name: str, faults: list[str]) -> list[Any]:
    value = raw.get(name, [])
    if not isinstance(value, list):
        faults.append(f"{name} must be written as [[{name}]]")
        return []
    return value


def grantable(role: Role, scopes: frozenset[Scope]) -> frozenset[Scope]:
    """What a role gets of the scopes that its entry allows."""
    return ROLE_SCOPES[role] & scopes
