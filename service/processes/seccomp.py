"""The filter on system calls (seccomp(2), classic BPF) of a child that computes, and speaks on one socket.

Three answers, of which [decision 10](docs/decisions/0010-locked-children.md) gives the reasons:

    allowed    memory without execution, waiting, the socket's own descriptor, stderr, the process's own end
    refused    with an error, as if the system had nothing of it: what the interpreter and libraries ask for by
               themselves and can do without (files by their path, questions about the machine, clone3, calls younger
               than this table)
    the rest   the kernel ends the process: who makes such a call is not our code

The architecture is checked with every call, and x32's numbers are among the rest.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from service.processes.sandbox import Measure

NAME = "seccomp"

ALLOW, KILL, REFUSE = 0x7FFF_0000, 0x8000_0000, 0x0005_0000
"""SECCOMP_RET_ALLOW, SECCOMP_RET_KILL_PROCESS, SECCOMP_RET_ERRNO, whose low 16 bits are the error's number."""

# bpf(4), linux/bpf_common.h: load a word of the call's data; and; jump where equal, or not less; return.
LOAD, AND, EQUAL, NOT_LESS, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16
"""Offsets in `struct seccomp_data`; each argument has 8 bytes, the lower half first on the machines below."""
INSTRUCTION = struct.Struct("=HBBI")

X32_BIT = 0x4000_0000
NEWEST = 469
"""file_setattr, of Linux 6.17. From 424 on every machine numbers calls alike."""

SET_FILTER, ACTION_AVAILABLE, ALL_THREADS = 1, 2, 1

MAP_KIND, MAP_PRIVATE_ANONYMOUS = 0x23, 0x22
PROT_EXEC = 4
MADV_DONTNEED, MADV_FREE, MADV_HUGEPAGE = 4, 8, 14
FUTEX_COMMAND, FUTEX_WAIT, FUTEX_WAKE, FUTEX_WAIT_BITSET, FUTEX_WAKE_BITSET = 0x7F, 0, 1, 9, 10
WHOLE = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class Machine:
    """Its audit architecture (linux/audit.h), the number of seccomp(2), and its place in the tables below."""

    architecture: int
    seccomp: int
    place: int


MACHINES = {"x86_64": Machine(0xC000_003E, 317, 0), "aarch64": Machine(0xC000_00B7, 277, 1)}


@dataclass(frozen=True, slots=True)
class Check:
    """An argument's lower half, under `mask`, must be one of `values`. The kernel reads no more of those that are checked."""

    argument: int
    mask: int
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """What to answer to one call: `then` where every check holds, `otherwise` where one does not.

    `numbers` are those of x86-64 and of aarch64, which lacks some calls.
    """

    name: str
    numbers: tuple[int, int | None]
    then: int = ALLOW
    checks: tuple[Check, ...] = ()
    otherwise: int = KILL


def rules(connection: int, pid: int) -> tuple[Rule, ...]:
    """What a child may do whose socket is `connection`; the most frequent first.

    Beside what decoding, networks and the wire were seen to use, there is what depends on the machine or the moment: a
    clock that is not mapped, a wait that a stop interrupts, a lock that is contended, the words and the end of abort(3).
    """
    socket = Check(0, WHOLE, (connection,))
    output = Check(0, WHOLE, (1, 2))
    return (
        Rule(
            "futex",
            (202, 98),
            checks=(Check(1, FUTEX_COMMAND, (FUTEX_WAIT, FUTEX_WAKE, FUTEX_WAIT_BITSET, FUTEX_WAKE_BITSET)),),
            otherwise=REFUSE | errno.ENOSYS,
        ),
        Rule("recvfrom", (45, 207), checks=(socket,)),
        Rule("sendmsg", (46, 211), checks=(socket,)),
        Rule("brk", (12, 214)),
        Rule(
            "mmap",
            (9, 222),
            checks=(Check(2, PROT_EXEC, (0,)), Check(3, MAP_KIND, (MAP_PRIVATE_ANONYMOUS,))),
        ),
        Rule("munmap", (11, 215)),
        Rule("mremap", (25, 216)),
        Rule(
            "madvise",
            (28, 233),
            checks=(Check(2, WHOLE, (MADV_DONTNEED, MADV_FREE, MADV_HUGEPAGE)),),
            otherwise=REFUSE | errno.EINVAL,
        ),
        Rule("clock_gettime", (228, 113)),
        Rule("sched_yield", (24, 124)),
        Rule("restart_syscall", (219, 128)),
        Rule("write", (1, 64), checks=(output,)),
        Rule("writev", (20, 66), checks=(output,)),
        Rule("getpid", (39, 172)),
        Rule("gettid", (186, 178)),
        Rule("rt_sigprocmask", (14, 135)),
        Rule(
            "tgkill",
            (234, 131),
            checks=(Check(0, WHOLE, (pid,)), Check(2, WHOLE, (int(signal.SIGABRT),))),
        ),
        Rule("exit_group", (231, 94)),
        *(
            Rule(name, numbers, REFUSE | errno.EACCES)
            for name, numbers in (
                ("open", (2, None)),
                ("openat", (257, 56)),
                ("stat", (4, None)),
                ("lstat", (6, None)),
                ("newfstatat", (262, 79)),
                ("statx", (332, 291)),
                ("access", (21, None)),
                ("faccessat", (269, 48)),
                ("faccessat2", (439, 439)),
                ("readlink", (89, None)),
                ("readlinkat", (267, 78)),
                ("getcwd", (79, 17)),
            )
        ),
        *(
            Rule(name, numbers, REFUSE | errno.EPERM)
            for name, numbers in (
                ("getrandom", (318, 278)),
                ("clock_nanosleep", (230, 115)),
                ("sched_getaffinity", (204, 123)),
                ("sysinfo", (99, 179)),
                ("uname", (63, 160)),
                ("ioctl", (16, 29)),
            )
        ),
        Rule("clone3", (435, 435), REFUSE | errno.ENOSYS),
    )


def assemble(rules: Sequence[Rule], machine: Machine) -> bytes:
    """The program: an array of `struct sock_filter` that gives an answer to every `struct seccomp_data`."""
    program = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, machine.architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (NOT_LESS, 0, 1, X32_BIT),
        (RETURN, 0, 0, KILL),
        (NOT_LESS, 0, 1, NEWEST + 1),
        (RETURN, 0, 0, REFUSE | errno.ENOSYS),
    ]
    for rule in rules:
        number = rule.numbers[machine.place]
        if number is not None:
            body = _answer(rule)
            program += [(EQUAL, 0, len(body), number), *body]
    program.append((RETURN, 0, 0, KILL))
    return b"".join(INSTRUCTION.pack(*instruction) for instruction in program)


def _answer(rule: Rule) -> list[tuple[int, int, int, int]]:
    """From where the call's number is known, to an answer."""
    body = []
    for check in rule.checks:
        body += [(LOAD, 0, 0, ARGUMENTS + 8 * check.argument), (AND, 0, 0, check.mask)]
        for left, value in zip(range(len(check.values), 0, -1), check.values, strict=True):
            body.append((EQUAL, left, 0, value))
        body.append((RETURN, 0, 0, rule.otherwise))
    return [*body, (RETURN, 0, 0, rule.then)]


def filter_calls(connection: int) -> Measure:
    """Bind every thread of this process, for good, to `rules`. Never raises: whether it holds is in the report.

    It needs no new privileges, or root. No thread can be started any more.
    """
    name = os.uname().machine
    machine = MACHINES.get(name)
    if sys.platform != "linux" or machine is None or sys.maxsize < 2**32 or sys.byteorder != "little":
        return Measure(NAME, False, f"no table for {sys.platform} on {name}")
    libc = ctypes.CDLL(None, use_errno=True)
    kill = ctypes.c_uint32(KILL)
    if libc.syscall(machine.seccomp, ACTION_AVAILABLE, 0, ctypes.byref(kill)) != 0:
        return Measure(NAME, False, os.strerror(ctypes.get_errno()))
    program = assemble(rules(connection, os.getpid()), machine)
    instructions = ctypes.create_string_buffer(program, len(program))
    header = _Program(len(program) // INSTRUCTION.size, ctypes.addressof(instructions))
    result = libc.syscall(machine.seccomp, SET_FILTER, ALL_THREADS, ctypes.byref(header))
    if result != 0:
        why = os.strerror(ctypes.get_errno()) if result < 0 else "a thread has a filter of its own"
        return Measure(NAME, False, why)
    try:
        Path("/").stat()
    except PermissionError:
        return Measure(NAME, True, name)
    return Measure(NAME, False, "a call that the filter refuses was answered")


class _Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("instructions", ctypes.c_ushort), ("filter", ctypes.c_void_p))
