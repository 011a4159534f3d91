"""`backup drill`: from nothing but the store and the secrets to a `/v1/rerank` that answers, with the time of each stage.

A scratch home gets what a restore would give it, and a service of its own in a process of its own. That service has another
log key: it never signs anything as the installation's log, so no drill can make a fork of it. It gets no settings that
reach beyond this host (witnesses, alerts, a database elsewhere), and is gone afterwards with all that was unpacked.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from service.backup import BackupDoubted, Progress
from service.backup.restoring import Restored, restore
from service.deeds import OPERATOR, Actor
from service.desk import Desk, build_desk
from service.installation import SECRET_BYTES, Installation, bring_up_to_date, opened
from tenants.access import Role
from tenants.database import Database

if TYPE_CHECKING:
    from service.backup.shelf import Shelf, Shelved
    from service.settings import Settings

COPIED = ("pepper", "master-key")
TAKEN_OVER = (
    "MODEL",
    "DEVICE",
    "DTYPE",
    "WORKER",
    "SHARE_WEIGHTS",
    "SCREEN",
    "IMAGE_NETS",
    "IMAGE_TEXT",
    "QUEUE",
    "DEADLINE",
)
"""Beginnings of the settings that the drilled service shares with the installation."""
START_S = 600.0
ANSWER_S = 120.0
STOP_S = 60.0
POLL_S = 0.05
READY = re.compile(rb"http://127\.0\.0\.1:(\d+)")
REPOSITORY = Path(__file__).resolve().parents[2]
BODY = {"query": "a bicycle", "documents": ["an old mountain bike", "a slice of bread"]}


@dataclass(frozen=True, slots=True)
class Drilled:
    """A drill that ended in an answer."""

    shelved: Shelved
    stages_s: dict[str, float]
    total_s: float


def drill(settings: Settings, shelf: Shelf, shelved: Shelved, room: Path, progress: Progress) -> Drilled:
    """Recover in `room`, a scratch folder, and ask once. Raises a `BackupError`, an `EmbeddedError`, `OSError`."""
    began = time.monotonic()
    home = room / "home"
    secrets_at = settings.home.resolve() / "secrets"
    home.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700)
    (home / "secrets").mkdir(mode=0o700)
    for name in COPIED:
        _write_secret(home / "secrets" / name, (secrets_at / name).read_bytes())
    _write_secret(home / "secrets" / "log-key", secrets.token_bytes(SECRET_BYTES))
    restored = restore(shelf, shelved, home, room, secrets_at, progress)
    stages = dict(restored.stages_s)
    mark = time.monotonic()
    alike = settings.model_copy(update={"home": home, "database_url": None, "owner_database_url": None})
    with opened(alike) as found:
        bring_up_to_date(found)
        key = asyncio.run(_make_key(found))
        stages["start_database"] = time.monotonic() - mark
        mark = time.monotonic()
        with progress("Starting the service", None), _serving(home, restored, room) as port:
            stages["start_service"] = time.monotonic() - mark
            mark = time.monotonic()
            _ask(port, key)
            stages["answer"] = time.monotonic() - mark
            total_s = time.monotonic() - began
    return Drilled(shelved, stages, total_s)


async def _make_key(found: Installation) -> str:
    """A key of a tenant that the drilled installation alone has."""
    database = Database(found.app_url, pool_size=1, call_pool_size=1)
    await database.open()
    try:
        desk: Desk = build_desk(database, found)
        tenant = await desk.administration.create_tenant(Actor(OPERATOR), f"drill-{secrets.token_hex(6)}")
        _, text = await desk.administration.create_key(Actor(OPERATOR), tenant.id, Role.SEARCH)
    finally:
        await database.close()
    return text


@contextmanager
def _serving(home: Path, restored: Restored, room: Path) -> Iterator[int]:
    """The service of the restored home; its port. Raises `BackupDoubted` where it does not start."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PERICARP_") or name.removeprefix("PERICARP_").startswith(TAKEN_OVER)
    }
    environment |= {"PERICARP_HOME": str(home), "PERICARP_HOST": "127.0.0.1", "PERICARP_PORT": "0"}
    if restored.model is not None:
        environment["PERICARP_MODEL"] = str(restored.model)
    with (room / "stdout").open("wb") as stdout, (room / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "service", "serve"],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )
    try:
        yield _await_port(process, room)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_port(process: subprocess.Popen[bytes], room: Path) -> int:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        if (found := READY.search((room / "stdout").read_bytes())) is not None:
            return int(found[1])
        if process.poll() is not None:
            break
        time.sleep(POLL_S)
    last = (room / "stderr").read_text(errors="replace").strip().splitlines()[-3:]
    raise BackupDoubted(f"the restored service did not start: {' | '.join(last) or 'it said nothing'}")


def _ask(port: int, key: str) -> None:
    """One rerank over HTTP. Raises `BackupDoubted` unless it is answered with a ranking of both documents."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
    try:
        connection.request("POST", "/v1/rerank", json.dumps(BODY), headers)
        answer = connection.getresponse()
        told = answer.read()
    except (OSError, http.client.HTTPException) as exc:
        raise BackupDoubted(f"the restored service does not answer: {type(exc).__name__}") from exc
    finally:
        connection.close()
    if answer.status != http.client.OK or len(json.loads(told)["results"]) != len(BODY["documents"]):
        raise BackupDoubted(f"the restored service answers {answer.status}")


def _write_secret(path: Path, secret: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secret)
