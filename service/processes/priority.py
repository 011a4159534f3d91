"""Who computes for long gives way to who answers: the gateway and the database come first on cores that all share."""

from __future__ import annotations

import os
import time
from pathlib import Path

from service.processes.sandbox import Measure

NICE = 5
"""A third of the share of a process that does not give way (sched(7), the table of weights)."""

TRIES, PAUSE_S = 10, 0.12


def give_way() -> Measure:
    """Lower this process's priority; and that of threads which it starts from then on. Never raises: see the report.

    Where the kernel groups processes by session (sched(7), autogroup), as each child has one of its own, a process's own
    value counts within its group alone, and the group has one too.
    """
    group = Path("/proc/self/autogroup")
    try:
        os.setpriority(os.PRIO_PROCESS, 0, max(NICE, os.getpriority(os.PRIO_PROCESS, 0)))
        if group.exists():
            _tell(group)
    except OSError as exc:
        return Measure("gives_way", False, type(exc).__name__)
    return Measure("gives_way", os.getpriority(os.PRIO_PROCESS, 0) >= NICE, str(NICE))


def _tell(group: Path) -> None:
    """Whoever is not privileged may say so ten times a second, all processes together. Raises OSError."""
    for _ in range(TRIES):
        try:
            group.write_text(str(NICE))
            return
        except BlockingIOError:
            time.sleep(PAUSE_S)
    group.write_text(str(NICE))
