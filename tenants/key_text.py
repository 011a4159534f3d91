"""The text of a key: `prc_live_` or `prc_admin_`, its id, its secret, a checksum.

12 characters of id, `_`, 43 of secret (256 bits) and 6 of CRC32 over all before it, in base62. The checksum is
checked before any database is asked. What is stored of a secret is HMAC-SHA-256 under the pepper.
"""

from __future__ import annotations

import hmac
import re
import secrets
import zlib
from enum import StrEnum

from tenants.errors import KeyMalformed

BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
KEY_ID_LENGTH = 12
SECRET_LENGTH = 43
CHECKSUM_LENGTH = 6
KEY_PATTERN = re.compile(
    r"(?P<head>prc_(?P<form>live|admin)_(?P<id>[0-9A-Za-z]{12})_(?P<secret>[0-9A-Za-z]{43}))(?P<crc>[0-9A-Za-z]{6})"
)
"""What a leak scanner looks for; `parse_key` checks the checksum as well."""
KEY_ID_PATTERN = re.compile(r"[0-9A-Za-z]{12}")
PEPPER_VERSION = 1
PEPPER_BYTES = 32


class Plane(StrEnum):
    """Which half of the surface a path and a key belong to. What works on one is unknown on the other."""

    DATA = "data"
    """Rerank, sessions, usage, models. Its keys begin with `prc_live_`."""
    ADMIN = "admin"
    """`/admin/…` and `/metrics`. Its keys begin with `prc_admin_`."""


FORMS = {"live": Plane.DATA, "admin": Plane.ADMIN}
PREFIXES = {plane: f"prc_{form}_" for form, plane in FORMS.items()}


def make_key(plane: Plane = Plane.DATA) -> tuple[str, str, str]:
    """A new key: its id, its secret, and the text that the tenant gets, once."""
    key_id = random_base62(KEY_ID_LENGTH)
    secret = random_base62(SECRET_LENGTH)
    return key_id, secret, write_key(plane, key_id, secret)


def write_key(plane: Plane, key_id: str, secret: str) -> str:
    """The text of a key."""
    head = f"{PREFIXES[plane]}{key_id}_{secret}"
    return head + checksum(head)


def parse_key(token: str) -> tuple[Plane, str, str]:
    """Plane, id and secret of a key's text. Raises `KeyMalformed` for a wrong shape or checksum."""
    match = KEY_PATTERN.fullmatch(token)
    if match is None or checksum(match["head"]) != match["crc"]:
        raise KeyMalformed
    return FORMS[match["form"]], match["id"], match["secret"]


def checksum(head: str) -> str:
    """CRC32 in six base62 digits. It finds typos and random probes; it proves nothing."""
    rest = zlib.crc32(head.encode())
    digits = []
    for _ in range(CHECKSUM_LENGTH):
        rest, digit = divmod(rest, len(BASE62))
        digits.append(BASE62[digit])
    return "".join(reversed(digits))


def digest_secret(pepper: bytes, secret: str) -> bytes:
    """What is stored of a secret. Worthless without the pepper, which is kept outside the database."""
    return hmac.digest(pepper, secret.encode(), "sha256")


def random_base62(length: int) -> str:
    """`length` characters that nobody guesses, 5.95 bits each."""
    return "".join(secrets.choice(BASE62) for _ in range(length))
