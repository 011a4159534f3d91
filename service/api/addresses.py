"""Where a request comes from: the peer's address, or what trusted proxies say before it."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.datastructures import Headers
    from starlette.types import Scope

    Address = ipaddress.IPv4Address | ipaddress.IPv6Address
    Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MOST_HOPS = 32


class Proxies:
    """The reverse proxies whose word counts. Without any, nobody's does."""

    def __init__(self, networks: Iterable[str]) -> None:
        """Raises ValueError for what is no network."""
        self._networks: tuple[Network, ...] = tuple(map(ipaddress.ip_network, networks))

    def trusts(self, address: str) -> bool:
        """Whether a peer at that address is one of them."""
        found = read_address(address)
        return found is not None and any(found in network for network in self._networks)

    def client_address(self, scope: Scope, headers: Headers) -> str:
        """The nearest address that is no trusted proxy's; empty where a trusted proxy's word cannot be read.

        `X-Forwarded-For` is read from its end, and only as far as each hop is trusted: what a caller wrote into it
        stands further left. RFC 7239's `Forwarded` is not read.
        """
        peer = (scope.get("client") or ("", 0))[0]
        if not self._networks or not self.trusts(peer):
            return str(peer)
        nearest = read_address(peer)
        hops = ",".join(headers.getlist("x-forwarded-for")).split(",")
        for hop in reversed(hops[-MOST_HOPS:]):
            if not hop.strip():
                break
            nearest = read_address(hop.strip())
            if nearest is None:
                return ""
            if not any(nearest in network for network in self._networks):
                break
        return str(nearest)


def read_address(text: str) -> Address | None:
    """The address, an IPv4 one where it was mapped into IPv6; None for anything else."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address
