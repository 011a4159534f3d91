"""Open the installation for one command, its schema up to date, and work at the desk."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

from service.deeds import OPERATOR, Actor
from service.desk import Desk, build_desk
from service.installation import Installation, bring_up_to_date, opened
from service.settings import Settings
from tenants.database import Database

Result = TypeVar("Result")


def read_settings() -> Settings:
    """From the environment, and from files named like its variables in `CREDENTIALS_DIRECTORY`, where systemd puts secrets.

    What is in both counts as the environment has it (systemd.exec(5), Credentials).
    """
    return Settings(_secrets_dir=os.environ.get("CREDENTIALS_DIRECTORY"))


@contextmanager
def installation() -> Iterator[tuple[Settings, Installation]]:
    """The installation that the settings name."""
    settings = read_settings()
    with opened(settings) as found:
        yield settings, found


def at_desk(work: Callable[[Desk], Awaitable[Result]]) -> Result:
    """The result of `work` in the installation that the settings name."""
    with installation() as (_settings, found):
        return work_in(found, work)


def work_in(found: Installation, work: Callable[[Desk], Awaitable[Result]]) -> Result:
    """The result of `work` in an open installation, its schema up to date."""

    async def run() -> Result:
        async with _database(found) as database:
            return await work(build_desk(database, found))

    bring_up_to_date(found)
    return asyncio.run(run())


def operator() -> Actor:
    """Whoever runs this command."""
    return Actor(OPERATOR)


@asynccontextmanager
async def _database(found: Installation) -> AsyncIterator[Database]:
    database = Database(found.app_url, pool_size=1, call_pool_size=1)
    await database.open()
    try:
        yield database
    finally:
        await database.close()
