"""`backup restore`: a backup into a home that has no database; the configuration and the model's files beside it.

The secrets must be in the home before. What was fetched when it was cut off is kept in the home's folder `backup` for the
next try, and gone at the end. Nothing that the home has already is changed.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from service.backup import BackupRefused, Progress
from service.backup.fetching import fetch_small, put_together, unpack_chain
from service.backup.model_files import restore_model
from tenants.postgres_account import carried_binaries, recorded_place

if TYPE_CHECKING:
    from service.backup.configuration import Configuration
    from service.backup.shelf import Shelf, Shelved

RESTORED = "restored"
"""Folder of the home for what is not the database."""
UNPACKED = "unpacked"
ALLOWED = frozenset({"secrets", "logs", "backup", "postgres", RESTORED})


@dataclass(frozen=True, slots=True)
class Restored:
    """What was restored, and how long each stage took."""

    shelved: Shelved
    model: Path | None
    """The folder of the model's files, for `PERICARP_MODEL`; None where the backup has none."""
    configuration: Path
    stages_s: dict[str, float]


def refuse_used(home: Path) -> None:
    """Raises `BackupRefused` where the home holds what a restore would mix with."""
    place = recorded_place(home) if (home / "postgres").exists() else None
    if place is not None and place.data.exists():
        raise BackupRefused(f"{home} has a database: restore into another home")
    if strange := sorted(each.name for each in home.iterdir() if each.name not in ALLOWED):
        raise BackupRefused(f"{home} is not empty, it has {strange[0]!r}: restore into another home")


def restore(
    shelf: Shelf, shelved: Shelved, home: Path, folder: Path, secrets: Path, progress: Progress
) -> Restored:
    """Restore into `home`, by way of a `folder` that is the caller's. Its embedded Postgres is not left running.

    `secrets` has those of the installation that was backed up. Raises a `BackupError`, an `EmbeddedError`, `OSError`; what
    was fetched stays, and the next call goes on from there.
    """
    stages, began = {}, time.monotonic()

    def done(stage: str) -> None:
        nonlocal began
        stages[stage] = time.monotonic() - began
        began = time.monotonic()

    refuse_used(home)
    chain = shelf.chain(shelved)
    configuration, model = fetch_small(shelf, shelved)
    configuration.refuse_other_secrets(secrets)
    unpacked_at = folder / UNPACKED
    unpacked_at.mkdir(mode=0o700, exist_ok=True)
    binaries = carried_binaries()
    unpacked = unpack_chain(shelf, chain, binaries, unpacked_at, progress)
    done("fetch_and_verify")
    placed = home / RESTORED
    placed.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, exist_ok=True)
    _write(configuration, placed / "configuration")
    if model.files:
        with progress("Model files", sum(file.size_bytes for file in model.files)) as told:
            restore_model(shelf.store, shelf.key, model, placed / "model", told)
    done("model")
    with progress("Recovering", None):
        put_together(binaries, unpacked, home, durably=True)
    done("recover")
    shutil.rmtree(unpacked_at)
    return Restored(shelved, placed / "model" if model.files else None, placed / "configuration", stages)


def _write(configuration: Configuration, folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    for name, value in (("settings", configuration.settings), ("policies", configuration.policies)):
        (folder / f"{name}.json").write_bytes(orjson.dumps(value, option=orjson.OPT_INDENT_2))
    for name, content in configuration.files.items():
        path = folder / name
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.write_bytes(content)
