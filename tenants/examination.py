"""What a database is, for whoever wants to know whether it keeps its promises. Reads, and changes nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tenants.database import CALL_S, CONNECT_S, QUOTA_ROLE, connect, schema_head, translated
from tenants.guard import ROLE_FAULTS, TABLE_FAULTS

if TYPE_CHECKING:
    from asyncpg import Connection, Record

SETTINGS = (
    *("data_checksums", "fsync", "full_page_writes", "synchronous_commit", "password_encryption"),
    *("listen_addresses", "log_statement", "log_min_duration_statement", "log_min_duration_sample"),
    *("log_min_error_statement", "log_parameter_max_length_on_error"),
)


@dataclass(frozen=True, slots=True)
class BackupAges:
    """Since the newest backup, and since one was read back and nothing was wrong, in seconds; None: never."""

    made_s: float | None
    verified_s: float | None


@dataclass(frozen=True, slots=True)
class Examination:
    """As the runtime role sees it."""

    role: str
    role_faults: tuple[str, ...]
    """What the role may do that it must not."""
    table_faults: tuple[str, ...]
    """Where row security does not hold."""
    revision: str | None
    """Of the schema; None where there is none."""
    needed: str
    """The revision of this version."""
    settings: Mapping[str, str]
    """Of `SETTINGS`, as they are for this role; one that the role may not read is missing."""
    local: bool
    """Whether the connection is a unix socket."""
    encrypted: bool
    ahead_s: float
    """How far its clock is ahead of ours, give or take `give_s`."""
    give_s: float
    backups: BackupAges | None
    """None where the schema knows of no backups."""


async def examine(app_url: str) -> Examination:
    """Look at the database of that URL, as its role. Raises `DatabaseUnavailable`."""
    with translated():
        connection = await connect(app_url, {}, command_timeout=CALL_S)
        try:
            return await _examine(connection)
        finally:
            await connection.close(timeout=CONNECT_S)


async def _examine(connection: Connection[Record]) -> Examination:
    began_s = time.time()
    theirs_s = await connection.fetchval("select extract(epoch from clock_timestamp())::float8")
    took_s = time.time() - began_s
    there = await connection.fetchval("select to_regclass('pericarp.alembic_version') is not null")
    revision = (
        await connection.fetchval("select version_num from pericarp.alembic_version") if there else None
    )
    told = await connection.fetch(
        "select name, current_setting(name, true) as value from unnest($1::text[]) name", list(SETTINGS)
    )
    encrypted = await connection.fetchval("select ssl from pg_stat_ssl where pid = pg_backend_pid()")
    return Examination(
        role=await connection.fetchval("select session_user::text"),
        role_faults=await _column(connection, ROLE_FAULTS) if there else (),
        table_faults=await _column(connection, TABLE_FAULTS) if there else (),
        revision=revision,
        needed=schema_head(),
        settings={row["name"]: row["value"] for row in told if row["value"] is not None},
        local=await connection.fetchval("select inet_client_addr() is null"),
        encrypted=bool(encrypted),
        ahead_s=theirs_s - (began_s + took_s / 2),
        give_s=took_s / 2,
        backups=await _read_backups(connection),
    )


async def _column(connection: Connection[Record], query: str) -> tuple[str, ...]:
    return tuple(sorted({row[0] for row in await connection.fetch(query)}))


async def _read_backups(connection: Connection[Record]) -> BackupAges | None:
    if not await connection.fetchval("select to_regproc('pericarp.backup_standing') is not null"):
        return None
    async with connection.transaction():
        await connection.execute(f"set local role {QUOTA_ROLE}")
        row = await connection.fetchrow("select * from pericarp.backup_standing()")
    assert row is not None, "a function without a set gives one row"
    return BackupAges(row["backup_age_s"], row["verified_age_s"])
