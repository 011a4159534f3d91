"""Promises that a command of ours makes sure of already: it is asked, and its exit status is what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from models import DEMO
from service.doctor.check import Finding, State, Unseen, judge

if TYPE_CHECKING:
    from service.doctor.sight import Sight

ASK_S = 600.0
"""A model is read whole, and may be large."""
UNKNOWN_COMMAND = "No such command"


def look_at_signature(sight: Sight) -> Finding:
    """Every byte of the model is as its signer signed it."""
    model = sight.settings.model
    if model == DEMO:
        return Finding(State.HOLDS, "the embedded model, pinned by this version's own files")
    if not Path(model).is_dir():
        raise Unseen(f"{model} is no folder here")
    if sight.settings.model_seal_fd is not None:
        raise Unseen(
            "the seal's key comes by a descriptor of the service's own; `model verify` takes one as well"
        )
    return judge_signature(ask("model", "verify", model))


def look_at_alerts(_sight: Sight) -> Finding:
    """Alerts go somewhere else than into the log, and their absence is noticed. Whether they arrive, `alert test` tries."""
    return judge_sinks(ask("alert", "rules", "--json"))


def judge_signature(done: subprocess.CompletedProcess[str]) -> Finding:
    """What `model verify` said."""
    if done.returncode == 0:
        return Finding(State.HOLDS, "every file is as it was signed")
    if done.returncode == 1:
        remedy = "serve nothing from it: restore the files, or sign them if it was you who changed them"
        return Finding(State.BROKEN, _last_line(done), remedy)
    return Finding(
        State.BROKEN,
        "the model is not signed, or PERICARP_MODEL_KEY is not set",
        "sign it (`model sign`), and set PERICARP_MODEL_KEY",
    )


def judge_sinks(done: subprocess.CompletedProcess[str]) -> Finding:
    """What `alert rules --json` said."""
    if done.returncode != 0:
        return Finding(State.BROKEN, _last_line(done), "mend the file that PERICARP_ALERTS names")
    sinks = json.loads(done.stdout)["sinks"]
    faults = [] if sinks else ["alerts go to the log alone"]
    if sinks and not any(sink["heartbeat_s"] for sink in sinks):
        faults.append("no sink gets a heartbeat: that alerts are silent for they are dead, nobody notices")
    return judge(
        faults,
        f"sinks: {', '.join(sink['name'] for sink in sinks)}",
        "name a sink with a heartbeat in the file of PERICARP_ALERTS, and try it by `alert test`",
    )


def ask(*words: str) -> subprocess.CompletedProcess[str]:
    """`python -m service …` to its end, with the settings of this process. Raises `Unseen` where there is no such command."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "service", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ASK_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Unseen(f"`{' '.join(words[:2])}` takes longer than {ASK_S:g} s") from None
    if done.returncode == 2 and UNKNOWN_COMMAND in done.stderr:
        raise Unseen(f"this version has no command `{' '.join(words[:2])}`")
    return done


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    return next(
        (line for line in reversed(done.stderr.splitlines()) if line.strip()),
        f"exit status {done.returncode}",
    )
