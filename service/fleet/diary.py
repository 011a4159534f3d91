"""What the log is told of workers: who came, who went and why, and never what a tenant sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog

from service.processes.children import FORBIDDEN_CALL, Cause
from service.processes.parent import UNFORESEEN
from service.processes.sandbox import missing

if TYPE_CHECKING:
    from service.fleet.seats import Seat
    from service.fleet.tally import Retirement, Tally
    from service.processes.children import Child


class Diary:
    """One fleet's, which keeps its tally as well."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._log = structlog.get_logger(source="fleet")
        self._told: dict[str, str] = {}

    def hear(self, line: str) -> None:
        """Keep what a worker says of its own bugs, and how it ended; what libraries print might repeat a tenant's text."""
        if line.startswith(UNFORESEEN):
            self._log.error("A worker failed in an unforeseen way.", action="request_failed", where=line)
        elif line == FORBIDDEN_CALL.decode():
            self._log.error("A worker says something.", action="child_says", line=line)

    def tell_ready(self, child: Child) -> None:
        """And what does not hold of its confinement: once, not of each worker again."""
        self._tally.starts["ready"] += 1
        self._log.info(
            "A worker is ready.", action="worker_ready", pid=child.pid, stages_ms=child.hello.stages_ms
        )
        broken = missing(child.hello.sandbox)
        if broken and broken != self._told:
            self._log.warning(
                "A worker is less confined than it should be.",
                action="sandbox",
                missing=list(broken),
                reasons=broken,
            )
        self._told = broken

    def tell_not_started(self, reason: str) -> None:
        self._tally.starts["failed"] += 1
        self._log.error("A worker cannot be started.", action="worker_lost", reason=reason)

    def tell_retired(self, seat: Seat, why: Retirement) -> None:
        self._tally.ends[why.name.lower()] += 1
        self._log.info("A worker retires.", action="worker_retire", **_whose(seat), reason=why.value)

    def tell_lost(self, seat: Seat, reason: str) -> None:
        self._tally.ends[seat.child.cause or Cause.DIED] += 1
        self._log.warning("A worker is lost.", action="worker_lost", **_whose(seat), reason=reason)

    def tell_broken(self) -> None:
        self._log.critical("The fleet's dispatcher broke.", action="worker_lost")


def _whose(seat: Seat) -> dict[str, Any]:
    if seat.party is None or seat.party.group is None:
        return {"pid": seat.child.pid, "tenant": None if seat.party is None else seat.party.tenant}
    return {"pid": seat.child.pid, "group": seat.party.group}
