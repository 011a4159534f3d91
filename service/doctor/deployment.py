"""What the service is started with: the model's files and the unit."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from models import DEMO
from service.doctor.check import Finding, Unseen, judge

if TYPE_CHECKING:
    from service.doctor.sight import Sight

CODE = frozenset(
    {".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pth", ".py", ".pyc", ".so"}
)
"""Files that are programs, or become one when they are loaded."""
SEALED = ".sealed"
"""What `model seal` adds to a file's name."""
UNITS = (
    Path("/etc/systemd/system/pericarp.service"),
    Path("/usr/local/lib/systemd/system/pericarp.service"),
    Path("/usr/lib/systemd/system/pericarp.service"),
    Path(__file__).resolve().parents[2] / "deploy" / "pericarp.service",
)
EXPOSURE = 20
"""In tenths: `systemd-analyze security` rates from 0 to 10, and below 2.0 is what issues of hardening aim at."""
ANALYSE_S = 30.0


def look_at_model(sight: Sight) -> Finding:
    """A model's folder holds weights as safetensors and no program, and nobody but its owner writes there."""
    name = sight.settings.model
    if name != DEMO and not Path(name).is_dir():
        raise Unseen(f"{name} is no folder here: what the hub's cache holds is checked when it is loaded")
    folder = Path(name) if name != DEMO else _demo()
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    kinds = {path: Path(path.name.removesuffix(SEALED)).suffix.lower() for path in files}
    faults = [f"{path.name} is a program, or becomes one" for path, kind in kinds.items() if kind in CODE]
    faults += [] if ".safetensors" in kinds.values() else ["there are no safetensors"]
    faults += [_writable(path) for path in (folder, *files)]
    return judge(
        faults,
        f"{folder}, {len(files)} files",
        "remove what is no model; chown the folder to root and chmod it go-w",
    )


def look_at_unit(_sight: Sight) -> Finding:
    """The unit leaves the service little to do harm with, by systemd's own rating."""
    analyse = shutil.which("systemd-analyze")
    if analyse is None:
        raise Unseen("systemd-analyze is not on this host")
    unit = next((path for path in UNITS if path.exists()), None)
    if unit is None:
        raise Unseen("there is no unit of that name")
    done = subprocess.run(
        [analyse, "security", "--offline=true", f"--threshold={EXPOSURE}", "--no-pager", str(unit)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=ANALYSE_S,
        check=False,
        env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
    )
    verdict = next((line.strip() for line in reversed(done.stdout.splitlines()) if "exposure" in line), "")
    if not verdict:
        raise Unseen(f"systemd-analyze said nothing of {unit}")
    verdict = verdict.lstrip("→ ").strip()
    return judge(
        [f"{unit}: {verdict}"] if done.returncode else [],
        f"{unit}: {verdict}",
        "install deploy/pericarp.service, and change it by drop-ins that take nothing of it back",
    )


def _demo() -> Path:
    from models.weights import DEMO_DIRECTORY

    return DEMO_DIRECTORY


def _writable(path: Path) -> str:
    found = path.stat()
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path.name} may be written by others"
    return f"{path.name} belongs to uid {found.st_uid}" if found.st_uid not in (0, os.geteuid()) else ""
