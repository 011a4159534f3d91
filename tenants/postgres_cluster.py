"""A cluster's beginning: the superuser's password, initdb, and which major version wrote the data."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from tenants.postgres_account import (
    CLEAN_ENVIRONMENT,
    DataUnusable,
    EmbeddedError,
    Place,
    as_account,
    hand_over,
    sync_directory,
    write_durably,
)

_ALONE = ("synchronous_standby_names=", "archive_mode=off", "ssl=off", "shared_preload_libraries=")
"""A restored cluster waits for nobody, and writes to no archive: its configuration may be that of a server with both."""
_HBA = "local all all scram-sha-256\nlocal replication all scram-sha-256\n"
_NAMELESS = "look up effective user"  # what initdb says where its uid has no passwd entry


class InitFailed(EmbeddedError):
    """initdb failed."""


def initialise(home: Path, place: Place, binaries: Path) -> None:
    """initdb beside, then rename: data/ is either whole or not there.

    As the account itself if it has a passwd entry or a user namespace lends it one, else as one that is listed.
    """
    password = password_of(home, place)
    draft, complaint = _draft(place, binaries, password, place.uid, place.gid)
    if _NAMELESS in complaint and place.initdb_uid != place.uid:
        shutil.rmtree(draft, ignore_errors=True)
        draft, complaint = _draft(place, binaries, password, place.initdb_uid, place.initdb_gid)
    if complaint:
        shutil.rmtree(draft, ignore_errors=True)
        hint = f": give uid {place.uid} a passwd entry" if _NAMELESS in complaint else ""
        raise InitFailed(f"initdb failed: {complaint}{hint}")
    hand_over(draft, place.uid, place.gid)
    draft.rename(place.data)
    sync_directory(place.cluster)


def take_in(home: Path, place: Place, binaries: Path, fill: Callable[[Path], None], verifier: str) -> None:
    """Have `fill` write a cluster, a restored base backup, into an empty folder; then rename: data/ is either whole or not there.

    Postgres recovers it in single-user mode, where it takes the password of this home's superuser, by its SCRAM `verifier`.
    Raises `DataUnusable`, and what `fill` raises; nothing is left then.
    """
    draft = Path(tempfile.mkdtemp(prefix="draft-", dir=place.cluster))
    try:
        fill(draft)
        draft.chmod(0o700)
        refuse_other_major(draft, binaries)
        # A server of one's own may have kept its configuration elsewhere, and let others in.
        for name in ("postgresql.conf", "pg_ident.conf"):
            (draft / name).touch()
        (draft / "pg_hba.conf").write_text(_HBA)
        hand_over(draft, place.uid, place.gid)
        options = ("exit_on_error=on", "log_min_messages=warning", *_ALONE)
        words = [word for option in options for word in ("-c", option)]
        command: list[str | Path] = [binaries / "postgres", "--single", "-D", draft, *words, "postgres"]
        told = subprocess.run(
            as_account("become", place.uid, place.gid, command),
            input=f"alter role postgres with login password '{verifier}'\n",
            capture_output=True,
            text=True,
            cwd="/",
            env=CLEAN_ENVIRONMENT,
            check=False,
        )
        if told.returncode:
            raise DataUnusable(f"Postgres cannot recover what was restored: {last_lines(told.stderr)}")
        draft.rename(place.data)
        sync_directory(place.cluster)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def refuse_other_major(data: Path, binaries: Path) -> None:
    """Raises DataUnusable where the data was written by another major version; nothing is touched."""
    recorded = (data / "PG_VERSION").read_text().strip()
    answer = subprocess.run(
        [binaries / "postgres", "--version"],
        capture_output=True,
        text=True,
        env=CLEAN_ENVIRONMENT,
        check=False,
    )
    carried = answer.stdout.split()[-1].split(".")[0] if answer.stdout else "an unknown version"
    if recorded != carried:
        raise DataUnusable(
            f"the data is of Postgres {recorded}, the installed binaries are of {carried}: install the"
            " release that wrote it and take a backup there, or move it with pg_upgrade. Nothing was changed."
        )


def password_of(home: Path, place: Place) -> str:
    """The superuser's, made on the first start. Without it a cluster that exists cannot be entered."""
    path = secret_file(home)
    if not path.exists():
        if place.initialised:
            raise DataUnusable(f"{path} is gone: restore it, the database cannot be entered without it")
        write_durably(path, secrets.token_urlsafe(32))  # 256 bits, safe in a URL
    return path.read_text(encoding="ascii").strip()


def secret_file(home: Path) -> Path:
    """Where the password is, 0600 in a directory 0700."""
    return home / "secrets" / "postgres-superuser"


def last_lines(text: str) -> str:
    """What a Postgres program said last that tells why it failed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [
        line for line in lines if any(word in line for word in ("FATAL:", "PANIC:", "error:", "ERROR:"))
    ]
    return " | ".join((telling or lines)[-3:]) or "it said nothing"


def _draft(place: Place, binaries: Path, password: str, uid: int, gid: int) -> tuple[Path, str]:
    """A new cluster, and initdb's complaint if it failed. The password goes through a pipe, and nowhere else."""
    draft = Path(tempfile.mkdtemp(prefix="draft-", dir=place.cluster))
    os.chown(draft, uid, gid)
    reading, writing = os.pipe()
    try:
        os.fchown(reading, uid, gid)  # /dev/fd opens it anew, with a check
        os.write(writing, password.encode() + b"\n")
        os.close(writing)
        command: list[str | Path] = [
            binaries / "initdb",
            f"--pgdata={draft}",
            "--username=postgres",
            f"--pwfile=/dev/fd/{reading}",
            "--auth-local=scram-sha-256",
            "--auth-host=scram-sha-256",
            "--data-checksums",
            "--encoding=UTF8",
            "--locale-provider=builtin",
            "--builtin-locale=C.UTF-8",
        ]
        made = subprocess.run(
            as_account("become", uid, gid, command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            pass_fds=[reading],
            cwd="/",
            env=CLEAN_ENVIRONMENT,
            check=False,
        )
    finally:
        os.close(reading)
    return draft, last_lines(made.stderr.decode(errors="replace")) if made.returncode else ""
