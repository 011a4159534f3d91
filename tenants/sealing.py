"""Secrets at rest: wrapped with AES-256-GCM under a master key that never enters the database.

Wrapped bytes are version (1), nonce (12), ciphertext and tag. The tenant's id is bound in as associated data:
a wrapped secret copied into another tenant's row does not open.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tenants.errors import SealBroken

if TYPE_CHECKING:
    from uuid import UUID

MASTER_KEY_BYTES = 32
NONCE_BYTES = 12
VERSION = b"\x01"


def seal(master_key: bytes, tenant: UUID, secret: bytes) -> bytes:
    """Wrap `secret` for `tenant`."""
    nonce = os.urandom(NONCE_BYTES)
    return VERSION + nonce + _cipher(master_key).encrypt(nonce, secret, VERSION + tenant.bytes)


def unseal(master_key: bytes, tenant: UUID, wrapped: bytes) -> bytes:
    """The secret that `seal` wrapped. Raises `SealBroken` for another key or tenant, or altered bytes."""
    body = wrapped[1:]
    try:
        if wrapped[:1] != VERSION:
            raise InvalidTag
        return _cipher(master_key).decrypt(body[:NONCE_BYTES], body[NONCE_BYTES:], VERSION + tenant.bytes)
    except (InvalidTag, ValueError) as exc:
        raise SealBroken from exc


def _cipher(master_key: bytes) -> AESGCM:
    if len(master_key) != MASTER_KEY_BYTES:
        raise SealBroken(f"the master key must be {MASTER_KEY_BYTES} bytes")
    return AESGCM(master_key)
