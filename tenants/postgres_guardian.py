"""The one process that stands beside an embedded Postgres and stops it when nobody needs it any more.

`tenants/embedded.py` runs this file by its path, with `python -I -S`, because a child that gives up root must
be a fresh, single-threaded process of the standard library alone. Three verbs:

    reach UID GID PATH…             0 if that account can enter (a directory) or run (a file) every PATH
    become UID GID COMMAND…         give up root and run COMMAND (initdb); it dies with whoever started it
    serve CLUSTER UID GID COMMAND…  leave the caller's session, run Postgres, stay until nobody claims it

`serve` holds CLUSTER/guardian, an exclusive flock, for life: who can take that lock knows that no server is
supervised. It stops Postgres once it gets the exclusive lock on CLUSTER/holders, of which every user of the
server has a shared one. A Postgres that dies while it is needed is started again.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import pwd
import resource
import signal
import sys
import time
from pathlib import Path

BUSY = 75  # another guardian is there already (EX_TEMPFAIL)
_TICK_S = 0.1
_FAST_STOP_S = 30.0
_IMMEDIATE_STOP_S = 10.0
_LONG_LIFE_S = 60.0  # a server that lived this long was healthy: forget earlier failures
_MOST_RESTARTS = 8
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_CLONE_NEWUSER = 0x10000000


def main(arguments: list[str]) -> int:
    """Do what the first argument says; the exit status is the answer."""
    _dump_no_core()
    verb, rest = arguments[0], arguments[1:]
    if verb == "serve":
        return _serve(Path(rest[0]), int(rest[1]), int(rest[2]), rest[3:])
    _become(int(rest[0]), int(rest[1]))
    if verb == "become":
        _borrow_a_name()
        _die_with_parent(signal.SIGKILL)
        os.execv(rest[2], rest[2:])  # noqa: S606
    return _reach(rest[2:])


def status(data: Path, pid: int | None = None) -> str:
    """What the server on `data` (the one with that pid) says it is: starting, ready, stopping; empty if there is none."""
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
    except OSError:
        return ""
    if len(lines) < 8 or (pid is not None and lines[0].strip() != str(pid)):
        return ""
    return lines[7].strip()


def _dump_no_core() -> None:
    """No core dump of Postgres holds rows or passwords. Both are kept by what we start, and by root as well.

    The limit does not count where dumps are piped to a program; there the filter leaves no memory to be dumped (core(5)).
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(FileNotFoundError):  # of kernels without the file
        Path("/proc/self/coredump_filter").write_text("0")


def _become(uid: int, gid: int) -> None:
    """Give up root for good; nothing to do where we never had it."""
    os.umask(0o077)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)


def _borrow_a_name() -> None:
    """initdb insists on a passwd entry. A uid that has none becomes `nobody` in a user namespace of its own.

    Where that is not allowed, initdb says what it misses.
    """
    uid, gid = os.geteuid(), os.getegid()
    if any(entry.pw_uid == uid for entry in pwd.getpwall()):
        return
    listed = next((entry for entry in pwd.getpwall() if entry.pw_name == "nobody"), None)
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # lost with root, and needed to write to our own /proc/self
    if listed is None or libc.unshare(_CLONE_NEWUSER) != 0:
        return
    for file, words in (
        ("setgroups", "deny"),
        ("uid_map", f"{listed.pw_uid} {uid} 1"),
        ("gid_map", f"{listed.pw_gid} {gid} 1"),
    ):
        Path("/proc/self", file).write_text(words)


def _die_with_parent(with_signal: int) -> None:
    """Have the kernel signal us when our parent is gone. After `_become`: a change of uid clears it."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(with_signal), 0, 0, 0)
    if os.getppid() != parent:  # it went before we asked
        os._exit(1)


def _reach(paths: list[str]) -> int:
    for path in paths:
        try:
            if Path(path).is_dir():
                os.chdir(path)
            elif not os.access(path, os.X_OK):
                raise PermissionError(path)
        except OSError:
            sys.stderr.write(path)
            return 1
    return 0


def _serve(cluster: Path, uid: int, gid: int, command: list[str]) -> int:
    lock = os.open(cluster / "guardian", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return BUSY
    if (
        os.fork()
    ):  # the lock lives on in the child; whoever started us is not bothered with a child of its own
        return 0
    os.setsid()
    os.chdir("/")
    # A terminal's Ctrl-C or a service manager's SIGTERM to the whole group must not part us from our holders.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would have the kernel reap for us
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    _spare_from_the_oom_killer(-900)
    holders = os.open(cluster / "holders", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    return _watch(holders, cluster / "data", uid, gid, command)


def _watch(holders: int, data: Path, uid: int, gid: int, command: list[str]) -> int:
    """Keep Postgres running until no holder is left. A start that never became ready is not tried again."""
    postgres, started, ready, restarts = _launch(uid, gid, command), time.monotonic(), False, 0
    while True:
        signal.sigtimedwait({signal.SIGCHLD}, _TICK_S)
        if _unclaimed(holders):
            _stop(postgres)
            return 0
        ready = ready or status(data, postgres) == "ready"
        if os.waitpid(postgres, os.WNOHANG)[0] == 0:
            continue
        if time.monotonic() - started > _LONG_LIFE_S:
            restarts = 0
        restarts += 1
        if not ready or restarts > _MOST_RESTARTS:
            return 1
        # Backends of a killed postmaster take a moment to notice, and hold its shared memory until then.
        time.sleep(min(0.1 * 2**restarts, 5.0))
        postgres, started = _launch(uid, gid, command), time.monotonic()


def _launch(uid: int, gid: int, command: list[str]) -> int:
    postgres = os.fork()
    if postgres:
        return postgres
    try:
        os.setsid()
        for default in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(default, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        _become(uid, gid)
        _die_with_parent(signal.SIGINT)  # fast shutdown: Postgres does not outlive its guardian
        os.execv(command[0], command)  # noqa: S606
    except BaseException as failure:  # noqa: BLE001  the child must never run on as a second guardian
        os.write(2, f"FATAL:  cannot run {command[0]}: {failure}\n".encode())
    os._exit(1)


def _unclaimed(holders: int) -> bool:
    """Whether nobody holds the server. If so we now own the lock, and a newcomer waits until we are gone."""
    try:
        fcntl.flock(holders, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _stop(postgres: int) -> None:
    """Fast shutdown, then an immediate one, from which the WAL recovers. Our own child: no pid reuse."""
    for word, patience_s in (
        (signal.SIGINT, _FAST_STOP_S),
        (signal.SIGQUIT, _IMMEDIATE_STOP_S),
        (signal.SIGKILL, _IMMEDIATE_STOP_S),
    ):
        os.kill(postgres, word)
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            if os.waitpid(postgres, os.WNOHANG)[0]:
                return
            signal.sigtimedwait({signal.SIGCHLD}, _TICK_S)


def _spare_from_the_oom_killer(score: int) -> None:
    """Where we may. Workers are worth less than the database; its backends reset themselves to 0."""
    try:
        Path("/proc/self/oom_score_adj").write_text(str(score))
    except OSError:
        return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
