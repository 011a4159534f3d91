"""A real Postgres for every integration test: one server per session, one fresh database per test module.

The server is the embedded one under our own supervisor. A template database is provisioned and migrated once;
each module gets a copy of it, which takes some 50 ms.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import make_url

from tenants import embedded
from tenants.access import Access
from tenants.audit import Audit
from tenants.database import Database, Urls, migrate, provision
from tenants.directory import Directory
from tenants.quotas import Quotas

TEMPLATE = "pericarp"
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Secrets:
    """What an installation keeps outside the database, made anew for every session."""

    pepper: bytes
    master_key: bytes
    owner_password: str
    app_password: str


@pytest.fixture(scope="session")
def installation_secrets() -> Secrets:
    return Secrets(
        pepper=secrets.token_bytes(32),
        master_key=secrets.token_bytes(32),
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
def audit(database: Database, installation_secrets: Secrets) -> Audit:
    return Audit(database, master_key=installation_secrets.master_key)


@pytest.fixture
def quotas(database: Database) -> Quotas:
    return Quotas(database)


def with_database(url: str, name: str) -> str:
    return make_url(url).set(database=name).render_as_string(hide_password=False)


async def run_as_superuser(url: str, *statements: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()
