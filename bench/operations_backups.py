"""Backups: how fast one is made, verified, and recovered from cold until the service answers.

An installation of its own with so many entries that its database has about a gigabyte (a quick run: a hundred MB), their
leaves in the tree, as a service leaves it. What is timed are the commands of an operator, with a folder as the store.
`database_mb_per_s` is of the bytes that Postgres gave; the model and the configuration are in the time.

    python bench/operations_backups.py [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sqlalchemy import make_url  # noqa: E402

from bench.audit import make_entry  # noqa: E402
from bench.report import circumstances, close  # noqa: E402
from tenants import embedded  # noqa: E402
from tenants.access import INSTALLATION  # noqa: E402
from tenants.audit import SCHEMA_VERSION, encode  # noqa: E402
from tenants.database import Database, connect  # noqa: E402
from tenants.sequencer import Sequencer, log_signer  # noqa: E402

ENTRY_BYTES = 16_000
ENTRIES, QUICK_ENTRIES = 55_000, 2_500
BATCH = 500
AIM_S = 300.0
"""Of a gigabyte, from nothing to an answer."""
GIGABYTE = 1e9


@dataclass(frozen=True, slots=True)
class Home:
    """An installation, and the store of its backups."""

    home: Path
    store: Path

    def tell(self, *arguments: str) -> Any:
        """What a command prints with `--json`; it must end well."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PERICARP_")}
        ours = {"PERICARP_HOME": str(self.home), "PERICARP_BACKUP_STORE": str(self.store)}
        done = subprocess.run(
            [sys.executable, "-m", "service", *arguments, "--json"],
            cwd=ROOT,
            env=kept | ours,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            check=True,
        )
        return json.loads(done.stdout)


def measure(quick: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures, and aims as reports have them."""
    with tempfile.TemporaryDirectory(prefix="pericarp-bench-") as above:
        Path(above).chmod(0o711)
        home = Home(Path(above) / "home", Path(above) / "store")
        try:
            return _measure(home, quick)
        finally:
            embedded.erase(home.home)


def _measure(home: Home, quick: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    with embedded.running(home.home) as server:
        home.tell("tenant", "create", "acme")
        asyncio.run(_fill(home, server.superuser_url, QUICK_ENTRIES if quick else ENTRIES))
        full = home.tell("backup", "run")
        incremental = home.tell("backup", "run")
        verified = home.tell("backup", "verify")
        drilled = home.tell("backup", "drill")
    size_gb = full["database_bytes"] / GIGABYTE
    figures = {
        "database_bytes": full["database_bytes"],
        "entries": verified["bodies"],
        "full_s": full["duration_s"],
        "database_mb_per_s": round(full["database_bytes"] / 1e6 / full["duration_s"], 1),
        "incremental_s": incremental["duration_s"],
        "incremental_bytes": incremental["stored_bytes"],
        "verify_s": verified["duration_s"],
        "drill_s": drilled["total_s"],
        "drill_stages_s": drilled["stages_s"],
    }
    # What does not grow with the database (starting a service) is not scaled.
    fixed = sum(drilled["stages_s"][name] for name in ("start_database", "start_service", "answer", "model"))
    per_gb_s = round(fixed + (drilled["total_s"] - fixed) / size_gb, 1)
    aim = {
        "what": "cold recovery of 1 GB until /v1/rerank answers, in seconds"
        + (" (scaled from less)" if quick else ""),
        "aim": AIM_S,
        "measured": per_gb_s,
        "ok": per_gb_s <= AIM_S,
    }
    return figures, [aim]


async def _fill(home: Home, superuser_url: str, entries: int) -> None:
    """Entries of random bytes, so that nothing is smaller than it looks, and their leaves in the tree."""
    url = make_url(superuser_url).set(database="pericarp").render_as_string(hide_password=False)
    connection = await connect(url, {}, command_timeout=None)
    try:
        for first in range(0, entries, BATCH):
            rows = []
            for _ in range(min(BATCH, entries - first)):
                entry = replace(
                    make_entry(INSTALLATION), details={"filling": secrets.token_hex(ENTRY_BYTES // 2)}
                )
                rows.append((INSTALLATION, entry.request_id, SCHEMA_VERSION, encode(entry)))
            await connection.executemany(
                "insert into pericarp.audit_inbox (tenant_id, request_id, schema_version, body)"
                " values ($1, $2, $3, $4)",
                rows,
            )
    finally:
        await connection.close()
    log_key = (home.home / "secrets" / "log-key").read_bytes()
    password = (home.home / "secrets" / "postgres-app").read_bytes().hex()
    app = make_url(superuser_url).set(username="pericarp_app", password=password, database="pericarp")
    database = Database(app.render_as_string(hide_password=False), pool_size=1, call_pool_size=1)
    await database.open()
    try:
        sequencer = Sequencer(database, log_signer(log_key))
        while (await sequencer.step()).integrated:
            pass
    finally:
        await database.close()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="100 MB instead of a gigabyte")
    arguments = parser.parse_args()
    figures, aims = measure(arguments.quick)
    report = circumstances("operations_backups", ("obstore", "cryptography"), quick=arguments.quick)
    return close({**report, "figures": figures, "aims": aims}, None)


if __name__ == "__main__":
    sys.exit(main())
