"""What was found before in the same content, by tenant: equal texts and images are not looked at twice.

Kept are findings, not verdicts: thresholds may change, and judging costs nothing. The key is a hash of the content and
of everything that the findings depend on (the detectors' versions, what was looked for, the tenant's own words), keyed
with random bytes of the tenant's own: no tenant ever finds, or can time, what another one sent, and nothing of a content
is kept. Bounded; gone with the process, and with whatever changes about its tenant.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from typing import Generic, TypeVar

MOST_TENANTS = 64
MOST_KEPT = 2_000
"""Of one tenant. Together at most some 40 MB."""
KEY_BYTES = 16

Found = TypeVar("Found")


class Recall(Generic[Found]):
    """Findings by tenant and content, the least recently used forgotten first. Belongs to one event loop."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[str, tuple[bytes, OrderedDict[bytes, Found]]] = OrderedDict()

    def key(self, tenant: str, content: bytes, context: bytes) -> bytes:
        """The content's name for this tenant, for as long as the tenant is kept. `context`: all else that counts."""
        salt, _ = self._of(tenant)
        digest = hashlib.blake2b(content, digest_size=KEY_BYTES, key=salt, person=_fold(context))
        return digest.digest()

    def find(self, tenant: str, key: bytes) -> Found | None:
        """What was found in this content, if it is still known."""
        _, kept = self._of(tenant)
        found = kept.get(key)
        if found is not None:
            kept.move_to_end(key)
        return found

    def keep(self, tenant: str, key: bytes, found: Found) -> None:
        """Remember it. Only what no detector failed on is worth that."""
        _, kept = self._of(tenant)
        kept[key] = found
        kept.move_to_end(key)
        if len(kept) > MOST_KEPT:
            kept.popitem(last=False)

    def forget(self, tenant: str) -> None:
        """All of one tenant, its key included."""
        self._tenants.pop(tenant, None)

    def forget_all(self) -> None:
        self._tenants.clear()

    def _of(self, tenant: str) -> tuple[bytes, OrderedDict[bytes, Found]]:
        kept = self._tenants.get(tenant)
        if kept is None:
            kept = self._tenants[tenant] = (secrets.token_bytes(32), OrderedDict())
            if len(self._tenants) > MOST_TENANTS:
                self._tenants.popitem(last=False)
        self._tenants.move_to_end(tenant)
        return kept


def _fold(context: bytes) -> bytes:
    """BLAKE2's personalisation holds 16 bytes."""
    return hashlib.blake2b(context, digest_size=16).digest()
