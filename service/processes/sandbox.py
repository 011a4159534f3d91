"""What a child gives up before it touches anybody's data, and a report of what truly held.

First layer: resource limits, no new privileges, no core dump and no tracing, and, where the child is root,
an unprivileged user of its own; and where the host runs out of memory, children are ended before the gateway and the
database are. A child confines itself once, after it has read what it needs (a model's files may belong to root). What
children give up beyond that is in `lock.py`.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4
PR_SET_NAME = 15
PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS = 38, 39

OOM_SCORE = 500
"""Half of all memory is added to what a child takes, where the kernel chooses whom to end."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One measure of confinement: whether it holds, read back from the kernel where it can be."""

    name: str
    held: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Confinement:
    """What to give up. `uid` is taken as the group id too, and only where the process is root."""

    uid: int | None = None
    open_files: int = 256
    address_space_bytes: int | None = None
    data_bytes: int | None = None
    cpu_s: int | None = None


def confine(confinement: Confinement) -> tuple[Measure, ...]:
    """Give it up for the life of this process. Never raises: what did not hold is in the report.

    A dropped user clears the parent-death signal (prctl(2)): arm it again afterwards.
    """
    measures = [
        limit("core", resource.RLIMIT_CORE, 0),
        limit("open_files", resource.RLIMIT_NOFILE, confinement.open_files),
    ]
    if confinement.address_space_bytes is not None:
        measures.append(limit("address_space", resource.RLIMIT_AS, confinement.address_space_bytes))
    if confinement.data_bytes is not None:
        measures.append(limit("data", resource.RLIMIT_DATA, confinement.data_bytes))
    if confinement.cpu_s is not None:
        measures.append(limit("cpu", resource.RLIMIT_CPU, confinement.cpu_s))
    if confinement.uid is not None:
        measures.append(_drop(confinement.uid))
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    measures.append(Measure("no_new_privs", prctl(PR_GET_NO_NEW_PRIVS) == 1))
    prctl(PR_SET_DUMPABLE, 0)  # after the drop, which may set it again
    measures.append(Measure("not_dumpable", prctl(PR_GET_DUMPABLE) == 0))
    return tuple(measures)


def keep_out_of_files() -> tuple[Measure, ...]:
    """Let no core dump hold this process's memory, nor another process of its user read it; what held of that.

    For processes that keep secrets or what callers sent, and are not confined otherwise. Programs that it starts may
    not dump core either, but can be looked into again (prctl(2), `PR_SET_DUMPABLE`).
    """
    core = limit("core", resource.RLIMIT_CORE, 0)
    prctl(PR_SET_DUMPABLE, 0)
    return core, Measure("not_dumpable", prctl(PR_GET_DUMPABLE) == 0)


def go_first() -> Measure:
    """Where memory runs out, be ended before whoever has no such mark (proc_pid_oom_score_adj(5)). It opens a file."""
    path = Path("/proc/self/oom_score_adj")
    try:
        if int(path.read_text()) < OOM_SCORE:  # only a privileged process may lower it
            path.write_text(str(OOM_SCORE))
        score = int(path.read_text())
    except OSError as exc:
        return Measure("oom_first", False, type(exc).__name__)
    return Measure("oom_first", score >= OOM_SCORE, str(score))


def missing(measures: tuple[Measure, ...]) -> dict[str, str]:
    """The measures that do not hold, by name, and what each says of it."""
    return {measure.name: measure.detail for measure in measures if not measure.held}


def prctl(option: int, value: int = 0) -> int:
    """prctl(2) with one argument; -1 where it failed or this is not Linux."""
    if sys.platform != "linux":
        return -1
    zero = ctypes.c_ulong(0)
    return int(ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(value), zero, zero, zero))


def limit(name: str, kind: int, value: int) -> Measure:
    """Lower a resource limit (getrlimit(2)) to `value`, soft and hard."""
    try:
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    except (OSError, ValueError) as exc:
        return Measure(name, False, type(exc).__name__)
    return Measure(name, resource.getrlimit(kind) == (value, value), str(value))


def _drop(uid: int) -> Measure:
    """Become `uid` in every respect, and make sure that there is no way back."""
    if os.geteuid() != 0:
        return Measure("uid", False, f"not root: still {os.geteuid()}")
    if uid == 0:
        return Measure("uid", False, "0 is root")
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError as exc:
        return Measure("uid", False, type(exc).__name__)
    try:
        os.setuid(0)
    except PermissionError:
        return Measure("uid", os.getresuid() == (uid, uid, uid) and os.getgroups() == [], str(uid))
    return Measure("uid", False, "root could be taken back")
