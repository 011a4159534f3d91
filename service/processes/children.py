"""The gateway's side of a child process: start it, know that it lives, ask it, end it.

A child inherits three things only: one end of a socket pair, the environment that `Launch` spells out, and a
pipe as stderr; a worker also the memory that holds the weights, or says where they are, and a child that decodes images the
memory that it writes pixels into. It runs in a session of
its own, so that Ctrl-C in a terminal reaches the gateway alone. It counts as started when its `Hello` arrives.
From then on silence for `silence_s` is death: it is killed and reported lost; so are an end of its socket and its
exit, at once. A lost or stopped child is always reaped.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from service.processes.wire import Beat, Hello, Vocabulary, WireError

STDERR_LINE_BYTES = 500
STDERR_LINES = 40
WATCHES_PER_SILENCE = 8
FORBIDDEN_CALL = b"ended by the kernel: it made a system call that its filter does not allow"


class Cause(StrEnum):
    """Why a child is gone, for whoever counts; the reason beside it is for the log."""

    STOPPED = "stopped"
    """It was no longer wanted."""
    DIED = "died"
    """It ended by itself, or somebody else ended it."""
    SILENT = "silent"
    PROTOCOL = "protocol"
    """What it said makes no sense."""
    OVERDUE = "overdue"
    """It took too long over a piece of work."""
    DECODER = "decoder"
    """What it decodes with choked on an image."""
    WEIGHTS = "weights"
    """Its weights are no longer to be trusted."""
    CONTAINED = "contained"
    """Its tenant is contained."""


class ChildLost(Exception):
    """The child is gone: it ended, was killed, fell silent, or never started.

    Of one that never started there may be its exit `status`, and its `last_words` on stderr.
    """

    def __init__(self, reason: str, *, status: int | None = None, last_words: str = "") -> None:
        super().__init__(reason)
        self.status = status
        self.last_words = last_words


class Request(Protocol):
    """A message that expects an answer with the same id; ids are never used twice with one child."""

    @property
    def id(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start one kind of child.

    `{fd}`, `{parent}` and `{shared}` in `argv` become the number of the inherited socket, the gateway's pid, and
    `shared`, a descriptor that the child inherits under the same number; `{secret}` that of a pipe from which `secret`,
    4 KiB at most, can be read once. `environ` is the child's whole environment.
    `told` gets each line of its stderr, cut short, and a word of ours where the kernel ended it; it must not raise.
    """

    argv: tuple[str, ...]
    vocabulary: Vocabulary
    environ: Mapping[str, str] = field(default_factory=dict)
    start_s: float = 60.0
    silence_s: float = 10.0
    grace_s: float = 2.0
    told: Callable[[str], None] | None = None
    shared: int | None = None
    secret: bytes | None = field(default=None, repr=False)


def bare_environ(**extra: str) -> dict[str, str]:
    """The least a Python child needs, and nothing of ours: no secrets, no settings."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "PYTHONDONTWRITEBYTECODE": "1",
        **extra,
    }


class Child:
    """One child process. Belongs to the event loop that started it. Use `start_child`."""

    def __init__(
        self,
        launch: Launch,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.pid = process.pid
        self.lost: asyncio.Future[str] = loop.create_future()
        """Done once the child is unusable, with the reason; never cancelled, never an exception."""
        self.cause: Cause | None = None
        """Why it is lost, once it is."""
        self.stderr: deque[str] = deque(maxlen=STDERR_LINES)
        self._launch = launch
        self._process = process
        self._reader = reader
        self._writer = writer
        self._hello: asyncio.Future[Hello] = loop.create_future()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._heard = True
        self._pidfd = _open_pidfd(process.pid)
        self._tasks = [loop.create_task(self._read()), loop.create_task(self._watch())]
        self._tell = loop.create_task(self._forward())
        self._end = loop.create_task(self._reap())

    @property
    def hello(self) -> Hello:
        """What the child said when it was ready."""
        return self._hello.result()

    @property
    def alive(self) -> bool:
        return not self.lost.done()

    async def ask(self, request: Request) -> Any:
        """Send a request and wait for its answer. Raises ChildLost; WireError where it cannot be sent.

        Cancelling does not stop the child: its late answer is dropped.
        """
        self._check()
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[request.id] = answer
        try:
            await self.tell(request)
            return await answer
        finally:
            self._waiting.pop(request.id, None)
            if answer.done() and not answer.cancelled():
                answer.exception()  # lost while we were still sending: `tell` has raised it already

    async def tell(self, message: object) -> None:
        """Send a message that has no answer. Raises ChildLost or WireError."""
        self._check()
        self._launch.vocabulary.write(self._writer, message)
        try:
            await self._writer.drain()
        except (OSError, RuntimeError) as exc:
            self._lose("closed its socket", Cause.DIED)
            raise ChildLost(self.lost.result()) from exc

    async def mention(self, message: object) -> None:
        """Send what has no answer; where the child is lost, there is nobody left to whom it matters."""
        with contextlib.suppress(ChildLost):
            await self.tell(message)

    def kill(self, reason: str = "killed", cause: Cause = Cause.STOPPED) -> None:
        """End the child at once; who waits for it gets ChildLost. Returns before it is reaped: see `stop`."""
        self._lose(reason, cause)

    async def stop(self) -> None:
        """End the child and reap it: close its socket, and kill it where it has not gone after `grace_s`."""
        if self.alive:
            self._lose("stopped", Cause.STOPPED, kill=False)
        try:
            async with asyncio.timeout(self._launch.grace_s):
                await asyncio.shield(self._end)
        except TimeoutError:
            self._signal_kill()
            await asyncio.shield(self._end)
        await asyncio.wait({self._tell}, timeout=1.0)
        self._tell.cancel()

    def _check(self) -> None:
        if self.lost.done():
            raise ChildLost(self.lost.result())

    async def _greet(self) -> None:
        """Wait for Hello. Raises ChildLost with the last words of a child that did not make it."""
        either: tuple[asyncio.Future[Any], ...] = (self._hello, self.lost)
        await asyncio.wait(either, timeout=self._launch.start_s, return_when=asyncio.FIRST_COMPLETED)
        if self._hello.done() and self.alive:
            return
        self._lose(f"not ready within {self._launch.start_s:g} s", Cause.OVERDUE)
        await self.stop()
        last_words = self.stderr[-1] if self.stderr else "no word on stderr"
        status = self._process.returncode
        reason = f"{self.lost.result()}; {_status(status)}; {last_words}"
        raise ChildLost(reason, status=status, last_words=last_words)

    async def _read(self) -> None:
        reason, cause = "broke the protocol", Cause.PROTOCOL
        try:
            while (message := await self._launch.vocabulary.read(self._reader)) is not None:
                self._heard = True
                if isinstance(message, Beat):
                    continue
                if isinstance(message, Hello):
                    if self._hello.done():
                        raise WireError("a second Hello")
                    self._hello.set_result(message)
                    continue
                answer = self._waiting.pop(getattr(message, "id", 0), None)
                if answer is not None and not answer.done():
                    answer.set_result(message)
            reason, cause = "closed its socket", Cause.DIED
        except WireError as exc:
            reason = f"broke the protocol: {exc}"
        except OSError:
            reason, cause = "closed its socket", Cause.DIED
        finally:
            self._lose(reason, cause)

    async def _watch(self) -> None:
        """Count ticks without a word rather than seconds: a gateway that itself stood still must not kill."""
        await asyncio.wait({self._hello})
        silent = 0
        while silent < WATCHES_PER_SILENCE:
            await asyncio.sleep(self._launch.silence_s / WATCHES_PER_SILENCE)
            silent = 0 if self._heard else silent + 1
            self._heard = False
        self._lose(f"silent for {self._launch.silence_s:g} s", Cause.SILENT)

    async def _reap(self) -> None:
        status = await self._process.wait()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        if status == -signal.SIGSYS:
            self._hear(FORBIDDEN_CALL)
        self._lose(f"ended with {_status(status)}", Cause.DIED, kill=False)

    async def _forward(self) -> None:
        """Read stderr to its end in bounded pieces: a chatty child neither blocks nor fills our memory."""
        stderr = self._process.stderr
        assert stderr is not None
        rest = b""
        while piece := await stderr.read(8192):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                self._hear(line)
            rest = rest[:STDERR_LINE_BYTES]
        if rest:
            self._hear(rest)

    def _hear(self, line: bytes) -> None:
        text = line[:STDERR_LINE_BYTES].decode(errors="replace").rstrip()
        if text:
            self.stderr.append(text)
            if self._launch.told is not None:
                self._launch.told(text)

    def _lose(self, reason: str, cause: Cause, *, kill: bool = True) -> None:
        """The one way out; only its first reason counts."""
        if not self.lost.done():
            self.cause = cause
            self.lost.set_result(reason)
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(ChildLost(reason))
            self._waiting.clear()
            self._writer.transport.abort() if kill else self._writer.close()
            for task in self._tasks:
                task.cancel()
        if kill:
            self._signal_kill()

    def _signal_kill(self) -> None:
        """SIGKILL through the pidfd: a pid may already be another process's by now."""
        with contextlib.suppress(ProcessLookupError):
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            elif self._process.returncode is None:
                self._process.kill()


async def start_child(launch: Launch) -> Child:
    """Start a child and wait until it is ready. Raises ChildLost; however it fails, it leaves no process."""
    ours, theirs = socket.socketpair()
    with theirs, _pipe_with(launch.secret) as secret:
        # Connected first: between the child's birth and its `Child`, which reaps it, nothing is awaited.
        try:
            reader, writer = await asyncio.open_unix_connection(sock=ours)
        except BaseException:
            ours.close()
            raise
        numbers = {
            "{fd}": str(theirs.fileno()),
            "{parent}": str(os.getpid()),
            "{shared}": str(launch.shared),
            "{secret}": str(secret),
        }
        inherited = [each for each in (theirs.fileno(), launch.shared, secret) if each is not None]
        try:
            process = await asyncio.create_subprocess_exec(
                *(numbers.get(argument, argument) for argument in launch.argv),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=inherited,
                env=dict(launch.environ),
                start_new_session=True,
            )
        except OSError as exc:
            writer.close()
            raise ChildLost(f"cannot be started: {type(exc).__name__}") from exc
        except BaseException:
            writer.close()  # a child that did start reads the end of its socket
            raise
    child = Child(launch, process, reader, writer)
    try:
        await child._greet()
    except BaseException:
        child.kill("given up")
        await asyncio.shield(child.stop())
        raise
    return child


@contextlib.contextmanager
def _pipe_with(secret: bytes | None) -> Iterator[int | None]:
    """The end to read of a pipe that holds `secret` and ends there, for as long as the block; None without any."""
    if secret is None:
        yield None
        return
    out, into = os.pipe()
    try:
        os.write(into, secret)
    finally:
        os.close(into)
    try:
        yield out
    finally:
        os.close(out)


def _open_pidfd(pid: int) -> int | None:
    """A handle to exactly this process, or None where the kernel has none."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def _status(code: int | None) -> str:
    """An exit status in words."""
    if code is not None and code < 0:
        return f"signal {-code}"
    return f"exit status {code}"
