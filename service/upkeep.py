"""What goes on beside the requests: changes heard and issuers' keys fetched, so that who calls is known; uses, refusals
and the evidence of screening written; entries put into the log's tree, and its checkpoints cosigned; alerts sent."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from service.watch.logs import get_logger, where_it_broke
from tenants.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from service.alerting import Alerting
    from service.cosigning import Cosigning
    from service.key_sets import KeySets
    from service.refusals import Refusals
    from service.sequencing import Sequencing
    from tenants.changes import Changes
    from tenants.evidence import Evidence
    from tenants.uses import Uses

USES_EVERY_S = 15.0
EVIDENCE_EVERY_S = 10.0
AGAIN_S = 1.0
LAST_WORDS_S = 3.0
"""How long the end may wait for what is still to be written."""

log = get_logger(__name__)


class Upkeep:
    """Starts and ends with the gateway."""

    def __init__(
        self,
        *,
        changes: Changes,
        uses: Uses,
        refusals: Refusals,
        evidence: Evidence,
        sequencing: Sequencing,
        cosigning: Cosigning,
        alerting: Alerting,
        key_sets: KeySets | None = None,
    ) -> None:
        self._changes = changes
        self._uses = uses
        self._refusals = refusals
        self._evidence = evidence
        self._sequencing = sequencing
        self._cosigning = cosigning
        self._alerting = alerting
        self._key_sets = key_sets
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin. The database must be open."""
        works: dict[str, Callable[[], Awaitable[None]]] = {
            "changes": self._changes.listen,
            "uses": self._write_uses,
            "evidence": self._write_evidence,
            "refusals": self._refusals.write,
            "log": self._sequencing.keep,
            "cosigning": self._cosigning.keep,
            "alerts": self._alerting.keep,
        }
        if self._key_sets is not None:
            works["key sets"] = self._key_sets.keep
        for name, work in works.items():
            self._tasks.append(asyncio.create_task(_always(name, work), name=name))

    async def close(self) -> None:
        """End, and write what waits, if the database takes it soon. Idempotent."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if not tasks:
            return
        try:
            async with asyncio.timeout(LAST_WORDS_S):
                await self._uses.write()
                await self._evidence.write()
                self._refusals.sum_up(all_of_them=True)
                await self._refusals.write_waiting()
                await self._sequencing.turn()
        except (TimeoutError, DatabaseUnavailable):
            log.error(
                "refusals, uses or evidence could not be written before the end",
                action="upkeep_failed",
                task="close",
            )

    async def _write_uses(self) -> None:
        while True:
            await asyncio.sleep(USES_EVERY_S)
            try:
                await self._uses.write()
            except DatabaseUnavailable:
                continue  # kept for the next time

    async def _write_evidence(self) -> None:
        while True:
            await asyncio.sleep(EVIDENCE_EVERY_S)
            try:
                await self._evidence.write()
            except DatabaseUnavailable:
                continue  # kept for the next time


async def _always(name: str, work: Callable[[], Awaitable[None]]) -> None:
    """Run it for ever: a bug in one round must not be the last of all rounds."""
    while True:
        try:
            await work()
        except Exception as exc:  # noqa: BLE001 - whatever it was, it is told, and the work goes on
            log.error(
                "upkeep broke and goes on",
                action="upkeep_failed",
                task=name,
                error=type(exc).__name__,
                where=where_it_broke(exc),
            )
        await asyncio.sleep(AGAIN_S)
