"""Tokens of an identity provider: a signed JWT → `Identity`. Nothing is fetched and no database is asked here.

The algorithms are the issuer's own, asymmetric, fixed by configuration; the key is looked up by `kid` among that
issuer's keys and must be of the algorithm's kind. A header that names keys or places of keys, a `crit`, a repeated
member, anything that is not canonical base64url is refused before any signature is checked. PyJWT checks signature,
issuer, audience and times.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    SECP384R1,
    SECP521R1,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from tenants.access import Identity, Means, Role, plane_of
from tenants.errors import KeySetInvalid, KeySetMissing, TokenInvalid
from tenants.identities import Issuer, grantable
from tenants.key_text import Plane

TOKEN_LENGTH = 8_192
NAME_LENGTH = 256
"""Of a `kid`, a `jti`, a `sub`."""
KEY_SET_BYTES = 512 * 1024
MOST_KEYS = 100
LEAST_RSA_BITS = 2_048
SEGMENT = re.compile(r"[A-Za-z0-9_-]+")
FORBIDDEN_HEADERS = frozenset({"crit", "jwk", "jku", "x5u", "x5c", "zip", "enc", "b64"})
REQUIRED = ("exp", "iat", "iss", "aud", "sub")
CURVES = {"ES256": SECP256R1, "ES384": SECP384R1, "ES512": SECP521R1}

PublicKey = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey


@dataclass(frozen=True, slots=True)
class VerifyingKey:
    """One key of an issuer."""

    kid: str
    algorithm: str | None
    """What the key says that it is for; None: any of its kind."""
    key: PublicKey

    def fits(self, algorithm: str) -> bool:
        """Whether a signature of that algorithm may be by this key."""
        if self.algorithm is not None and self.algorithm != algorithm:
            return False
        if algorithm in CURVES:
            return isinstance(self.key, EllipticCurvePublicKey) and isinstance(
                self.key.curve, CURVES[algorithm]
            )
        if algorithm == "EdDSA":
            return isinstance(self.key, Ed25519PublicKey)
        return isinstance(self.key, RSAPublicKey)


KeySet = tuple[VerifyingKey, ...]


class Tokens:
    """Verifies tokens with the keys that it was last given."""

    def __init__(self, issuers: tuple[Issuer, ...]) -> None:
        self._issuers = {issuer.issuer: issuer for issuer in issuers}
        self._keys: dict[str, KeySet] = {}
        self.wanted: set[str] = set()
        """Names of issuers of which a token named a key that is not there; whoever fetches keys takes them out."""

    def give(self, name: str, keys: KeySet | None) -> None:
        """The keys of that issuer from now on; None: there are none that may be trusted."""
        if keys is None:
            self._keys.pop(name, None)
        else:
            self._keys[name] = keys

    def verify(self, token: str, *, plane: Plane) -> Identity:
        """Whom a token speaks for on that plane. Raises `TokenInvalid`, `KeySetMissing`."""
        header, claims = read_token(token)
        issuer = self._issuers.get(_text(claims, "iss", 2_000))
        if issuer is None:
            raise TokenInvalid(reason="token_issuer")
        algorithm = pick_algorithm(header, issuer.algorithms)
        _check_type(header, issuer)
        keys = self._keys.get(issuer.name)
        if keys is None:
            raise KeySetMissing
        key = pick_key(header, algorithm, keys)
        if key is None:
            self.wanted.add(issuer.name)
            raise TokenInvalid(reason="token_key")
        try:
            # The same text decodes to the same claims: it has no repeated members.
            jwt.decode(
                token,
                key.key,
                algorithms=[algorithm],
                audience=list(issuer.audience),
                issuer=issuer.issuer,
                leeway=issuer.leeway_s,
                options={"require": [*REQUIRED, issuer.jti_claim], "enforce_minimum_key_length": True},
            )
        except jwt.ExpiredSignatureError as exc:
            raise TokenInvalid(reason="token_expired") from exc
        except jwt.InvalidSignatureError as exc:
            raise TokenInvalid(reason="token_signature") from exc
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError) as exc:
            raise TokenInvalid(reason="token_claims") from exc
        return _identity(issuer, claims, plane)


def read_token(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and claims of a token, unverified but well formed. Raises `TokenInvalid`."""
    parts = token.split(".") if len(token) <= TOKEN_LENGTH else []
    if len(parts) != 3:
        raise TokenInvalid(reason="token_malformed")
    header, claims, signature = map(_decode, parts)
    if not signature:
        raise TokenInvalid(reason="token_malformed")
    return _object(header), _object(claims)


def pick_algorithm(header: Mapping[str, Any], allowed: frozenset[str]) -> str:
    """The algorithm of a header, one of those allowed. Raises `TokenInvalid`, also for a header that says too much."""
    if FORBIDDEN_HEADERS & set(header):
        raise TokenInvalid(reason="token_header")
    algorithm = header.get("alg")
    if not isinstance(algorithm, str) or algorithm not in allowed:
        raise TokenInvalid(reason="token_algorithm")
    return algorithm


def pick_key(header: Mapping[str, Any], algorithm: str, keys: KeySet) -> VerifyingKey | None:
    """The issuer's key that the header names; without a name the only one that fits. None where there is none."""
    fitting = [key for key in keys if key.fits(algorithm)]
    if "kid" in header:
        kid = header["kid"]
        if not isinstance(kid, str) or not 0 < len(kid) <= NAME_LENGTH:
            raise TokenInvalid(reason="token_header")
        fitting = [key for key in fitting if key.kid == kid]
    return fitting[0] if len(fitting) == 1 else None


def read_key_set(body: bytes) -> KeySet:
    """The signing keys of a JWK set (RFC 7517); keys for other things and of other kinds are left out.

    Raises `KeySetInvalid`, also where no key is left, where two fit one name, or where a private key lies open.
    """
    if len(body) > KEY_SET_BYTES:
        raise KeySetInvalid("the key set is too large")
    try:
        raw = _object(body)
    except TokenInvalid as exc:
        raise KeySetInvalid("the key set is not one JSON object") from exc
    listed = raw.get("keys")
    if not isinstance(listed, list) or len(listed) > MOST_KEYS:
        raise KeySetInvalid(f"the key set has no list of at most {MOST_KEYS} keys")
    keys = [key for key in map(_read_key, listed) if key is not None]
    if not keys:
        raise KeySetInvalid("the key set has no key that we can use")
    names = [(key.kid, type(key.key), key.algorithm) for key in keys]
    if len(set(names)) < len(names):
        raise KeySetInvalid("the key set has two keys of one name")
    return tuple(keys)


def _read_key(raw: object) -> VerifyingKey | None:
    if not isinstance(raw, dict):
        raise KeySetInvalid("a key is not an object")
    if raw.get("kty") not in ("RSA", "EC", "OKP"):
        return None
    if {"d", "p", "q", "dp", "dq", "qi"} & set(raw):
        raise KeySetInvalid("a private key lies open in the key set")
    operations = raw.get("key_ops")
    if raw.get("use", "sig") != "sig" or (operations is not None and "verify" not in operations):
        return None
    kid, algorithm = raw.get("kid", ""), raw.get("alg")
    if not isinstance(kid, str) or not isinstance(algorithm, str | None):
        raise KeySetInvalid("a key's kid or alg is not a text")
    kind = {"RSA": "RS256", "OKP": "EdDSA"}.get(str(raw["kty"])) or {
        "P-256": "ES256",
        "P-384": "ES384",
        "P-521": "ES512",
    }.get(str(raw.get("crv")))
    if kind is None:
        return None
    try:
        key = jwt.PyJWK.from_dict(raw, algorithm=kind).key
    except (jwt.PyJWTError, ValueError, TypeError) as exc:
        raise KeySetInvalid("a key cannot be read") from exc
    if isinstance(key, RSAPublicKey):
        if key.key_size < LEAST_RSA_BITS or key.public_numbers().e < 65_537:
            raise KeySetInvalid(f"an RSA key is weaker than {LEAST_RSA_BITS} bits")
    elif not isinstance(key, EllipticCurvePublicKey | Ed25519PublicKey):
        return None  # Ed448, X25519
    return VerifyingKey(kid, algorithm, key)


def _identity(issuer: Issuer, claims: Mapping[str, Any], plane: Plane) -> Identity:
    for name in ("exp", "iat", *(("nbf",) if "nbf" in claims else ())):
        if not isinstance(claims[name], int | float) or isinstance(claims[name], bool):
            raise TokenInvalid(reason="token_claims")
    if not 0 < claims["exp"] - claims["iat"] <= issuer.longest_s:
        raise TokenInvalid(reason="token_lifetime")
    role = _role(issuer, claims, plane)
    return Identity(
        Means.JWT,
        issuer.name,
        _tenant(issuer, claims),
        role,
        grantable(role, issuer.scopes),
        subject=_text(claims, "sub"),
        jti=_text(claims, issuer.jti_claim),
    )


def _tenant(issuer: Issuer, claims: Mapping[str, Any]) -> str:
    if issuer.tenant is not None:
        return issuer.tenant
    assert issuer.tenant_claim is not None
    value = _text(claims, issuer.tenant_claim)
    if issuer.tenants is None:
        return value
    if value not in issuer.tenants:
        raise TokenInvalid(reason="token_tenant")
    return issuer.tenants[value]


def _role(issuer: Issuer, claims: Mapping[str, Any], plane: Plane) -> Role:
    """The configured role, or the first of the mapped ones, in the file's order, that works on that plane."""
    if issuer.role is not None:
        return issuer.role
    assert issuer.role_claim is not None
    given = claims.get(issuer.role_claim)
    values = [given] if isinstance(given, str) else given
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TokenInvalid(reason="token_role")
    held = [role for value, role in issuer.roles.items() if value in values]
    if not held:
        raise TokenInvalid(reason="token_role")
    return next((role for role in held if plane_of(role) == plane), held[0])


def _check_type(header: Mapping[str, Any], issuer: Issuer) -> None:
    given = header.get("typ")
    if given is None:
        return
    if not isinstance(given, str) or given.lower().removeprefix("application/") not in issuer.types:
        raise TokenInvalid(reason="token_type")


def _text(claims: Mapping[str, Any], name: str, most: int = NAME_LENGTH) -> str:
    value = claims.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= most:
        raise TokenInvalid(reason="token_claims")
    return value


def _decode(segment: str) -> bytes:
    """Canonical base64url without padding (RFC 7515, section 2): one text for one value."""
    if SEGMENT.fullmatch(segment) is None:
        raise TokenInvalid(reason="token_malformed")
    try:
        decoded = base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4))
    except ValueError as exc:
        raise TokenInvalid(reason="token_malformed") from exc
    if base64.urlsafe_b64encode(decoded).rstrip(b"=").decode() != segment:
        raise TokenInvalid(reason="token_malformed")
    return decoded


def _object(body: bytes) -> dict[str, Any]:
    """One JSON object in which no member is repeated, with numbers that are numbers."""
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as exc:
        raise TokenInvalid(reason="token_malformed") from exc
    if not isinstance(value, dict):
        raise TokenInvalid(reason="token_malformed")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a member is repeated")
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")
