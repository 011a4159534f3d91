"""Writes log lines on a thread of its own, so that no disk, pipe or terminal holds up whoever logs.

Between them is a buffer of a fixed number of lines. Where the writer does not keep up, for its disk hangs or nobody
reads its pipe, further lines are dropped and counted, and the next line that gets through says how many.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

BUFFERED_LINES = 8192
TELL_LINES = BUFFERED_LINES // 2
"""Fewer must wait before drops are told: that line is not to be dropped as well."""
BATCH_LINES = 256
LINE_BYTES = 16 * 1024
"""A longer line is dropped: 128 MiB of buffer are the most that there can be."""
FLUSH_S = 5.0
"""How long the end of a process waits for its last lines."""

Sink = Callable[[bytes], None]
"""Writes whole lines, each with its newline. Blocking; raises OSError where it cannot."""


class Writer:
    """One process's. `write` may be called from any thread and never waits."""

    def __init__(
        self,
        sink: Sink,
        *,
        fallback: Sink | None = None,
        dropped: Callable[[int], None] | None = None,
        told: Callable[[int], None] | None = None,
        failed: Callable[[OSError], None] | None = None,
    ) -> None:
        """Lines go to `sink` and, while that one fails, to `fallback`. All of these are called on the writer's thread
        but `dropped`, which counts: with a number of lines, at once, on the thread that logs.

        `told` gets the number of lines dropped since it was called last, once there is room again, and logs it.
        `failed` gets the first error of a row.
        """
        self._sink = sink
        self._fallback = fallback
        self._count = dropped
        self._told = told
        self._failed = failed
        self._failing = False
        self._untold = 0
        self._lock = threading.Lock()
        self._lines: SimpleQueue[bytes | None] = SimpleQueue()
        self._closed = False
        self._stuck = False
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        """Have one line written, newline included; or dropped. After `close` it is written at once."""
        if len(line) > LINE_BYTES or self._lines.qsize() >= BUFFERED_LINES or self._stuck:
            self._drop(1)
        elif self._closed:
            self._put([line])
        else:
            self._lines.put(line)

    def close(self, within_s: float = FLUSH_S) -> bool:
        """Write what is buffered; whether that was done in time. What was not is lost with the process."""
        if not self._closed:
            self._closed = True
            self._lines.put(None)
        self._thread.join(within_s)
        self._stuck = self._thread.is_alive()
        return not self._stuck

    def _run(self) -> None:
        while True:
            lines = [self._lines.get()]
            while len(lines) < BATCH_LINES and lines[-1] is not None:
                try:
                    lines.append(self._lines.get_nowait())
                except Empty:
                    break
            if self._put([line for line in lines if line is not None]) and self._lines.qsize() < TELL_LINES:
                self._tell()
            if lines[-1] is None:
                return

    def _put(self, lines: list[bytes]) -> bool:
        """Write these, or count them as dropped; whether they were written."""
        data = b"".join(lines)
        try:
            self._sink(data)
        except OSError as exc:
            first, self._failing = not self._failing, True
            written = self._put_elsewhere(data)
            if not written:
                self._drop(len(lines))
            if first and self._failed is not None:
                self._failed(exc)
            return written
        self._failing = False
        return True

    def _put_elsewhere(self, data: bytes) -> bool:
        if self._fallback is None:
            return False
        try:
            self._fallback(data)
        except OSError:
            return False
        return True

    def _drop(self, lines: int) -> None:
        with self._lock:
            self._untold += lines
        if self._count is not None:
            self._count(lines)

    def _tell(self) -> None:
        with self._lock:
            count, self._untold = self._untold, 0
        if count and self._told is not None:
            self._told(count)


def write_stderr(data: bytes) -> None:
    """Write all of it to the process's standard error, whatever `sys.stderr` is."""
    while data:
        data = data[os.write(2, data) :]
