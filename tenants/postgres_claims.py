"""Claims on an embedded Postgres: who needs it, whose turn it is, and whether it is attended. All are flocks.

A claim is a shared lock on CLUSTER/holders for life, so the kernel gives it back even after `kill -9`; the
guardian stops the server when it gets that lock exclusively. CLUSTER/guardian is a guardian's for life.
home/postgres/lock is held for a moment by whoever starts or leaves: questions about the other two are safe to
ask, and to act on, in that turn alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from tenants.postgres_account import EmbeddedError

LEAVE_S = 60.0  # longer than all the guardian's patience together
POLL_S = 0.01


class StopFailed(EmbeddedError):
    """Postgres did not stop in time."""


class Busy(EmbeddedError):
    """Another process has had its turn for too long."""


@contextlib.contextmanager
def turn(lock_file: Path, patience_s: float) -> Iterator[None]:
    """One starts or leaves at a time."""
    lock = _open_lock(lock_file)
    try:
        if not _lock(lock, fcntl.LOCK_EX, patience_s):
            raise Busy(f"another process has held {lock_file} for {patience_s:.0f} s: end it")
        yield
    finally:
        let_go(lock)


def claim(cluster: Path) -> int:
    """A shared lock on the server's life; waits for one that is just stopping."""
    held = _open_lock(cluster / "holders")
    if not _lock(held, fcntl.LOCK_SH, LEAVE_S):
        os.close(held)
        raise StopFailed(f"an earlier server in {cluster} is still stopping: see the log")
    return held


def leave(cluster: Path, held: int) -> None:
    """In our turn, so nobody claims meanwhile: give it back; after the last, wait for the server to stop."""
    last = _lock(held, fcntl.LOCK_EX, 0)
    if not last:  # others hold it, or a guardian that came first is already stopping it
        others = _lock(held, fcntl.LOCK_SH, 0)
        last = not others
    let_go(held)
    deadline = time.monotonic() + LEAVE_S
    while last and not unattended(cluster):
        if time.monotonic() > deadline:
            raise StopFailed(f"Postgres in {cluster} did not stop within {LEAVE_S:.0f} s: see the log")
        time.sleep(POLL_S)


def unattended(cluster: Path) -> bool:
    """Whether no guardian is alive here right now."""
    handle = _open_lock(cluster / "guardian")
    try:
        return _lock(handle, fcntl.LOCK_EX, 0)
    finally:
        let_go(handle)


def let_go(handle: int) -> None:
    """Unlock, not only close: a forked child may share the handle."""
    fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


def _lock(handle: int, kind: int, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_S)
        else:
            return True
