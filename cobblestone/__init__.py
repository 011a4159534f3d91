"""Streams sealed under a key: Cobblestone-256 of C2SP chunked-encryption (https://c2sp.org/chunked-encryption).

AES-256-GCM over chunks of 16 KiB, behind a salt and a commitment to key and context, both of HKDF-Expand with SHA-512.
A ciphertext opens under no other key or context; chunks that were moved, changed, cut off or appended are found.
`cryptography` does the work on streams; `Reader` is the specification's random access. Imports nothing of ours.
"""

from __future__ import annotations

import hmac
import io
from types import TracebackType
from typing import Final, Protocol, Self

from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

KEY_BYTES: Final = 32
CHUNK_BYTES: Final = 16_384
"""Of plain text in every chunk but the last, which is shorter."""

_SALT_BYTES = 24
_COMMITMENT_BYTES = 32
_HEADER_BYTES = _SALT_BYTES + _COMMITMENT_BYTES
_NONCE_BYTES = 12
_TAG_BYTES = 16
_SEALED_CHUNK_BYTES = CHUNK_BYTES + _TAG_BYTES
_INFO = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\0"
_PIECE_BYTES = 16 * _SEALED_CHUNK_BYTES
"""What a stream holds in memory at a time: more is slower, for it leaves the cache."""


class NotAuthentic(Exception):
    """This is not what was sealed under this key and context, or not all of it."""

    def __init__(self, why: str = "not what was sealed under this key and context, or not all of it") -> None:
        super().__init__(why)


class Readable(Protocol):
    """A binary file, pipe or socket file to read; `b""` is its end."""

    def read(self, size: int, /) -> bytes: ...


class Writable(Protocol):
    """A binary file or pipe; a raw one may take less than it is given, and says how much."""

    def write(self, data: memoryview, /) -> int: ...


def new_key() -> bytes:
    """32 random bytes. A key must be random: never a password."""
    return Cobblestone256Encryptor.generate_key()


def sealed_size(plain_bytes: int) -> int:
    """How many bytes a ciphertext of `plain_bytes` has: 56 more, and 16 more for each chunk."""
    return _HEADER_BYTES + plain_bytes + (plain_bytes // CHUNK_BYTES + 1) * _TAG_BYTES


def plain_size(sealed_bytes: int) -> int:
    """How many bytes a ciphertext of `sealed_bytes` opens to. Raises `NotAuthentic` for a size that none has."""
    whole, last = divmod(sealed_bytes - _HEADER_BYTES, _SEALED_CHUNK_BYTES)
    if whole < 0 or last < _TAG_BYTES:
        raise NotAuthentic("the ciphertext was cut short")
    return whole * CHUNK_BYTES + last - _TAG_BYTES


class Writer:
    """Seals what is written, into `target`: to be used as a context, and once.

    Where its block raises, the ciphertext is left without its end, and opens no more. Not thread-safe.
    """

    def __init__(self, target: Writable, key: bytes, context: bytes) -> None:
        """`context` says what this is, and where it belongs; it is not stored. Raises `ValueError` for another key size."""
        self._target = target
        self._encryptor = Cobblestone256Encryptor(key, context)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Seal `data`, of any length; its length. Raises what `target` raises."""
        pieces = memoryview(data).cast("B")
        for start in range(0, len(pieces), _PIECE_BYTES):
            _put(self._target, self._encryptor.update(pieces[start : start + _PIECE_BYTES]))
        return len(pieces)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            _put(self._target, self._encryptor.finalize())


def encrypt(source: Readable, target: Writable, key: bytes, context: bytes) -> int:
    """Seal `source`, to its end, into `target`; how many plain bytes there were. Raises what either of them raises."""
    count = 0
    with Writer(target, key, context) as writer:
        while len(data := source.read(_PIECE_BYTES)):  # a file that is not ready says None, which raises
            count += writer.write(data)
    return count


def decrypt(source: Readable, target: Writable, key: bytes, context: bytes) -> int:
    """Open `source`, to its end, into `target`; how many plain bytes there were.

    Each chunk is written once it is known to be authentic, and that it was the last at the very end. Where this raises,
    what was written is to be thrown away. Raises `NotAuthentic`, `ValueError` for another key size, and what `source`
    and `target` raise.
    """
    decryptor = Cobblestone256Decryptor(key, context)
    count = 0
    try:
        while len(data := source.read(_PIECE_BYTES)):
            count += _put(target, decryptor.update(data))
        count += _put(target, decryptor.finalize())
    except InvalidTag as exc:
        raise NotAuthentic from exc
    return count


class Reader(io.RawIOBase):
    """The plain bytes of a ciphertext, at any place: only the chunks that a read touches are opened.

    The length is known to be authentic from the start; the bytes of a chunk once they are read. Holds one chunk.
    `io.BufferedReader` around it makes small reads cheap. Not thread-safe.
    """

    def __init__(self, source: io.IOBase, key: bytes, context: bytes) -> None:
        """`source` is a seekable binary file that stays the caller's to close; nobody else moves in it.

        Raises `NotAuthentic`, and `ValueError` for another key size.
        """
        super().__init__()
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes")
        self._source = source
        self._place = 0
        self._chunk: tuple[int, bytes] | None = None
        sealed_bytes = source.seek(0, io.SEEK_END)
        self._size = plain_size(sealed_bytes)
        source.seek(0)
        header = self._read_sealed(_HEADER_BYTES)
        salt, commitment = header[:_SALT_BYTES], header[_SALT_BYTES:]
        length = KEY_BYTES + _NONCE_BYTES + _COMMITMENT_BYTES
        derived = HKDFExpand(SHA512(), length, _INFO + salt + context).derive(key)
        if not hmac.compare_digest(derived[-_COMMITMENT_BYTES:], commitment):
            raise NotAuthentic("sealed under another key or context")
        self._cipher = AESGCM(derived[:KEY_BYTES])
        self._base_nonce = int.from_bytes(derived[KEY_BYTES : KEY_BYTES + _NONCE_BYTES])
        self._open(self._size // CHUNK_BYTES)  # which only the last can be

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        if place < 0:
            raise ValueError("before the beginning")
        self._place = place
        return place

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]  # typeshed: any writable buffer
        """Up to the end of one chunk. Raises `NotAuthentic`."""
        number, start = divmod(self._place, CHUNK_BYTES)
        target = memoryview(buffer).cast("B")
        if self._place >= self._size or not target:
            return 0
        plain = self._open(number)[start : start + len(target)]
        target[: len(plain)] = plain
        self._place += len(plain)
        return len(plain)

    def _open(self, number: int) -> bytes:
        """Chunk `number`, which is there. Raises `NotAuthentic`."""
        if self._chunk is not None and self._chunk[0] == number:
            return self._chunk[1]
        self._source.seek(_HEADER_BYTES + number * _SEALED_CHUNK_BYTES)
        size = min(CHUNK_BYTES, self._size - number * CHUNK_BYTES)
        nonce = (self._base_nonce ^ number).to_bytes(_NONCE_BYTES)
        try:
            plain = self._cipher.decrypt(nonce, self._read_sealed(size + _TAG_BYTES), None)
        except InvalidTag as exc:
            raise NotAuthentic from exc
        self._chunk = number, plain
        return plain

    def _read_sealed(self, size: int) -> bytes:
        """The next `size` bytes of the source. Raises `NotAuthentic` where it ends before."""
        data = b""
        while len(data) < size:
            piece: bytes = self._source.read(size - len(data))
            if not piece:
                raise NotAuthentic("the ciphertext was cut short")
            data += piece
        return data


def _put(target: Writable, data: bytes) -> int:
    """Write all of `data`; its length."""
    rest = memoryview(data)
    while rest:
        rest = rest[target.write(rest) :]
    return len(data)
