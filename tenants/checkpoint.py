"""What the log signs and hands out, as text that other programs read: C2SP checkpoints, cosignatures, proofs.

A checkpoint is a signed note (C2SP signed-note) of three lines: the log's origin, the tree's size, its root. A
witness adds a cosignature/v1, with the time when it saw that the tree had only grown. A receipt is a tlog-proof: the
entry's index, its inclusion proof, and such a checkpoint, verifiable without asking anybody. A submission is what a
log sends to a witness (C2SP tlog-witness): the size that the witness knows, the consistency proof, the checkpoint.

Everything is parsed strictly: one way to write each thing, and no other is read. Whatever does not hold raises
`ProofInvalid`.
"""

from __future__ import annotations

import hashlib
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tenants.errors import ProofInvalid
from tenants.merkle import HASH_BYTES, LARGEST

ED25519 = 0x01
COSIGNATURE = 0x04
"""Timestamped Ed25519 cosignature of a witness (C2SP tlog-cosignature, cosignature/v1)."""
PROOF_HEADER = "c2sp.org/tlog-proof@v1"
SIGNATURES_MOST = 32
NOTE_BYTES_MOST = 64 * 1024
PROOF_NODES_MOST = 63
KEY_ID_BYTES = 4


@dataclass(frozen=True, slots=True)
class VerifyKey:
    """A public key that one trusts, with the name that it signs as."""

    name: str
    kind: int
    public: bytes
    """32 bytes, RFC 8032."""

    @classmethod
    def parse(cls, text: str) -> VerifyKey:
        """Of `name+hex id+base64(kind ‖ public key)`. Raises `ProofInvalid`."""
        parts = text.split("+", 2)
        if len(parts) != 3:
            raise ProofInvalid("not a verifier key")
        encoded = read_base64(parts[2])
        key = cls(parts[0], encoded[0] if encoded else 0, encoded[1:])
        if key.kind not in (ED25519, COSIGNATURE) or len(key.public) != 32 or key.text != text:
            raise ProofInvalid("not a verifier key")
        _check_name(key.name)
        return key

    @property
    def id(self) -> bytes:
        """SHA-256(name ‖ LF ‖ kind ‖ public key), the first four bytes."""
        material = self.name.encode() + b"\n" + bytes([self.kind]) + self.public
        return hashlib.sha256(material).digest()[:KEY_ID_BYTES]

    @property
    def text(self) -> str:
        return f"{self.name}+{self.id.hex()}+{write_base64(bytes([self.kind]) + self.public)}"

    def verify(self, signature: bytes, text: str) -> int | None:
        """The time of a cosignature in seconds since 1970, None of a log's own signature. Raises `ProofInvalid`."""
        at_s = None
        if self.kind == COSIGNATURE:
            at_s, signature = int.from_bytes(signature[:8], "big"), signature[8:]
            text = _cosigned(at_s, text)
        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(signature, text.encode())
        except (InvalidSignature, ValueError) as exc:
            raise ProofInvalid("a signature of a known key does not hold") from exc
        return at_s


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A tree of so many leaves has that root."""

    origin: str
    size: int
    root: bytes

    @property
    def text(self) -> str:
        """What is signed."""
        return f"{self.origin}\n{self.size}\n{write_base64(self.root)}\n"

    @classmethod
    def parse(cls, text: str) -> Checkpoint:
        """Of a note's text. Extension lines, which this log never writes, are refused. Raises `ProofInvalid`."""
        lines = text.split("\n")
        if len(lines) != 4 or lines[3]:
            raise ProofInvalid("a checkpoint has three lines")
        checkpoint = cls(lines[0], read_decimal(lines[1]), read_base64(lines[2], HASH_BYTES))
        _check_name(checkpoint.origin)
        return checkpoint


class Signer:
    """An Ed25519 key that signs as `name`: the log's own."""

    kind: ClassVar[int] = ED25519

    def __init__(self, name: str, seed: bytes) -> None:
        """`seed`: the 32 bytes of an RFC 8032 private key."""
        _check_name(name)
        self._private = Ed25519PrivateKey.from_private_bytes(seed)
        self.key = VerifyKey(name, self.kind, self._private.public_key().public_bytes_raw())

    def sign(self, checkpoint: Checkpoint) -> str:
        """The checkpoint as a signed note."""
        return self._note(checkpoint.text)

    def sign_text(self, text: str) -> str:
        """Another text, of lines, as a signed note. Raises `ValueError` where it could pass for a checkpoint."""
        if text.startswith(f"{self.key.name}\n") or not text.endswith("\n") or "\n\n" in text:
            raise ValueError("not a text of lines, or one that begins as the log's checkpoints do")
        return self._note(text)

    def _note(self, text: str) -> str:
        return f"{text}\n{_line(self.key, self._private.sign(text.encode()))}"


class Cosigner:
    """An Ed25519 key that adds cosignatures as `name`: a witness's."""

    kind: ClassVar[int] = COSIGNATURE

    def __init__(self, name: str, seed: bytes) -> None:
        """`seed` as `Signer` takes it. One seed never serves both."""
        _check_name(name)
        self._private = Ed25519PrivateKey.from_private_bytes(seed)
        self.key = VerifyKey(name, self.kind, self._private.public_key().public_bytes_raw())

    def cosign(self, checkpoint: Checkpoint, *, at_s: int) -> str:
        """One signature line: seen to be consistent at `at_s`, in seconds since 1970."""
        signature = self._private.sign(_cosigned(at_s, checkpoint.text).encode())
        return _line(self.key, at_s.to_bytes(8, "big") + signature)


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint whose signature by a trusted key holds."""

    checkpoint: Checkpoint
    signers: tuple[VerifyKey, ...]
    times_s: tuple[int, ...] = ()
    """Of the cosignatures, in their order."""


def open_checkpoint(note: str, keys: Iterable[VerifyKey], *, origin: str | None = None) -> Opened:
    """The checkpoint of a signed note. Raises `ProofInvalid`: no key of ours signed it, or one of ours does not hold.

    Signatures of other keys are passed over. Where `origin` is given, a key of that name must be among the signers.
    """
    text, lines = split_note(note)
    known = {(key.name, key.id): key for key in keys}
    signers, times = [], []
    for line in lines:
        name, signature = _parse_line(line)
        key = known.get((name, signature[:KEY_ID_BYTES]))
        if key is None:
            continue
        at_s = key.verify(signature[KEY_ID_BYTES:], text)
        if at_s is not None:
            times.append(at_s)
        signers.append(key)
    if not signers:
        raise ProofInvalid("no trusted key has signed this")
    checkpoint = Checkpoint.parse(text)
    if origin is not None and (
        checkpoint.origin != origin or not any(key.name == origin and key.kind == ED25519 for key in signers)
    ):
        raise ProofInvalid("the log itself has not signed this")
    return Opened(checkpoint, tuple(signers), tuple(times))


def open_note(note: str, key: VerifyKey) -> str:
    """The text of a note that `key` has signed, and nobody else. Raises `ProofInvalid`."""
    text, lines = split_note(note)
    signatures = [_parse_line(line) for line in lines]
    if [(name, signature[:KEY_ID_BYTES]) for name, signature in signatures] != [(key.name, key.id)]:
        raise ProofInvalid("not signed by the one key that signs this")
    key.verify(signatures[0][1][KEY_ID_BYTES:], text)
    return text


def split_note(note: str) -> tuple[str, tuple[str, ...]]:
    """A note's text and its signature lines, without their ends. Nothing is verified. Raises `ProofInvalid`."""
    text, blank, signatures = note.rpartition("\n\n")
    if (
        not blank
        or not text
        or not signatures.endswith("\n")
        or len(note.encode("utf-8", "surrogatepass")) > NOTE_BYTES_MOST
        or any((char < " " and char != "\n") or "\ud800" <= char <= "\udfff" for char in note)
    ):
        raise ProofInvalid("not a signed note")
    lines = tuple(signatures[:-1].split("\n"))
    if len(lines) > SIGNATURES_MOST:
        raise ProofInvalid("too many signatures")
    for line in lines:
        _parse_line(line)
    return f"{text}\n", lines


@dataclass(frozen=True, slots=True)
class Proof:
    """A tlog-proof: entry number `index` is in the tree that `note` tells of."""

    index: int
    nodes: tuple[bytes, ...]
    note: str = field(repr=False)
    extra: bytes = b""
    """Here the leaf's data. It is not to be trusted before its hash was proven to be in the tree."""

    @property
    def text(self) -> str:
        extra = f"extra {write_base64(self.extra)}\n" if self.extra else ""
        nodes = "".join(f"{write_base64(node)}\n" for node in self.nodes)
        return f"{PROOF_HEADER}\n{extra}index {self.index}\n{nodes}\n{self.note}"

    @classmethod
    def parse(cls, text: str) -> Proof:
        """Raises `ProofInvalid`. Nothing is verified."""
        head, blank, note = text.partition("\n\n")
        lines = head.split("\n")
        if not blank or lines.pop(0) != PROOF_HEADER or not lines:
            raise ProofInvalid("not a proof")
        extra = b""
        if lines[0].startswith("extra "):
            extra = read_base64(lines.pop(0).removeprefix("extra "))
        if not lines or not lines[0].startswith("index "):
            raise ProofInvalid("a proof without an index")
        index = read_decimal(lines.pop(0).removeprefix("index "))
        split_note(note)
        return cls(index, read_nodes(lines), note, extra)


@dataclass(frozen=True, slots=True)
class Submission:
    """The body of `add-checkpoint`: the tree of `old` leaves is, by `nodes`, the beginning of the one that `note` tells of."""

    old: int
    nodes: tuple[bytes, ...]
    note: str = field(repr=False)

    @property
    def text(self) -> str:
        nodes = "".join(f"{write_base64(node)}\n" for node in self.nodes)
        return f"old {self.old}\n{nodes}\n{self.note}"

    @classmethod
    def parse(cls, text: str) -> Submission:
        """Raises `ProofInvalid`. Nothing is verified."""
        head, blank, note = text.partition("\n\n")
        lines = head.split("\n")
        if not blank or not lines[0].startswith("old "):
            raise ProofInvalid("not a checkpoint with a proof")
        old = read_decimal(lines.pop(0).removeprefix("old "))
        split_note(note)
        return cls(old, read_nodes(lines), note)


def read_nodes(lines: Sequence[str]) -> tuple[bytes, ...]:
    """Hashes in base64, one a line. Raises `ProofInvalid`."""
    if len(lines) > PROOF_NODES_MOST:
        raise ProofInvalid("a proof has 63 hashes at most")
    return tuple(read_base64(line, HASH_BYTES) for line in lines)


def read_decimal(text: str) -> int:
    """ASCII decimal without leading zeros, below 2^63. Raises `ProofInvalid`."""
    if (
        not (text.isascii() and text.isdigit())
        or len(text) > 19
        or str(int(text)) != text
        or int(text) > LARGEST
    ):
        raise ProofInvalid("not a number as it is to be written")
    return int(text)


def read_base64(text: str, length: int | None = None) -> bytes:
    """Standard base64 with padding, in the one way to write it. Raises `ProofInvalid`."""
    try:
        found = b64decode(text.encode("ascii"), validate=True)
    except (Base64Error, UnicodeEncodeError, ValueError) as exc:
        raise ProofInvalid("not base64") from exc
    if write_base64(found) != text or (length is not None and len(found) != length):
        raise ProofInvalid("not base64 as it is to be written")
    return found


def write_base64(data: bytes) -> str:
    return b64encode(data).decode()


def _cosigned(at_s: int, text: str) -> str:
    """What a witness signs: never what a log does, so neither passes for the other."""
    return f"cosignature/v1\ntime {at_s}\n{text}"


def _line(key: VerifyKey, signature: bytes) -> str:
    return f"— {key.name} {write_base64(key.id + signature)}\n"


def _parse_line(line: str) -> tuple[str, bytes]:
    parts = line.split(" ")
    if len(parts) != 3 or parts[0] != "—":
        raise ProofInvalid("not a signature line")
    _check_name(parts[1])
    signature = read_base64(parts[2])
    if len(signature) <= KEY_ID_BYTES:
        raise ProofInvalid("not a signature line")
    return parts[1], signature


def _check_name(name: str) -> None:
    if not name or "+" in name or not name.isprintable() or any(char.isspace() for char in name):
        raise ProofInvalid("not a key's name")
