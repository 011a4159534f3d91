"""What a killed supervisor may leave in a cluster's directory, and how the next start clears it.

Contract: the caller has its turn at the start lock and knows that no guardian is alive.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from tenants.postgres_account import DEDICATED_UIDS, EmbeddedError, Place

_PATIENCE_S = ((signal.SIGINT, 20.0), (signal.SIGQUIT, 8.0), (signal.SIGKILL, 5.0))


class OrphanStays(EmbeddedError):
    """A Postgres that nobody supervises cannot be ended."""


def clear_remains(place: Place) -> None:
    """End every process that still works on this data; remove what would keep a new one from starting."""
    _end_orphans(place)
    for draft in place.cluster.glob("draft-*"):  # an initdb that was killed
        shutil.rmtree(draft, ignore_errors=True)
    pid_file = place.data / "postmaster.pid"
    try:
        pid = int(pid_file.read_text().split("\n", 1)[0])
    except (OSError, ValueError):
        pid = 0
    # A dead pid Postgres sees through by itself, and then looks for leftover shared memory. A reused one it
    # takes for a running server; we know better.
    if Path(f"/proc/{pid}").exists() or (pid == 0 and pid_file.exists()):
        pid_file.unlink()
    for name in (".s.PGSQL.5432", ".s.PGSQL.5432.lock"):
        (place.sockets / name).unlink(missing_ok=True)


def _end_orphans(place: Place) -> None:
    """Fast shutdown of an orphaned postmaster; what does not heed it is ended harder."""
    handles = dict(_ours(place))
    try:
        for word, patience_s in _PATIENCE_S:
            for handle in handles.values():
                _signal(handle, word)
                _signal(handle, signal.SIGCONT)  # a stopped one hears nothing but SIGKILL
            deadline = time.monotonic() + patience_s
            while handles and time.monotonic() < deadline:
                for pid in [pid for pid, handle in handles.items() if _ended(handle, 0.05)]:
                    os.close(handles.pop(pid))
            if not handles:
                return
        raise OrphanStays(f"process {min(handles)} still uses {place.data} and does not end: end it by hand")
    finally:
        for handle in handles.values():
            os.close(handle)


def _ours(place: Place) -> Iterator[tuple[int, int]]:
    """Every postgres process on this data, with a handle that stays its own even if the pid is reused."""
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            handle = os.pidfd_open(int(entry.name))
        except OSError:
            continue
        if _is_ours(int(entry.name), place) and not _ended(handle, 0):
            yield int(entry.name), handle
        else:
            os.close(handle)


def _is_ours(pid: int, place: Place) -> bool:
    """By what it is: a postgres whose working directory is this data."""
    process = Path(f"/proc/{pid}")
    try:
        if (process / "comm").read_text().strip() != "postgres":
            return False
        try:
            return (process / "cwd").samefile(place.data)
        except PermissionError:  # a container's root without the right to look into another uid's process
            if process.stat().st_uid != place.uid:
                return False
            return (
                place.uid in DEDICATED_UIDS or os.fsencode(place.data) in (process / "cmdline").read_bytes()
            )
    except OSError:
        return False


def _signal(handle: int, word: signal.Signals) -> None:
    try:
        signal.pidfd_send_signal(handle, word)
    except ProcessLookupError:
        return


def _ended(handle: int, patience_s: float) -> bool:
    return bool(select.select([handle], [], [], patience_s)[0])
