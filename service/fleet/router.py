"""What any fleet offers, and how requests wait for it.

A fleet scores jobs, each in a worker that serves no other tenant. Worker processes of this host (`local.py`)
keep this contract, and so will those of a cluster; `tests/integration/fleet_conformance.py` holds them to it.

A tenant has one worker at most. So its requests share that worker's packs and never another tenant's, and its
sessions are bound to that worker by nature: what a session keeps lives there, and is lost with it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from models import Item, Job, ModelCard, Scores


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores, and what it took to get them: the pid of the worker, time in line, and time at the worker."""

    scores: Scores
    worker: int
    queue_ms: float
    worker_ms: float
    retried: bool = False


@dataclass(frozen=True, slots=True)
class WorkerState:
    """One live worker: `spare` until it is `assigned` to its tenant, for life.

    It has `running` jobs now and has answered `jobs`; it compiled `compilations` kernels since it was warm.
    """

    pid: int
    state: str
    tenant: str | None
    running: int
    jobs: int
    idle_s: float
    compilations: int
    age_s: float = 0.0
    """Since it was given to its tenant; of a spare, since it was ready."""

    @property
    def busy(self) -> bool:
        return self.running > 0


@dataclass(frozen=True, slots=True)
class LentState:
    """Weights that workers share on a GPU: their size there, 0 where none are lent, and how many workers map them.

    Since the fleet's start they were checked `checks` times, and found changed `changes` times.
    """

    size_bytes: int = 0
    workers: int = 0
    checks: int = 0
    changes: int = 0


class Fleet(Protocol):
    """Workers that score. One event loop owns it."""

    async def start(self) -> None:
        """Begin to prepare workers; returns before one is ready."""
        ...

    async def close(self) -> None:
        """End every worker and fail what still waits. Safe to call twice, or without `start`."""
        ...

    async def score(self, tenant: str, job: Job, *, deadline_s: float, session: str | None = None) -> Scored:
        """Score `job` in a worker of `tenant` within `deadline_s` seconds from now.

        What it computes is kept under `session` for the next job of that session, until `end_session`. A job
        whose worker dies is scored again in another, once. Cancelling takes it out of the line, or what is left
        of it out of its worker. Raises Overloaded (no room, or no worker can be started), DeadlineExceeded,
        WorkerLost, BodyTooLarge (the decoded job is too large to be sent), BadRequest (it holds text that is no
        text), DocumentTooLong, JobTooLong and ModelFailed.
        """
        ...

    async def end_session(self, tenant: str, session: str) -> None:
        """Have the tenant's worker wipe what `session` keeps, if there is a worker and it keeps anything.

        Jobs of the session that wait or run are answered, and leave nothing behind; one that comes later begins
        a session anew. Returns before the worker has done it.
        """
        ...

    async def expel(self, tenant: str) -> None:
        """Kill the worker that serves `tenant` at once, and all that it keeps; its jobs fail with Contained.

        A job that comes later is scored in a new worker. Returns before the worker is gone.
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

    @property
    def waiting(self) -> int:
        """How many jobs wait in line, all tenants together."""
        ...

    @property
    def lent(self) -> LentState:
        """What is known of weights that workers share on a GPU."""
        ...

    def workers(self) -> tuple[WorkerState, ...]:
        """Every live worker."""
        ...


@dataclass(slots=True, eq=False)
class Ticket:
    """One request in a fleet. Times are on the clock of `time.monotonic`."""

    id: int
    tenant: str
    job: Job
    deadline_s: float
    session: str | None
    answer: asyncio.Future[Scored]
    arrived_s: float = field(default_factory=time.monotonic)
    sent_s: float = 0.0
    attempts: int = 0
    asking: asyncio.Task[None] | None = None
    """Waits for the worker's answer, where a worker has it."""
    pixel_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.pixel_bytes = sum(map(_pixel_bytes, (self.job.query, *self.job.candidates)))

    @property
    def waits(self) -> bool:
        """False once it is answered, or once nobody waits for the answer any more."""
        return not self.answer.done()

    def fail(self, exc: Exception) -> None:
        if self.waits:
            self.answer.set_exception(exc)


class Line:
    """The tickets that wait for one tenant's worker, oldest first."""

    def __init__(self) -> None:
        self._tickets: deque[Ticket] = deque()

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[Ticket]:
        return iter(self._tickets)

    @property
    def head(self) -> Ticket | None:
        return self._tickets[0] if self._tickets else None

    def join(self, ticket: Ticket) -> None:
        """Wait at the end."""
        self._tickets.append(ticket)

    def rejoin(self, tickets: Iterable[Ticket]) -> None:
        """Wait at the front, in this order: they had their turn, and their worker died."""
        self._tickets.extendleft(reversed(list(tickets)))

    def call(self) -> Ticket:
        """The next ticket, no longer in line."""
        return self._tickets.popleft()

    def forget_gone(self) -> None:
        """Drop the tickets that nobody waits for."""
        if any(not ticket.waits for ticket in self._tickets):
            self._tickets = deque(ticket for ticket in self._tickets if ticket.waits)


def _pixel_bytes(item: Item) -> int:
    return 0 if item.image is None else len(item.image.data)
