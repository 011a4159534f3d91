"""The file of issuers and certificates: read whole, or refused with every fault."""

from __future__ import annotations

import pytest

from tenants import identities as module
from tenants.access import Role, Scope
from tenants.errors import InvalidIdentities
from tenants.identities import Identities, read_identities

ISSUER = """
[[issuer]]
name = "corp"
issuer = "https://login.example.com/"
audience = "pericarp"
algorithms = ["RS256"]
keys_url = "https://login.example.com/keys"
tenant = "acme"
role = "search"
"""
CERTIFICATE = """
[[certificate]]
name = "backend"
uri = "spiffe://example.org/backend"
tenant = "acme"
role = "search"
"""


def faults(text: str) -> str:
    with pytest.raises(InvalidIdentities) as caught:
        read_identities(text)
    return str(caught.value)


def test_an_empty_file_believes_nobody() -> None:
    assert read_identities("") == Identities()


def test_a_small_file_is_read() -> None:
    read = read_identities(ISSUER + CERTIFICATE)
    (issuer,), (certificate,) = read.issuers, read.certificates
    assert (issuer.name, issuer.audience, issuer.tenant, issuer.role) == (
        "corp",
        ("pericarp",),
        "acme",
        Role.SEARCH,
    )
    assert issuer.types == {"jwt", "at+jwt"}
    assert (certificate.uri, certificate.tenant, certificate.scopes) == (
        "spiffe://example.org/backend",
        "acme",
        frozenset(Scope),
    )


def test_the_example_of_the_docs_is_read() -> None:
    assert module.__doc__ is not None
    example = "\n".join(
        line.removeprefix("    ") for line in module.__doc__.splitlines() if line.startswith("    ")
    )
    read = read_identities(example)
    assert read.issuers[0].roles == {"searchers": Role.SEARCH}
    assert read.issuers[0].tenants == {"org-17": "acme"}
    assert read.certificates[0].name == "backend"


@pytest.mark.parametrize(
    ("was", "becomes", "says"),
    [
        ('["RS256"]', '["HS256"]', "issuer[0].algorithms must be of"),
        ('["RS256"]', '["none"]', "not none"),
        ('["RS256"]', "[]", "algorithms must be a text or a list"),
        ("https://login.example.com/keys", "http://login.example.com/keys", "keys_url must be an https URL"),
        ("https://login.example.com/keys", "https:///keys", "keys_url must be an https URL"),
        ('tenant = "acme"', 'tenant = "acme"\ntenant_claim = "org"', "one of tenant and tenant_claim"),
        ('tenant = "acme"', "", "one of tenant and tenant_claim"),
        ('role = "search"', 'role_claim = "groups"', "issuer[0].roles is needed"),
        ('role = "search"', 'role = "root"', "issuer[0].role is unknown: root"),
        (
            'role = "search"',
            'role = "search"\nscopes = ["everything"]',
            "issuer[0].scopes is unknown: everything",
        ),
        ('role = "search"', 'role = "search"\nleeway_s = 100000', "leeway_s must be a whole number"),
        ('role = "search"', 'role = "search"\nverify = false', "unknown fields: verify"),
        ('name = "corp"', 'name = "Corp 1"', "issuer[0].name is 1 to 32"),
        ('audience = "pericarp"', "", "issuer[0].audience must be"),
    ],
)
def test_a_fault_is_named_with_its_place(was: str, becomes: str, says: str) -> None:
    assert says in faults(ISSUER.replace(was, becomes))


def test_every_fault_is_named_at_once() -> None:
    told = faults(ISSUER.replace("RS256", "HS256").replace('role = "search"', "role = 7") + "\n[other]\n")
    assert "algorithms" in told and "issuer[0].role" in told and "unknown tables: other" in told


def test_names_and_issuers_are_there_once() -> None:
    told = faults(ISSUER + ISSUER + CERTIFICATE + CERTIFICATE)
    for what in ("issuer.name", "issuer.issuer", "certificate.name", "certificate.uri"):
        assert f"{what} is there twice" in told


def test_what_is_not_toml_is_refused() -> None:
    assert "not TOML" in faults("[[issuer")
    assert "must be written as [[issuer]]" in faults("issuer = 1")
