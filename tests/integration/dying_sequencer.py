"""A sequencer that is killed within its step: `python -m tests.integration.dying_sequencer URL SEED MOMENT`.

MOMENT counts what is behind it of the step: 0 its transaction is open, 1 the leaves are read, 2 the edge's tiles too, 3
everything is written, 4 it is committed. It ends by SIGKILL, whatever it was about to do.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tenants.database import Database
from tenants.sequencer import Sequencer, log_signer


class Counting:
    """A connection that dies once enough statements are behind it."""

    def __init__(self, connection: Any, moment: int) -> None:
        self._connection = connection
        self._left = moment

    def die_or_go_on(self) -> None:
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= 1

    def __getattr__(self, name: str) -> Any:
        async def run(*arguments: Any) -> Any:
            done = await getattr(self._connection, name)(*arguments)
            self.die_or_go_on()
            return done

        return run


class DyingDatabase(Database):
    moment = 0

    @asynccontextmanager
    async def calls(self) -> AsyncIterator[Any]:
        async with super().calls() as connection:
            counting = Counting(connection, self.moment)
            counting.die_or_go_on()
            yield counting
        counting.die_or_go_on()


async def main(url: str, seed: str, moment: int) -> None:
    database = DyingDatabase(url)
    database.moment = moment
    await database.open()
    await Sequencer(database, log_signer(bytes.fromhex(seed))).step()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
