"""A home whose database is up, the command line on it, and the store of its backups."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenants import embedded
from tests.acceptance import commands
from tests.acceptance.service_process import environment

COMMAND_S = 600.0
MEMORY = Path("/dev/shm")
MEMORY_BYTES = 2 * 2**30
KEPT_ELSEWHERE = ("pepper", "master-key", "log-key", "backup-key")
"""What an operator keeps apart from the backups."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def told(self) -> Any:
        """What it printed with `--json`."""
        assert self.status == 0, self.stderr
        return json.loads(self.stdout)


@dataclass(frozen=True, slots=True)
class Home:
    """An installation, and the store of its backups."""

    home: Path
    store: Path
    settings: dict[str, str] = field(default_factory=dict)

    def run(self, *arguments: str, **settings: str) -> Ended:
        """`python -m service …`, to its end."""
        ours = {"PERICARP_BACKUP_STORE": str(self.store), **self.settings, **settings}
        done = commands.run(list(arguments), environment(self.home, **ours), COMMAND_S)
        return Ended(done.returncode, done.stdout, done.stderr)

    def backup(self, *arguments: str, **settings: str) -> Any:
        """What a backup command tells; it must end well."""
        return self.run("backup", *arguments, "--json", **settings).told

    def part(self, sequence: int, name: str) -> Path:
        """The first object of a part."""
        (installation,) = self.store.iterdir()
        return installation / f"{sequence:010d}" / name

    def contents(self) -> dict[str, int]:
        """Every object, with when it was written."""
        return {
            str(path): path.stat().st_mtime_ns for path in sorted(self.store.rglob("*")) if path.is_file()
        }

    @contextmanager
    def lost(self) -> Iterator[Home]:
        """Another host: nothing is left but the secrets, kept elsewhere, and the store."""
        with folder() as above:
            home = above / "home"
            (home / "secrets").mkdir(parents=True, mode=0o700)
            for name in KEPT_ELSEWHERE:
                if not (self.home / "secrets" / name).exists():
                    continue  # no backup was made yet
                shutil.copy(self.home / "secrets" / name, home / "secrets" / name)
            yield Home(home, self.store, self.settings)


@contextmanager
def backup_home(**settings: str) -> Iterator[Home]:
    """A new installation with one tenant, its Postgres up for as long as the block lasts."""
    with folder() as above, embedded.running(above / "home"):
        made = Home(above / "home", above / "store", settings)
        assert made.run("tenant", "create", "acme").status == 0
        yield made


@contextmanager
def folder() -> Iterator[Path]:
    """A new one, in memory where there is room: a cluster is a thousand files. Gone afterwards, with a home's database."""
    room = MEMORY if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > MEMORY_BYTES else None
    above = Path(tempfile.mkdtemp(prefix="pericarp-backup-", dir=room))
    above.chmod(0o711)  # Postgres must get through to the home where we are root
    try:
        yield above
    finally:
        if (above / "home").exists():
            embedded.erase(above / "home")
        shutil.rmtree(above)
