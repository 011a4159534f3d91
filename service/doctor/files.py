"""Who owns what lies on disk, and who else may read or write it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from service.doctor.check import Finding, State, Unseen, judge
from service.doctor.sight import KEYS
from service.installation import SECRET_BYTES

if TYPE_CHECKING:
    from service.doctor.sight import Sight


def look_at_home(sight: Sight) -> Finding:
    """The folder of all state: its owner's, and nobody else lists it."""
    if not sight.home.exists():
        raise Unseen(f"there is no {sight.home}")
    # As root, Postgres's own account must get through to its data.
    crossable = 0o711 if os.geteuid() == 0 else 0o700
    return judge(
        [fault(sight.home, crossable, stat.S_ISDIR)],
        f"{sight.home} is its owner's alone",
        f"chown it to who runs the service, and chmod {crossable:o}",
    )


def look_at_secrets(sight: Sight) -> Finding:
    """Every file of the secrets: 0600, its owner's, and the three keys whole."""
    folder = sight.home / "secrets"
    if not folder.exists():
        raise Unseen(f"there is no {folder}")
    files = list(folder.rglob("*"))
    faults = [fault(folder, 0o700, stat.S_ISDIR), *_faults(files)]
    faults += [
        f"{name} has {size} bytes, not {SECRET_BYTES}"
        for name in KEYS
        if (size := _size(folder / name)) is not None and size != SECRET_BYTES
    ]
    faults += [f"{name} is missing" for name in KEYS if not (folder / name).exists()]
    return judge(
        faults,
        f"{folder}, files: {len(files)}",
        "restore what is missing; chmod files 600 and the folder 700; what others may have read is to be replaced",
    )


def look_at_logs(sight: Sight) -> Finding:
    """The logs of Postgres and of the service."""
    chosen = sight.settings.log_folder
    folders = [sight.home / "logs", *([chosen.absolute()] if chosen is not None else [])]
    there = [folder for folder in folders if folder.exists()]
    if not there:
        raise Unseen(f"there is no {folders[0]}")
    files = [path for folder in there for path in folder.iterdir()]
    faults = [*(fault(folder, 0o700, stat.S_ISDIR) for folder in there), *_faults(files)]
    return judge(
        faults, f"{', '.join(map(str, there))}, files: {len(files)}", "chmod files 600 and folders 700"
    )


def look_at_database_files(sight: Sight) -> Finding:
    """The embedded database's data and socket: 0700, of the account that Postgres runs as."""
    place = sight.place
    if not place.data.exists():
        raise Unseen(f"there is no {place.data}, or it cannot be reached")
    folders = [place.data, *([place.sockets] if place.sockets.exists() else [])]
    return judge(
        [fault(folder, 0o700, stat.S_ISDIR, uid=place.uid) for folder in folders],
        f"{', '.join(map(str, folders))}, of uid {place.uid}",
        "chown these to the account that Postgres runs as, and chmod 700",
    )


def look_at_backup_store(sight: Sight) -> Finding:
    """A folder of backups: its owner's alone, the files in it as well. What a bucket lets others do is not seen."""
    store = sight.settings.backup_store
    if store is None:
        return Finding(
            State.BROKEN, "no place for backups is named", "set PERICARP_BACKUP_STORE; see docs/backups.md"
        )
    if "://" in store:
        raise Unseen(f"who may read {store} its provider knows")
    folder = Path(store)
    if not folder.exists():
        raise Unseen(f"there is no {folder}")
    files = list(folder.rglob("*"))
    return judge(
        [
            fault(folder, 0o700, stat.S_ISDIR),
            *(_open_to_others(path) for path in files if not path.is_symlink()),
        ],
        f"{folder}, files: {len(files)}",
        "chmod files 600 and folders 700: backups are encrypted, and still nobody else's",
    )


def _open_to_others(path: Path) -> str:
    mode = stat.S_IMODE(path.lstat().st_mode)
    return f"{path} has mode {mode:04o}: others may write there" if mode & 0o022 else ""


def fault(path: Path, most: int, is_kind: object = stat.S_ISREG, *, uid: int | None = None) -> str:
    """What is wrong with its kind, its owner (this process's user, or `uid`) or its mode (`most` allows); empty: nothing."""
    found = path.lstat()
    if is_kind is stat.S_ISREG and not stat.S_ISREG(found.st_mode):
        return f"{path} is no plain file"
    if is_kind is stat.S_ISDIR and not stat.S_ISDIR(found.st_mode):
        return f"{path} is no folder"
    if found.st_uid != (os.geteuid() if uid is None else uid):
        return f"{path} belongs to uid {found.st_uid}"
    mode = stat.S_IMODE(found.st_mode)
    return f"{path} has mode {mode:04o}, more than {most:04o}" if mode & ~most else ""


def _faults(paths: Iterable[Path]) -> list[str]:
    return [
        fault(path, 0o700, stat.S_ISDIR) if path.is_dir() and not path.is_symlink() else fault(path, 0o600)
        for path in paths
    ]


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
