"""What the kernel offers, and what there is room for."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from service.doctor.check import Finding, State, Unseen, judge
from service.processes.landlock import CREATE_RULESET, PARTS, VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator

    from service.doctor.sight import Sight

FREE_BYTES = 2 * 2**30
FREE_SHARE = 0.05
OPEN_FILES = 4096
"""A caller's connection is one, a worker a few; the unit in deploy/ allows 65,536."""


def look_at_user(sight: Sight) -> Finding:
    """The gateways are not root; without one, whoever runs doctor, as whom a command would run."""
    try:
        users = {str(each): each.uid for each in sight.running("gateway")}
    except Unseen:
        users = {"this command": os.geteuid()}
    return judge(
        (f"{who} is root" for who, uid in users.items() if uid == 0),
        ", ".join(f"{who} is uid {uid}" for who, uid in users.items()),
        "run it as an account of its own (deploy/pericarp.service); as root, its children have users of their own"
        " and the gateway has all rights",
    )


def look_at_seccomp(_sight: Sight) -> Finding:
    """The kernel can end a process for a system call."""
    offered = _read("/proc/sys/kernel/seccomp/actions_avail").split()
    missing = {"kill_process", "errno"} - set(offered)
    return judge(
        (f"no {action}" for action in sorted(missing)),
        f"actions: {' '.join(offered)}",
        "use a kernel with CONFIG_SECCOMP_FILTER, 4.14 or later, and a container runtime that lets seccomp pass",
    )


def look_at_landlock(_sight: Sight) -> Finding:
    """Landlock's version has all that children give up: files, TCP, signals."""
    if sys.platform != "linux":
        raise Unseen(f"{sys.platform} has none")
    abi = ctypes.CDLL(None, use_errno=True).syscall(CREATE_RULESET, None, ctypes.c_size_t(0), VERSION)
    if abi < 1:
        why = os.strerror(ctypes.get_errno())
        return Finding(State.BROKEN, f"no landlock: {why}", "use Linux 6.12 with landlock among its LSMs")
    return judge(
        (f"{part} needs ABI {since}, here is {abi}" for part, since in PARTS.items() if since > abi),
        f"ABI {abi}",
        "use Linux 6.12 or later; until then the system call filter alone stands there",
    )


def look_at_namespaces(sight: Sight) -> Finding:
    """User namespaces, which initdb needs where Postgres runs as a user without a name."""
    if not sight.embedded or os.geteuid() != 0:
        return Finding(State.HOLDS, "not needed: Postgres runs as somebody who has a name")
    most = int(_read("/proc/sys/user/max_user_namespaces"))
    return judge(
        ["user namespaces are switched off"] if most == 0 else [],
        f"{most} at most",
        "make an account named pericarp, or set user.max_user_namespaces above 0",
    )


def look_at_disk(sight: Sight) -> Finding:
    """Room on every file system that the service writes to."""
    folders = [sight.home, sight.settings.log_folder]
    if sight.embedded:
        folders.append(_data(sight))
    there = sorted({folder.absolute() for folder in folders if folder is not None and folder.exists()})
    if not there:
        raise Unseen(f"there is no {sight.home}")
    usage = {folder: shutil.disk_usage(folder) for folder in there}
    return judge(
        (
            f"{folder} has {_size(free)} left of {_size(total)}"
            for folder, (total, _, free) in usage.items()
            if free < FREE_BYTES or free < total * FREE_SHARE
        ),
        "; ".join(f"{folder} has {_size(free)} left" for folder, (_, _, free) in usage.items()),
        "make room: where the log cannot be written, nothing is answered",
    )


def look_at_open_files(sight: Sight) -> Finding:
    """How many files a gateway may open; without one, this command."""
    return judge(
        (
            f"{who} may open {most:.0f}, fewer than {OPEN_FILES}"
            for who, most in _open_files(sight)
            if most < OPEN_FILES
        ),
        "; ".join(f"{who} may open {most:.0f}" for who, most in _open_files(sight)),
        "raise LimitNOFILE= of the unit, or `ulimit -n`",
    )


def read_limit(folder: Path, name: str) -> tuple[str, str]:
    """The soft and the hard limit of that name in /proc/PID/limits."""
    for line in (folder / "limits").read_text().splitlines():
        if line.startswith(name):
            soft, hard = line[len(name) :].split()[:2]
            return soft, hard
    raise Unseen(f"the kernel tells no {name}")


def _open_files(sight: Sight) -> Iterator[tuple[str, float]]:
    try:
        gateways = sight.running("gateway")
    except Unseen:
        yield "this command", float(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        return
    for gateway in gateways:
        soft, _ = read_limit(gateway.folder, "Max open files")
        yield str(gateway), float("inf") if soft == "unlimited" else float(soft)


def _data(sight: Sight) -> Path | None:
    try:
        return sight.place.data
    except Unseen:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as exc:
        raise Unseen(f"{path} cannot be read: {type(exc).__name__}") from exc


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
