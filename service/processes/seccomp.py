"""Filters on system calls (seccomp(2), classic BPF) of children that compute, and speak on one socket.

Three answers, of which [decision 10](docs/decisions/0010-locked-children.md) gives the reasons:

    allowed    memory without execution, waiting, the socket's own descriptor, stderr, the process's own end
    refused    with an error, as if the system had nothing of it: what the interpreter and libraries ask for by
               themselves and can do without (files by their path, questions about the machine, clone3, calls younger
               than this table)
    the rest   the kernel ends the process: who makes such a call is not our code

The architecture is checked with every call, and x32's numbers are among the rest. `rules` are for what reads strangers'
bytes, `computing_rules` for a model on a CPU, and `offline_rules` for one on a GPU, of whose driver nobody wrote down what
it calls: there only what is listed is refused, and the rest is allowed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from service.processes.sandbox import Measure

NAME, OFFLINE = "seccomp", "seccomp_offline"

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
PR_SET_NAME = 15
THREAD, DETACHED = 0x003D_0F00, 0x0040_0000
"""clone(2)'s flags of a new thread, by which no new process and no namespace comes about; musl adds the second."""
AF_UNIX = 1
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
    wire = Check(0, WHOLE, (connection,))
    output = Check(0, WHOLE, (1, 2))
    return (
        Rule(
            "futex",
            (202, 98),
            checks=(Check(1, FUTEX_COMMAND, (FUTEX_WAIT, FUTEX_WAKE, FUTEX_WAIT_BITSET, FUTEX_WAKE_BITSET)),),
            otherwise=REFUSE | errno.ENOSYS,
        ),
        Rule("recvfrom", (45, 207), checks=(wire,)),
        Rule("sendmsg", (46, 211), checks=(wire,)),
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


def computing_rules(connection: int, pid: int) -> tuple[Rule, ...]:
    """What a worker may do whose model is on a CPU: as `rules`, and what torch and its threads need.

    oneDNN compiles a kernel for each new shape, so memory may be made executable. Threads of this process may start, and
    get a stack and a heap. A fault is told on stderr by handlers of signals; a tenant's caches need randomness.
    """
    mine = (
        Rule("mprotect", (10, 226)),
        Rule("getrandom", (318, 278)),
        Rule("clone", (56, 220), checks=(Check(0, WHOLE, (THREAD, THREAD | DETACHED)),)),
        Rule("set_robust_list", (273, 99)),
        Rule("rseq", (334, 293)),
        Rule("exit", (60, 93)),
        Rule("prctl", (157, 167), checks=(Check(0, WHOLE, (PR_SET_NAME,)),), otherwise=REFUSE | errno.EPERM),
        Rule("rt_sigaction", (13, 134)),
        Rule("rt_sigreturn", (15, 139)),
        Rule("clock_nanosleep", (230, 115)),
        # AMX is asked for once, at the first product that could use it: then the one that needs no leave is taken.
        Rule("arch_prctl", (158, None), REFUSE | errno.EPERM),
    )
    replaced = {rule.name for rule in mine}
    return (*(rule for rule in rules(connection, pid) if rule.name not in replaced), *mine)


def offline_rules(pid: int) -> tuple[Rule, ...]:
    """What a worker may not do whose model is on a GPU: no network, nobody else's memory or end, no new right.

    Its sockets are unix's alone, and none that it connects. It may still open files and run programs, as its user may:
    a kernel that is compiled late is compiled by one.
    """
    refused = (
        ("connect", (42, 203)),
        ("bind", (49, 200)),
        ("listen", (50, 201)),
        ("accept", (43, 202)),
        ("accept4", (288, 242)),
        ("ptrace", (101, 117)),
        ("process_vm_readv", (310, 270)),
        ("process_vm_writev", (311, 271)),
        ("process_madvise", (440, 440)),
        ("pidfd_getfd", (438, 438)),
        ("kcmp", (312, 272)),
        ("keyctl", (250, 219)),
        ("add_key", (248, 217)),
        ("request_key", (249, 218)),
        ("bpf", (321, 280)),
        ("perf_event_open", (298, 241)),
        ("userfaultfd", (323, 282)),
        ("io_uring_setup", (425, 425)),
        ("io_uring_enter", (426, 426)),
        ("io_uring_register", (427, 427)),
        ("mount", (165, 40)),
        ("umount2", (166, 39)),
        ("pivot_root", (155, 41)),
        ("chroot", (161, 51)),
        ("open_tree", (428, 428)),
        ("move_mount", (429, 429)),
        ("fsopen", (430, 430)),
        ("unshare", (272, 97)),
        ("setns", (308, 268)),
        ("open_by_handle_at", (304, 265)),
        ("tkill", (200, 130)),
        ("rt_sigqueueinfo", (129, 138)),
        ("rt_tgsigqueueinfo", (297, 240)),
        ("pidfd_send_signal", (424, 424)),
    )
    local, itself = Check(0, WHOLE, (AF_UNIX,)), Check(0, WHOLE, (pid,))
    return (
        Rule("kill", (62, 129), checks=(itself,), otherwise=REFUSE | errno.EPERM),
        Rule("tgkill", (234, 131), checks=(itself,), otherwise=REFUSE | errno.EPERM),
        Rule("socket", (41, 198), checks=(local,), otherwise=REFUSE | errno.EACCES),
        *(Rule(name, numbers, REFUSE | errno.EPERM) for name, numbers in refused),
    )


def assemble(rules: Sequence[Rule], machine: Machine, *, rest: int = KILL) -> bytes:
    """The program: an array of `struct sock_filter` that gives an answer to every `struct seccomp_data`.

    `rest` is the answer to what no rule names, of calls that this table is old enough to know.
    """
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
    program.append((RETURN, 0, 0, rest))
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


def filter_calls(rules: Sequence[Rule]) -> Measure:
    """Bind every thread of this process, and those that they start, for good, to `rules`; the rest ends the process.

    Never raises: whether it holds is in the report. It needs no new privileges, or root.
    """
    return _bind(NAME, rules, KILL, _look_up)


def filter_network() -> Measure:
    """Bind every thread of this process in the same way to `offline_rules`; the rest is allowed."""
    return _bind(OFFLINE, offline_rules(os.getpid()), ALLOW, _open_socket)


def _bind(name: str, rules: Sequence[Rule], rest: int, probe: Callable[[], object]) -> Measure:
    """Have the kernel take the program, and try what it must refuse."""
    here = os.uname().machine
    machine = MACHINES.get(here)
    if sys.platform != "linux" or machine is None or sys.maxsize < 2**32 or sys.byteorder != "little":
        return Measure(name, False, f"no table for {sys.platform} on {here}")
    libc = ctypes.CDLL(None, use_errno=True)
    kill = ctypes.c_uint32(KILL)
    if libc.syscall(machine.seccomp, ACTION_AVAILABLE, 0, ctypes.byref(kill)) != 0:
        return Measure(name, False, os.strerror(ctypes.get_errno()))
    program = assemble(rules, machine, rest=rest)
    instructions = ctypes.create_string_buffer(program, len(program))
    header = _Program(len(program) // INSTRUCTION.size, ctypes.addressof(instructions))
    result = libc.syscall(machine.seccomp, SET_FILTER, ALL_THREADS, ctypes.byref(header))
    if result != 0:
        why = os.strerror(ctypes.get_errno()) if result < 0 else "a thread has a filter of its own"
        return Measure(name, False, why)
    try:
        probe()
    except PermissionError:
        return Measure(name, True, here)
    return Measure(name, False, "a call that the filter refuses was answered")


def _look_up() -> None:
    Path("/").stat()


def _open_socket() -> None:
    socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()


class _Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("instructions", ctypes.c_ushort), ("filter", ctypes.c_void_p))
