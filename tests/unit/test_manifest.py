"""Signed manifests: those of the reference implementation, our own, and what is none."""

from __future__ import annotations

import hashlib
import json
from base64 import b64decode, b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from models import ModelRefused
from models.manifest import (
    IGNORED,
    Manifest,
    PrivateKey,
    _pae,
    _sign,
    is_plain,
    open_bundle,
    public_der,
    read_private_key,
    read_public_key,
    sign,
)

VECTORS: Any = json.loads((Path(__file__).parents[1] / "assets" / "model_signing_vectors.json").read_text())
REFERENCE_KEY = read_public_key(VECTORS["public_key"].encode())
FILES = {"config.json": "1" * 64, "a/b.json": "2" * 64, "model.safetensors": "3" * 64}
KEYS: dict[str, PrivateKey] = {
    "ed25519": ed25519.Ed25519PrivateKey.generate(),
    "p-256": ec.generate_private_key(ec.SECP256R1()),
    "p-384": ec.generate_private_key(ec.SECP384R1()),
    "p-521": ec.generate_private_key(ec.SECP521R1()),
}
KEY = KEYS["ed25519"]


def test_a_model_that_the_reference_implementation_has_signed_is_what_it_was() -> None:
    manifest = open_bundle(json.dumps(VECTORS["signature"]).encode(), REFERENCE_KEY)
    for name, text in VECTORS["files"].items():
        if not manifest.ignores(name):
            assert manifest.files[name] == hashlib.sha256(text.encode()).hexdigest()
    assert set(VECTORS["files"]) == set(manifest.files) | {"ignore-me"}
    assert open_bundle(json.dumps(VECTORS["valid"]).encode(), REFERENCE_KEY).digest == manifest.digest


@pytest.mark.parametrize("name", sorted(VECTORS["invalid"]))
def test_what_the_specification_calls_invalid_is_refused(name: str) -> None:
    with pytest.raises(ModelRefused):
        open_bundle(VECTORS["invalid"][name].encode(), REFERENCE_KEY)


@pytest.mark.parametrize("kind", sorted(KEYS))
def test_what_was_signed_is_read_again_and_by_no_other_key(kind: str) -> None:
    key = KEYS[kind]
    manifest = Manifest(FILES, "2026-11 release")
    bundle = sign(manifest, key, name="my-model")
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for form in (pem, public_der(key.public_key())):
        assert open_bundle(bundle, read_public_key(form)) == manifest
    for other in KEYS:
        if other != kind:
            with pytest.raises(ModelRefused, match="another key"):
                open_bundle(bundle, KEYS[other].public_key())


def test_the_root_digest_is_over_the_files_digests_in_the_order_of_their_names() -> None:
    digests = bytes.fromhex("2" * 64 + "1" * 64 + "3" * 64)
    assert Manifest(FILES).digest == hashlib.sha256(digests).hexdigest()


def test_what_is_signed_is_the_envelopes_type_and_payload() -> None:
    """The example of DSSE's protocol.md, with our type."""
    assert _pae(b"hello world") == b"DSSEv1 28 application/vnd.in-toto+json 11 hello world"


def resign(change: Callable[[dict[str, Any]], object]) -> bytes:
    """A bundle whose statement was changed before it was signed."""
    bundle = json.loads(sign(Manifest(FILES), KEY, name="m"))
    statement = json.loads(b64decode(bundle["dsseEnvelope"]["payload"]))
    change(statement)
    payload = json.dumps(statement).encode()
    bundle["dsseEnvelope"]["payload"] = b64encode(payload).decode()
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = b64encode(_sign(KEY, _pae(payload))).decode()
    return json.dumps(bundle).encode()


def resources(statement: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = statement["predicate"]["resources"]
    return found


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda each: each.update(predicateType="https://slsa.dev/provenance/v1"), "v1.0"),
        (lambda each: each.update(_type="https://in-toto.io/Statement/v0.1"), "v1.0"),
        (lambda each: resources(each).clear(), "no files"),
        (lambda each: resources(each).append(resources(each)[0]), "twice"),
        (lambda each: resources(each)[0].update(name="../config.json"), "name"),
        (lambda each: resources(each)[0].update(name="/etc/passwd"), "name"),
        (lambda each: resources(each)[0].update(name="a//b.json"), "name"),
        (lambda each: resources(each)[0].update(algorithm="blake2b"), "SHA-256"),
        (lambda each: resources(each)[0].update(digest="F" * 64), "SHA-256"),
        (lambda each: resources(each)[0].update(digest="4" * 64), "root digest"),
        (lambda each: resources(each).pop(), "root digest"),
        (lambda each: each["predicate"]["serialization"].update(method="shards"), "not supported"),
        (lambda each: each["predicate"]["serialization"].update(hash_type="blake3"), "not supported"),
        (lambda each: each["predicate"]["serialization"].update(allow_symlinks=True), "not supported"),
        (lambda each: each["predicate"]["serialization"].update(ignore_paths=["../x"]), "ignore"),
        (lambda each: each["subject"].append(each["subject"][0]), "many"),
        (lambda each: each["subject"][0].update(annotations={"revision": "a\nb"}), "revision"),
        (lambda each: each.update(predicate=[]), "cannot be read"),
    ],
)
def test_a_statement_that_is_not_understood_is_refused_even_if_it_is_signed(
    change: Callable[[dict[str, Any]], object], why: str
) -> None:
    with pytest.raises(ModelRefused, match=why):
        open_bundle(resign(change), KEY.public_key())


@pytest.mark.parametrize(
    "change",
    [
        lambda each: each["dsseEnvelope"].update(payload=b64encode(b"{}").decode()),
        lambda each: each["dsseEnvelope"]["signatures"][0].update(sig=b64encode(bytes(64)).decode()),
        lambda each: each["dsseEnvelope"]["signatures"].clear(),
        lambda each: each["dsseEnvelope"].update(payloadType="application/json"),
        lambda each: each["dsseEnvelope"].update(payload="%%%"),
        lambda each: each.update(mediaType="application/json"),
        lambda each: each.update(verificationMaterial={"certificate": {}}),
        lambda each: each.pop("dsseEnvelope"),
    ],
)
def test_a_changed_bundle_is_refused(change: Callable[[dict[str, Any]], object]) -> None:
    bundle = json.loads(sign(Manifest(FILES), KEY, name="m"))
    change(bundle)
    with pytest.raises(ModelRefused):
        open_bundle(json.dumps(bundle).encode(), KEY.public_key())


def test_a_key_that_stands_twice_is_refused() -> None:
    bundle = sign(Manifest(FILES), KEY, name="m")
    with pytest.raises(ModelRefused, match="twice"):
        open_bundle(bundle.replace(b'"mediaType"', b'"mediaType": "x", "mediaType"', 1), KEY.public_key())
    with pytest.raises(ModelRefused):
        open_bundle(b"[" * 100_000, KEY.public_key())


def test_keys_of_other_kinds_are_refused() -> None:
    for key in (rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP256K1())):
        with pytest.raises(ModelRefused, match="Ed25519"):
            read_public_key(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        with pytest.raises(ModelRefused, match="Ed25519"):
            read_private_key(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    private = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    assert public_der(read_private_key(private, b"secret").public_key()) == public_der(KEY.public_key())
    for password in (None, b"another"):
        with pytest.raises(ModelRefused, match="password"):
            read_private_key(private, password)
    with pytest.raises(ModelRefused, match="public key"):
        read_public_key(private)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        *((each, True) for each in ("config.json", "a/b/c.json", ".hidden", "with space")),
        *(
            (each, False)
            for each in ("", ".", "..", "../a", "a/../b", "/a", "a/", "./a", "a//b", "a\\b", "a\0b", 7)
        ),
    ],
)
def test_a_name_is_a_path_inside_the_folder_written_one_way(name: object, plain: bool) -> None:
    assert is_plain(name) is plain


def test_what_is_ignored_is_at_the_top_alone() -> None:
    manifest = Manifest(FILES, ignored=("cache",))
    assert all(manifest.ignores(each) for each in (*IGNORED, ".git/config", "cache", "cache/x"))
    assert not any(manifest.ignores(each) for each in ("a/.git", "cached", "a/cache"))
