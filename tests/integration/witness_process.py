"""A witness as its operator starts it: `python -m service witness` in a process and a folder of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from service.witness.store import Store
from tenants.checkpoint import VerifyKey
from tests.acceptance.service_process import REPOSITORY, START_S, environment, until


@dataclass
class WitnessProcess:
    """One start of a witness. `folder` outlives it."""

    folder: Path
    process: subprocess.Popen[bytes]
    output: Path

    @property
    def address(self) -> str:
        """What PERICARP_WITNESSES takes, as it printed it."""
        return (self.output / "stdout").read_text().strip()

    @property
    def url(self) -> str:
        return self.address.partition("=")[0]

    @property
    def key(self) -> str:
        return self.address.partition("=")[2]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def lines(self) -> list[dict[str, Any]]:
        """What it has logged."""
        return [json.loads(line) for line in (self.output / "stderr").read_text().splitlines()]

    @property
    def held(self) -> dict[str, int]:
        """Size of the newest tree that it has cosigned, by log, as its folder tells."""
        store = Store(self.folder)
        found = {log.name: store.newest(log.name) for log in store.logs()}
        return {origin: held[1].size if held else 0 for origin, held in found.items()}

    @property
    def evidence(self) -> list[Path]:
        return sorted((self.folder / "evidence").iterdir())

    def add_log(self, key: str) -> None:
        """As `witness add-log` does, which takes seconds to load the whole command line."""
        assert Store(self.folder).add_log(VerifyKey.parse(key))

    def post(self, body: bytes | str) -> httpx.Response:
        content = body.encode() if isinstance(body, str) else body
        return httpx.post(f"{self.url}/add-checkpoint", content=content, timeout=30)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def witness_command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service", "witness", "--folder", str(folder), *arguments],
        cwd=REPOSITORY,
        env=environment(folder.parent / "unused"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )


@contextmanager
def witnessing(folder: Path, port: int = 0) -> Iterator[WitnessProcess]:
    """A witness that listens, and that is gone afterwards whatever happened."""
    output = Path(tempfile.mkdtemp(prefix="witness-", dir=folder.parent))
    with (output / "stdout").open("wb") as stdout, (output / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "service", "witness", "--folder", str(folder), "--port", str(port)],
            cwd=REPOSITORY,
            env=environment(folder.parent / "unused"),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )
    try:

        def listens() -> bool:
            assert process.poll() is None, f"the witness ended: {(output / 'stderr').read_text()[-2000:]}"
            return "\n" in (output / "stdout").read_text()

        until(listens, START_S)
        yield WitnessProcess(folder, process, output)
    finally:
        process.terminate()
        process.wait(30)
