"""Client certificates: whom they speak for, and which do not hold. Real ones, made here."""

from __future__ import annotations

import pytest

from tenants.access import Means, Role, Scope
from tenants.certificates import Certificates
from tenants.errors import CertificateInvalid
from tenants.identities import CertificateEntry
from tests.certificates import CLIENT, SERVER, authority, issue

CA = authority()
OTHER_CA = authority("Other CA")
BETWEEN = authority("Between", CA)
SPIFFE = "spiffe://example.org/ns/search/sa/backend"
ENTRIES = (
    CertificateEntry("backend", SPIFFE, None, "acme", Role.SEARCH, frozenset({Scope.RERANK})),
    CertificateEntry("host", None, "backend.example.org", "beta", Role.SEARCH),
    CertificateEntry("same", "spiffe://example.org/same", None, "beta", Role.SEARCH),
)


@pytest.fixture
def certificates() -> Certificates:
    return Certificates(ENTRIES, ca_pem=CA.pem)


def test_a_spiffe_name_is_mapped(certificates: Certificates) -> None:
    issued = issue(CA, uris=(SPIFFE,))
    chains: list[list[bytes] | None] = [None, [], [BETWEEN.der]]
    for chain in chains:
        identity = certificates.identify(issued.der, chain)
        assert identity is not None
        assert (identity.means, identity.key_id, identity.subject) == (Means.MTLS, "mtls:backend", SPIFFE)
        assert (identity.tenant_name, identity.role) == ("acme", Role.SEARCH)
        assert identity.scopes == {Scope.RERANK}
        assert len(identity.jti) == 64
        assert certificates.identify(issued.der, chain) == identity, "kept until it expires"


def test_a_dns_name_is_mapped_whatever_its_case(certificates: Certificates) -> None:
    identity = certificates.identify(issue(CA, dns=("Backend.example.ORG", "b.example.org")).der, [])
    assert identity is not None
    assert (identity.name, identity.tenant_name) == ("host", "beta")


def test_a_chain_through_another_ca_holds_where_it_is_shown(certificates: Certificates) -> None:
    issued = issue(BETWEEN, uris=(SPIFFE,))
    assert certificates.identify(issued.der, [BETWEEN.der]) is not None
    with pytest.raises(CertificateInvalid) as caught:
        certificates.identify(issued.der, [])
    assert caught.value.reason == "certificate_chain"


def test_two_names_that_mean_the_same_are_one_and_two_that_differ_are_none(
    certificates: Certificates,
) -> None:
    same = issue(CA, uris=("spiffe://example.org/same",), dns=("backend.example.org",))
    identity = certificates.identify(same.der, [])
    assert identity is not None and identity.tenant_name == "beta"
    with pytest.raises(CertificateInvalid) as caught:
        certificates.identify(issue(CA, uris=(SPIFFE,), dns=("backend.example.org",)).der, [])
    assert caught.value.reason == "certificate_ambiguous"


def test_a_name_that_is_not_mapped_speaks_for_nobody(certificates: Certificates) -> None:
    for issued in (
        issue(CA, uris=(SPIFFE + "/deeper",)),
        issue(CA, uris=(SPIFFE.upper(),)),
        issue(CA, dns=("x.backend.example.org",)),
        issue(CA, dns=("*.example.org",)),
    ):
        assert certificates.identify(issued.der, None) is None
    assert certificates.identify(issue(CA, common_name="backend.example.org").der, None) is None


@pytest.mark.parametrize("chain", [None, []], ids=["handshake", "header"])
@pytest.mark.parametrize(
    ("issued", "why"),
    [
        (issue(CA, uris=(SPIFFE,), days=(-10, -1)), {"certificate_expired", "certificate_chain"}),
        (issue(CA, uris=(SPIFFE,), days=(1, 10)), {"certificate_expired", "certificate_chain"}),
        (issue(CA, uris=(SPIFFE,), uses=(SERVER,)), {"certificate_use", "certificate_chain"}),
        (issue(CA, uris=(SPIFFE,), uses=None), {"certificate_use", "certificate_chain"}),
    ],
    ids=["expired", "not-yet", "server-use", "no-use"],
)
def test_a_certificate_out_of_its_time_or_use_is_refused(
    certificates: Certificates, issued: object, why: set[str], chain: list[bytes] | None
) -> None:
    with pytest.raises(CertificateInvalid) as caught:
        certificates.identify(issued.der, chain)  # type: ignore[attr-defined]
    assert caught.value.reason in why


def test_another_ca_is_refused_although_its_name_is_the_same(certificates: Certificates) -> None:
    namesake = authority()
    for issued, chain in (
        (issue(OTHER_CA, uris=(SPIFFE,)), [OTHER_CA.der]),
        (issue(namesake, uris=(SPIFFE,)), [namesake.der]),
    ):
        with pytest.raises(CertificateInvalid) as caught:
            certificates.identify(issued.der, chain)
        assert caught.value.reason == "certificate_chain"


def test_both_uses_are_a_clients_too(certificates: Certificates) -> None:
    assert certificates.identify(issue(CA, uris=(SPIFFE,), uses=(SERVER, CLIENT)).der, []) is not None


@pytest.mark.parametrize("der", [b"", b"x", issue(CA, uris=(SPIFFE,)).der[:-1], b"\0" * 20_000])
def test_what_is_no_certificate_is_refused(certificates: Certificates, der: bytes) -> None:
    chains: list[list[bytes] | None] = [None, []]
    for chain in chains:
        with pytest.raises(CertificateInvalid) as caught:
            certificates.identify(der, chain)
        assert caught.value.reason == "certificate_malformed"
