"""The systemd units that make and verify backups: locked in, and what they run is a command that exists."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

from service.__main__ import app

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
UNITS = ("pericarp-backup", "pericarp-backup-verify")


@pytest.mark.parametrize("unit", UNITS)
def test_what_a_unit_runs_is_a_command(unit: str) -> None:
    lines = (DEPLOY / f"{unit}.service").read_text().splitlines()
    commands = [
        shlex.split(line.removeprefix("ExecStart=")) for line in lines if line.startswith("ExecStart=")
    ]
    known = typer.main.get_command(app).commands["backup"].commands  # type: ignore[attr-defined]
    assert commands
    for python, *words in commands:
        assert python == "/opt/pericarp/.venv/bin/python"
        assert words[:3] == ["-m", "service", "backup"] and words[3] in known and len(words) == 4


def test_both_units_are_locked_in_alike() -> None:
    kept = []
    for unit in UNITS:
        lines = (DEPLOY / f"{unit}.service").read_text().splitlines()
        kept.append([line for line in lines if not line.startswith(("#", "ExecStart=", "Description="))])
    assert kept[0] == kept[1]


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_is_exposed_to_little(unit: str) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", DEPLOY / f"{unit}.service"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("unit", UNITS)
def test_a_timer_has_a_time_that_systemd_reads(unit: str) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    lines = (DEPLOY / f"{unit}.timer").read_text().splitlines()
    assert "Persistent=yes" in lines, "what was missed is caught up"
    (calendar,) = (line.removeprefix("OnCalendar=") for line in lines if line.startswith("OnCalendar="))
    done = subprocess.run(
        ["systemd-analyze", "calendar", calendar], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
