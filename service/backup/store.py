"""Where backups are kept: a folder, or a bucket that speaks S3 (through obstore).

Objects are created, never overwritten (a conditional put: `If-None-Match: *`, or link(2)), with a SHA-256 that an S3 store
checks on arrival. A request has a time limit and is repeated a few times; a put whose answer was lost finds its own
object when it is repeated, and that is a success.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, S3Store

from service.backup import BackupRefused, StoreFailed

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore

CONNECT_S = 5.0
RETRIES = 4
REMOVED_AT_ONCE = 500


class Store:
    """Objects by name; a name is words with `/` between."""

    def __init__(self, objects: ObjectStore, folder: Path | None) -> None:
        self._objects = objects
        self._folder = folder

    def create(self, name: str, data: bytes) -> None:
        """Keep `data` under a name that is free, or already has that very content. Durable on return.

        Raises `StoreFailed`, also where other content has the name.
        """
        with _translated(name):
            try:
                obstore.put(self._objects, name, data, mode="create", use_multipart=False)
            except AlreadyExistsError as exc:
                if bytes(obstore.get(self._objects, name).bytes()) != data:
                    raise StoreFailed(f"{name} is there already, and is never overwritten") from exc
        if self._folder is not None:
            _sync(self._folder, name)

    def read(self, name: str) -> bytes | None:
        """All of an object; None where there is none. Raises `StoreFailed`."""
        with _translated(name):
            try:
                return bytes(obstore.get(self._objects, name).bytes())
            except FileNotFoundError:
                return None

    def sizes(self, prefix: str) -> dict[str, int]:
        """The names below `prefix`, with the sizes of the objects in bytes. Raises `StoreFailed`."""
        with _translated(prefix):
            return {
                found["path"]: found["size"]
                for page in obstore.list(self._objects, f"{prefix}/")
                for found in page
            }

    def folders(self, prefix: str) -> list[str]:
        """The next words below `prefix`. Raises `StoreFailed`."""
        with _translated(prefix):
            found = obstore.list_with_delimiter(self._objects, f"{prefix}/" if prefix else None)
            return [path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"]]

    def remove(self, names: Iterable[str]) -> None:
        """Objects that are gone already are no error. Raises `StoreFailed`."""
        rest = sorted(names)
        for first in range(0, len(rest), REMOVED_AT_ONCE):
            with _translated(rest[first]):
                try:
                    obstore.delete(self._objects, rest[first : first + REMOVED_AT_ONCE])
                except FileNotFoundError:
                    continue


def open_store(location: str | None, *, timeout_s: float) -> Store:
    """The store of `PERICARP_BACKUP_STORE`: a folder, made where there is none (0700), or `s3://bucket/prefix`.

    Credentials and endpoint of S3 are where its other clients have them: `AWS_…` variables, or the host's own role.
    Raises `BackupRefused`.
    """
    if location is None:
        raise BackupRefused("set PERICARP_BACKUP_STORE: a folder, or s3://bucket/prefix")
    try:
        if location.startswith("s3://"):
            limit = timedelta(seconds=timeout_s)
            options: ClientConfig = {"timeout": limit, "connect_timeout": timedelta(seconds=CONNECT_S)}
            if os.environ.get("AWS_ALLOW_HTTP", "").lower() == "true":
                options["allow_http"] = True
            objects = S3Store.from_url(
                location,
                config={"checksum_algorithm": "SHA256"},
                client_options=options,
                retry_config={"max_retries": RETRIES, "retry_timeout": limit},
            )
            return Store(objects, None)
        folder = Path(location)
        if not folder.is_absolute() or "://" in location:
            raise BackupRefused("PERICARP_BACKUP_STORE is an absolute path, or s3://bucket/prefix")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Store(LocalStore(prefix=folder, automatic_cleanup=True), folder)
    except (BaseError, OSError) as exc:
        raise BackupRefused(f"PERICARP_BACKUP_STORE cannot be used: {_reason(exc)}") from exc


@contextmanager
def _translated(name: str) -> Iterator[None]:
    try:
        yield
    except StoreFailed:
        raise
    except (BaseError, OSError) as exc:
        raise StoreFailed(f"{name}: {_reason(exc)}") from exc


def _reason(exc: BaseException) -> str:
    """What the store said first: the rest is the library's own view of it."""
    lines = str(exc).strip().splitlines()
    return f"{type(exc).__name__}: {lines[0][:300]}" if lines else type(exc).__name__


def _sync(folder: Path, name: str) -> None:
    """Make a file, and its name in every folder above it, survive a power cut."""
    path = folder / name
    for each in (path, *path.parents):
        handle = os.open(each, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        if each == folder:
            return
