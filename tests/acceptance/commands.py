"""Commands of the command line, each in a process of its own that need not import everything first.

To start Python, import the command line and end takes a second or two of a core, and the suite runs hundreds of commands.
So one process imports it once, and forks for each command: with the command's own arguments, environment, folder, output
and exit status. `test_command_line` shows that a command started from nothing says the same.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

REPOSITORY = Path(__file__).resolve().parents[2]
REQUEST_BYTES = 1 << 20
_started: list[tuple[subprocess.Popen[bytes], str]] = []


def run(
    arguments: list[str], environment: dict[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """`python -m service …`, to its end.

    Raises subprocess.TimeoutExpired where it does not end in time; it is killed then.
    """
    with (
        tempfile.TemporaryFile() as stdout,
        tempfile.TemporaryFile() as stderr,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel,
    ):
        channel.connect(_server())
        channel.settimeout(timeout_s)
        request = json.dumps([arguments, environment]).encode()
        socket.send_fds(channel, [request], [stdout.fileno(), stderr.fileno()])
        pid = int(channel.recv(32))
        try:
            status = int(channel.recv(32))
        except TimeoutError as exc:
            os.kill(pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(arguments, timeout_s) from exc
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read().decode())
        return subprocess.CompletedProcess(arguments, status, *texts)


def end() -> None:
    """End this test process's server, where one was started."""
    if _started:
        process, address = _started.pop()
        process.communicate()  # its input ends
        shutil.rmtree(Path(address).parent)


def _server() -> str:
    """The address of this test process's server; it is started when first asked for."""
    if not _started:
        address = str(Path(tempfile.mkdtemp(prefix="pericarp-commands-")) / "socket")
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.acceptance.commands", address],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        _started.append((process, address))
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return _started[0][1]


def serve(address: str) -> None:
    """Answer on `address` until standard input ends."""
    from service import __main__ as command_line

    sys.modules["__main__"] = command_line  # whose name stands in "Usage: python -m service"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen(64)
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who watch over a command
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        channel, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _watch_over(channel, command_line.main)
        channel.close()


def _watch_over(channel: socket.socket, main: Callable[[], None]) -> NoReturn:
    """Fork for the one command that `channel` asks for; tell its pid, and its exit status once it has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, descriptors, _, _ = socket.recv_fds(channel, REQUEST_BYTES, 2)
    arguments, environment = json.loads(request)
    pid = os.fork()
    if pid == 0:
        channel.close()
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        for number, descriptor in enumerate(descriptors, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = [str(REPOSITORY / "service" / "__main__.py"), *arguments]
        status = 1
        try:
            main()
            status = 0
        except SystemExit as exc:
            status = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    channel.send(str(pid).encode())
    channel.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1])
