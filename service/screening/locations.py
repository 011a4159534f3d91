"""Where an image may be fetched from: the one form of URL that is accepted, and the addresses that are public.

Pure. A URL is matched whole against one narrow form instead of being parsed: what two parsers could read in two ways
(a user, a backslash, a control character, a port) does not match. Its host is a name, compared letter by letter with the
Policy's list, which holds no addresses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address

URL_CHARACTERS = 2048
"""The longest URL that is accepted."""

_URL = re.compile(
    r"https://(?P<host>[a-z0-9.-]{1,253})(?::443)?(?P<target>[/?][!-~]*)?", re.IGNORECASE | re.ASCII
)

GLOBAL_UNICAST = IPv6Network("2000::/3")
"""RFC 4291, section 2.4, as far as IANA has handed it out; IPv4-mapped and NAT64 addresses lie outside."""
NOT_PUBLIC = (
    IPv4Network("192.88.99.0/24"),  # 6to4 relays, RFC 7526
    IPv6Network("2001::/23"),  # IETF protocol assignments, with Teredo, RFC 2928
    IPv6Network("2002::/16"),  # 6to4, which carries any IPv4 address, RFC 3056
    IPv6Network("3fff::/20"),  # documentation, RFC 9637
)
"""What `ipaddress` takes for global, in some release of Python at least, and nobody's web server is."""


@dataclass(frozen=True, slots=True)
class Location:
    """An https URL in parts, port 443 being understood."""

    host: str
    """In lower case."""
    target: str
    """Path and query, as they go into the request line."""

    @property
    def url(self) -> str:
        return f"https://{self.host}{self.target}"


def read_location(url: str) -> Location | None:
    """The parts of an https URL, or none where it does not have the one form. A fragment is dropped."""
    if len(url) > URL_CHARACTERS:
        return None
    match = _URL.fullmatch(url.partition("#")[0])
    if match is None:
        return None
    target = match["target"] or "/"
    return Location(match["host"].lower(), target if target.startswith("/") else f"/{target}")


def is_public(address: str) -> bool:
    """Whether an IP address is of the public internet (IANA's special-purpose registries, RFC 6890)."""
    try:
        ip = ip_address(address)
    except ValueError:  # with a zone, or no address at all
        return False
    if isinstance(ip, IPv6Address) and (ip.scope_id is not None or ip not in GLOBAL_UNICAST):
        return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in NOT_PUBLIC)
