"""Client certificates: one that holds → `Identity`, by a name in it that the configuration maps.

Where TLS ends here, OpenSSL has checked the chain in the handshake; where a proxy ends it, the proxy says that it has, and
the chain is checked here once more against the client CA. Either way the certificate must be in its time now and for the
use as a client. One with two names that are mapped differently says who it is in two ways, and is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from tenants.access import Identity, Means
from tenants.errors import CertificateInvalid
from tenants.identities import CertificateEntry, grantable

MOST_CHAIN = 8
MOST_KEPT = 1_000
DER_LENGTH = 16_384


class Certificates:
    """Maps certificates that the client CA has signed."""

    def __init__(self, entries: tuple[CertificateEntry, ...], *, ca_pem: bytes) -> None:
        """Raises ValueError where `ca_pem` holds no certificate."""
        self._by_uri = {entry.uri: entry for entry in entries if entry.uri is not None}
        self._by_dns = {entry.dns: entry for entry in entries if entry.dns is not None}
        self._store = Store(x509.load_pem_x509_certificates(ca_pem))
        self._kept: dict[bytes, tuple[datetime, Identity | None]] = {}

    def identify(self, der: bytes, chain: Sequence[bytes] | None) -> Identity | None:
        """Whom a certificate speaks for; None for one that holds and is not mapped. Raises `CertificateInvalid`.

        `chain` are the certificates between it and the CA; None where OpenSSL has verified them already.
        """
        digest = hashlib.sha256(
            b"\0".join([b"handshake" if chain is None else b"header", der, *(chain or ())])
        ).digest()
        now = datetime.now(UTC)
        kept = self._kept.get(digest)
        if kept is not None and now < kept[0]:
            return kept[1]
        over_at, identity = self._verify(der, chain, now)
        if len(self._kept) >= MOST_KEPT:
            self._kept.pop(next(iter(self._kept)))
        self._kept[digest] = (over_at, identity)
        return identity

    def _verify(
        self, der: bytes, chain: Sequence[bytes] | None, now: datetime
    ) -> tuple[datetime, Identity | None]:
        """Until when the certificate holds, and whom it speaks for."""
        try:
            if len(der) > DER_LENGTH or len(chain or ()) > MOST_CHAIN:
                raise ValueError("too large")
            certificate = x509.load_der_x509_certificate(der)
            path = [certificate] if chain is None else self._verify_chain(certificate, chain, now)
            if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
                raise CertificateInvalid(reason="certificate_expired")
            _require_client_use(certificate)
            return min(each.not_valid_after_utc for each in path), self._map(certificate)
        except VerificationError as exc:
            raise CertificateInvalid(reason="certificate_chain") from exc
        except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as exc:
            raise CertificateInvalid(reason="certificate_malformed") from exc

    def _verify_chain(
        self, certificate: x509.Certificate, chain: Sequence[bytes], now: datetime
    ) -> Sequence[x509.Certificate]:
        """The path from the certificate to the CA. Raises what `_verify` translates."""
        between = [x509.load_der_x509_certificate(each) for each in chain]
        verifier = PolicyBuilder().store(self._store).time(now.replace(tzinfo=None)).build_client_verifier()
        return verifier.verify(certificate, between).chain

    def _map(self, certificate: x509.Certificate) -> Identity | None:
        try:
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            return None  # a common name is no name
        found = {
            name: self._by_uri[name]
            for name in names.get_values_for_type(x509.UniformResourceIdentifier)
            if name in self._by_uri
        } | {
            name: self._by_dns[name.lower()]
            for name in names.get_values_for_type(x509.DNSName)
            if name.lower() in self._by_dns
        }
        whom = {(entry.tenant, entry.role) for entry in found.values()}
        if len(whom) > 1:
            raise CertificateInvalid(reason="certificate_ambiguous")
        if not found:
            return None
        name, entry = next(iter(found.items()))
        encoded = certificate.public_bytes(serialization.Encoding.DER)
        return Identity(
            Means.MTLS,
            entry.name,
            entry.tenant,
            entry.role,
            grantable(entry.role, entry.scopes),
            subject=name,
            jti=hashlib.sha256(encoded).hexdigest(),
        )


def _require_client_use(certificate: x509.Certificate) -> None:
    """The certificate says that it is a client's: silence is not enough. Raises `CertificateInvalid`."""
    try:
        uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        raise CertificateInvalid(reason="certificate_use") from None
    if ExtendedKeyUsageOID.CLIENT_AUTH not in uses:
        raise CertificateInvalid(reason="certificate_use")
