"""What every bench's report says of where it was measured, and how one ends."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from service import __version__

ROOT = Path(__file__).resolve().parent.parent


def circumstances(
    name: str, packages: Sequence[str] = (), *, quick: bool, **machine: object
) -> dict[str, Any]:
    """The head of a report; `machine` is what else is to be known of it."""
    return {
        "name": name,
        "machine": {"cpu": cpu_model(), "cores": len(os.sched_getaffinity(0)), **machine},
        "versions": {
            "pericarp": __version__,
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in packages},
        },
        "commit": git_commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "quick": quick,
    }


def close(report: dict[str, Any], kept: Path | None) -> int:
    """Print the report, keep it where there is a place for it; the exit status says whether every aim is met."""
    text = json.dumps(report, indent=2, ensure_ascii=False)
    print(text)
    if kept is not None:
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(text + "\n", encoding="utf-8")
    return 0 if all(aim["ok"] for aim in report["aims"]) else 1


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def git_commit() -> str:
    told = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    return told.stdout.strip()
