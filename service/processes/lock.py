"""The lock of a child that reads what strangers sent: all layers, in the one order in which they work."""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING

from service.processes.landlock import shut
from service.processes.sandbox import Confinement, Measure, confine, limit
from service.processes.seccomp import filter_calls

if TYPE_CHECKING:
    from service.processes.parent import Parent


def lock_in(parent: Parent, *, uid: int, address_space_bytes: int) -> tuple[Measure, ...]:
    """Leave this process nothing but memory, its socket and stderr, for good. Never raises: see the report.

    Call it on the only thread; the beat, which starts here, is the last other one. Whatever is needed from files must
    be there by now, and the address space counts from zero. `uid` is taken where the process is root.
    """
    confinement = Confinement(
        uid=uid if os.geteuid() == 0 else None, open_files=0, address_space_bytes=address_space_bytes
    )
    measures = [
        *shut(),  # needs a descriptor, and binds threads that are yet to start
        limit("file_size", resource.RLIMIT_FSIZE, 0),
        *confine(confinement),
    ]
    parent.follow_to_death()  # a change of user cleared it
    parent.beat()
    measures.append(filter_calls(parent.descriptor))
    return tuple(measures)
