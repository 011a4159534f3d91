"""Which URLs an image may be fetched from, and which addresses are nobody's inside."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.screening.locations import URL_CHARACTERS, Location, is_public, read_location


@pytest.mark.parametrize(
    ("url", "host", "target"),
    [
        ("https://img.example/a.png", "img.example", "/a.png"),
        ("HTTPS://IMG.Example/A.png?x=1&y=%20", "img.example", "/A.png?x=1&y=%20"),
        ("https://img.example:443/", "img.example", "/"),
        ("https://img.example", "img.example", "/"),
        ("https://img.example?x", "img.example", "/?x"),
        ("https://img.example/a#b@c", "img.example", "/a"),
        ("https://img.example/@evil.example/", "img.example", "/@evil.example/"),
    ],
)
def test_one_form_of_url_is_read(url: str, host: str, target: str) -> None:
    assert read_location(url) == Location(host, target)


@pytest.mark.parametrize(
    "url",
    [
        "http://img.example/a",
        "ftp://img.example/a",
        "https:///a",
        "https://img.example:8443/a",
        "https://img.example:/a",
        "https://user@img.example/a",
        "https://user:pass@img.example/a",
        "https://img.example\\@evil.example/a",
        "https://img.example\\.evil.example/a",
        "https://img.example/a b",
        "https://img.example/a\r\nHost: evil.example",
        "https://img.exa\tmple/a",
        " https://img.example/a",
        "https://img.example/\u00e9",
        "https://\u0131mg.example/a",
        "https://img\u3002example/a",
        "https://[::1]/a",
        "https://[::ffff:127.0.0.1]/a",
        "https://img.example%2eevil/a",
        "https://img.example/" + "a" * URL_CHARACTERS,
        "file:///etc/passwd",
        "",
    ],
)
def test_whatever_two_readers_could_read_in_two_ways_is_no_url(url: str) -> None:
    assert read_location(url) is None


@given(st.text(max_size=60))
def test_any_text_is_a_host_in_plain_letters_or_nothing(text: str) -> None:
    location = read_location("https://" + text)
    assert location is None or (
        location.host.isascii() and location.host == location.host.lower() and location.target.startswith("/")
    )


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "1.1.1.1", "2606:4700:4700::1111", "2a00:1450:4001::8a"]
)
def test_the_internet_is_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.255.255.254", "::1", "::ffff:127.0.0.1", "::ffff:93.184.215.14", "0.0.0.0", "::",
        "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "100.64.0.1", "100.127.255.254",
        "169.254.169.254", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "2606:4700:4700::1111%eth0",
        "10.0.0.1", "172.16.0.1", "192.168.1.1", "192.0.0.1", "192.0.2.1", "192.88.99.1", "198.18.0.1",
        "198.51.100.1", "203.0.113.1", "224.0.0.1", "ff02::1", "240.0.0.1", "255.255.255.255", "0.1.2.3",
        "2002:7f00:1::1", "2001:0:7f00:1::1", "2001:db8::1", "3fff::1", "fc00::1", "5f00::1", "100::1",
        "", "img.example", "2130706433", "0x7f.1", "127.1", "0177.0.0.1",
    ],
)  # fmt: skip
def test_what_is_not_of_the_internet_is_not_public(address: str) -> None:
    assert not is_public(address)
