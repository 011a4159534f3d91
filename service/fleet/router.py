"""What any fleet offers, and how requests wait for it.

A fleet scores jobs, each in a worker that serves one party: a tenant, or the pooled tenants of one group. Worker
processes of this host (`local.py`) keep this contract, and so will those of a cluster;
`tests/integration/fleet_conformance.py` holds them to it.

A party has one worker at most. So a tenant's requests share that worker's packs and never another tenant's, and its
sessions are bound to that worker by nature: what a session keeps lives there, and is lost with it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Protocol

from models import Item, Job, ModelCard, Scores
from tenants.policy import Isolation

if TYPE_CHECKING:
    from service.fleet.tally import Tally
    from service.processes.sandbox import Measure
    from tenants.policy import Policy


@dataclass(frozen=True, slots=True)
class Party:
    """Whom a worker serves, for life: one `tenant`, or the pooled tenants of one `group`.

    With `own_weights` it scores with a copy of the weights that no other process sees.
    """

    tenant: str | None = None
    group: str | None = None
    own_weights: bool = False

    def __post_init__(self) -> None:
        if (self.tenant is None) == (self.group is None):
            raise ValueError("a party is a tenant or a group")

    @staticmethod
    def of(tenant: str, policy: Policy) -> Party:
        """The party that the tenant belongs to, by the tier of its policy."""
        if policy.isolation is Isolation.POOLED:
            return Party(group=policy.group)
        return Party(tenant, own_weights=policy.isolation is Isolation.DEDICATED)


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores, and what it took to get them: the pid of the worker, time in line, and time at the worker."""

    scores: Scores
    worker: int
    queue_ms: float
    worker_ms: float
    retried: bool = False


@dataclass(frozen=True, slots=True)
class TenantState:
    """What a worker has done for one tenant since its first job there, `age_s` ago: a neighbour's part is not in it."""

    tenant: str
    running: int
    jobs: int
    age_s: float


@dataclass(frozen=True, slots=True)
class WorkerState:
    """One live worker: `spare` until it is `assigned` to its party, a `tenant` or a `group`, for life.

    `tenants` are those of whose work it may keep something. It has `running` jobs now and has answered `jobs`; it
    compiled `compilations` kernels since it was warm.
    """

    pid: int
    state: str
    tenant: str | None
    running: int
    jobs: int
    idle_s: float
    compilations: int
    group: str | None = None
    tenants: tuple[TenantState, ...] = ()
    own_weights: bool = False
    age_s: float = 0.0
    """Since it was given to its party; of a spare, since it was ready."""

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

    async def score(
        self,
        tenant: str,
        job: Job,
        *,
        deadline_s: float,
        session: str | None = None,
        party: Party | None = None,
    ) -> Scored:
        """Score `job` in the worker of the tenant's `party` (unset: its own) within `deadline_s` seconds from now.

        What it computes is kept under `session` for the next job of that session, until `end_session`. A job
        whose worker dies is scored again in another, once. Cancelling takes it out of the line, or what is left
        of it out of its worker. Raises Overloaded (no room, or no worker can be started), ModelUnavailable, DeadlineExceeded,
        WorkerLost, BodyTooLarge (the decoded job is too large to be sent), BadRequest (it holds text that is no
        text), DocumentTooLong, JobTooLong and ModelFailed.
        """
        ...

    async def end_session(self, tenant: str, session: str) -> None:
        """Have every worker that served the tenant wipe what its `session` keeps, if it keeps anything.

        Jobs of the session that wait or run are answered, and leave nothing behind; one that comes later begins
        a session anew. Returns before the worker has done it.
        """
        ...

    async def expel(self, tenant: str) -> None:
        """Kill every worker that serves `tenant` or did, at once, and all that it keeps; its jobs fail with Contained.

        What a neighbour in its group had under way there is scored again. A job that comes later is scored in a new
        worker. Returns before the worker is gone.
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
    def refusal(self) -> str | None:
        """Why no new worker serves the model: its files are not those that may be served. Holds no path."""
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
    def longest_wait_s(self) -> float:
        """For how long the first of them has waited; 0 where none waits."""
        ...

    @property
    def tally(self) -> Tally:
        """What became of its workers so far, and what they did."""
        ...

    @property
    def lent(self) -> LentState:
        """What is known of weights that workers share on a GPU."""
        ...

    @property
    def sandbox(self) -> tuple[Measure, ...]:
        """What confines the workers, as one that lives says; empty while none does."""
        ...

    def workers(self) -> tuple[WorkerState, ...]:
        """Every live worker."""
        ...


@dataclass(slots=True, eq=False)
class Ticket:
    """One request in a fleet. Times are on the clock of `time.monotonic`."""

    id: int
    tenant: str
    party: Party
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
    """The tickets that wait for one party's worker: tenant by tenant in turn, each one's oldest first."""

    def __init__(self) -> None:
        self._tickets: dict[str, deque[Ticket]] = {}
        """In the order of whose turn it is; no deque is empty."""

    def __len__(self) -> int:
        return sum(map(len, self._tickets.values()))

    def __iter__(self) -> Iterator[Ticket]:
        return chain.from_iterable(self._tickets.values())

    @property
    def head(self) -> Ticket | None:
        return next(iter(self), None)

    @property
    def since_s(self) -> float:
        """When the first of all that wait arrived; there must be one."""
        return min(tickets[0].arrived_s for tickets in self._tickets.values())

    def count(self, tenant: str) -> int:
        """How many of this tenant wait."""
        return len(self._tickets.get(tenant, ()))

    def join(self, ticket: Ticket) -> None:
        """Wait at the end of its tenant's."""
        self._tickets.setdefault(ticket.tenant, deque()).append(ticket)

    def rejoin(self, tickets: Iterable[Ticket]) -> None:
        """Wait at the front, in this order: they had their turn, and their worker died."""
        before, self._tickets = self._tickets, {}
        for ticket in chain(tickets, *before.values()):
            self.join(ticket)

    def call(self) -> Ticket:
        """The next ticket, no longer in line; then it is the next tenant's turn."""
        tenant = next(iter(self._tickets))
        tickets = self._tickets.pop(tenant)
        ticket = tickets.popleft()
        if tickets:
            self._tickets[tenant] = tickets
        return ticket

    def forget_gone(self) -> None:
        """Drop the tickets that nobody waits for."""
        if any(not ticket.waits for ticket in self):
            waiting = {
                tenant: deque(ticket for ticket in tickets if ticket.waits)
                for tenant, tickets in self._tickets.items()
            }
            self._tickets = {tenant: tickets for tenant, tickets in waiting.items() if tickets}


def _pixel_bytes(item: Item) -> int:
    return 0 if item.image is None else len(item.image.data)
