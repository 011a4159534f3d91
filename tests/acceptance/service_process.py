"""The real service as a user starts it: `python -m service serve` in a process of its own, its state in a folder of its own.

Nothing here reaches into the service: what is asked goes over HTTP or through the command line.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx

from tenants import embedded
from tests.acceptance import commands

REPOSITORY = Path(__file__).resolve().parents[2]
START_S = 120.0
"""How long a start may take on a machine that is busy with something else."""
ANSWER_S = 120.0
IN_FORCE_S = 2.0
"""What the docs promise: a change is in force everywhere within that time. Mostly it is at once."""
CHANGES = {("tenant", "policy"), ("key", "revoke"), ("key", "rotate"), ("token", "deny")}

Kwargs = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant made by the command line, with one search key."""

    name: str
    id: str
    key: str
    key_id: str

    @property
    def worker_name(self) -> str:
        """What `ps` calls this tenant's worker."""
        return "prc-w-" + self.id.replace("-", "")[:8]


@dataclass
class Service:
    """One start of the service. `home` outlives it."""

    home: Path
    process: subprocess.Popen[bytes]
    folder: Path
    settings: dict[str, str]
    began_s: float
    up_s: float = 0.0
    line: str = ""
    """What it printed once it was ready."""
    issued: list[str] = field(default_factory=list)
    """The text of every key that was made."""

    @cached_property
    def url(self) -> str:
        return found(r"https?://[0-9.]+:\d+", self.line)

    @cached_property
    def key(self) -> str:
        return found(r"prc_live_[0-9A-Za-z_]+", self.line)

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def client(self, key: str | None = None, **headers: str) -> httpx.Client:
        """As the demo tenant, or with `key`; without any where it is empty."""
        key = self.key if key is None else key
        bearer = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers={**bearer, **headers}, timeout=ANSWER_S)

    def rerank(self, body: object, key: str | None = None) -> httpx.Response:
        with self.client(key) as client:
            return client.post("/v1/rerank", json=body)

    def rerank_at_once(self, bodies: list[object], key: str | None = None) -> list[httpx.Response]:
        """All of them in parallel, each on a connection of its own."""
        with ThreadPoolExecutor(len(bodies)) as pool:
            return list(pool.map(lambda body: self.rerank(body, key), bodies))

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command of the command line, while the service runs; what it changed is in force afterwards."""
        done = command(self.home, *arguments)
        if arguments[:2] in CHANGES:
            time.sleep(IN_FORCE_S)
        return done

    def tell(self, *arguments: str) -> Any:
        """What a command prints with `--json`."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def make_key(self, tenant: str, role: str = "search", *options: str) -> dict[str, Any]:
        made: dict[str, Any] = self.tell("key", "create", tenant, "--role", role, *options)
        self.issued.append(made["key"])
        return made

    def make_tenant(self, name: str) -> Tenant:
        made = self.tell("tenant", "create", name)
        key = self.make_key(name)
        return Tenant(name, made["id"], key["key"], key["id"])

    def entries(self, tenant: str) -> list[dict[str, Any]]:
        """The tenant's audit entries, newest first."""
        listed: list[dict[str, Any]] = self.tell("audit", "list", tenant, "--limit", "10000")
        return listed

    def children(self) -> list[Process]:
        """The processes that the gateway itself started and that still live."""
        return [process for process in processes() if process.parent == self.process.pid]

    def orphans(self) -> list[Process]:
        """Children of the gateway, also where it is gone: each has its parent's pid in its arguments."""
        pid = str(self.process.pid)
        return [
            each
            for each in processes()
            if re.search(r"service\.(fleet\.worker|screening\.child)", each.command)
            and pid in each.command.split()
        ]

    def workers(self) -> list[Process]:
        return [child for child in self.children() if "service.fleet.worker" in child.command]

    def worker_of(self, tenant: Tenant) -> Process:
        """The tenant's own worker. It has one after its first request."""
        (worker,) = (each for each in self.workers() if each.name == tenant.worker_name)
        return worker

    def family(self) -> list[Process]:
        """Everything that lives because this service was started: children, Postgres and its guardian."""
        location = self.home / "postgres" / "location"
        cluster = json.loads(location.read_text())["cluster"] if location.exists() else str(self.home)
        everything = processes()
        ours = {self.process.pid}
        while True:  # grandchildren too
            more = {
                each.pid
                for each in everything
                if each.pid not in ours
                and (each.parent in ours or cluster in each.command or str(self.home) in each.command)
            }
            if not more:
                return [each for each in everything if each.pid in ours]
            ours |= more

    def end(self, with_signal: signal.Signals = signal.SIGTERM, within_s: float = 40.0) -> int:
        """Signal the gateway and wait for it; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(with_signal)
        return self.process.wait(within_s)


@dataclass(frozen=True, slots=True)
class Process:
    """One line of `ps`."""

    pid: int
    parent: int
    name: str
    state: str
    command: str
    began: int
    """Ticks since boot: with the pid it names a process for good."""

    @property
    def lives(self) -> bool:
        now = read_process(self.pid)
        return now is not None and now.began == self.began and now.state not in "ZX"

    def environment(self) -> bytes:
        """What anybody who may look sees of its environment; nobody may, but for root."""
        try:
            return Path(f"/proc/{self.pid}/environ").read_bytes()
        except PermissionError:
            return b""


def processes() -> list[Process]:
    """Every live process of this machine."""
    found = (read_process(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [process for process in found if process is not None and process.state not in "ZX"]


def read_process(pid: int) -> Process | None:
    folder = Path(f"/proc/{pid}")
    try:
        head, _, tail = (folder / "stat").read_text().rpartition(") ")
        line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = tail.split()
    return Process(pid, int(fields[1]), head.partition(" (")[2], fields[0], line, int(fields[19]))


def environment(home: Path, **settings: str) -> dict[str, str]:
    """A user's shell: nothing of ours but what is asked for."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PERICARP_", "PYTEST", "PG"))
    }
    return {**kept, "PERICARP_HOME": str(home), "PERICARP_PORT": "0", **settings}


def command(home: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """`python -m service …`, to its end."""
    return commands.run(list(arguments), environment(home, **settings), START_S)


def launch(home: Path, *arguments: str, **settings: str) -> Service:
    """Start the service and return at once."""
    folder = Path(tempfile.mkdtemp(prefix="start-", dir=home.parent))
    with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "service", "serve", *arguments],
            cwd=REPOSITORY,
            env=environment(home, **settings),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )
    return Service(home, process, folder, settings, time.monotonic())


def await_ready(service: Service) -> Service:
    """Until it says on stdout that it is ready."""

    def ready() -> bool:
        assert service.process.poll() is None, f"the service ended: {service.stderr[-3000:]}"
        return "\n" in service.stdout

    until(ready, START_S)
    service.up_s = time.monotonic() - service.began_s
    service.line = service.stdout.splitlines()[0]
    return service


@contextmanager
def serving(home: Path, *arguments: str, **settings: str) -> Iterator[Service]:
    """A service that is ready, and that is gone afterwards whatever happened."""
    service = launch(home, *(arguments or ("--demo",)), **settings)
    try:
        yield await_ready(service)
    finally:
        put_down(service)
    assert service.process.returncode in (0, -signal.SIGKILL), service.stderr[-3000:]


def put_down(service: Service) -> None:
    """Stop the service and wait until nothing of it is left."""
    family = service.family()
    try:
        service.end()
    except subprocess.TimeoutExpired:
        service.process.kill()
        service.process.wait()
    until(lambda: not [each for each in family if each.lives], 30.0)


@contextmanager
def new_home() -> Iterator[Path]:
    """A folder for one installation, erased with its database at the end."""
    above = Path(tempfile.mkdtemp(prefix="pericarp-acceptance-"))
    home = above / "home"
    try:
        yield home
    finally:
        if home.exists():
            embedded.erase(home)
        shutil.rmtree(above, ignore_errors=True)


def until(holds: Callable[[], bool], within_s: float, every_s: float = 0.05) -> None:
    """Wait for something that must come; the time is only there to end a broken run."""
    deadline_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline_s, f"still waiting after {within_s:g} s"
        time.sleep(every_s)


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in {text!r}"
    return match[0]
