"""Who sits where: the workers of one host, the lines before them, and the rules of giving and taking seats.

Decisions over plain state, with neither processes nor tasks: `local.py` owns the one instance and acts on it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from service.fleet.router import Line, Ticket, WorkerState
from service.processes.children import Child


@dataclass(frozen=True, slots=True)
class Rules:
    """How many may sit, and for how long."""

    max_workers: int
    spare_workers: int
    idle_s: float
    patience_s: float
    """A tenant that has waited so long for a seat may take one between two of its holder's jobs."""
    queue_limit: int
    keep_warm: tuple[str, ...]


@dataclass(slots=True, eq=False)
class Seat:
    """One live worker. `tenant` is None while it is a spare; it is set once and never changed."""

    child: Child
    tenant: str | None = None
    ticket: Ticket | None = None
    jobs: int = 0
    used_s: float = field(default_factory=time.monotonic)

    def state(self, now: float) -> WorkerState:
        return WorkerState(
            pid=self.child.pid,
            state="spare" if self.tenant is None else "assigned",
            tenant=self.tenant,
            busy=self.ticket is not None,
            jobs=self.jobs,
            idle_s=0.0 if self.ticket is not None else now - self.used_s,
        )


class Seating:
    """Seats and lines. `now` is on the clock of `time.monotonic`."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.seats: list[Seat] = []
        self.lines: dict[str, Line] = {}
        self.starts_fail = False

    def line(self, tenant: str) -> Line:
        """The tenant's line, which begins here if it must."""
        return self.lines.setdefault(tenant, Line(self.rules.queue_limit))

    def forget_gone(self) -> None:
        """Drop the tickets that nobody waits for, and the lines that are empty."""
        for line in self.lines.values():
            line.forget_gone()
        self.lines = {tenant: line for tenant, line in self.lines.items() if line}

    def spares(self) -> list[Seat]:
        return [seat for seat in self.seats if seat.tenant is None and seat.child.alive]

    def free(self) -> int:
        """How many more tenants may have a worker."""
        return self.rules.max_workers - sum(seat.tenant is not None for seat in self.seats)

    def waiting(self) -> list[str]:
        """Tenants that wait without a worker, the longest wait first."""
        seated = {seat.tenant for seat in self.seats}
        heads = {tenant: line.head for tenant, line in self.lines.items() if tenant not in seated}
        since_s = {tenant: head.arrived_s for tenant, head in heads.items() if head is not None}
        return sorted(since_s, key=lambda tenant: since_s[tenant])

    def missing(self) -> list[str]:
        """Tenants that should have a worker and have none: those that wait, then those to be kept warm."""
        waiting = self.waiting()
        present = {seat.tenant for seat in self.seats} | set(waiting)
        return waiting + [tenant for tenant in self.rules.keep_warm if tenant not in present]

    def calls(self, now: float) -> list[tuple[Seat, Ticket]]:
        """Take from the lines the next job of each idle worker."""
        waiting = self.waiting()
        called = []
        for seat in self.seats:
            line = self.lines.get(seat.tenant or "")
            if seat.ticket is None and seat.child.alive and line and not self._yields(seat, waiting, now):
                ticket = line.call()
                assert ticket is not None  # an empty line is false
                called.append((seat, ticket))
        return called

    def oldest_idle(self, now: float) -> Seat | None:
        """The worker to retire where a waiting tenant needs a seat. None too where that would win nothing."""
        waiting = self.waiting()
        if not waiting or not self._in_reach():
            return None
        idle = [seat for seat in self.seats if self._idle(seat) or self._yields(seat, waiting, now)]
        return min(idle, key=lambda seat: seat.used_s, default=None)

    def outdated(self, now: float) -> list[Seat]:
        """Workers and surplus spares that nobody has used for too long."""
        seats = [seat for seat in self.seats if self._idle(seat)] + self.spares()[self.rules.spare_workers :]
        return [seat for seat in seats if now - seat.used_s > self.rules.idle_s]

    def _idle(self, seat: Seat) -> bool:
        """Whether it may go: assigned, at rest, with nobody in its line, and not to be kept warm."""
        if seat.tenant is None or seat.tenant in self.rules.keep_warm:
            return False
        return seat.ticket is None and not self.lines.get(seat.tenant)

    def _yields(self, seat: Seat, waiting: list[str], now: float) -> bool:
        """Between two jobs: whether somebody without a seat waits too long, and longer than its own line."""
        if seat.tenant is None or seat.tenant in self.rules.keep_warm or seat.ticket is not None:
            return False
        if not waiting or self.free() > 0 or not self._in_reach():
            return False
        own, first = self.line(seat.tenant).head, self.line(waiting[0]).head
        if own is None or first is None:
            return False
        return now - first.arrived_s > self.rules.patience_s and first.arrived_s < own.arrived_s

    def _in_reach(self) -> bool:
        """Whether a freed seat would be taken soon.

        Where no spares are kept, the old worker ends before the new one loads: never one process too many.
        """
        return bool(self.spares()) or (self.rules.spare_workers == 0 and not self.starts_fail)
