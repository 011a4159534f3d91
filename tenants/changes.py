"""What other gateways and the command line changed: Postgres' LISTEN on one direct connection of its own.

It only makes things sooner: what a gateway keeps is too old after 1.5 s anyway (`tenants.access`). After a loss the
connection is made again, and since changes may have been missed, everything is read anew. A connection that went
silent without a word is found by asking it something every second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tenants.database import connect, translated
from tenants.errors import DatabaseUnavailable

CHANNEL = "pericarp_changes"
APPLICATION = "pericarp changes"
"""What `pg_stat_activity` calls the connection."""
ASK_EVERY_S = 1.0
AGAIN_S = 0.5


class Changes:
    """Listens for as long as `listen` runs."""

    def __init__(self, url: str, *, changed: Callable[[str], None], missed: Callable[[], None]) -> None:
        """`changed` hears each change, `missed` that some may have been missed. Both must be quick.

        `url` must lead to Postgres itself: a pooler that shares connections between transactions passes nothing on.
        """
        self._url = url
        self._changed = changed
        self._missed = missed
        self.listening = False

    async def listen(self) -> None:
        """Until it is cancelled. Whatever the database does, it is listened to again."""
        while True:
            try:
                with translated():
                    await self._listen_once()
            except DatabaseUnavailable:
                await asyncio.sleep(AGAIN_S)

    async def _listen_once(self) -> None:
        """Until the connection is lost. Raises what the driver does then."""
        connection = await connect(self._url, {"application_name": APPLICATION}, command_timeout=ASK_EVERY_S)
        try:
            await connection.add_listener(CHANNEL, self._hear)
            self.listening = True
            self._missed()
            while True:
                await asyncio.sleep(ASK_EVERY_S)
                await connection.execute("select 1")
        finally:
            self.listening = False
            self._missed()
            connection.terminate()

    def _hear(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        if isinstance(payload, str):
            self._changed(payload)
