"""Each process of ours as the kernel describes it, and as it describes itself."""

from __future__ import annotations

import re
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from service.doctor.check import Finding, Unseen, judge
from service.doctor.host import read_limit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from service.doctor.sight import Process, Sight

OURS = ("gateway", "worker", "weights", "screening", "witness")
CHILDREN = ("worker", "weights", "screening")
SETTLED_S = 60.0
LOOK_EVERY_S = 1.0
SECRET = re.compile(r"prc_(?:live|admin)_\w+|//[^/@\s:]+:[^/@\s]+@")


def look_at_core_dumps(sight: Sight) -> Finding:
    """No process may leave a core dump, also where the kernel pipes it to a program, which limits do not hold back."""
    processes = sight.running(*OURS, "guardian", "postgres")
    pattern = Path("/proc/sys/kernel/core_pattern")
    piped = pattern.exists() and pattern.read_text().startswith("|")
    return judge(
        (fault for each in processes for fault in _if_it_lives(each, partial(_dumps, piped=piped))),
        f"{len(processes)} processes, none may",
        "restart the service with this version; LimitCORE=0 in the unit",
    )


def look_at_memory(sight: Sight) -> Finding:
    """Nobody of the same user reads the memory of a process that holds secrets or what callers sent."""
    processes = sight.running(*OURS)
    told = [each for each in processes if each.uid != 0]
    if not told:
        raise Unseen("all of them are root's, and the kernel does not tell of these")
    return judge(
        _lasting(told, _readable),
        f"{len(told)} processes, each shut"
        + (f"; of {len(processes) - len(told)} of root it is not told" if len(told) < len(processes) else ""),
        "restart the service with this version",
    )


def look_at_children(sight: Sight) -> Finding:
    """Every child of a gateway has no way to new privileges, and screening children a filter on system calls."""
    children = sight.running(*CHILDREN)
    return judge(
        _lasting(children, _open_doors),
        f"{len(children)} children, none can gain privileges; screening children are filtered",
        "see the log's lines `sandbox`: they say what did not hold, and why",
    )


def look_at_users(sight: Sight) -> Finding:
    """Where a gateway is root, its children are not, and no two kinds or workers share a user."""
    children = sight.running(*CHILDREN)
    gateways = {each.pid: each for each in sight.running("gateway")}
    privileged = [each for each in children if each.parent in gateways and gateways[each.parent].uid == 0]
    if not privileged:
        return judge([], "the gateway has no privilege to lose; its children are its own user's", "")
    return judge(
        _lasting(privileged, _root),
        f"{len(privileged)} children of a root gateway, none of them root",
        "see the log's lines `sandbox`",
    )


def look_at_arguments(sight: Sight) -> Finding:
    """No argument list, which every user of the host reads, holds a key or a password."""
    processes = sight.running(*OURS, "guardian", "postgres")
    return judge(
        (f"{each} has one in its arguments" for each in processes if SECRET.search(" ".join(each.arguments))),
        f"{len(processes)} argument lists",
        "give secrets by the environment file or by files, and replace those that were shown",
    )


def look_at_locks(sight: Sight) -> Finding:
    """What the children themselves read back of their confinement, in /readyz."""
    told = dict(_sandboxes(sight.readiness))
    if not told:
        raise Unseen("/readyz tells of no confinement")
    return judge(
        (
            f"{who}: {name}"
            for who, measures in told.items()
            for name, held in measures.items()
            if held is not True
        ),
        "; ".join(f"{who}: {len(measures)} measures" for who, measures in told.items()),
        "see the log's lines `sandbox` for the reasons, and docs/operations.md for what the kernel must offer",
    )


def _sandboxes(told: object, where: str = "") -> Iterator[tuple[str, dict[str, object]]]:
    """Every object named `sandbox` in what /readyz says, by whose it is."""
    if not isinstance(told, dict):
        return
    for name, value in told.items():
        if name == "sandbox" and isinstance(value, dict):
            flat = {key: held for key, held in value.items() if not isinstance(held, dict)}
            if flat:
                yield where or "children", flat
            for key, held in value.items():
                if isinstance(held, dict):
                    yield f"{where} {key}".strip(), held
        else:
            yield from _sandboxes(value, name)


def _lasting(processes: Sequence[Process], faults: Callable[[Process], Iterator[str]]) -> list[str]:
    """The faults of these that stay: a child gives most up only once it has read what it needs."""
    until_s = time.monotonic() + SETTLED_S
    while True:
        found = [fault for process in processes for fault in _if_it_lives(process, faults)]
        if not found or time.monotonic() >= until_s:
            return found
        time.sleep(LOOK_EVERY_S)


def _if_it_lives(process: Process, faults: Callable[[Process], Iterator[str]]) -> list[str]:
    try:
        return list(faults(process))
    except (Unseen, FileNotFoundError, ProcessLookupError):
        if process.folder.exists():
            raise
        return []  # it ended meanwhile


def _readable(process: Process) -> Iterator[str]:
    # proc(5): these files belong to root once a process may not be dumped.
    if (process.folder / "environ").stat().st_uid != 0:
        yield f"{process} may be read by its user"


def _root(child: Process) -> Iterator[str]:
    if child.uid == 0:
        yield f"{child} is root"


def _dumps(process: Process, *, piped: bool) -> Iterator[str]:
    if read_limit(process.folder, "Max core file size") != ("0", "0"):
        yield f"{process} may leave a core dump"
    elif piped and process.kind in ("guardian", "postgres"):
        chosen = process.folder / "coredump_filter"
        if not chosen.exists() or int(chosen.read_text(), 16) != 0:
            yield f"{process} may pipe its memory to the program of core_pattern"


def _open_doors(child: Process) -> Iterator[str]:
    if child.status("NoNewPrivs") != "1":
        yield f"{child} may gain privileges"
    if child.kind == "screening" and child.status("Seccomp") != "2":
        yield f"{child} has no filter on system calls"
