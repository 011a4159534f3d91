"""Worker processes of this host, one party each: a tenant, or a group of tenants.

Spare workers, loaded and warm, have served nobody and wait; a party's first request takes one for life, and the next
spare is prepared behind it; one with weights of its own is started only when it is needed. At most `max_workers` are
assigned: beyond that the one idle for longest retires, never a busy one. A worker that dies is replaced.

A worker has several of its party's jobs at a time, up to `JOBS_AT_ONCE`; which it does first is its own business. All
others wait in the party's line.

One dispatcher task owns every seat and line (`seats.py`); all others send it events, so there is no lock.
After each event it looks at the whole state again (`_advance`), which makes the order of events harmless.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any

from models import ANYONE, Job, ModelCard, Trust
from service.errors import DeadlineExceeded, ServiceError, WorkerLost
from service.fleet import replies
from service.fleet.diary import Diary
from service.fleet.messages import Assign, Cancel, EndSession, Forget, ScoreRequest
from service.fleet.ownership import Owner, Ownership, may_lend
from service.fleet.router import LentState, Party, Scored, Ticket, WorkerState
from service.fleet.seats import JOBS_AT_ONCE, PIXEL_BYTES_AT_ONCE, Rules, Seat, Seating
from service.fleet.starts import FIRST_UID, Starts, stopping, worker_launch
from service.fleet.tally import Retirement, Tally
from service.processes.children import Cause, Child, ChildLost, Launch, start_child
from service.processes.sandbox import Measure
from service.processes.wire import WireError

TICK_S = 0.25
OVERRUN_S = 30.0
"""A worker that has not answered a job so long after its deadline is taken to hang and is killed."""


class LocalFleet:
    """See `router.Fleet`. Belongs to the event loop that calls `start`."""

    def __init__(
        self,
        *,
        model: str,
        device: str = "auto",
        dtype: str = "auto",
        threads: int = 1,
        memory_bytes: int | None = None,
        max_workers: int = 8,
        spare_workers: int = 1,
        idle_s: float = 900.0,
        start_s: float = 120.0,
        queue_limit: int = 64,
        jobs_at_once: int = JOBS_AT_ONCE,
        pixel_bytes_at_once: int = PIXEL_BYTES_AT_ONCE,
        keep_warm: tuple[Party, ...] = (),
        silence_s: float = 10.0,
        overrun_s: float = OVERRUN_S,
        patience_s: float = 5.0,
        offline: bool = True,
        first_uid: int | None = FIRST_UID,
        worker: str = "service.fleet.worker",
        owner: str = "service.fleet.owner",
        share_weights: bool = True,
        weights_check_s: float = 60.0,
        trust: Trust = ANYONE,
    ) -> None:
        """`worker` and `owner` are the modules that they run. `first_uid` counts only where the gateway is root.

        Without `share_weights` every worker has a copy of its own. `trust` says who must have signed the model.
        """
        self.tally = Tally()
        self._diary = Diary(self.tally)
        if len(keep_warm) > max_workers:
            raise ValueError(f"{len(keep_warm)} parties to keep warm, but at most {max_workers} workers")
        self._seating = Seating(
            Rules(
                max_workers=max_workers,
                spare_workers=spare_workers,
                idle_s=idle_s,
                patience_s=patience_s,
                queue_limit=queue_limit,
                keep_warm=tuple(dict.fromkeys(keep_warm)),
                jobs_at_once=jobs_at_once,
                pixel_bytes_at_once=pixel_bytes_at_once,
            )
        )
        launch = worker_launch(
            worker=worker,
            model=model,
            device=device,
            dtype=dtype,
            threads=threads,
            memory_bytes=memory_bytes,
            offline=offline,
            start_s=start_s,
            silence_s=silence_s,
            told=self._diary.hear,
            trust=trust,
        )
        self._starts = Starts(launch, first_uid=first_uid)
        self._own_starts = Starts(launch, first_uid=first_uid, own_weights=True, uids=self._starts.uids)
        self._share_weights = share_weights
        self._ownership = Ownership(
            self._starts,
            owner=owner if share_weights and may_lend(device) else None,
            check_s=weights_check_s,
            changed=partial(self._post, _look_again),
        )
        self._overrun_s = overrun_s
        self._open = False
        self._inbox: asyncio.Queue[Callable[[], None]] = asyncio.Queue()
        self._dispatcher: asyncio.Task[None] | None = None
        self._work: set[asyncio.Task[None]] = set()
        self._endings: set[asyncio.Task[None]] = set()
        self._ids = itertools.count(1)

    @property
    def ready(self) -> bool:
        return self._open and (bool(self._seating.seats) or self._starts.proven)

    @property
    def reason(self) -> str | None:
        return self._starts.reason or self._own_starts.reason

    @property
    def refusal(self) -> str | None:
        return self._starts.refusal or self._own_starts.refusal

    @property
    def card(self) -> ModelCard | None:
        return self._starts.card

    @property
    def waiting(self) -> int:
        return sum(ticket.waits for line in self._seating.lines.values() for ticket in line)

    @property
    def longest_wait_s(self) -> float:
        return self._seating.longest_wait_s(time.monotonic())

    @property
    def lent(self) -> LentState:
        return self._ownership.state

    @property
    def sandbox(self) -> tuple[Measure, ...]:
        return next((seat.child.hello.sandbox for seat in self._seating.seats if seat.child.alive), ())

    def workers(self) -> tuple[WorkerState, ...]:
        return tuple(seat.state(time.monotonic()) for seat in self._seating.seats)

    async def start(self) -> None:
        self._open = True
        self._starts.share()
        self._dispatcher = asyncio.create_task(self._dispatch(), name="fleet")

    async def close(self) -> None:
        self._open = False
        if self._dispatcher is not None:
            self._dispatcher.cancel()
            await asyncio.wait({self._dispatcher})
        for task in self._work:
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)
        self._starts.forget()
        self._own_starts.forget()
        while not self._inbox.empty():
            self._inbox.get_nowait()()  # a worker may have become ready meanwhile: it must not be forgotten
        seats, self._seating.seats = self._seating.seats, []
        for seat in seats:
            for ticket in seat.tickets:
                ticket.fail(stopping())
        self._refuse(list(self._seating.lines), stopping)
        stops = (seat.child.stop() for seat in seats)
        await asyncio.gather(*stops, *self._endings, *self._work, return_exceptions=True)
        await self._ownership.close()
        self._starts.unshare()

    async def score(
        self,
        tenant: str,
        job: Job,
        *,
        deadline_s: float,
        session: str | None = None,
        party: Party | None = None,
    ) -> Scored:
        party = party or Party(tenant)
        if party.tenant not in (None, tenant):
            raise ValueError("the party is another tenant's")
        if not self._open:
            raise stopping()
        answer: asyncio.Future[Scored] = asyncio.get_running_loop().create_future()
        ticket = Ticket(next(self._ids), tenant, party, job, time.monotonic() + deadline_s, session, answer)
        self._post(partial(self._seating.join, ticket))
        try:
            async with asyncio.timeout(deadline_s):
                return await answer
        except TimeoutError:
            self._post(_look_again)  # a place in the line is free; a worker sees the deadline by itself
            raise DeadlineExceeded from None
        except asyncio.CancelledError:
            self._post(partial(self._give_up, ticket))
            raise

    async def end_session(self, tenant: str, session: str) -> None:
        self._post(partial(self._end_session, tenant, session))

    async def expel(self, tenant: str) -> None:
        self._post(partial(self._expel, tenant))

    # From here on everything is the dispatcher's. What takes time runs in a task that ends with an event.

    async def _dispatch(self) -> None:
        try:
            while True:
                self._advance(time.monotonic())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TICK_S):
                        event = await self._inbox.get()
                    event()
        finally:
            if self._open:  # a bug of ours: refuse clearly rather than hang
                self._open, self._starts.reason = False, "the dispatcher broke"
                self._diary.tell_broken()
                self._refuse(list(self._seating.lines), stopping)

    def _post(self, event: Callable[[], None]) -> None:
        self._inbox.put_nowait(event)

    def _run(self, work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return task

    def _advance(self, now: float) -> None:
        """Do all that can be done now."""
        self._seating.forget_gone()
        self._end_unfit(now)
        self._serve(now)
        self._seat_missing(now)
        self._serve(now)
        for seat in self._seating.outdated(now):
            self._retire(seat, Retirement.IDLE)
        for seat, tenant in self._seating.leaving(now):
            del seat.tenants[tenant]
            self._run(seat.child.mention(Forget(tenant)), self._work)
        self._ownership.advance(now)
        self._start_wanted(now)

    def _end_unfit(self, now: float) -> None:
        """End workers that hang, whose weights were changed, or whose owner died; what they were at is done again."""
        for seat in self._seating.hung(now - self._overrun_s):
            seat.child.kill("hung in a job long past its deadline", Cause.OVERDUE)
        for seat in self._seating.disowned():
            why = Retirement.WEIGHTS
            seat.child.kill(why.value, Cause.WEIGHTS) if seat.tickets else self._retire(seat, why)

    def _serve(self, now: float) -> None:
        """Give each worker as many of its party's next jobs as it has room for."""
        for seat, ticket in self._seating.call(now):
            ticket.asking = self._run(self._score(seat, ticket), self._work)

    def _seat_missing(self, now: float) -> None:
        """Give spares to parties without a worker; make room for those that wait where need be."""
        free = self._seating.free()
        for party in self._seating.missing():
            if free < 1:
                oldest = self._seating.oldest_idle(now) if party in self._seating.lines else None
                if oldest is None:
                    return
                self._retire(oldest, Retirement.SEAT)
                free += 1
            free -= 1  # where there is no spare for it yet, the seat is kept for it
            spare = next(iter(self._seating.spares(own_weights=party.own_weights)), None)
            if spare is not None:
                spare.party, spare.used_s, spare.since_s = party, now, now
                self._run(spare.child.mention(Assign(party.tenant, party.group)), self._work)

    def _start_wanted(self, now: float) -> None:
        """Start workers for who needs one and as spares."""
        for starts in (self._starts, self._own_starts):
            own = starts.own_weights
            wanted = self._seating.lacking(own_weights=own)  # counted before those who wait are refused
            if starts.hopeless:
                missing = [party for party in self._seating.missing() if party.own_weights is own]
                self._refuse(missing, partial(starts.excuse, now))
            if not own and not self._ownership.settled:
                continue
            if not own and not starts.proven:  # prove that a worker can be had
                wanted = max(wanted, 1 - len(self._seating.spares()))
            for _ in range(starts.due(now, wanted)):
                share = self._share_weights and not own
                launch, owner = self._ownership.begin() if share else (starts.begin(share=False), None)
                self._run(self._start(starts, launch, owner), self._work)

    def _refuse(self, parties: Iterable[Party], error: Callable[[], ServiceError]) -> None:
        """Fail all that waits in these parties' lines."""
        for party in parties:
            line = self._seating.lines.pop(party, None)
            for ticket in line or ():
                ticket.fail(error())

    def _retire(self, seat: Seat, why: Retirement) -> None:
        self._seating.seats.remove(seat)
        self._diary.tell_retired(seat, why)
        self._run(self._end(seat), self._endings)

    # Tasks, and the events that they end with.

    async def _start(self, starts: Starts, launch: Launch, owner: Owner | None) -> None:
        try:
            child = await start_child(launch)
        except Exception as exc:  # noqa: BLE001 - whatever it is, a start that is not counted as failed hangs
            self._ownership.give_back(owner)
            self._post(partial(self._mourn_start, starts, exc))
        else:
            self._post(partial(self._welcome, starts, child, owner))

    async def _end(self, seat: Seat) -> None:
        """Reap a worker. Only then is what it maps its owner's again."""
        await seat.child.stop()
        self._ownership.give_back(seat.owner)

    async def _score(self, seat: Seat, ticket: Ticket) -> None:
        request = ScoreRequest(
            ticket.id, ticket.tenant, ticket.job, ticket.deadline_s, ticket.session, ticket.party.group
        )
        try:
            reply = await seat.child.ask(request)
        except ChildLost:
            return  # its `lost` has told the dispatcher
        except WireError as exc:
            reply = exc
        self._post(partial(self._finish, seat, ticket, reply))

    def _give_up(self, ticket: Ticket) -> None:
        """Nobody waits for it any more: out of a line it falls by itself, and a worker drops what is left of it."""
        seat = self._seating.seat(ticket.party)
        if seat is not None and seat.drop(ticket, time.monotonic(), self._overrun_s):
            self._run(seat.child.mention(Cancel(ticket.id)), self._work)

    def _end_session(self, tenant: str, session: str) -> None:
        """Its jobs that are not at the worker yet, or not for the last time, will name no session there."""
        for ticket in self._seating.tickets(tenant):
            if ticket.session == session:
                ticket.session = None
        for seat in self._seating.homes(tenant):
            self._run(seat.child.mention(EndSession(session, tenant)), self._work)

    def _expel(self, tenant: str) -> None:
        """Jobs that only share the worker go back to the line when it is lost, as after any other death."""
        for seat in self._seating.expel(tenant):
            seat.child.kill("its tenant is contained", Cause.CONTAINED)

    def _welcome(self, starts: Starts, child: Child, owner: Owner | None) -> None:
        owner = self._ownership.welcome(owner, child.hello.card)
        seat = Seat(child, own_weights=starts.own_weights, owner=owner)
        starts.succeeded(child.hello.card)
        self._seating.failing.discard(starts.own_weights)
        self._seating.seats.append(seat)
        child.lost.add_done_callback(lambda _: self._post(partial(self._mourn, seat)))
        self._diary.tell_ready(child)

    def _mourn_start(self, starts: Starts, exc: Exception) -> None:
        self._diary.tell_not_started(starts.failed(exc))
        self._seating.failing.add(starts.own_weights)

    def _mourn(self, seat: Seat) -> None:
        """A worker died: its jobs go back to the front of the line, each once."""
        if seat not in self._seating.seats:
            return
        self._seating.seats.remove(seat)
        self._diary.tell_lost(seat, seat.child.lost.result())
        self._run(self._end(seat), self._endings)
        again = []
        for ticket in seat.tickets:
            if ticket.attempts > 1:
                ticket.fail(WorkerLost())
            elif ticket.waits:
                again.append(ticket)
        if again:
            self._seating.line(again[0].party).rejoin(again)

    def _finish(self, seat: Seat, ticket: Ticket, reply: object) -> None:
        """An answer came; the worker has room for another job."""
        self.tally.work += seat.note(reply)
        if seat.finish(ticket, time.monotonic()):
            replies.answer(ticket, reply, seat.child.pid)


def _look_again() -> None:
    """The event that changes nothing itself."""
