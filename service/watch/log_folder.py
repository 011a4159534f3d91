"""Log lines in a folder: a file for each day in UTC, another one where it grows too large, old ones deleted.

Files are `gateway-2026-01-31.jsonl`, then `gateway-2026-01-31.1.jsonl` and so on; nothing is ever renamed, so several
gateways may share a folder: each appends whole lines. The folder is 0700 and its files 0600, and what is there of
another owner, for others to write, or behind a link is refused.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from itertools import count
from pathlib import Path

NAME = re.compile(r"gateway-(\d{4}-\d{2}-\d{2})(?:\.\d+)?\.jsonl")


class LogFolderUnusable(Exception):
    """The folder of the log cannot be written, or is not ours alone."""


class LogFolder:
    """A sink of `log_writer.Writer`. Not for more than one thread at a time."""

    def __init__(
        self,
        folder: Path,
        *,
        file_bytes: int,
        retention_days: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open today's file. A file is closed once it has `file_bytes`; one of `retention_days` days ago is deleted.

        Raises LogFolderUnusable. `clock` gives seconds since 1970.
        """
        self._folder = folder
        self._file_bytes = file_bytes
        self._retention_days = retention_days
        self._clock = clock
        self._fd = -1
        self._day = date.min
        self._torn = False
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._open(self._today())
        except OSError as exc:
            raise LogFolderUnusable(f"the folder of the log cannot be used: {exc.strerror}") from exc

    def __call__(self, lines: bytes) -> None:
        """Append whole lines. Raises OSError; what was written of them then is closed by a newline of its own."""
        today = self._today()
        if self._fd < 0 or today != self._day or os.fstat(self._fd).st_size >= self._file_bytes:
            self._open(today)
        rest = b"\n" + lines if self._torn else lines
        self._torn = False
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError:
            self._torn = True
            raise

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _today(self) -> date:
        return datetime.fromtimestamp(self._clock(), UTC).date()

    def _open(self, day: date) -> None:
        """The day's first file with room, and no file of a day that is over for long enough."""
        _refuse_others(self._folder.lstat(), stat.S_ISDIR, "the folder of the log")
        self.close()
        for number in count():
            path = self._folder / f"gateway-{day}{f'.{number}' if number else ''}.jsonl"
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                found = os.fstat(fd)
                _refuse_others(found, stat.S_ISREG, path.name)
            except BaseException:
                os.close(fd)
                raise
            if found.st_size < self._file_bytes:
                break
            os.close(fd)
        self._fd, self._day = fd, day
        self._prune(day)

    def _prune(self, today: date) -> None:
        oldest = today - timedelta(days=self._retention_days - 1)
        for path in self._folder.iterdir():
            named = NAME.fullmatch(path.name)
            if named is not None and named[1] < str(oldest):
                path.unlink(missing_ok=True)


def _refuse_others(found: os.stat_result, is_kind: Callable[[int], bool], what: str) -> None:
    """Raises PermissionError for what is of another kind, of another owner, or open to others."""
    if not is_kind(found.st_mode):
        raise PermissionError(0, f"{what} is something else than it should be")
    if found.st_uid != os.geteuid():
        raise PermissionError(0, f"{what} belongs to another user")
    if found.st_mode & 0o077:
        raise PermissionError(0, f"{what} is open to others than its owner: chmod it")
