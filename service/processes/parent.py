"""The child's side: one socket to the parent, a heartbeat, and never a life longer than the parent's.

A child ends at once, without clean-up, where its parent closes the socket or dies: `os._exit`, because the
interpreter's own shutdown takes a third of a second with torch loaded and has nothing of value to save.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from service.processes.sandbox import PR_SET_NAME, PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG, prctl
from service.processes.wire import Beat, Hello, Vocabulary, WireError

BEAT_S = 1.0
UNFORESEEN = "unforeseen: "
"""Begins a line on stderr that names an error by type and place, never by what was sent: it may be logged."""
LOST_PARENT = 3
"""Exit status of a child whose parent went away."""
BROKEN = 5
"""Exit status of a child that failed in an unforeseen way, or whose parent broke the protocol."""


class Parent:
    """The connection to the parent. Make it first of all; safe to send from several threads.

    It beats from its `Hello` on at the latest: nobody counts a silence before.
    """

    def __init__(
        self, fd: int, parent_pid: int, vocabulary: Vocabulary, *, keep: Iterable[int | None] = ()
    ) -> None:
        """Take over the inherited socket `fd`. Ctrl-C is the parent's to handle, not ours.

        Every other descriptor is closed, but for those to `keep`.
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # A thread has this from the one that started it: set later, it would not hold for those that run by then.
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        self._parent_pid = parent_pid
        self._vocabulary = vocabulary
        # uvloop hands its children every descriptor that is not close-on-exec, whatever close_fds says.
        kept = sorted({2, fd, os.sysconf("SC_OPEN_MAX"), *(each for each in keep if each is not None)})
        for before, after in pairwise(kept):
            os.closerange(before + 1, after)
        self._connection = socket.socket(fileno=fd)
        self._connection.setblocking(True)
        self._sending = threading.Lock()  # a beat must not land inside a reply
        self._beats = False
        self.follow_to_death()

    @property
    def descriptor(self) -> int:
        """The socket's."""
        return self._connection.fileno()

    def beat(self) -> None:
        """Start to beat, on the last thread that a locked child starts."""
        if not self._beats:
            self._beats = True
            threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def follow_to_death(self) -> None:
        """Have the kernel kill this process when its parent dies. Call again after a change of user.

        The signal follows the parent's thread that started us; the socket's end covers what it does not.
        """
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self._parent_pid:  # it died before we asked
            leave(LOST_PARENT)

    def receive(self) -> Any:
        """The parent's next message. Ends the process where the parent is gone or talks nonsense."""
        try:
            message = self._vocabulary.receive(self._connection)
        except (OSError, WireError):
            leave(LOST_PARENT)
        if message is None:
            leave(0)
        return message

    def send(self, message: object) -> None:
        """Send one message whole. Ends the process where the parent is gone; raises what `encode` raises."""
        if isinstance(message, Hello):
            self.beat()
        try:
            with self._sending:
                self._vocabulary.send(self._connection, message)
        except OSError:
            leave(LOST_PARENT)

    def serve(self, answer: Callable[[object], object]) -> NoReturn:
        """Answer one message after the other, for life. A failure of `answer` ends the process."""
        while True:
            try:
                self.send(answer(self.receive()))  # not by a name: a child at rest keeps nobody's pixels
            except Exception as exc:  # noqa: BLE001 - the interpreter's own end is more than a locked child may do
                tell_unforeseen(exc)
                leave(BROKEN)

    def _beat(self) -> None:
        pause = threading.Event()
        while not pause.wait(BEAT_S):
            self.send(Beat())


def tell_unforeseen(exc: BaseException) -> None:
    """What broke, and where, on stderr; never its message, which may repeat what a tenant sent. It reads no file."""
    frames = [*traceback.walk_tb(exc.__traceback__)][-4:]
    where = " < ".join(
        f"{Path(frame.f_code.co_filename).name}:{line} {frame.f_code.co_name}"
        for frame, line in reversed(frames)
    )
    print(f"{UNFORESEEN}{type(exc).__name__} at {where}", file=sys.stderr, flush=True)  # noqa: T201


def leave(status: int) -> NoReturn:
    """End this process now, also from a thread."""
    os._exit(status)


def name_process(name: str) -> None:
    """What `ps` and `top` call this process; 15 bytes are kept. Call it on the main thread.

    Not through /proc/self/comm, which belongs to root once a process may not be dumped.
    """
    kept = ctypes.create_string_buffer(name.encode()[:15])
    prctl(PR_SET_NAME, ctypes.addressof(kept))
