"""A model's files and who answers for them: OpenSSF model signing, v1.0 (github.com/ossf/model-signing-spec).

A manifest says which files a model has, and the SHA-256 of each. Signed it is a Sigstore bundle: a DSSE envelope
around an in-toto statement whose predicate lists the files. Of the specification there is what a key of one's own
needs: the method `key` over ECDSA keys, the serialization `files`, SHA-256, no links. Ed25519 keys, which it does not
list, work here too. A revision that the signer gives is an annotation of the statement's subject. Free of torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512, HashAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
    load_pem_private_key,
    load_pem_public_key,
)

from models import ModelRefused

SIGNATURE = "model.sig"
"""The bundle's name in the model's folder, where it is not elsewhere."""
IGNORED = (".git", ".gitattributes", ".github", ".gitignore")
"""What the specification leaves out, at the top of the folder alone. Nothing of it is ever read."""
BUNDLE_BYTES_MOST = 16 << 20

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"

_HASHES: dict[str, HashAlgorithm] = {"secp256r1": SHA256(), "secp384r1": SHA384(), "secp521r1": SHA512()}
_SHA256 = re.compile(r"[0-9a-f]{64}")

PrivateKey = Ed25519PrivateKey | EllipticCurvePrivateKey
PublicKey = Ed25519PublicKey | EllipticCurvePublicKey


@dataclass(frozen=True, slots=True)
class Manifest:
    """A model's files by their place in its folder, each with its SHA-256 in hex.

    `ignored` are paths, files or folders, that the signer left out.
    """

    files: Mapping[str, str]
    revision: str = ""
    ignored: tuple[str, ...] = IGNORED

    @property
    def digest(self) -> str:
        """The root digest (section 6.5.1): SHA-256, in hex, over the files' digests in the order of their names."""
        return hashlib.sha256(
            b"".join(bytes.fromhex(self.files[name]) for name in sorted(self.files))
        ).hexdigest()

    def ignores(self, name: str) -> bool:
        path = PurePosixPath(name)
        return any(path.is_relative_to(each) for each in (*IGNORED, *self.ignored))


def sign(manifest: Manifest, key: PrivateKey, *, name: str) -> bytes:
    """The signed bundle, as JSON; `name` is the model's, for people to read."""
    subject: dict[str, Any] = {"name": name, "digest": {"sha256": manifest.digest}}
    if manifest.revision:
        subject["annotations"] = {"revision": manifest.revision}
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [subject],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "resources": [
                {"name": each, "digest": manifest.files[each], "algorithm": "sha256"}
                for each in sorted(manifest.files)
            ],
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": list(manifest.ignored),
            },
        },
    }
    payload = json.dumps(statement, separators=(",", ":")).encode()
    bundle = {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": _hint(key.public_key())}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": b64encode(_sign(key, _pae(payload))).decode(), "keyid": ""}],
        },
    }
    return json.dumps(bundle, indent=2).encode() + b"\n"


def open_bundle(bundle: bytes, key: PublicKey) -> Manifest:
    """What `key` has signed. Raises `ModelRefused`: it has not, or says something that is not understood here."""
    try:
        return _open(bundle, key)
    except InvalidSignature:
        raise ModelRefused("the signature of the model's manifest does not hold") from None
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, Base64Error, RecursionError) as exc:
        raise ModelRefused(f"the model's manifest cannot be read: {exc or type(exc).__name__}") from exc


def read_public_key(data: bytes) -> PublicKey:
    """A public key in PEM, or in DER as `public_der` writes it. Raises `ModelRefused` for another kind of key."""
    try:
        key = load_pem_public_key(data) if b"-----BEGIN" in data else load_der_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise ModelRefused(
            "the key that models are signed with cannot be read: it should be a public key"
        ) from exc
    if isinstance(key, Ed25519PublicKey) or (
        isinstance(key, EllipticCurvePublicKey) and key.curve.name in _HASHES
    ):
        return key
    raise ModelRefused("models are signed with Ed25519, or ECDSA on P-256, P-384 or P-521")


def read_private_key(data: bytes, password: bytes | None = None) -> PrivateKey:
    """A private key in PEM. Raises `ModelRefused` for another kind of key, or where it cannot be opened."""
    try:
        key = load_pem_private_key(data, password)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise ModelRefused("the private key cannot be read, or needs another password") from exc
    if isinstance(key, Ed25519PrivateKey) or (
        isinstance(key, EllipticCurvePrivateKey) and key.curve.name in _HASHES
    ):
        return key
    raise ModelRefused("models are signed with Ed25519, or ECDSA on P-256, P-384 or P-521")


def public_der(key: PublicKey) -> bytes:
    """SubjectPublicKeyInfo (RFC 5280, section 4.1.2.7)."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _open(data: bytes, key: PublicKey) -> Manifest:
    if len(data) > BUNDLE_BYTES_MOST:
        raise ValueError("too long")
    bundle = _parse(data)
    if bundle["mediaType"] != MEDIA_TYPE:
        raise ValueError("not a Sigstore bundle v0.3")
    hint = bundle["verificationMaterial"]["publicKey"].get("hint")
    if hint is not None and hint != _hint(key):
        raise ModelRefused("the model is signed with another key")
    envelope = bundle["dsseEnvelope"]
    (signature,) = envelope["signatures"]  # a Sigstore bundle has one
    payload = b64decode(envelope["payload"], validate=True)
    if envelope["payloadType"] != PAYLOAD_TYPE:
        raise ValueError("not an in-toto statement")
    _verify(key, b64decode(signature["sig"], validate=True), _pae(payload))
    return _read_statement(_parse(payload))


def _read_statement(statement: Any) -> Manifest:
    if (statement["_type"], statement["predicateType"]) != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise ValueError("not a statement of model signing v1.0")
    (subject,) = statement["subject"]
    predicate = statement["predicate"]
    how = predicate["serialization"]
    if (how["method"], how["hash_type"]) != ("files", "sha256") or how["allow_symlinks"] is not False:
        raise ValueError(
            "files are listed in a way that is not supported: it takes whole files, SHA-256, no links"
        )
    files: dict[str, str] = {}
    for resource in predicate["resources"]:
        name, digest = resource["name"], resource["digest"]
        if resource["algorithm"] != "sha256" or not _SHA256.fullmatch(digest):
            raise ValueError("a digest is none of SHA-256")
        if not is_plain(name) or name in files:
            raise ValueError("a file's name is none, or stands twice")
        files[name] = digest
    ignored = tuple(how.get("ignore_paths", ()))
    if not files or not all(map(is_plain, ignored)):
        raise ValueError("no files, or a path to ignore that is none")
    revision = (subject.get("annotations") or {}).get("revision", "")
    if not isinstance(revision, str) or len(revision) > 200 or not revision.isprintable():
        raise ValueError("the revision is no short text")
    manifest = Manifest(files, revision, ignored)
    if subject["digest"]["sha256"] != manifest.digest:
        raise ValueError("the root digest is not that of the files")
    return manifest


def is_plain(name: object) -> bool:
    """Whether `name` is a path inside a folder, written the one way that section 6.1.2 knows."""
    if not isinstance(name, str) or "\0" in name or "\\" in name:
        return False
    path = PurePosixPath(name)
    return str(path) == name and name != "." and not path.is_absolute() and ".." not in path.parts


def _parse(data: bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key stands twice")
        return found

    return json.loads(data, object_pairs_hook=unique)


def _pae(payload: bytes) -> bytes:
    """What is signed (DSSE v1.0.2, signature definition)."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _hint(key: PublicKey) -> str:
    """How the reference implementation names a key: SHA-256 of its PEM."""
    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _sign(key: PrivateKey, data: bytes) -> bytes:
    if isinstance(key, Ed25519PrivateKey):
        return key.sign(data)
    return key.sign(data, ECDSA(_HASHES[key.curve.name]))


def _verify(key: PublicKey, signature: bytes, data: bytes) -> None:
    """Raises `InvalidSignature`."""
    if isinstance(key, Ed25519PublicKey):
        key.verify(signature, data)
    else:
        key.verify(signature, data, ECDSA(_HASHES[key.curve.name]))
