"""The folder `backup` of a home: one backup command at a time, and room for what is being unpacked.

What an interrupted verify or drill leaves there, plain data of the database among it, the next command clears.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.backup import BackupRefused
from tenants import embedded
from tenants.postgres_account import make_directory

FOLDER = "backup"
SCRATCH = "scratch-"


@contextmanager
def alone(home: Path) -> Iterator[Path]:
    """The folder, for one command at a time. Raises `BackupRefused` where another is at work."""
    folder = home / FOLDER
    # As root, Postgres runs as somebody who must get through to a scratch cluster, as with the home itself.
    make_directory(folder, 0o711 if os.geteuid() == 0 else 0o700)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BackupRefused("another backup command is at work on this home: run again later") from None
        for left in folder.glob(f"{SCRATCH}*"):
            clear(left)
        yield folder
    finally:
        os.close(lock)


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A new folder for a scratch home and what is unpacked for it; gone afterwards, with the cluster."""
    made = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=folder))
    made.chmod(0o711 if os.geteuid() == 0 else 0o700)
    try:
        yield made
    finally:
        clear(made)


def clear(scratch: Path) -> None:
    """Remove a scratch folder, and the cluster of its home wherever it lies."""
    home = scratch / "home"
    if home.exists():
        with contextlib.suppress(embedded.DataUnusable):  # it was cut off before there was any
            embedded.erase(home)
    shutil.rmtree(scratch)
