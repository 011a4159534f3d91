"""A real Postgres for every integration test: one server per session, one fresh database per test module.

The server is the embedded one under our own supervisor. A template database is provisioned and migrated once;
each module gets a copy of it, which takes some 50 ms.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest
from alembic import command
from sqlalchemy import Connection, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from tenants import embedded
from tenants.access import Access, Caller, Role, plane_of
from tenants.audit import Audit
from tenants.database import Database, _alembic_config, connect, migrate
from tenants.denials import Denials
from tenants.directory import Directory
from tenants.keys import Keys
from tenants.lifecycle import Lifecycle
from tenants.policy import Policy
from tenants.presence import Presences
from tenants.provisioning import Urls, provision
from tenants.quotas import Quotas
from tenants.repeats import Repeats
from tenants.sessions import Sessions
from tests.integration.served import Served, serve

TEMPLATE = "pericarp"
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Secrets:
    """What an installation keeps outside the database, made anew for every session."""

    pepper: bytes
    master_key: bytes
    log_key: bytes
    owner_password: str
    app_password: str

    @property
    def keys(self) -> tuple[bytes, bytes, bytes]:
        """As an installation has them: pepper, master key, log key."""
        return self.pepper, self.master_key, self.log_key


@pytest.fixture(scope="session")
def installation_secrets() -> Secrets:
    return Secrets(
        pepper=secrets.token_bytes(32),
        master_key=secrets.token_bytes(32),
        log_key=secrets.token_bytes(32),
        owner_password=secrets.token_hex(16),
        app_password=secrets.token_hex(16),
    )


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[embedded.Server]:
    """A running server; `superuser_url` reaches it."""
    with tempfile.TemporaryDirectory(prefix="pericarp-test-") as home, embedded.running(Path(home)) as server:
        yield server


@pytest.fixture(scope="session")
def template(postgres_server: embedded.Server, installation_secrets: Secrets) -> Urls:
    """The template database, built by the migrations. Nobody connects to it once it stands."""

    async def build() -> Urls:
        urls = await provision(
            postgres_server.superuser_url,
            owner_password=installation_secrets.owner_password,
            app_password=installation_secrets.app_password,
            database=TEMPLATE,
        )
        await migrate(urls.owner_url)
        return urls

    return asyncio.run(build())


@pytest.fixture(scope="module")
def urls(postgres_server: embedded.Server, template: Urls) -> Urls:
    """A fresh migrated database for this module, as its owner and as the runtime role."""
    name = f"pericarp_{next(_numbers)}"
    asyncio.run(
        run_as_superuser(
            postgres_server.superuser_url,
            f"create database {name} template {TEMPLATE} owner pericarp_owner",
            f"revoke all on database {name} from public",
            f"grant connect on database {name} to pericarp_app",
        )
    )
    return Urls(with_database(template.owner_url, name), with_database(template.app_url, name))


@pytest.fixture(scope="module")
def owner_url(urls: Urls) -> str:
    return urls.owner_url


@pytest.fixture(scope="module")
def app_url(urls: Urls) -> str:
    return urls.app_url


@pytest.fixture(scope="module")
def superuser_url(postgres_server: embedded.Server, urls: Urls) -> str:
    """This module's database as the superuser: for what only tests may do."""
    return with_database(postgres_server.superuser_url, make_url(urls.app_url).database or "")


@pytest.fixture
async def database(app_url: str) -> AsyncIterator[Database]:
    """This module's database, open as the runtime role. What a test leaves in it, the next one finds."""
    opened = Database(app_url)
    await opened.open()
    try:
        yield opened
    finally:
        await opened.close()


@pytest.fixture
def directory(database: Database, installation_secrets: Secrets) -> Directory:
    return Directory(database, pepper=installation_secrets.pepper, master_key=installation_secrets.master_key)


@pytest.fixture
def access(database: Database, installation_secrets: Secrets) -> Access:
    return Access(database, pepper=installation_secrets.pepper)


@pytest.fixture
def keys(directory: Directory) -> Keys:
    return directory.keys


@pytest.fixture
def denials(database: Database) -> Denials:
    return Denials(database)


@pytest.fixture
def audit(database: Database, installation_secrets: Secrets) -> Audit:
    return Audit(database, master_key=installation_secrets.master_key)


@pytest.fixture
def quotas(database: Database) -> Quotas:
    return Quotas(database)


@pytest.fixture
def sessions(database: Database) -> Sessions:
    return Sessions(database)


@pytest.fixture
def lifecycle(database: Database) -> Lifecycle:
    return Lifecycle(database)


@pytest.fixture
def presences(database: Database) -> Presences:
    return Presences(database)


@pytest.fixture
def repeats(database: Database, installation_secrets: Secrets) -> Repeats:
    return Repeats(database, master_key=installation_secrets.master_key)


@pytest.fixture(scope="module")
def judges_images() -> bool:
    """Whether this module's service has the networks that judge images; to load them takes seconds of a core."""
    return False


@pytest.fixture(scope="module")
def service(app_url: str, installation_secrets: Secrets, judges_images: bool) -> Iterator[Served]:
    """The whole service, over real HTTP, with a puppet for a model, on this module's database."""
    with serve(app_url, *installation_secrets.keys, judges_images=judges_images) as served:
        yield served


MakeCaller = Callable[..., Awaitable[Caller]]


@pytest.fixture
def make_caller(directory: Directory, access: Access) -> MakeCaller:
    """`await make_caller(policy, role)`: a new tenant's new key, authenticated."""

    async def make(policy: Policy | None = None, role: Role = Role.SEARCH) -> Caller:
        tenant = await directory.create_tenant(f"tenant-{secrets.token_hex(8)}", policy)
        _, token = await directory.keys.create(tenant.id, role)
        return await access.authenticate(token, plane=plane_of(role))

    return make


@pytest.fixture
async def proxy(app_url: str) -> AsyncIterator[Proxy]:
    """A way to the database that a test can cut or freeze."""
    with tempfile.TemporaryDirectory(prefix="pericarp-proxy-") as folder:
        opened = Proxy(app_url, Path(folder))
        await opened.resume()
        try:
            yield opened
        finally:
            await opened.cut()


class Proxy:
    """Forwards one unix socket to another: what a dead or a silent database looks like, without harming the real one."""

    def __init__(self, url: str, folder: Path) -> None:
        parsed = make_url(url)
        port = str(parsed.query.get("port", parsed.port or 5432))
        self._behind = f"{parsed.query['host']}/.s.PGSQL.{port}"
        self._front = folder / ".s.PGSQL.5432"
        self.url = (
            parsed.difference_update_query(["host", "port"])
            .update_query_dict({"host": str(folder), "port": "5432"})
            .render_as_string(hide_password=False)
        )
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()

    async def resume(self) -> None:
        self._flowing.set()
        if self._server is None:
            self._server = await asyncio.start_unix_server(self._forward, self._front)

    def freeze(self) -> None:
        """Connections stay open and new ones are accepted, but nothing passes any more."""
        self._flowing.clear()

    async def cut(self) -> None:
        """Close every connection; new ones are refused."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._front.unlink(missing_ok=True)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._flowing.wait()
            behind_reader, behind_writer = await asyncio.open_unix_connection(self._behind)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._pump(reader, behind_writer))
                    group.create_task(self._pump(behind_reader, writer))
            finally:
                behind_writer.close()
        except (asyncio.CancelledError, ExceptionGroup, OSError):
            pass
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(65536):
            await self._flowing.wait()
            writer.write(chunk)
            await writer.drain()
        raise ConnectionResetError  # one side hung up: end the other as well


def with_database(url: str, name: str) -> str:
    return make_url(url).set(database=name).render_as_string(hide_password=False)


async def go_back(owner_url: str, revision: str) -> None:
    """Bring the schema back to what it was at that revision."""

    def downgrade(connection: Connection) -> None:
        config = _alembic_config()
        config.attributes["connection"] = connection
        command.downgrade(config, revision)

    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=lambda: connect(owner_url, {}, command_timeout=60),
        poolclass=NullPool,
    )
    async with engine.begin() as connection:
        await connection.run_sync(downgrade)
        assert await connection.scalar(text("select version_num from pericarp.alembic_version")) == revision
    await engine.dispose()


async def run_as_superuser(url: str, *statements: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()
