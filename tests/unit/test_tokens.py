"""Tokens of an identity provider: which are believed, and the many that are not. The kinds are Wycheproof's."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tenants.access import Means, Role, Scope
from tenants.errors import KeySetInvalid, KeySetMissing, TokenInvalid
from tenants.identities import Issuer
from tenants.key_text import Plane
from tenants.tokens import TOKEN_LENGTH, Tokens, read_key_set

RSA = rsa.generate_private_key(65537, 2048)
OTHER_RSA = rsa.generate_private_key(65537, 2048)
P256 = ec.generate_private_key(ec.SECP256R1())
P384 = ec.generate_private_key(ec.SECP384R1())
ED = ed25519.Ed25519PrivateKey.generate()
SIGNERS: dict[str, Any] = {"RS256": RSA, "PS256": RSA, "ES256": P256, "ES384": P384, "EdDSA": ED}
KIDS = {"RS256": "rsa", "PS256": "rsa", "ES256": "p256", "ES384": "p384", "EdDSA": "ed"}


def jwk(key: Any, kid: str, **more: object) -> dict[str, Any]:
    algorithm: Any = {
        rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm,
        ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm,
        ed25519.Ed25519PrivateKey: jwt.algorithms.OKPAlgorithm,
    }
    (made,) = (each for kind, each in algorithm.items() if isinstance(key, kind))
    told: dict[str, Any] = json.loads(made.to_jwk(key.public_key()))
    return {**told, "kid": kid, **more}


KEY_SET = [
    jwk(RSA, "rsa"),
    jwk(P256, "p256", alg="ES256", use="sig"),
    jwk(P384, "p384"),
    jwk(ED, "ed"),
    jwk(OTHER_RSA, "encryption", use="enc"),
    {"kty": "oct", "kid": "shared", "k": "c2VjcmV0"},
]


def issuer(**more: Any) -> Issuer:
    given: dict[str, Any] = {
        "name": "corp",
        "issuer": "https://login.example.com/",
        "audience": ("pericarp",),
        "algorithms": frozenset(SIGNERS),
        "keys_file": "keys.json",
        "tenant_claim": "org",
        "role_claim": "groups",
        "roles": {"searchers": Role.SEARCH, "auditors": Role.AUDITOR, "admins": Role.TENANT_ADMIN},
    }
    return Issuer(**{**given, **more})


def make_tokens(**more: Any) -> Tokens:
    tokens = Tokens((issuer(**more),))
    tokens.give("corp", read_key_set(json.dumps({"keys": KEY_SET}).encode()))
    return tokens


def claims(**more: object) -> dict[str, Any]:
    now = int(time.time())
    told = {
        "iss": "https://login.example.com/",
        "aud": "pericarp",
        "sub": "alice",
        "iat": now,
        "exp": now + 300,
        "jti": "token-1",
        "org": "acme",
        "groups": ["auditors", "searchers", "cooks"],
        **more,
    }
    return {name: value for name, value in told.items() if value is not None}


def signed(algorithm: str = "ES256", headers: dict[str, Any] | None = None, **more: object) -> str:
    return jwt.encode(
        claims(**more),
        SIGNERS[algorithm],
        algorithm=algorithm,
        headers={"kid": KIDS[algorithm], **(headers or {})},
    )


def segment(value: object) -> str:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(body).rstrip(b"=").decode()


def sign_raw(header: object, payload: object) -> str:
    """A token with a good ES256 signature over whatever stands in it."""
    told = f"{segment(header)}.{segment(payload)}"
    return f"{told}.{segment(jwt.algorithms.ECAlgorithm(jwt.algorithms.ECAlgorithm.SHA256).sign(told.encode(), P256))}"


def reason(token: str, **more: Any) -> str:
    with pytest.raises(TokenInvalid) as caught:
        make_tokens(**more).verify(token, plane=Plane.DATA)
    assert caught.value.tenant is None
    return caught.value.reason


# -- believed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", list(SIGNERS))
def test_a_good_token_speaks_for_its_tenant_and_role(algorithm: str) -> None:
    identity = make_tokens().verify(signed(algorithm), plane=Plane.DATA)
    assert (identity.means, identity.name, identity.key_id) == (Means.JWT, "corp", "jwt:corp")
    assert (identity.tenant_name, identity.role) == ("acme", Role.SEARCH)
    assert identity.scopes == {Scope.RERANK, Scope.SESSIONS, Scope.USAGE}
    assert (identity.subject, identity.jti) == ("alice", "token-1")


def test_of_several_roles_the_first_of_the_file_on_that_plane_counts() -> None:
    token = signed(groups=["searchers", "admins", "auditors"])
    assert make_tokens().verify(token, plane=Plane.ADMIN).role == Role.AUDITOR
    assert make_tokens().verify(token, plane=Plane.DATA).role == Role.SEARCH
    assert make_tokens().verify(signed(groups="admins"), plane=Plane.DATA).role == Role.TENANT_ADMIN


def test_what_is_fixed_by_the_file_is_not_asked_of_the_token() -> None:
    tokens = make_tokens(
        tenant="fixed", tenant_claim=None, role=Role.SEARCH, role_claim=None, scopes=frozenset({Scope.RERANK})
    )
    identity = tokens.verify(signed(org=None, groups=None), plane=Plane.DATA)
    assert (identity.tenant_name, identity.role, identity.scopes) == (
        "fixed",
        Role.SEARCH,
        frozenset({Scope.RERANK}),
    )


def test_mapped_tenants_are_the_only_ones() -> None:
    tokens = make_tokens(tenants={"org-17": "acme"})
    assert tokens.verify(signed(org="org-17"), plane=Plane.DATA).tenant_name == "acme"
    assert reason(signed(org="acme"), tenants={"org-17": "acme"}) == "token_tenant"


def test_without_a_kid_the_only_key_that_fits_is_taken() -> None:
    assert (
        make_tokens()
        .verify(jwt.encode(claims(), ED, algorithm="EdDSA", headers={}), plane=Plane.DATA)
        .subject
        == "alice"
    )


@pytest.mark.parametrize("typ", ["JWT", "at+jwt", "application/at+jwt", "jwt"])
def test_types_of_access_tokens_are_taken(typ: str) -> None:
    make_tokens().verify(signed(headers={"typ": typ}), plane=Plane.DATA)


def test_a_clock_may_be_a_little_off() -> None:
    now = int(time.time())
    make_tokens(leeway_s=60).verify(signed(iat=now + 40, nbf=now + 40, exp=now + 300), plane=Plane.DATA)


# -- not believed -----------------------------------------------------------------------------------------------


def test_no_algorithm_is_no_signature() -> None:
    for algorithm in ("none", "None", "NONE", "nOnE", ""):
        header = {"alg": algorithm, "kid": "p256"}
        assert reason(f"{segment(header)}.{segment(claims())}.") == "token_malformed"
        assert reason(f"{segment(header)}.{segment(claims())}.{segment(b'x')}") == "token_algorithm"


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
def test_a_public_key_is_no_shared_secret(algorithm: str) -> None:
    for public in (RSA.public_key(), P256.public_key()):
        for secret in (
            public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
            public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        ):
            told = f"{segment({'alg': algorithm, 'kid': 'rsa'})}.{segment(claims())}"
            mac = hmac.digest(secret, told.encode(), getattr(hashlib, f"sha{algorithm[2:]}"))
            assert reason(f"{told}.{segment(mac)}") == "token_algorithm"


def test_an_algorithm_that_the_issuer_does_not_use_is_refused_although_the_signature_is_good() -> None:
    assert reason(signed("RS256"), algorithms=frozenset({"ES256"})) == "token_algorithm"


def test_a_key_signs_in_its_own_algorithm_alone() -> None:
    assert reason(jwt.encode(claims(), P384, algorithm="ES384", headers={"kid": "p256"})) == "token_key"
    assert reason(jwt.encode(claims(), RSA, algorithm="RS256", headers={"kid": "p256"})) == "token_key"
    told = f"{segment({'alg': 'ES256', 'kid': 'p384'})}.{segment(claims())}"
    assert reason(f"{told}.{segment(b'0' * 64)}") == "token_key"
    assert (
        reason(jwt.encode(claims(), OTHER_RSA, algorithm="RS256", headers={"kid": "encryption"}))
        == "token_key"
    )


@pytest.mark.parametrize("algorithm", list(SIGNERS))
def test_a_signature_that_is_cut_longer_another_or_of_something_else_is_refused(algorithm: str) -> None:
    head, body, signature = signed(algorithm).split(".")
    raw = base64.urlsafe_b64decode(signature + "==")
    flipped = bytes([raw[0] ^ 1]) + raw[1:]
    for spoiled in (raw[:-1], raw[: len(raw) // 2], raw[:1], raw + b"\0", b"\0" * len(raw), flipped):
        assert reason(f"{head}.{body}.{segment(spoiled)}") in ("token_signature", "token_claims")
    other = segment(claims(org="beta"))
    assert reason(f"{head}.{other}.{signature}") in ("token_signature", "token_claims")


def test_a_signature_by_another_key_of_that_name_is_refused() -> None:
    assert (
        reason(jwt.encode(claims(), OTHER_RSA, algorithm="RS256", headers={"kid": "rsa"}))
        == "token_signature"
    )


@pytest.mark.parametrize(
    "header",
    [
        {"jwk": jwk(OTHER_RSA, "mine")},
        {"jku": "https://evil.example/keys"},
        {"x5u": "https://evil.example/chain"},
        {"x5c": ["MIIB"]},
        {"crit": ["exp"]},
        {"crit": ["b64"], "b64": False},
        {"b64": False},
        {"zip": "DEF"},
    ],
    ids=lambda header: "+".join(header),
)
def test_a_header_brings_no_keys_and_no_rules(header: dict[str, Any]) -> None:
    assert reason(sign_raw({"alg": "ES256", "kid": "p256", **header}, claims())) == "token_header"


@pytest.mark.parametrize(
    "kid", ["../../etc/passwd", "p256' or 1=1 --", "P256", "p256 ", "https://evil.example/"]
)
def test_a_kid_is_a_name_and_nothing_else(kid: str) -> None:
    tokens = make_tokens()
    with pytest.raises(TokenInvalid) as caught:
        tokens.verify(signed(headers={"kid": kid}), plane=Plane.DATA)
    assert caught.value.reason == "token_key"
    assert tokens.wanted == {"corp"}, "the issuer may have a new key: it is asked beside the requests"


@pytest.mark.parametrize("kid", [1, None, ["p256"], {"a": 1}, "", "k" * 257])
def test_a_kid_of_another_type_is_refused(kid: object) -> None:
    assert reason(sign_raw({"alg": "ES256", "kid": kid}, claims())) == "token_header"


@pytest.mark.parametrize("typ", ["id+jwt", "JOSE", "dpop+jwt", 7, ["JWT"]])
def test_another_type_of_token_is_refused(typ: object) -> None:
    assert reason(sign_raw({"alg": "ES256", "kid": "p256", "typ": typ}, claims())) == "token_type"


def test_a_member_that_is_repeated_is_refused_in_header_and_claims() -> None:
    body = json.dumps(claims())
    twice = f'{{"org": "beta", {body[1:]}'.encode()
    assert reason(sign_raw({"alg": "ES256", "kid": "p256"}, twice)) == "token_malformed"
    assert reason(sign_raw(b'{"alg": "none", "alg": "ES256", "kid": "p256"}', claims())) == "token_malformed"
    nested = json.dumps(claims(extra={}))[:-1].encode() + b', "more": {"a": 1, "a": 2}}'
    assert reason(sign_raw({"alg": "ES256", "kid": "p256"}, nested)) == "token_malformed"


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"iss": "https://login.example.com"}, "token_issuer"),
        ({"iss": None}, "token_claims"),
        ({"iss": ["https://login.example.com/"]}, "token_claims"),
        ({"aud": "another"}, "token_claims"),
        ({"aud": None}, "token_claims"),
        ({"aud": 7}, "token_claims"),
        ({"exp": None}, "token_claims"),
        ({"exp": "9999999999"}, "token_claims"),
        ({"exp": True}, "token_expired"),
        ({"exp": 1}, "token_expired"),
        ({"exp": 9_999_999_999}, "token_lifetime"),
        ({"iat": None}, "token_claims"),
        ({"iat": 9_999_999_999}, "token_claims"),
        ({"iat": 1}, "token_lifetime"),
        ({"nbf": 9_999_999_999}, "token_claims"),
        ({"nbf": "now"}, "token_claims"),
        ({"sub": None}, "token_claims"),
        ({"sub": ""}, "token_claims"),
        ({"sub": "s" * 257}, "token_claims"),
        ({"jti": None}, "token_claims"),
        ({"jti": 7}, "token_claims"),
        ({"org": None}, "token_claims"),
        ({"org": ["acme"]}, "token_claims"),
        ({"groups": None}, "token_role"),
        ({"groups": ["cooks"]}, "token_role"),
        ({"groups": [["searchers"]]}, "token_role"),
        ({"groups": {"searchers": True}}, "token_role"),
    ],
)
def test_a_claim_that_is_missing_wrong_or_of_another_type_is_refused(more: dict[str, Any], why: str) -> None:
    told = sign_raw({"alg": "ES256", "kid": "p256"}, claims(**more))
    assert reason(told) == why


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_number_is_refused(number: str) -> None:
    body = json.dumps(claims()).replace(str(claims()["exp"]), number).encode()
    assert reason(sign_raw({"alg": "ES256", "kid": "p256"}, body)) == "token_malformed"


def test_a_number_beyond_all_numbers_is_refused() -> None:
    body = json.dumps({**claims(), "exp": 0}).replace('"exp": 0', '"exp": 1e999').encode()
    assert reason(sign_raw({"alg": "ES256", "kid": "p256"}, body)).startswith("token_")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda token: "",
        lambda token: ".",
        lambda token: "..",
        lambda token: token.rpartition(".")[0],
        lambda token: token + ".",
        lambda token: token + "." + token,
        lambda token: token + "=",
        lambda token: token + "\n",
        lambda token: token.replace(".", ". ", 1),
        lambda token: token.replace(".", ".!", 1),
        lambda token: "x" * (TOKEN_LENGTH + 1),
        lambda token: "[" * 4000 + "." + token,
        lambda token: segment(b"[" * 4000) + "." + token.partition(".")[2],
        lambda token: segment(b"\xff\xfe") + "." + token.partition(".")[2],
        lambda token: segment([]) + "." + token.partition(".")[2],
        lambda token: token[:-1] + ("B" if token[-1] != "B" else "C"),
    ],
)
def test_another_shape_is_refused(spoil: Any) -> None:
    assert reason(spoil(signed())) in ("token_malformed", "token_signature", "token_claims")


def test_without_its_issuers_keys_a_token_is_refused_for_now() -> None:
    tokens = Tokens((issuer(),))
    with pytest.raises(KeySetMissing):
        tokens.verify(signed(), plane=Plane.DATA)
    tokens.give("corp", read_key_set(json.dumps({"keys": KEY_SET}).encode()))
    tokens.verify(signed(), plane=Plane.DATA)
    tokens.give("corp", None)
    with pytest.raises(KeySetMissing):
        tokens.verify(signed(), plane=Plane.DATA)


# -- key sets ---------------------------------------------------------------------------------------------------


def test_keys_for_other_things_are_left_out() -> None:
    assert sorted(key.kid for key in read_key_set(json.dumps({"keys": KEY_SET}).encode())) == [
        "ed",
        "p256",
        "p384",
        "rsa",
    ]


def private(key: Any) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(key))
    return told


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ([], "no key that we can use"),
        ([{"kty": "oct", "k": "c2VjcmV0", "kid": "a"}], "no key that we can use"),
        ([private(P256)], "private key lies open"),
        ([jwk(RSA, "a"), jwk(OTHER_RSA, "a")], "two keys of one name"),
        ([jwk(rsa.generate_private_key(65537, 1024), "a")], "weaker than 2048"),
        ([{**jwk(RSA, "a"), "e": "Aw"}], "weaker than 2048"),
        ([{**jwk(P256, "a"), "crv": "P-384"}], "cannot be read"),
        ([{**jwk(P256, "a"), "x": jwk(P384, "b")["x"]}], "cannot be read"),
        ([{**jwk(P256, "a"), "y": jwk(P256, "b")["x"]}], "cannot be read"),
        ([{**jwk(P256, "a"), "kid": 7}], "not a text"),
        (["a"], "not an object"),
        ([jwk(ED, "a")] * 101, "at most 100"),
    ],
)
def test_a_key_set_that_is_not_good_is_refused_whole(keys: list[Any], why: str) -> None:
    with pytest.raises(KeySetInvalid, match=why):
        read_key_set(json.dumps({"keys": keys}).encode())


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"keys": {}}', b'{"keys": [], "keys": []}', b"x" * 600_000]
)
def test_what_is_no_key_set_is_refused(body: bytes) -> None:
    with pytest.raises(KeySetInvalid):
        read_key_set(body)
