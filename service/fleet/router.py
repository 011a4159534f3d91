"""What any fleet offers, and how requests wait for it.

A fleet scores jobs, each in a worker that serves no other tenant. Worker processes of this host (`local.py`)
keep this contract, and so will those of a cluster; `tests/integration/fleet_conformance.py` holds them to it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from models import Job, ModelCard, Scores
from service.errors import Overloaded


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores, and what it took to get them. `worker` is the pid of the worker that gave them."""

    scores: Scores
    worker: int
    queue_ms: float
    worker_ms: float
    retried: bool = False


@dataclass(frozen=True, slots=True)
class WorkerState:
    """One live worker: `spare` until it is `assigned` to its tenant, for life."""

    pid: int
    state: str
    tenant: str | None
    busy: bool
    jobs: int
    idle_s: float


class Fleet(Protocol):
    """Workers that score. One event loop owns it."""

    async def start(self) -> None:
        """Begin to prepare workers; returns before one is ready."""
        ...

    async def close(self) -> None:
        """End every worker and fail what still waits. Safe to call twice, or without `start`."""
        ...

    async def score(self, tenant: str, job: Job, *, deadline_s: float) -> Scored:
        """Score `job` in a worker of `tenant` within `deadline_s` seconds from now.

        A job whose worker dies is scored again in another, once. Cancelling takes a waiting job out of the
        queue. Raises Overloaded (no room, or no worker can be started), DeadlineExceeded, WorkerLost,
        BodyTooLarge (the decoded job is too large to be sent), BadRequest (it holds text that is no text),
        JobTooLong and ModelFailed.
        """
        ...

    @property
    def ready(self) -> bool:
        """Whether a worker has scored its warm-up, and another one could be had."""
        ...

    @property
    def reason(self) -> str | None:
        """Why there is trouble, in words for the operator; may name files. None where there is none."""
        ...

    @property
    def card(self) -> ModelCard | None:
        """What the first ready worker said of its model."""
        ...

    def workers(self) -> tuple[WorkerState, ...]:
        """Every live worker."""
        ...


@dataclass(slots=True, eq=False)
class Ticket:
    """One request in a fleet. Times are on the clock of `time.monotonic`."""

    tenant: str
    job: Job
    deadline_s: float
    answer: asyncio.Future[Scored]
    arrived_s: float = field(default_factory=time.monotonic)
    sent_s: float = 0.0
    attempts: int = 0

    @property
    def waits(self) -> bool:
        """False once it is answered, or once nobody waits for the answer any more."""
        return not self.answer.done()

    def fail(self, exc: Exception) -> None:
        if self.waits:
            self.answer.set_exception(exc)


class Line:
    """The tickets that wait for one tenant's worker, oldest first, and no more than `limit` of them."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._tickets: deque[Ticket] = deque()

    def __len__(self) -> int:
        return len(self._tickets)

    @property
    def head(self) -> Ticket | None:
        return self._tickets[0] if self._tickets else None

    def join(self, ticket: Ticket) -> None:
        """Wait at the end; a full line fails the ticket with Overloaded."""
        if len(self._tickets) >= self._limit:
            ticket.fail(Overloaded("Too many requests are waiting. Try again shortly.", reason="queue_full"))
        else:
            self._tickets.append(ticket)

    def rejoin(self, ticket: Ticket) -> None:
        """Wait at the front: it had its turn, and its worker died."""
        self._tickets.appendleft(ticket)

    def call(self) -> Ticket | None:
        """The next ticket, no longer waiting in line."""
        return self._tickets.popleft() if self._tickets else None

    def forget_gone(self) -> None:
        """Drop the tickets that nobody waits for."""
        if any(not ticket.waits for ticket in self._tickets):
            self._tickets = deque(ticket for ticket in self._tickets if ticket.waits)
