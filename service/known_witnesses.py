"""Which witnesses an installation asks: what PERICARP_WITNESSES says, read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from tenants.checkpoint import COSIGNATURE, VerifyKey
from tenants.errors import ProofInvalid

MOST = 16


@dataclass(frozen=True, slots=True)
class KnownWitness:
    """Where a witness listens, and the key that its cosignatures are verified by."""

    url: str
    """C2SP's submission prefix, without a slash at its end."""
    key: VerifyKey


def read_witnesses(texts: Sequence[str]) -> tuple[KnownWitness, ...]:
    """Of `URL=VKEY` each. Raises ValueError: not so, a key of another kind, one key twice, or too many."""
    found = tuple(_read(text) for text in texts)
    if len({witness.key for witness in found}) != len(found) or len(found) > MOST:
        raise ValueError(f"each witness once, and {MOST} at most")
    return found


def _read(text: str) -> KnownWitness:
    url, _, written = text.partition("=")
    try:
        key = VerifyKey.parse(written)
    except ProofInvalid as exc:
        raise ValueError("a witness is URL=VKEY, as it prints at its start") from exc
    parts = urlsplit(url)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.query
        or parts.fragment
        or parts.username is not None
    ):
        raise ValueError("a witness's URL is http:// or https://, a host, and perhaps a port and a path")
    if key.kind != COSIGNATURE:
        raise ValueError("that is a log's key, not a witness's")
    return KnownWitness(url.rstrip("/"), key)
