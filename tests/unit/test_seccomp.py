"""The filter's program, read by an interpreter of our own: also for the machine that tests do not run on."""

from __future__ import annotations

import errno
import mmap
import re
import signal
import struct
from pathlib import Path

import pytest

from service.processes.seccomp import (
    ALLOW,
    INSTRUCTION,
    KILL,
    MACHINES,
    NEWEST,
    REFUSE,
    Machine,
    Rule,
    assemble,
    computing_rules,
    offline_rules,
    rules,
)

WIRE, PID = 7, 4_321
ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
RULES = {rule.name: rule for rule in rules(WIRE, PID)}
COMPUTING = {rule.name: rule for rule in computing_rules(WIRE, PID)}
OFFLINE = {rule.name: rule for rule in offline_rules(PID)}
THREAD = 0x3D0F00


@pytest.fixture(params=sorted(MACHINES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def machine(name: str) -> Machine:
    return MACHINES[name]


def judge(
    machine: Machine,
    number: int,
    *arguments: int,
    architecture: int | None = None,
    table: dict[str, Rule] = RULES,
    rest: int = KILL,
) -> int:
    """What the program answers to one call: bpf(4)'s rules for the few instructions that it has."""
    where = machine.architecture if architecture is None else architecture
    padded = [argument & 0xFFFF_FFFF_FFFF_FFFF for argument in (*arguments, *(0,) * (6 - len(arguments)))]
    data = struct.pack("<iIQ6Q", number if number < 2**31 else number - 2**32, where, 0, *padded)
    program = list(INSTRUCTION.iter_unpack(assemble(tuple(table.values()), machine, rest=rest)))
    at = accumulator = 0
    while True:
        code, jump_true, jump_false, value = program[at]
        at += 1
        match code:
            case 0x20:
                (accumulator,) = struct.unpack_from("<I", data, value)
            case 0x54:
                accumulator &= value
            case 0x15:
                at += jump_true if accumulator == value else jump_false
            case 0x35:
                at += jump_true if accumulator >= value else jump_false
            case 0x06:
                return int(value)
            case _:
                raise AssertionError(f"no instruction of ours: {code:#x}")


@pytest.mark.parametrize(
    ("call", "arguments", "answer"),
    [
        ("recvfrom", (WIRE,), ALLOW),
        ("recvfrom", (WIRE + 1,), KILL),
        ("sendmsg", (WIRE,), ALLOW),
        ("sendmsg", (2,), KILL),
        ("write", (2,), ALLOW),
        ("write", (WIRE,), KILL),
        ("writev", (0,), KILL),
        ("brk", (0,), ALLOW),
        ("munmap", (0, 4096), ALLOW),
        ("mmap", (0, 4096, mmap.PROT_READ | mmap.PROT_WRITE, ANONYMOUS, -1), ALLOW),
        ("mmap", (0, 4096, mmap.PROT_READ | mmap.PROT_EXEC, ANONYMOUS, -1), KILL),
        ("mmap", (0, 4096, mmap.PROT_READ, mmap.MAP_PRIVATE, 3), KILL),
        ("mmap", (0, 4096, mmap.PROT_READ, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, -1), KILL),
        ("madvise", (0, 4096, 4), ALLOW),
        ("madvise", (0, 4096, 14), ALLOW),
        ("madvise", (0, 4096, 12), REFUSE | errno.EINVAL),
        ("futex", (0, 128), ALLOW),
        ("futex", (0, 128 | 256 | 9), ALLOW),
        ("futex", (0, 128 | 6), REFUSE | errno.ENOSYS),
        ("tgkill", (PID, PID + 1, signal.SIGABRT), ALLOW),
        ("tgkill", (PID, PID + 1, signal.SIGTERM), KILL),
        ("tgkill", (PID + 1, PID + 1, signal.SIGABRT), KILL),
        ("exit_group", (0,), ALLOW),
        ("openat", (-100,), REFUSE | errno.EACCES),
        ("newfstatat", (-100,), REFUSE | errno.EACCES),
        ("getrandom", (0, 8, 0), REFUSE | errno.EPERM),
        ("clone3", (0, 0), REFUSE | errno.ENOSYS),
    ],
)
def test_calls_are_judged_by_their_arguments(
    machine: Machine, call: str, arguments: tuple[int, ...], answer: int
) -> None:
    number = RULES[call].numbers[machine.place]
    assert number is not None
    assert judge(machine, number, *arguments) == answer


@pytest.mark.parametrize(
    ("call", "arguments", "answer"),
    [
        ("mprotect", (0, 4096, mmap.PROT_READ | mmap.PROT_EXEC), ALLOW),
        ("mmap", (0, 4096, mmap.PROT_READ | mmap.PROT_EXEC, ANONYMOUS, -1), KILL),
        ("clone", (THREAD,), ALLOW),
        ("clone", (THREAD | 0x400000,), ALLOW),
        ("clone", (signal.SIGCHLD,), KILL),
        ("clone", (THREAD | 0x2000_0000,), KILL),  # and a new namespace of pids
        ("prctl", (15, 0), ALLOW),
        ("prctl", (4, 1), REFUSE | errno.EPERM),
        ("getrandom", (0, 8, 0), ALLOW),
        ("sendmsg", (WIRE + 1,), KILL),
        ("openat", (-100,), REFUSE | errno.EACCES),
        ("clone3", (0, 0), REFUSE | errno.ENOSYS),
    ],
)
def test_calls_of_a_worker_are_judged_by_their_arguments(
    machine: Machine, call: str, arguments: tuple[int, ...], answer: int
) -> None:
    number = COMPUTING[call].numbers[machine.place]
    assert number is not None
    assert judge(machine, number, *arguments, table=COMPUTING) == answer


def test_on_a_gpu_what_is_listed_is_refused_and_the_rest_allowed(machine: Machine) -> None:
    def answer(call: str, *arguments: int) -> int:
        number = OFFLINE[call].numbers[machine.place]
        assert number is not None
        return judge(machine, number, *arguments, table=OFFLINE, rest=ALLOW)

    assert answer("socket", 1, 1) == ALLOW
    assert {answer("socket", family, 1) for family in (0, 2, 10, 16, 17, 40)} == {REFUSE | errno.EACCES}
    assert (answer("kill", PID), answer("kill", PID + 1)) == (ALLOW, REFUSE | errno.EPERM)
    for call in OFFLINE.keys() - {"socket", "kill", "tgkill"}:
        assert answer(call, PID) == REFUSE | errno.EPERM
    known = {rule.numbers[machine.place] for rule in OFFLINE.values()}
    for number in set(range(NEWEST + 1)) - known:
        assert judge(machine, number, table=OFFLINE, rest=ALLOW) == ALLOW


def test_what_stands_in_no_table_ends_the_process(machine: Machine) -> None:
    for table in (RULES, COMPUTING):
        known = {rule.numbers[machine.place] for rule in table.values()}
        for number in range(NEWEST + 1):
            assert (judge(machine, number, table=table) == KILL) or number in known
    assert judge(machine, NEWEST + 1) == REFUSE | errno.ENOSYS
    assert judge(machine, 0x4000_0000 - 1) == REFUSE | errno.ENOSYS


def test_other_architectures_and_x32_end_the_process(machine: Machine) -> None:
    number = RULES["brk"].numbers[machine.place]
    assert number is not None
    for other in (0x4000_0003, 0x4000_0028, *(each.architecture for each in MACHINES.values())):  # i386, arm
        expected = ALLOW if other == machine.architecture else KILL
        assert judge(machine, number, architecture=other) == expected
    assert judge(machine, number | 0x4000_0000) == KILL
    assert judge(machine, 0xFFFF_FFFF) == KILL


def test_the_program_fits_into_the_kernel(machine: Machine) -> None:
    """BPF_MAXINSNS; and jumps reach no further than 255, which a byte of an instruction says."""
    assert len(assemble(rules(WIRE, PID), machine)) // INSTRUCTION.size < 4096


def test_numbers_are_those_of_the_kernels_headers(name: str, machine: Machine) -> None:
    if not HEADERS[name].exists():
        pytest.skip("no kernel headers here")
    stated = re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)$", HEADERS[name].read_text(), re.MULTILINE)
    numbers = {call: int(number) for call, number in stated}
    for rule in (*RULES.values(), *COMPUTING.values(), *OFFLINE.values()):
        call = "fstatat" if (rule.name, name) == ("newfstatat", "aarch64") else rule.name
        assert rule.numbers[machine.place] == numbers.get(call), rule.name
