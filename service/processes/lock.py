"""The lock of a child that reads what strangers sent, or computes on it: all layers, in the one order in which they work."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

from service.processes.landlock import shut
from service.processes.sandbox import Confinement, Measure, confine, go_first, limit
from service.processes.seccomp import computing_rules, filter_calls, rules

if TYPE_CHECKING:
    from service.processes.parent import Parent


def lock_in(
    parent: Parent,
    *,
    uid: int | None,
    address_space_bytes: int | None = None,
    data_bytes: int | None = None,
    computes: bool = False,
) -> tuple[Measure, ...]:
    """Leave this process nothing but memory, its socket and stderr, for good. Never raises: see the report.

    Call it on the only thread; the beat, which starts here, is the last other one, unless it `computes`: then threads may
    start, and memory may be made executable. Whatever is needed from files must be there by now. The address space counts
    from zero, `data_bytes` (private memory that can be written, of which stacks are a part) from what there is. `uid` is
    taken where the process is root.
    """
    if data_bytes is not None:
        data_bytes += _written_bytes()
    confinement = Confinement(
        uid=uid if os.geteuid() == 0 else None,
        open_files=0,
        address_space_bytes=address_space_bytes,
        data_bytes=data_bytes,
    )
    measures = [
        go_first(),
        *shut(),  # needs a descriptor, and binds threads that are yet to start
        limit("file_size", resource.RLIMIT_FSIZE, 0),
        *confine(confinement),
    ]
    parent.follow_to_death()  # a change of user cleared it
    parent.beat()
    table = computing_rules if computes else rules
    measures.append(filter_calls(table(parent.descriptor, os.getpid())))
    return tuple(measures)


def _written_bytes() -> int:
    """What counts against RLIMIT_DATA by now (proc_pid_status(5), `VmData`); 0 where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("VmData:")) * 1024
