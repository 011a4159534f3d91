"""Keeps the log's tree growing, as long as the gateway lives, and says so where it does not."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from service.watch import metrics
from service.watch.logs import get_logger, where_it_broke
from tenants.errors import DatabaseUnavailable, LogBroken

if TYPE_CHECKING:
    from tenants.sequencer import Sequencer

EVERY_S = 0.5
"""How long a leaf may wait before it is looked for; it is to be in the tree within 5 s."""
AGAIN_S = 5.0
"""How long after a step that failed the next one is tried."""

log = get_logger(__name__)


class Sequencing:
    """One to a gateway. Of several gateways, whoever comes first takes the step."""

    def __init__(self, sequencer: Sequencer) -> None:
        self._sequencer = sequencer
        self.fault = ""
        """Why the last step failed; empty where it did not, or the database was away."""

    async def keep(self) -> None:
        """Take steps, for ever."""
        while True:
            if not await self.turn():
                await asyncio.sleep(AGAIN_S if self.fault else EVERY_S)

    async def turn(self) -> bool:
        """Take one step; whether more is waiting. What goes wrong is told, and raises nothing."""
        more = False
        try:
            step = await self._sequencer.step()
        except DatabaseUnavailable:
            metrics.LOG_FAILURES.labels("database").inc()  # /readyz says so of the database itself
        except LogBroken as exc:
            self.fault = "log_broken"
            metrics.LOG_FAILURES.labels("broken").inc()
            # Its message is made of sizes and the log's own name.
            log.critical(
                "the log's tree is not the one that was signed: nothing is signed until it is",
                action="log_broken",
                reason=str(exc),
            )
        except Exception as exc:  # noqa: BLE001 - whatever it was, it is told, and tried again
            self.fault = "log_failed"
            metrics.LOG_FAILURES.labels("failed").inc()
            log.error(
                "entries could not be put into the log's tree",
                action="log_failed",
                error=type(exc).__name__,
                where=where_it_broke(exc),
            )
        else:
            self.fault = ""
            more = step.full
            if step.size is not None:
                metrics.LOG_SIZE.set(step.size)
        metrics.LOG_LAG.set(self._sequencer.lag_s)
        metrics.LOG_WAITING.set(self._sequencer.waiting)
        return more
