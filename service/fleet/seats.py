"""Who sits where: the workers of one host, the lines before them, and the rules of giving and taking seats.

Decisions over plain state, with neither processes nor tasks: `local.py` owns the one instance and acts on it.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

from models import Work
from service.errors import Contained, Overloaded
from service.fleet.messages import ScoreReply
from service.fleet.router import Line, Party, TenantState, Ticket, WorkerState
from service.processes.children import Child

if TYPE_CHECKING:
    from service.fleet.ownership import Owner

PACE_WEIGHT = 0.2
"""Of the newest answer, in the average time from one answer of a worker to the next."""
LONGEST_RETRY_S = 60
JOBS_AT_ONCE = 16
"""Jobs at one worker, the rest waits in line: enough to fill its packs and to put the shortest first, few
enough that a killed worker costs little and that its memory holds them."""
PIXEL_BYTES_AT_ONCE = 256 * 1024 * 1024
"""Of all jobs at one worker, unless one alone has more: some 90 of the largest images, seconds of work."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How many may sit, for how long, and with how much work."""

    max_workers: int
    spare_workers: int
    idle_s: float
    patience_s: float
    """After each such time that a party has waited for a seat, one holder more must give up its own."""
    queue_limit: int
    keep_warm: tuple[Party, ...]
    jobs_at_once: int
    pixel_bytes_at_once: int
    """Of all jobs at one worker; a single one may have more."""


@dataclass(slots=True)
class Stay:
    """One tenant at one worker: since when, when it last got or answered a job of theirs, and how many it answered."""

    since_s: float
    used_s: float
    jobs: int = 0


@dataclass(slots=True, eq=False)
class Seat:
    """One live worker. `party` is None while it is a spare; it is set once and never changed."""

    child: Child
    party: Party | None = None
    own_weights: bool = False
    """Whether no other process sees the weights that it maps."""
    tenants: dict[str, Stay] = field(default_factory=dict)
    """Those of whose work it may keep something."""
    tickets: list[Ticket] = field(default_factory=list)
    """What the worker has and has not answered, in the order of sending."""
    jobs: int = 0
    since_s: float = field(default_factory=time.monotonic)
    """When it was given to its party, or became ready as a spare."""
    used_s: float = field(default_factory=time.monotonic)
    """When it was given to its party, began to work after a rest, or last answered."""
    sent_s: float = 0.0
    owes_s: float | None = None
    """When it got the first job after its last answer."""
    pace_s: float = 0.0
    """Average time from one answer to the next while there was work."""
    compilations: int = 0
    work: Work = field(default_factory=Work)
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
        self.tenants.setdefault(ticket.tenant, Stay(now, now)).used_s = now
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
            if (stay := self.tenants.get(ticket.tenant)) is not None:
                stay.used_s = now
                stay.jobs += 1
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

    def note(self, reply: object) -> Work:
        """Remember what it says that it has done; what of that is new. Replies may overtake each other."""
        if not isinstance(reply, ScoreReply):
            return Work()
        self.compilations = max(self.compilations, reply.compilations)
        before, self.work = self.work, self.work | reply.work
        return self.work - before

    def state(self, now: float) -> WorkerState:
        return WorkerState(
            pid=self.child.pid,
            state="spare" if self.party is None else "assigned",
            tenant=None if self.party is None else self.party.tenant,
            running=len(self.tickets),
            jobs=self.jobs,
            idle_s=0.0 if self.tickets else now - self.used_s,
            compilations=self.compilations,
            group=None if self.party is None else self.party.group,
            tenants=tuple(
                TenantState(
                    tenant,
                    sum(ticket.tenant == tenant for ticket in self.tickets),
                    stay.jobs,
                    now - stay.since_s,
                )
                for tenant, stay in self.tenants.items()
            ),
            own_weights=self.own_weights,
            age_s=now - self.since_s,
        )


class Seating:
    """Seats and lines. `now` is on the clock of `time.monotonic`."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.seats: list[Seat] = []
        self.lines: dict[Party, Line] = {}
        self.failing: set[bool] = set()
        """Which starts fail at present: those of workers with weights of their own (True), or the others."""
        self.expelled: set[str] = set()
        """Tenants that were stopped and have not asked since."""

    def line(self, party: Party) -> Line:
        """The party's line, which begins here if it must."""
        return self.lines.setdefault(party, Line())

    def seat(self, party: Party) -> Seat | None:
        """The party's worker, if it has one."""
        return next((seat for seat in self.seats if seat.party == party), None)

    def homes(self, tenant: str) -> list[Seat]:
        """The workers that may keep something of the tenant's work: more than one where it changed its party."""
        own = Party(tenant), Party(tenant, own_weights=True)
        return [seat for seat in self.seats if tenant in seat.tenants or seat.party in own]

    def tickets(self, tenant: str) -> list[Ticket]:
        """The tenant's jobs, those in line and those at its workers."""
        jobs = chain(*self.lines.values(), *(seat.tickets for seat in self.homes(tenant)))
        return [ticket for ticket in jobs if ticket.tenant == tenant]

    def expel(self, tenant: str) -> list[Seat]:
        """Fail the tenant's jobs, and keep no worker warm for it until it asks again; the workers that serve it."""
        for ticket in self.tickets(tenant):
            ticket.fail(Contained(reason="contained"))
        self.expelled.add(tenant)
        return self.homes(tenant)

    def join(self, ticket: Ticket) -> None:
        """Wait in the party's line.

        Where the tenant has too many in it already, the ticket fails with Overloaded, until the line is worked off.
        """
        self.expelled.discard(ticket.tenant)
        line, seat = self.line(ticket.party), self.seat(ticket.party)
        if line.count(ticket.tenant) < self.rules.queue_limit:
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
        self.lines = {party: line for party, line in self.lines.items() if line}

    def longest_wait_s(self, now: float) -> float:
        """For how long the first of all that wait has waited; 0 where nobody does."""
        return now - min(self._since_s().values(), default=now)

    def spares(self, *, own_weights: bool = False) -> list[Seat]:
        return [
            seat
            for seat in self.seats
            if seat.party is None and seat.own_weights is own_weights and seat.child.alive
        ]

    def free(self) -> int:
        """How many more parties may have a worker."""
        return self.rules.max_workers - sum(seat.party is not None for seat in self.seats)

    def waiting(self) -> list[Party]:
        """Parties that wait without a worker, the longest wait first."""
        seated = {seat.party for seat in self.seats}
        since_s = self._since_s()
        return sorted(since_s.keys() - seated, key=lambda party: since_s[party])

    def missing(self) -> list[Party]:
        """Parties that should have a worker and have none: those that wait, then those to be kept warm."""
        waiting = self.waiting()
        present = {seat.party for seat in self.seats} | set(waiting)
        warm = [party for party in self.rules.keep_warm if party.tenant not in self.expelled]
        return waiting + [party for party in warm if party not in present]

    def lacking(self, *, own_weights: bool) -> int:
        """How many workers of that kind should be started, beside those that are ready."""
        seatable = self.missing()[: max(0, self.free())]
        wanted = sum(party.own_weights is own_weights for party in seatable)
        return (
            wanted
            + (0 if own_weights else self.rules.spare_workers)
            - len(self.spares(own_weights=own_weights))
        )

    def call(self, now: float) -> list[tuple[Seat, Ticket]]:
        """Move jobs from the lines to the workers that have room for them; those that were moved."""
        yielding = self._yielding(now)
        called = []
        for seat in self.seats:
            line = None if seat.party is None else self.lines.get(seat.party)
            if line is None or seat in yielding or not seat.child.alive:
                continue
            while line.head is not None and seat.takes(line.head, self.rules):
                ticket = line.call()
                seat.take(ticket, now)
                called.append((seat, ticket))
        return called

    def oldest_idle(self, now: float) -> Seat | None:
        """The worker to retire where a waiting party needs a seat. None too where that would win nothing."""
        if not self._in_reach():
            return None
        yielded = [seat for seat in self._yielding(now) if not seat.tickets]
        idle = [seat for seat in self.seats if self._idle(seat)] + yielded
        return min(idle, key=lambda seat: seat.used_s, default=None)

    def hung(self, since_s: float) -> list[Seat]:
        """Workers with a job whose deadline was before `since_s`."""
        return [seat for seat in self.seats if any(ticket.deadline_s < since_s for ticket in seat.tickets)]

    def disowned(self) -> list[Seat]:
        """Workers whose weights are no longer to be trusted."""
        return [seat for seat in self.seats if seat.owner is not None and not seat.owner.sound]

    def outdated(self, now: float) -> list[Seat]:
        """Workers and surplus spares that nobody has used for too long, and those whose tenant has another by now."""
        surplus = self.spares()[self.rules.spare_workers :] + self.spares(own_weights=True)
        idle = [seat for seat in self.seats if self._idle(seat)]
        left = [seat for seat in idle if seat.party is not None and self._has_left(seat, seat.party.tenant)]
        return left + [
            seat for seat in idle + surplus if seat not in left and now - seat.used_s > self.rules.idle_s
        ]

    def leaving(self, now: float) -> list[tuple[Seat, str]]:
        """Tenants of whose work a shared worker is to keep nothing more: long away, or in another party by now."""
        return [
            (seat, tenant)
            for seat in self.seats
            if seat.party is not None and seat.party.group is not None and seat.child.alive
            for tenant, stay in seat.tenants.items()
            if (now - stay.used_s > self.rules.idle_s or self._has_left(seat, tenant))
            and not any(ticket.tenant == tenant for ticket in seat.tickets)
            and not (seat.party in self.lines and self.lines[seat.party].count(tenant))
        ]

    def _has_left(self, seat: Seat, tenant: str | None) -> bool:
        """Whether the tenant was served by another worker since."""
        if tenant is None:
            return False
        used_s = seat.tenants[tenant].used_s if tenant in seat.tenants else 0.0
        others = (other.tenants.get(tenant) for other in self.seats if other is not seat)
        return any(stay is not None and stay.used_s > used_s for stay in others)

    def _since_s(self) -> dict[Party, float]:
        """When the first one of each line arrived."""
        return {party: line.since_s for party, line in self.lines.items() if line}

    def _idle(self, seat: Seat) -> bool:
        """Whether it may go: assigned, at rest, with nobody in its line, and not to be kept warm."""
        if seat.party is None or seat.party in self.rules.keep_warm:
            return False
        return not seat.tickets and not self.lines.get(seat.party)

    def _yielding(self, now: float) -> list[Seat]:
        """Workers that get no more jobs and go once they have ended those they have.

        Somebody without a seat has waited too long, and longer than the line of the seat's party. Of all such
        seats, those go to which no job was sent for longest: they are nearest to their end, and as nothing more
        is sent to them they stay the ones. The longer the wait, the more of them.
        """
        if self.free() > 0 or not self._in_reach():
            return []
        waiting, since_s = self.waiting(), self._since_s()
        number = sum(int((now - since_s[party]) / self.rules.patience_s) for party in waiting)
        later = [
            seat
            for seat in self.seats
            if number
            and seat.party is not None
            and seat.party not in self.rules.keep_warm
            and since_s.get(seat.party, math.inf) > since_s[waiting[0]]
        ]
        return sorted(later, key=lambda seat: seat.sent_s)[:number]

    def _in_reach(self) -> bool:
        """Whether a freed seat would be taken soon by who has waited for longest.

        Where no spares are kept, as for parties with weights of their own, the old worker ends before the new one
        loads: never one process too many.
        """
        waiting = self.waiting()
        own = bool(waiting) and waiting[0].own_weights
        none_kept = own or self.rules.spare_workers == 0
        return bool(waiting) and (
            bool(self.spares(own_weights=own)) or (none_kept and own not in self.failing)
        )
