"""A part of a backup: one sealed stream (Cobblestone-256), stored as objects of 32 MiB, `NAME.000000` and so on.

So no stream is ever whole in memory or on a disk here, and a put is repeated in small pieces. What is read back is
compared with the size and the SHA-256 that the signed manifest has of the stored bytes, besides what the sealing finds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

import cobblestone
from service.backup import BackupDamaged

if TYPE_CHECKING:
    from service.backup.key import BackupKey
    from service.backup.store import Store

OBJECT_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Part:
    """A sealed stream as it is stored."""

    name: str
    size_bytes: int
    sha256: str
    """Of the stored bytes, in hex."""


def object_name(path: str, number: int) -> str:
    return f"{path}.{number:06d}"


class SealedPart:
    """Writes one part: to be used as a context; `part` is there once its block is left without an error."""

    def __init__(self, store: Store, path: str, key: BackupKey, context: bytes) -> None:
        """`path` is where it lies in the store; its last word is the part's name."""
        self._path = path
        self._objects = _Objects(store, path)
        self._writer = cobblestone.Writer(self._objects, key.sealing, context)

    def write(self, data: bytes | memoryview) -> int:
        """Seal and store; raises `StoreFailed`, also of what was written before."""
        return self._writer.write(data)

    @property
    def part(self) -> Part:
        return Part(self._path.rpartition("/")[2], self._objects.size_bytes, self._objects.digest.hexdigest())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._writer.__exit__(kind, raised, trace)
            if kind is None:
                self._objects.finish()
        finally:
            self._objects.close()


class _Objects:
    """Takes a stream, and puts it into the store while the next piece is made: one put at a time."""

    def __init__(self, store: Store, path: str) -> None:
        self._store = store
        self._path = path
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="backup-put")
        self._pending: Future[None] | None = None
        self._piece = bytearray()
        self._count = 0
        self.size_bytes = 0
        self.digest = hashlib.sha256()

    def write(self, data: memoryview) -> int:
        self._piece += data
        while len(self._piece) >= OBJECT_BYTES:
            self._put(bytes(self._piece[:OBJECT_BYTES]))
            del self._piece[:OBJECT_BYTES]
        return len(data)

    def finish(self) -> None:
        if self._piece:
            self._put(bytes(self._piece))
            self._piece.clear()
        self._await()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _put(self, piece: bytes) -> None:
        self._await()
        self.digest.update(piece)
        self.size_bytes += len(piece)
        self._pending = self._pool.submit(self._store.create, object_name(self._path, self._count), piece)
        self._count += 1

    def _await(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


class StoredPart:
    """Reads one part's stored bytes, one object ahead. Raises `BackupDamaged` where it is not what the manifest says."""

    def __init__(self, store: Store, path: str, part: Part, pool: ThreadPoolExecutor) -> None:
        self._store = store
        self._path = path
        self._part = part
        self._pool = pool
        self._digest = hashlib.sha256()
        self._size_bytes = 0
        self._piece = memoryview(b"")
        self._number = 0
        self._ahead = self._ask()

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; `b""` at the end, once all of it was compared."""
        if not self._piece and not self._next():
            return b""
        data, self._piece = self._piece[:size], self._piece[size:]
        return bytes(data)

    def _next(self) -> bool:
        if self._size_bytes == self._part.size_bytes:
            if self._digest.hexdigest() != self._part.sha256:
                raise BackupDamaged(f"{self._path} is not what was stored: its SHA-256 differs")
            return False
        found = self._ahead.result()
        if found is None:
            raise BackupDamaged(f"{object_name(self._path, self._number - 1)} is missing")
        self._size_bytes += len(found)
        whole = len(found) == OBJECT_BYTES or self._size_bytes == self._part.size_bytes
        if not found or not whole or self._size_bytes > self._part.size_bytes:
            raise BackupDamaged(
                f"{object_name(self._path, self._number - 1)} has another size than was stored"
            )
        self._digest.update(found)
        self._piece = memoryview(found)
        if self._size_bytes < self._part.size_bytes:
            self._ahead = self._ask()
        return True

    def _ask(self) -> Future[bytes | None]:
        name = object_name(self._path, self._number)
        self._number += 1
        return self._pool.submit(self._store.read, name)


@contextmanager
def stored(store: Store, path: str, part: Part) -> Iterator[StoredPart]:
    """The stored bytes of a part."""
    with ThreadPoolExecutor(1, thread_name_prefix="backup-get") as pool:
        yield StoredPart(store, path, part, pool)


def open_part(
    store: Store, path: str, part: Part, key: BackupKey, context: bytes, target: cobblestone.Writable
) -> int:
    """Write the plain bytes of a part to `target`; how many. Where this raises, they are to be thrown away.

    Raises `BackupDamaged`, `StoreFailed`, and what `target` raises.
    """
    with stored(store, path, part) as source:
        try:
            return cobblestone.decrypt(source, target, key.sealing, context)
        except cobblestone.NotAuthentic as exc:
            raise BackupDamaged(
                f"{path} does not open: another key, another place, or changed bytes"
            ) from exc
