"""Where a request comes from: the peer, and before it only what trusted proxies say."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from service.api.addresses import Proxies


def found(proxies: tuple[str, ...], peer: str, *forwarded: str) -> str:
    headers = Headers(raw=[(b"x-forwarded-for", each.encode()) for each in forwarded])
    return Proxies(proxies).client_address({"type": "http", "client": (peer, 1)}, headers)


@pytest.mark.parametrize(
    ("proxies", "peer", "forwarded", "address"),
    [
        ((), "198.51.100.1", (), "198.51.100.1"),
        ((), "198.51.100.1", ("203.0.113.9",), "198.51.100.1"),
        (("10.0.0.0/8",), "198.51.100.1", ("203.0.113.9",), "198.51.100.1"),
        (("10.0.0.0/8",), "10.0.0.1", ("203.0.113.9",), "203.0.113.9"),
        (("10.0.0.0/8",), "::ffff:10.0.0.1", ("203.0.113.9",), "203.0.113.9"),
        (("10.0.0.0/8",), "10.0.0.1", (), "10.0.0.1"),
        (("10.0.0.0/8",), "10.0.0.1", ("192.0.2.66, 203.0.113.9",), "203.0.113.9"),
        (("10.0.0.0/8",), "10.0.0.1", ("192.0.2.66, 203.0.113.9, 10.0.0.7",), "203.0.113.9"),
        (("10.0.0.0/8",), "10.0.0.1", ("192.0.2.66", "203.0.113.9"), "203.0.113.9"),
        (("10.0.0.0/8",), "10.0.0.1", ("10.0.0.5, 10.0.0.7",), "10.0.0.5"),
        (("fd00::/8",), "fd00::1", ("2001:db8::7",), "2001:db8::7"),
        (("10.0.0.0/8",), "10.0.0.1", ("somebody",), ""),
        (("10.0.0.0/8",), "10.0.0.1", ("203.0.113.9:4711",), ""),
        (("10.0.0.0/8",), "10.0.0.1", ("203.0.113.9, unknown, 10.0.0.7",), ""),
        (("0.0.0.0/0",), "10.0.0.1", ("203.0.113.9, " * 100 + "203.0.113.10",), "203.0.113.9"),
    ],
)
def test_the_nearest_address_that_is_no_proxys_counts(
    proxies: tuple[str, ...], peer: str, forwarded: tuple[str, ...], address: str
) -> None:
    assert found(proxies, peer, *forwarded) == address


def test_a_connection_without_an_address_has_none() -> None:
    assert Proxies(("10.0.0.0/8",)).client_address({"type": "http"}, Headers()) == ""


def test_what_is_no_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"10\.0\.0\.1/8"):
        Proxies(("10.0.0.1/8",))
