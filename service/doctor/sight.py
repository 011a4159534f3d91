"""What doctor can see: each part is looked for when it is first asked for, and `Unseen` says why where there is none.

Nothing is made and nothing is changed, but that an embedded Postgres is started for as long as doctor runs where
nobody runs it. A home that is not there stays so.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import ssl
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from service.desk import build_desk
from service.doctor.check import Unseen
from service.installation import opened
from tenants.database import Database
from tenants.embedded import EmbeddedError
from tenants.errors import DatabaseUnavailable, TenancyError
from tenants.examination import Examination, examine
from tenants.postgres_account import Place, recorded_place

if TYPE_CHECKING:
    from service.desk import Desk
    from service.installation import Installation
    from service.settings import Settings

Result = TypeVar("Result")
KEYS = ("pepper", "master-key", "log-key")
"""Without which there is no installation to look at."""
ASK_S = 5.0
ANSWER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Process:
    """A process of ours that lives, by /proc."""

    pid: int
    parent: int
    kind: str
    """`gateway`, `worker`, `screening`, `weights`, `witness`, `guardian`, `postgres`."""
    folder: Path
    arguments: tuple[str, ...]

    def status(self, name: str) -> str:
        """A line of /proc/PID/status. Raises `Unseen` where the process is gone, or has no such line."""
        try:
            lines = (self.folder / "status").read_text().splitlines()
        except OSError as exc:
            raise Unseen(f"process {self.pid} cannot be read") from exc
        for line in lines:
            if line.startswith(f"{name}:"):
                return line.partition(":")[2].strip()
        raise Unseen(f"the kernel tells no {name} of process {self.pid}")

    @property
    def uid(self) -> int:
        """The user that it acts as."""
        return int(self.status("Uid").split()[1])

    def __str__(self) -> str:
        return f"{self.kind} {self.pid}"


KINDS = (
    ("gateway", ("service", "serve")),
    ("worker", ("service.fleet.worker",)),
    ("weights", ("service.fleet.owner",)),
    ("screening", ("service.screening.child",)),
    ("screening", ("service.screening.reading",)),
    ("witness", ("service.witness",)),
)
"""By which words of its arguments a Python process of ours is known."""


class Sight:
    """One look around. Use it as a context: what it opened it closes."""

    def __init__(self, settings: Settings, url: str | None = None) -> None:
        """`url` is where the service answers, if not where the settings say."""
        self.settings = settings
        self.home = settings.home.absolute()
        self._url = url
        self._open = ExitStack()

    def __enter__(self) -> Sight:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    @property
    def embedded(self) -> bool:
        """Whether the database is the embedded one."""
        return self.settings.database_url is None

    @cached_property
    def place(self) -> Place:
        """Where the embedded database lies."""
        if not self.embedded:
            raise Unseen("the database is one of your own")
        place = recorded_place(self.home)
        if place is None:
            raise Unseen("the embedded database was never started")
        return place

    @cached_property
    def installation(self) -> Installation:
        """The secrets and the database's address; the embedded Postgres runs from then on."""
        if not all((self.home / "secrets" / name).exists() for name in KEYS):
            raise Unseen(f"there is no whole installation in {self.home}")
        if self.embedded:
            self.place  # noqa: B018 - or it would be made
        try:
            return self._open.enter_context(opened(self.settings))
        except (EmbeddedError, TenancyError, DatabaseUnavailable, OSError) as exc:
            raise Unseen(f"the database cannot be opened: {type(exc).__name__}") from exc

    @cached_property
    def examination(self) -> Examination:
        """The database as the runtime role sees it."""
        url = self.installation.app_url
        try:
            return asyncio.run(examine(url))
        except DatabaseUnavailable as exc:
            raise Unseen("the database does not answer") from exc

    def at_desk(self, work: Callable[[Desk], Awaitable[Result]]) -> Result:
        """The result of `work` over the database; `Unseen` where that cannot be opened."""
        installation = self.installation

        async def run() -> Result:
            database = Database(installation.app_url, pool_size=1, call_pool_size=1)
            try:
                await database.open()
            except TenancyError as exc:
                raise Unseen(f"the database cannot be opened: {type(exc).__name__}") from exc
            try:
                return await work(build_desk(database, installation))
            finally:
                await database.close()

        return asyncio.run(run())

    @property
    def url(self) -> str:
        """Where the service should answer."""
        if self._url is not None:
            return self._url
        if self.settings.port == 0:
            raise Unseen("PERICARP_PORT is 0: say where the service answers by --url")
        scheme = "https" if self.settings.tls_certificate else "http"
        everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - asked, not bound
        host = everywhere.get(self.settings.host, self.settings.host)
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.settings.port}"

    @cached_property
    def answer(self) -> tuple[int, dict[str, Any], bytes | None]:
        """What /readyz says: status, body, and the certificate that it was said under (DER), which is not verified here."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Unseen(f"{self.url} is no address of a service")
        line: http.client.HTTPConnection
        if parts.scheme == "https":
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # who it is, a check compares
            line = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=ASK_S, context=context)
        else:
            line = http.client.HTTPConnection(parts.hostname, parts.port, timeout=ASK_S)
        try:
            line.connect()
            peer = line.sock.getpeercert(binary_form=True) if isinstance(line.sock, ssl.SSLSocket) else None
            line.request("GET", "/readyz")
            response = line.getresponse()
            told = json.loads(response.read(ANSWER_BYTES))
        except (OSError, http.client.HTTPException, ValueError) as exc:
            raise Unseen(f"no service answers at {self.url}: {type(exc).__name__}") from exc
        finally:
            line.close()
        if not isinstance(told, dict):
            raise Unseen(f"what answers at {self.url} is not the service")
        return response.status, told, peer

    @cached_property
    def readiness(self) -> dict[str, Any]:
        """What a ready service says of itself."""
        status, told, _ = self.answer
        if status != 200:
            raise Unseen(f"the service at {self.url} is not ready: it answers {status}")
        return told

    @cached_property
    def processes(self) -> tuple[Process, ...]:
        """The processes of this installation, and every witness on this host.

        With a Postgres of your own, every gateway on this host counts as one of this installation.
        """
        proc = Path("/proc")
        if not (proc / "self" / "status").exists():
            raise Unseen("there is no /proc")
        read = (self._read(folder) for folder in proc.iterdir() if folder.name.isdigit())
        found = [each for each in read if each is not None]
        holders = self._holders()
        gateways = {
            each.pid for each in found if each.kind == "gateway" and (holders is None or each.pid in holders)
        }
        ours = (
            each
            for each in found
            if each.pid in gateways
            or each.parent in gateways
            or each.kind in ("guardian", "postgres", "witness")
        )
        return tuple(sorted(ours, key=lambda each: each.pid))

    def _holders(self) -> set[int] | None:
        """Who has a claim on the embedded database (`flock`, /proc/locks in proc(5)); None where there is none."""
        claims = self._cluster / "holders"
        if not self.embedded or not claims.exists():
            return None
        number = claims.stat().st_ino
        lines = (line.split() for line in Path("/proc/locks").read_text().splitlines())
        return {
            int(fields[-4])
            for fields in lines
            if "FLOCK" in fields and fields[-3].rpartition(":")[2] == str(number)
        }

    def running(self, *kinds: str) -> tuple[Process, ...]:
        """The processes of these kinds. Raises `Unseen` where there is none."""
        found = tuple(each for each in self.processes if each.kind in kinds)
        if not found:
            raise Unseen(f"no process of these kinds runs here: {', '.join(kinds)}")
        return found

    def _read(self, folder: Path) -> Process | None:
        try:
            arguments = tuple((folder / "cmdline").read_bytes().decode(errors="replace").split("\0"))
            parent = int((folder / "stat").read_text().rpartition(") ")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return None  # it ended meanwhile
        kind = self._kind(arguments)
        return Process(int(folder.name), parent, kind, folder, arguments) if kind else None

    def _kind(self, arguments: tuple[str, ...]) -> str:
        program = Path(arguments[0]).name
        if program.startswith("python"):
            cluster = str(self._cluster)
            if any(each.endswith("postgres_guardian.py") for each in arguments) and cluster in arguments:
                return "guardian"
            if "-m" in arguments:
                words = arguments[arguments.index("-m") + 1 :]
                return next((kind for kind, start in KINDS if words[: len(start)] == start), "")
        if program == "postgres" and str(self._cluster / "data") in arguments:
            return "postgres"
        return ""

    @cached_property
    def _cluster(self) -> Path:
        try:
            return self.place.cluster
        except Unseen:
            return self.home / "postgres"
