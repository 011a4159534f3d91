"""Who sits where: the workers of one host, the lines before them, and the rules of giving and taking seats.

Decisions over plain state, with neither processes nor tasks: `local.py` owns the one instance and acts on it.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from service.errors import Overloaded
from service.fleet.router import Line, Ticket, WorkerState
from service.processes.children import Child

if TYPE_CHECKING:
    from service.fleet.ownership import Owner

PACE_WEIGHT = 0.2
"""Of the newest answer, in the average time from one answer of a worker to the next."""
LONGEST_RETRY_S = 60


@dataclass(frozen=True, slots=True)
class Rules:
    """How many may sit, for how long, and with how much work."""

    max_workers: int
    spare_workers: int
    idle_s: float
    patience_s: float
    """After each such time that a tenant has waited for a seat, one holder more must give up its own."""
    queue_limit: int
    keep_warm: tuple[str, ...]
    jobs_at_once: int
    pixel_bytes_at_once: int
    """Of all jobs at one worker; a single one may have more."""


@dataclass(slots=True, eq=False)
class Seat:
    """One live worker. `tenant` is None while it is a spare; it is set once and never changed."""

    child: Child
    tenant: str | None = None
    tickets: list[Ticket] = field(default_factory=list)
    """What the worker has and has not answered, in the order of sending."""
    jobs: int = 0
    since_s: float = field(default_factory=time.monotonic)
    """When it was given to its tenant, or became ready as a spare."""
    used_s: float = field(default_factory=time.monotonic)
    """When it was given to its tenant, began to work after a rest, or last answered."""
    sent_s: float = 0.0
    owes_s: float | None = None
    """When it got the first job after its last answer."""
    pace_s: float = 0.0
    """Average time from one answer to the next while there was work."""
    compilations: int = 0
    owner: Owner | None = None
    """Whose weights it maps, if it has none of its own."""

    def takes(self, ticket: Ticket, rules: Rules) -> bool:
        """Whether there is room for it.

        A job whose worker died is alone at the next one: if it was the cause, it takes no neighbour with it.
        """
        if not self.tickets:
            return True
        if ticket.attempts or any(other.attempts > 1 for other in self.tickets):
            return False
        pixel_bytes = sum(other.pixel_bytes for other in self.tickets) + ticket.pixel_bytes
        return len(self.tickets) < rules.jobs_at_once and pixel_bytes <= rules.pixel_bytes_at_once

    def take(self, ticket: Ticket, now: float) -> None:
        if not self.tickets:
            self.used_s = now
        if self.owes_s is None:
            self.owes_s = now
        self.tickets.append(ticket)
        ticket.attempts += 1
        ticket.sent_s = self.sent_s = now

    def finish(self, ticket: Ticket, now: float) -> bool:
        """Its answer came. False where it was dropped before."""
        awaited = ticket in self.tickets
        if awaited:
            self.tickets.remove(ticket)
            self.pace_s += (PACE_WEIGHT if self.jobs else 1.0) * (now - self.used_s - self.pace_s)
            self.jobs += 1
            self.used_s = now
        self.owes_s = now if self.tickets else None
        return awaited

    def drop(self, ticket: Ticket, now: float, doubt_s: float) -> bool:
        """Nobody waits for it any more, so it need not be computed. False where it is not here, or had better be.

        A worker might hang while all its callers are too impatient to see it. So once it owes an answer for
        `doubt_s`, jobs run on: an answer, or that none comes by their deadline, shows whether it lives.
        """
        doubtful = self.owes_s is not None and now - self.owes_s > doubt_s
        if doubtful or ticket not in self.tickets:
            return False
        self.tickets.remove(ticket)
        if ticket.asking is not None:
            ticket.asking.cancel()
        return True

    def state(self, now: float) -> WorkerState:
        return WorkerState(
            pid=self.child.pid,
            state="spare" if self.tenant is None else "assigned",
            tenant=self.tenant,
            running=len(self.tickets),
            jobs=self.jobs,
            idle_s=0.0 if self.tickets else now - self.used_s,
            compilations=self.compilations,
            age_s=now - self.since_s,
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
        return self.lines.setdefault(tenant, Line())

    def seat(self, tenant: str) -> Seat | None:
        """The tenant's worker, if it has one."""
        return next((seat for seat in self.seats if seat.tenant == tenant), None)

    def tickets(self, tenant: str) -> list[Ticket]:
        """The tenant's jobs, those in line and those at its worker."""
        seat = self.seat(tenant)
        jobs = (*self.lines.get(tenant, ()), *(seat.tickets if seat is not None else ()))
        return [ticket for ticket in jobs if ticket.tenant == tenant]

    def join(self, ticket: Ticket) -> None:
        """Wait at the end of the tenant's line. A full one fails the ticket with Overloaded, until it is worked off."""
        line, seat = self.line(ticket.tenant), self.seat(ticket.tenant)
        if len(line) < self.rules.queue_limit:
            line.join(ticket)
            return
        worked_off_s = math.ceil(len(line) * seat.pace_s) if seat is not None else 0
        ticket.fail(
            Overloaded(
                "Too many requests are waiting. Try again shortly.",
                reason="queue_full",
                retry_after_s=max(1, min(LONGEST_RETRY_S, worked_off_s)),
            )
        )

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
        since_s = self._since_s()
        return sorted(since_s.keys() - seated, key=lambda tenant: since_s[tenant])

    def missing(self) -> list[str]:
        """Tenants that should have a worker and have none: those that wait, then those to be kept warm."""
        waiting = self.waiting()
        present = {seat.tenant for seat in self.seats} | set(waiting)
        return waiting + [tenant for tenant in self.rules.keep_warm if tenant not in present]

    def call(self, now: float) -> list[tuple[Seat, Ticket]]:
        """Move jobs from the lines to the workers that have room for them; those that were moved."""
        yielding = self._yielding(now)
        called = []
        for seat in self.seats:
            line = self.lines.get(seat.tenant or "")
            if line is None or seat in yielding or not seat.child.alive:
                continue
            while line.head is not None and seat.takes(line.head, self.rules):
                ticket = line.call()
                seat.take(ticket, now)
                called.append((seat, ticket))
        return called

    def oldest_idle(self, now: float) -> Seat | None:
        """The worker to retire where a waiting tenant needs a seat. None too where that would win nothing."""
        if not self.waiting() or not self._in_reach():
            return None
        yielded = [seat for seat in self._yielding(now) if not seat.tickets]
        idle = [seat for seat in self.seats if self._idle(seat)] + yielded
        return min(idle, key=lambda seat: seat.used_s, default=None)

    def disowned(self) -> list[Seat]:
        """Workers whose weights are no longer to be trusted."""
        return [seat for seat in self.seats if seat.owner is not None and not seat.owner.sound]

    def outdated(self, now: float) -> list[Seat]:
        """Workers and surplus spares that nobody has used for too long."""
        seats = [seat for seat in self.seats if self._idle(seat)] + self.spares()[self.rules.spare_workers :]
        return [seat for seat in seats if now - seat.used_s > self.rules.idle_s]

    def _since_s(self) -> dict[str, float]:
        """When the first one of each line arrived."""
        heads = {tenant: line.head for tenant, line in self.lines.items()}
        return {tenant: head.arrived_s for tenant, head in heads.items() if head is not None}

    def _idle(self, seat: Seat) -> bool:
        """Whether it may go: assigned, at rest, with nobody in its line, and not to be kept warm."""
        if seat.tenant is None or seat.tenant in self.rules.keep_warm:
            return False
        return not seat.tickets and not self.lines.get(seat.tenant)

    def _yielding(self, now: float) -> list[Seat]:
        """Workers that get no more jobs and go once they have ended those they have.

        Somebody without a seat has waited too long, and longer than the line of the seat's tenant. Of all such
        seats, those go to which no job was sent for longest: they are nearest to their end, and as nothing more
        is sent to them they stay the ones. The longer the wait, the more of them.
        """
        if self.free() > 0 or not self._in_reach():
            return []
        waiting, since_s = self.waiting(), self._since_s()
        number = sum(int((now - since_s[tenant]) / self.rules.patience_s) for tenant in waiting)
        later = [
            seat
            for seat in self.seats
            if number
            and seat.tenant is not None
            and seat.tenant not in self.rules.keep_warm
            and since_s.get(seat.tenant, math.inf) > since_s[waiting[0]]
        ]
        return sorted(later, key=lambda seat: seat.sent_s)[:number]

    def _in_reach(self) -> bool:
        """Whether a freed seat would be taken soon.

        Where no spares are kept, the old worker ends before the new one loads: never one process too many.
        """
        return bool(self.spares()) or (self.rules.spare_workers == 0 and not self.starts_fail)
