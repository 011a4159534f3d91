"""What a key may have, and what whoever makes or changes it may hand on: roles, scopes, addresses. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from tenants.access import ROLE_SCOPES, Role, Scope
from tenants.errors import Fault, InvalidKeyRights

if TYPE_CHECKING:
    from tenants.access import Caller

MOST_CIDRS = 100
HANDS_ON: Mapping[Role, frozenset[Role]] = MappingProxyType(
    {
        Role.TENANT_ADMIN: frozenset({Role.SEARCH, Role.TENANT_ADMIN, Role.AUDITOR}),
        Role.PLATFORM_ADMIN: frozenset(Role),
    }
)
"""Whose keys a role may make and change. Only the platform makes keys that reach over all tenants."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def read_networks(texts: Iterable[str]) -> list[Network]:
    """Networks of an allow-list, in their own spelling. Raises `InvalidKeyRights` that names every wrong one."""
    networks, wrong = [], []
    given = list(texts)
    if len(given) > MOST_CIDRS:
        raise InvalidKeyRights((Fault("allowed_cidrs", f"at most {MOST_CIDRS} networks"),))
    for text in given:
        try:
            networks.append(ipaddress.ip_network(text))
        except ValueError:
            wrong.append(text[:64])
    if wrong:
        told = f"not a network: {', '.join(map(repr, wrong[:10]))}; write 203.0.113.0/24, 2001:db8::/32 or one address"
        raise InvalidKeyRights((Fault("allowed_cidrs", told),))
    return networks


def grant(role: Role, asked: Iterable[Scope] | None, creator: Caller | None) -> list[str]:
    """The scopes to store. Raises `InvalidKeyRights` for one that the role cannot have or the creator lacks."""
    possible = ROLE_SCOPES[role]
    held = possible if creator is None else possible & creator.scopes
    scopes = held if asked is None else frozenset(map(Scope, asked))
    if beyond := scopes - possible:
        raise _refuse_scopes(f"a key with the role {role} cannot have: {', '.join(sorted(beyond))}")
    refuse_beyond(role, scopes, creator)
    if not scopes:
        raise _refuse_scopes("a key needs at least one scope")
    return sorted(scopes)


def _refuse_scopes(why: str) -> InvalidKeyRights:
    return InvalidKeyRights((Fault("scopes", why),))


def refuse_beyond(role: Role, scopes: frozenset[Scope], creator: Caller | None) -> None:
    """Raises `InvalidKeyRights` where a key has, or would have, more rights than who makes or changes it."""
    if creator is None:
        return
    if role not in HANDS_ON.get(creator.role, frozenset()):
        raise InvalidKeyRights((Fault("role", f"yours cannot hand on the role {role}"),))
    if lacking := scopes - creator.scopes:
        raise _refuse_scopes(f"you cannot hand on what you lack: {', '.join(sorted(lacking))}")
