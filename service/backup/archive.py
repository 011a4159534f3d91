"""Tar as Postgres and we write it (POSIX ustar): regular files and folders, with relative names. Nothing else is read.

`Members` takes a stream in pieces of any length, so that it stands in the way of a backup as it is made as well as of one
that is restored. Modes are kept, less what group and others might; owners are whoever restores.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO, Self

from service.backup import BackupDamaged

BLOCK = tarfile.BLOCKSIZE
OWNERS_ALONE = 0o700
Target = Callable[[tarfile.TarInfo], IO[bytes] | None]
"""Opens what a file's content goes to, and is closed after it; None: it is passed over."""


class Members:
    """Reads an archive that is written to it: to be used as a context. Raises `BackupDamaged`, and what a target raises."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._header = bytearray()
        self._open: IO[bytes] | None = None
        self._content = 0
        self._padding = 0
        self._ended = False

    def write(self, data: bytes | memoryview) -> int:
        """One piece of the archive; its length."""
        rest = memoryview(data)
        while rest:
            if self._content:
                piece = rest[: self._content]
                if self._open is not None:
                    self._open.write(piece)
                self._content -= len(piece)
                rest = rest[len(piece) :]
                if not self._content:
                    self._close()
            elif self._padding:
                skipped = min(self._padding, len(rest))
                self._padding -= skipped
                rest = rest[skipped:]
            else:
                piece = rest[: BLOCK - len(self._header)]
                self._header += piece
                rest = rest[len(piece) :]
                if len(self._header) == BLOCK:
                    self._begin(bytes(self._header))
                    self._header.clear()
        return len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self._close()

    def finish(self) -> None:
        """Nothing more comes. Raises `BackupDamaged` where the archive is not whole."""
        if self._content or self._padding or self._header or not self._ended:
            raise BackupDamaged("an archive ends before its end")

    def _begin(self, header: bytes) -> None:
        if header == bytes(BLOCK):
            self._ended = True
            return
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as exc:
            raise BackupDamaged("an archive has a header that is none") from exc
        parts = PurePosixPath(member.name).parts
        if (
            self._ended
            or not (member.isreg() or member.isdir())
            or not parts
            or ".." in parts
            or parts[0] == "/"
        ):
            raise BackupDamaged("an archive has what no backup has: a link, or a way out of its folder")
        self._open = self._target(member)
        self._content = member.size if member.isreg() else 0
        self._padding = -self._content % BLOCK
        if not self._content:
            self._close()

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


def unpacking(folder: Path) -> Target:
    """Writes every member below `folder`, which is there and empty."""

    def target(member: tarfile.TarInfo) -> IO[bytes] | None:
        path = folder / member.name
        if member.isdir():
            path.mkdir(mode=member.mode & OWNERS_ALONE, exist_ok=True)
            return None
        path.parent.mkdir(mode=OWNERS_ALONE, parents=True, exist_ok=True)
        mode = member.mode & OWNERS_ALONE
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb")

    return target


class Kept(io.BytesIO):
    """The content of one member, kept as it passes by: it survives being closed."""

    def close(self) -> None:
        """The content stays."""


def catching(name: str, kept: Kept) -> Target:
    """Keeps the content of the member of that name."""
    return lambda member: kept if member.name == name else None


def pack(files: dict[str, bytes]) -> bytes:
    """A small archive of these files, 0600."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o600
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def unpack(archive: bytes) -> dict[str, bytes]:
    """What `pack` packed. Raises `BackupDamaged`."""
    found: dict[str, Kept] = {}

    def target(member: tarfile.TarInfo) -> IO[bytes] | None:
        return found.setdefault(member.name, Kept()) if member.isreg() else None

    with Members(target) as members:
        members.write(archive)
        members.finish()
    return {name: kept.getvalue() for name, kept in found.items()}
