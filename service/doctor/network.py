"""The running service, and by what it can be reached."""

from __future__ import annotations

import ipaddress
import stat
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from service.doctor.check import Finding, State, Unseen, judge
from service.doctor.files import fault

if TYPE_CHECKING:
    from pathlib import Path

    from service.doctor.sight import Sight

SOON = timedelta(days=14)


def look_at_service(sight: Sight) -> Finding:
    """The service answers, and says that it is ready."""
    status, told, _ = sight.answer
    if status == 200:
        return Finding(State.HOLDS, f"{sight.url} is ready")
    return Finding(
        State.BROKEN, f"{sight.url} answers {status}: {told.get('detail', '')}", "see the service's log"
    )


def look_at_detectors(sight: Sight) -> Finding:
    """Every detector of texts and images is there."""
    detectors = sight.readiness.get("screening", {}).get("detectors", [])
    if not detectors:
        raise Unseen("/readyz tells of no detectors")
    return judge(
        (f"{each.get('name')} is not active" for each in detectors if each.get("active") is not True),
        f"{len(detectors)} detectors, all active",
        "see PERICARP_IMAGE_NETS and PERICARP_IMAGE_TEXT, and the log's lines `child_says`",
    )


def look_at_reach(sight: Sight) -> Finding:
    """Keys cross a network under TLS alone: it ends here, or at a proxy that is known."""
    chosen = sight.settings
    if chosen.metrics_port is not None and not _is_loopback(chosen.metrics_host):
        return Finding(
            State.BROKEN,
            f"{chosen.metrics_host}:{chosen.metrics_port} shows metrics to whoever reaches it",
            "set PERICARP_METRICS_HOST to an address of this host alone, or shut the port from other networks",
        )
    if chosen.listens_inside:
        return Finding(State.HOLDS, f"{chosen.host}: this host alone")
    if chosen.tls_certificate is not None:
        return Finding(State.HOLDS, f"{chosen.host}, TLS ends here")
    if chosen.trusted_proxies:
        return Finding(State.HOLDS, f"{chosen.host}, behind the proxies {', '.join(chosen.trusted_proxies)}")
    return Finding(
        State.BROKEN,
        f"it listens on {chosen.host} without TLS, and knows of no proxy",
        "set PERICARP_TLS_CERTIFICATE and PERICARP_TLS_KEY, or PERICARP_HOST=127.0.0.1 behind a proxy with TLS",
    )


def look_at_certificates(sight: Sight) -> Finding:
    """Certificates are valid for two weeks more, the private key fits and is nobody else's to read, and the one in use is
    the one on disk."""
    chosen = sight.settings
    files = [path for path in (chosen.tls_certificate, chosen.client_ca) if path is not None]
    if not files:
        return Finding(State.HOLDS, "no TLS ends here")
    faults = [wrong for path in files for wrong in _dates(path)]
    if chosen.tls_certificate is not None and chosen.tls_key is not None:
        faults.append(fault(chosen.tls_key, 0o640, stat.S_ISREG, uid=chosen.tls_key.stat().st_uid))
        faults.append(_pair(chosen.tls_certificate, chosen.tls_key))
        faults.append(_served(sight, chosen.tls_certificate))
    return judge(
        faults,
        f"{', '.join(str(path) for path in files)}",
        "renew what expires and restart the service; chmod 600 the key, and replace it where others could read it",
    )


def _dates(path: Path) -> list[str]:
    now = datetime.now(UTC)
    wrong = []
    for certificate in x509.load_pem_x509_certificates(path.read_bytes()):
        name = f"{path}: {certificate.subject.rfc4514_string() or 'a certificate'}"
        if certificate.not_valid_before_utc > now:
            wrong.append(f"{name} is not valid yet")
        if certificate.not_valid_after_utc < now:
            wrong.append(f"{name} expired on {certificate.not_valid_after_utc:%Y-%m-%d}")
        elif certificate.not_valid_after_utc < now + SOON:
            wrong.append(f"{name} expires on {certificate.not_valid_after_utc:%Y-%m-%d}")
    return wrong


def _pair(certificate: Path, key: Path) -> str:
    """Whether both have the same public key; a key under a password is not opened."""
    try:
        public = load_pem_private_key(key.read_bytes(), password=None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        return f"{key} cannot be read: {type(exc).__name__}"
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    theirs = x509.load_pem_x509_certificates(certificate.read_bytes())[0].public_key()
    same = public.public_bytes(*form) == theirs.public_bytes(*form)
    return "" if same else f"{key} is not the key of {certificate}"


def _served(sight: Sight, certificate: Path) -> str:
    try:
        peer = sight.answer[2]
    except Unseen:
        return ""  # another check says so
    first = x509.load_pem_x509_certificates(certificate.read_bytes())[0]
    return (
        ""
        if peer == first.public_bytes(Encoding.DER)
        else f"the service shows another certificate than {certificate}"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
