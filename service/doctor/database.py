"""The database: what its role may do, whether rows are apart, and whether what was answered lasts."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from service.doctor.check import Finding, State, Unseen, judge

if TYPE_CHECKING:
    from service.doctor.sight import Sight

CLOCK_S = 2.0
"""The database's clock decides over limits, the gateway's over tokens: further apart, one of them is wrong."""
BACKUP_AGE_S = 2 * 3600.0
VERIFIED_AGE_S = 8 * 86_400.0
DURABLE = {"data_checksums": "on", "fsync": "on", "full_page_writes": "on"}
COMMITS = ("on", "remote_apply", "remote_write")
SILENT = {"log_statement": "none", "log_min_duration_statement": "-1", "log_min_duration_sample": "-1"}


def look_at_role(sight: Sight) -> Finding:
    """The runtime role is no owner and no superuser, and cannot become one."""
    found = sight.examination
    return judge(
        found.role_faults,
        f"role {found.role}",
        "make the roles as docs/operations.md says; the service does not start as this one",
    )


def look_at_rows(sight: Sight) -> Finding:
    """Row security on every table, forced, and by the tenant."""
    found = sight.examination
    if found.revision is None:
        raise Unseen("the schema is not there yet")
    return judge(
        found.table_faults, "every table of the schema", "run `migrate`; the service does not start so"
    )


def look_at_schema(sight: Sight) -> Finding:
    """The schema is this version's."""
    found = sight.examination
    return judge(
        [f"it stands at {found.revision}, this version needs {found.needed}"]
        if found.revision != found.needed
        else [],
        f"revision {found.revision}",
        "run `migrate`",
    )


def look_at_durability(sight: Sight) -> Finding:
    """What is committed is on the disk, and a page that rots is found."""
    told = sight.examination.settings
    wrong = [
        f"{name} is {told.get(name, 'not told')}"
        for name, value in DURABLE.items()
        if told.get(name) != value
    ]
    if told.get("synchronous_commit") not in COMMITS:
        wrong.append(f"synchronous_commit is {told.get('synchronous_commit', 'not told')}")
    return judge(
        wrong,
        ", ".join(f"{name} {told.get(name)}" for name in (*DURABLE, "synchronous_commit")),
        "set them in postgresql.conf; for data_checksums stop Postgres and run pg_checksums --enable",
    )


def look_at_statements(sight: Sight) -> Finding:
    """Postgres writes no statement and no value of a row into its own log."""
    told = sight.examination.settings
    return judge(
        (
            f"{name} is {told.get(name, 'not told')}"
            for name, value in SILENT.items()
            if told.get(name) != value
        ),
        ", ".join(f"{name} {value}" for name, value in SILENT.items()),
        "set them so in postgresql.conf: statements carry fingerprints, digests and names",
    )


def look_at_connection(sight: Sight) -> Finding:
    """Nobody between the gateway and the database reads along, and the embedded one listens on no network."""
    found = sight.examination
    if found.local:
        listens = found.settings.get("listen_addresses", "")
        wrong = [f"the embedded database listens on {listens}"] if sight.embedded and listens else []
        return judge(wrong, "a unix socket", "restart it: doctor and the service start it with no address")
    url = sight.settings.database_url
    mode = parse_qs(urlsplit(url.get_secret_value() if url else "").query).get("sslmode", [""])[0]
    wrong = ["the connection is not encrypted"] if not found.encrypted else []
    if found.encrypted and mode != "verify-full":
        wrong = [f"sslmode is {mode or 'unset'}: nobody makes sure whom it leads to"]
    return judge(wrong, "TLS, verified by name", "add ?sslmode=verify-full to PERICARP_DATABASE_URL")


def look_at_clock(sight: Sight) -> Finding:
    """The clocks of this host and of the database agree."""
    found = sight.examination
    if abs(found.ahead_s) <= CLOCK_S + found.give_s:
        return Finding(
            State.HOLDS, f"the database's is {found.ahead_s:+.3f} s off, give or take {found.give_s:.3f}"
        )
    return Finding(
        State.BROKEN,
        f"the database's clock is {found.ahead_s:+.1f} s off this host's",
        "run NTP on both hosts",
    )


def look_at_backups(sight: Sight) -> Finding:
    """There is a new backup, and one that was read back."""
    ages = sight.examination.backups
    if ages is None:
        raise Unseen("this schema knows of no backups")
    wrong = [
        _too_old("the newest backup", ages.made_s, BACKUP_AGE_S, "there is no backup"),
        _too_old("the last that was verified", ages.verified_s, VERIFIED_AGE_S, "none was ever verified"),
    ]
    seen = f"made {_hours(ages.made_s)} ago, verified {_hours(ages.verified_s)} ago"
    return judge(wrong, seen, "schedule `backup run` hourly and `backup verify` weekly; see docs/backups.md")


def _too_old(what: str, age_s: float | None, most_s: float, never: str) -> str:
    if age_s is None:
        return never
    return f"{what} is {_hours(age_s)} old, more than {_hours(most_s)}" if age_s > most_s else ""


def _hours(age_s: float | None) -> str:
    return "never" if age_s is None else f"{age_s / 3600:.1f} h"
