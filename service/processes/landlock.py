"""Landlock with no rule at all (landlock(7)): no file by any path, no TCP, no signal to and no socket of another domain.

It binds the thread that asks for it and those that this one starts, so it comes before any other thread. What a kernel
does not know of it is reported as not held: files need ABI 1 (Linux 5.13), TCP 4 (6.7), signals 6 (6.12).
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from service.processes.sandbox import Measure

CREATE_RULESET, RESTRICT_SELF = 444, 446
VERSION = 1
"""The flag that asks for the ABI's number and makes no ruleset."""
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}
"""How many rights on files are known from an ABI on; they are the lowest bits."""
TCP = 0b11
"""To bind and to connect."""
SCOPES = 0b11
"""Abstract unix sockets, and signals, of processes outside."""

PATIENCE_S = 0.5

PARTS = {"landlock_files": 1, "landlock_tcp": 4, "landlock_signals": 6}


class _Ruleset(ctypes.Structure):
    """`struct landlock_ruleset_attr`. An older kernel takes it as long as what it does not know is zero."""

    _fields_ = (("files", ctypes.c_uint64), ("tcp", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


def shut() -> tuple[Measure, ...]:
    """Shut this thread and its descendants in, for good. Never raises: what did not hold is in the report.

    It needs no new privileges, or root; a file descriptor that is free; and a parent that lives.
    """
    if sys.platform != "linux":
        return tuple(Measure(name, False, f"{sys.platform} has none") for name in PARTS)
    libc = ctypes.CDLL(None, use_errno=True)
    abi = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), VERSION)
    if abi < 1:
        why = os.strerror(ctypes.get_errno())
        return tuple(Measure(name, False, why) for name in PARTS)
    others = _count_other_threads()
    ruleset = _Ruleset(
        (1 << max(rights for since, rights in FILE_RIGHTS.items() if since <= abi)) - 1,
        TCP if abi >= PARTS["landlock_tcp"] else 0,
        SCOPES if abi >= PARTS["landlock_signals"] else 0,
    )
    descriptor = libc.syscall(
        CREATE_RULESET, ctypes.byref(ruleset), ctypes.c_size_t(ctypes.sizeof(ruleset)), 0
    )
    refused = descriptor < 0 or libc.syscall(RESTRICT_SELF, descriptor, 0) != 0
    why = os.strerror(ctypes.get_errno())
    if descriptor >= 0:
        os.close(descriptor)
    if refused:
        return tuple(Measure(name, False, why) for name in PARTS)
    probes = (_open_root, _connect, _signal_parent)
    return tuple(
        _measure(name, since, abi, others, probe)
        for (name, since), probe in zip(PARTS.items(), probes, strict=True)
    )


def _count_other_threads() -> int | None:
    """Those that stay: one that was joined takes a moment to be gone. None where there is no /proc."""
    end_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            others = len(list(Path("/proc/self/task").iterdir())) - 1
        except OSError:
            return None
        if others == 0 or time.monotonic() > end_s:
            return others
        time.sleep(0.001)


def _measure(name: str, since: int, abi: int, others: int | None, probe: Callable[[], object]) -> Measure:
    if abi < since:
        return Measure(name, False, f"needs ABI {since}, here is {abi}")
    if others != 0:
        return Measure(name, False, f"{others or 'unknown'} threads began before it")
    try:
        probe()
    except PermissionError:
        return Measure(name, True, f"ABI {abi}")
    except OSError as exc:
        return Measure(name, False, f"{type(exc).__name__} where a refusal is due")
    return Measure(name, False, "what it refuses was done")


def _open_root() -> None:
    os.close(os.open("/", os.O_RDONLY))


def _connect() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        probe.connect(("127.0.0.1", 1))


def _signal_parent() -> None:
    os.kill(os.getppid(), 0)
