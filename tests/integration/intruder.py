"""A screening child whose decoder was taken over: the real main and the real lock, and an act for images of a certain width.
`worker_intruder.py` does the same acts in a worker.

An image `FIRST_WIDTH + n` pixels wide makes it do the n-th of `ACTS`. What comes back, if anything does, are pixels of one
value: the error's number that the kernel answered, or 0 where the act was done.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from models import Pixels
from service.screening import Cleaned, ImageLimits, child
from service.screening.pixels import clean_image

FIRST_WIDTH = 300
WIRE, GATEWAY = (int(argument) for argument in sys.argv[1:3]) if __name__ == "__main__" else (-1, -1)

ON_X86 = platform.machine() == "x86_64"
PTRACE, READ_OTHERS, BPF, RANDOM, FUTEX = (101, 310, 321, 318, 202) if ON_X86 else (117, 270, 280, 278, 98)
IO_URING, CLONE3, YOUNGER = 425, 435, 500
"""Numbers of calls that Python has no function for."""

_libc = ctypes.CDLL(None, use_errno=True)
_page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
_name = ctypes.create_string_buffer(b"/etc/passwd")


def _call(number: int, *arguments: object) -> None:
    """A system call by its number. Raises OSError where it fails."""
    padded = [*arguments, *(0,) * (6 - len(arguments))]
    _check(
        _libc.syscall(number, *(ctypes.c_long(each) if isinstance(each, int) else each for each in padded))
    )


def _check(result: int) -> None:
    if result == -1:
        raise OSError(ctypes.get_errno(), "")


def _connect() -> None:
    address = b"\1\0/tmp/.s.PGSQL.5432\0"  # AF_UNIX, and a path
    _check(_libc.connect(WIRE, address, len(address)))


def _make_executable() -> None:
    address = ctypes.addressof(ctypes.c_char.from_buffer(_page))
    _check(_libc.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC))


def _map_executable() -> None:
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    mmap.mmap(-1, mmap.PAGESIZE, flags=kind, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)


def _start_thread() -> None:
    threading.Thread(target=print).start()


ACTS: dict[str, Callable[[], object]] = {
    # Refused with an error: what an interpreter and its libraries try by themselves.
    "open a file": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "create a file": lambda: os.open("/tmp/intruder", os.O_CREAT | os.O_WRONLY),
    "look at a path": lambda: os.stat("/etc"),
    "read a link": lambda: os.readlink("/proc/self/exe"),
    "import": lambda: __import__("wave"),
    "randomness": lambda: _call(RANDOM, ctypes.addressof(_name), 8),
    "sleep": lambda: time.sleep(0.01),
    "count the cores": lambda: os.sched_getaffinity(0),
    "ask what is waiting": lambda: fcntl.ioctl(WIRE, termios.FIONREAD, bytes(4)),
    "clone3": lambda: _call(CLONE3, 0, 0),
    "a younger call": lambda: _call(YOUNGER),
    "lock with priorities": lambda: _call(FUTEX, ctypes.addressof(_name), 6),
    "list a folder": lambda: os.listdir("/"),
    # What ends the process.
    "a socket": socket.socket,
    "connect the wire": _connect,
    "write to the wire": lambda: os.write(WIRE, b"x"),
    "accept": lambda: _libc.accept(WIRE, None, None),
    "execve": lambda: os.execv("/bin/true", ["true"]),
    "fork": os.fork,
    "a program": lambda: subprocess.run(["/bin/true"], check=True),
    "a thread": _start_thread,
    "map executable memory": _map_executable,
    "make memory executable": _make_executable,
    "memory as a file": lambda: os.memfd_create("intruder"),
    "ptrace": lambda: _call(PTRACE, 16, GATEWAY),
    "read another's memory": lambda: _call(READ_OTHERS, GATEWAY, 0, 0, 0, 0),
    "kill the gateway": lambda: os.kill(GATEWAY, signal.SIGKILL),
    "ask for the gateway": lambda: os.kill(GATEWAY, 0),
    "io_uring": lambda: _call(IO_URING, 1, 0),
    "bpf": lambda: _call(BPF, 0, 0, 0),
    "become root": lambda: os.setuid(0),
    "duplicate a descriptor": lambda: os.dup(WIRE),
    "another limit": lambda: os.nice(-1),
    # Its own end, as malloc(3) ends a process whose heap is damaged; and more memory than there is.
    "abort": os.abort,
    "much memory": lambda: bytes(4 * 2**30),
}


def attempt(name: str) -> int:
    """Do it; the number of the error, or 0 where it was done."""
    try:
        ACTS[name]()
    except OSError as exc:
        return exc.errno or 255
    except ImportError:
        return 254
    return 0


def intrude(data: bytes, limits: ImageLimits) -> Cleaned:
    cleaned = clean_image(data, limits)
    place = cleaned.width - FIRST_WIDTH
    if not 0 <= place < len(ACTS):
        return cleaned
    number = attempt([*ACTS][place])
    width, height = cleaned.pixels.width, cleaned.pixels.height
    return replace(cleaned, pixels=Pixels(width, height, bytes([number]) * (width * height * 3)))


if __name__ == "__main__":
    assert Path("/etc/passwd").exists()
    vars(child)["clean_image"] = intrude
    child.main(sys.argv[1:])
