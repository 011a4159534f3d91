"""Run a program as on a kernel without Landlock or seccomp filters: it is answered ENOSYS where it asks for them.

python -m tests.integration.old_kernel PROGRAM ARGUMENT...
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys

from service.processes.sandbox import PR_SET_NO_NEW_PRIVS, prctl
from service.processes.seccomp import (
    ALLOW,
    EQUAL,
    INSTRUCTION,
    LOAD,
    MACHINES,
    NUMBER,
    REFUSE,
    RETURN,
    SET_FILTER,
)

LANDLOCK = (444, 445, 446)


def forget() -> None:
    """Bind this process, and what it becomes, to a filter that refuses both."""
    seccomp = MACHINES[os.uname().machine].seccomp
    numbers = (seccomp, *LANDLOCK)
    program = [(LOAD, 0, 0, NUMBER)]
    program += [(EQUAL, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    program += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE | errno.ENOSYS)]
    code = b"".join(INSTRUCTION.pack(*instruction) for instruction in program)
    instructions = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        _fields_ = (("instructions", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    header = Program(len(program), ctypes.addressof(instructions))
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    assert ctypes.CDLL(None).syscall(seccomp, SET_FILTER, 0, ctypes.byref(header)) == 0


if __name__ == "__main__":
    forget()
    os.execv(sys.argv[1], sys.argv[1:])
