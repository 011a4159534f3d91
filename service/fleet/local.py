"""Worker processes of this host, one tenant each.

Spare workers, loaded and warm, have served nobody and wait; a tenant's first request takes one for life, and
the next spare is prepared behind it. At most `max_workers` are assigned: beyond that the one idle for longest
retires, never a busy one. A worker that dies is replaced from the spares.

One dispatcher task owns every seat and line (`seats.py`); all others send it events, so there is no lock.
After each event it looks at the whole state again (`_advance`), which makes the order of events harmless.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import structlog

from models import Job, JobTooLong, ModelCard, ModelFailed
from service.errors import BadRequest, BodyTooLarge, DeadlineExceeded, DocumentTooLong, Overloaded, WorkerLost
from service.fleet.router import Scored, Ticket, WorkerState
from service.fleet.seats import Rules, Seat, Seating
from service.processes.children import Child, ChildLost, Launch, bare_environ, start_child
from service.processes.parent import UNFORESEEN
from service.processes.wire import (
    SCORING,
    Assign,
    Failure,
    FrameTooLarge,
    ScoreReply,
    ScoreRequest,
    TooLong,
    WireError,
)

TICK_S = 0.25
FAILURES_TO_REFUSE = 2
"""Failed starts in a row after which waiting requests are refused instead of kept."""
BACK_OFF_S = (0.5, 30.0)
"""Pause after the first failed start, doubled by each further one, and the longest pause."""
STARTS_AT_ONCE = 2
OVERRUN_S = 30.0
"""A worker still busy so long after its job's deadline is taken to hang and is killed."""
STOPPING = ("The service is stopping.", "stopping")
FIRST_UID, UIDS = 61_184, 3_000
"""Users of workers where the gateway is root; systemd, too, keeps this range for users without a name."""
INHERITED = (
    "HOME",
    "HF_HOME",
    "HF_HUB_CACHE",
    "XDG_CACHE_HOME",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
)
"""All that a worker takes over from the gateway's environment: where models, libraries and GPUs are."""


class LocalFleet:
    """See `router.Fleet`. Belongs to the event loop that calls `start`."""

    def __init__(
        self,
        *,
        model: str,
        device: str = "auto",
        dtype: str = "auto",
        threads: int = 1,
        max_workers: int = 8,
        spare_workers: int = 1,
        idle_s: float = 900.0,
        start_s: float = 120.0,
        queue_limit: int = 64,
        keep_warm: tuple[str, ...] = (),
        silence_s: float = 10.0,
        overrun_s: float = OVERRUN_S,
        patience_s: float = 5.0,
        offline: bool = True,
        first_uid: int | None = FIRST_UID,
        worker: str = "service.fleet.worker",
    ) -> None:
        """`worker` is the module that a worker runs. `first_uid` counts only where the gateway is root."""
        if len(keep_warm) > max_workers:
            raise ValueError(f"{len(keep_warm)} tenants to keep warm, but at most {max_workers} workers")
        self._seating = Seating(
            Rules(
                max_workers, spare_workers, idle_s, patience_s, queue_limit, tuple(dict.fromkeys(keep_warm))
            )
        )
        self._spare_workers = spare_workers
        self._overrun_s = overrun_s
        self._first_uid = first_uid if os.geteuid() == 0 else None
        self._launch = Launch(
            # -P: no module is taken from the working directory
            (
                *(sys.executable, "-P", "-m", worker, "--fd", "{fd}", "--parent", "{parent}"),
                *("--model", model, "--device", device, "--dtype", dtype, "--threads", str(threads)),
            ),
            SCORING,
            _environ(threads, offline),
            start_s=start_s,
            silence_s=silence_s,
            told=self._hear,
        )
        self._log = structlog.get_logger(source="fleet")
        self._starting = 0
        self._failures = 0
        self._retry_s = 0.0
        self._reason: str | None = "no worker has been started yet"
        self._card: ModelCard | None = None
        self._open = False
        self._inbox: asyncio.Queue[Callable[[], None]] = asyncio.Queue()
        self._dispatcher: asyncio.Task[None] | None = None
        self._work: set[asyncio.Task[None]] = set()
        self._endings: set[asyncio.Task[None]] = set()
        self._ids = itertools.count(1)
        self._uids = itertools.count(os.getpid())  # two gateways of one host should not share users

    @property
    def ready(self) -> bool:
        return self._open and (bool(self._seating.seats) or (self._card is not None and self._failures == 0))

    @property
    def reason(self) -> str | None:
        return self._reason

    @property
    def card(self) -> ModelCard | None:
        return self._card

    def workers(self) -> tuple[WorkerState, ...]:
        now = time.monotonic()
        return tuple(seat.state(now) for seat in self._seating.seats)

    async def start(self) -> None:
        self._open, self._starting = True, 0
        self._dispatcher = asyncio.create_task(self._dispatch(), name="fleet")

    async def close(self) -> None:
        self._open = False
        if self._dispatcher is not None:
            self._dispatcher.cancel()
            await asyncio.wait({self._dispatcher})
        for task in self._work:
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)
        while not self._inbox.empty():
            self._inbox.get_nowait()()  # a worker may have become ready meanwhile: it must not be forgotten
        seats, self._seating.seats = self._seating.seats, []
        for seat in seats:
            if seat.ticket is not None:
                seat.ticket.fail(Overloaded(STOPPING[0], reason=STOPPING[1]))
                seat.child.kill("stopping")  # it would see its socket's end only after the job
        self._refuse(list(self._seating.lines), *STOPPING)
        await asyncio.gather(*(seat.child.stop() for seat in seats), *self._endings, return_exceptions=True)

    async def score(self, tenant: str, job: Job, *, deadline_s: float) -> Scored:
        if not self._open:
            raise Overloaded(STOPPING[0], reason=STOPPING[1])
        answer: asyncio.Future[Scored] = asyncio.get_running_loop().create_future()
        ticket = Ticket(tenant, job, time.monotonic() + deadline_s, answer)
        self._post(partial(self._arrive, ticket))
        try:
            async with asyncio.timeout(deadline_s):
                return await answer
        except TimeoutError:
            raise DeadlineExceeded from None
        finally:
            if answer.cancelled():
                self._post(_look_again)  # a place in the line is free

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
                self._open, self._reason = False, "the dispatcher broke"
                self._log.critical("The fleet's dispatcher broke.", action="worker_lost")
                self._refuse(list(self._seating.lines), *STOPPING)

    def _post(self, event: Callable[[], None]) -> None:
        self._inbox.put_nowait(event)

    def _run(self, work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def _advance(self, now: float) -> None:
        """Do all that can be done now."""
        self._seating.forget_gone()
        self._end_hung(now)
        self._serve(now)
        self._seat_missing(now)
        self._serve(now)
        for seat in self._seating.outdated(now):
            self._retire(seat, "idle")
        self._start_wanted(now)

    def _end_hung(self, now: float) -> None:
        for seat in self._seating.seats:
            if seat.ticket is not None and now > seat.ticket.deadline_s + self._overrun_s:
                seat.child.kill("hung in a job long past its deadline")

    def _serve(self, now: float) -> None:
        """Give each idle worker its tenant's next job."""
        for seat, ticket in self._seating.calls(now):
            seat.ticket = ticket
            ticket.attempts += 1
            ticket.sent_s = now
            self._run(self._score(seat, ticket), self._work)

    def _seat_missing(self, now: float) -> None:
        """Give spares to tenants without a worker; make room for those that wait where need be."""
        for tenant in self._seating.missing():
            if self._seating.free() < 1:
                oldest = self._seating.oldest_idle(now) if tenant in self._seating.lines else None
                if oldest is None:
                    return
                self._retire(oldest, "another tenant needs its seat")
            spare = next(iter(self._seating.spares()), None)
            if spare is None:
                return
            spare.tenant, spare.used_s = tenant, now
            self._run(_assign(spare.child, tenant), self._work)

    def _start_wanted(self, now: float) -> None:
        """Start workers for who needs one and as spares; while starts fail, one by one and ever later."""
        missing = self._seating.missing()
        if self._failures >= FAILURES_TO_REFUSE:
            retry_after_s = max(1, math.ceil(self._retry_s - now))
            self._refuse(missing, "No worker can be started at the moment.", "worker_start", retry_after_s)
        wanted = self._spare_workers + min(len(missing), self._seating.free())
        if self._card is None or self._failures:  # prove that a worker can be had
            wanted = max(wanted, 1)
        at_once = 1 if self._failures else STARTS_AT_ONCE
        while now >= self._retry_s and self._starting < at_once:
            if len(self._seating.spares()) + self._starting >= wanted:
                break
            self._starting += 1
            self._run(self._start(), self._work)

    def _refuse(self, tenants: Iterable[str], detail: str, reason: str, retry_after_s: int = 1) -> None:
        """Fail all that waits in these tenants' lines."""
        for tenant in tenants:
            line = self._seating.lines.pop(tenant, None)
            while line and (ticket := line.call()):
                ticket.fail(Overloaded(detail, reason=reason, retry_after_s=retry_after_s))

    def _retire(self, seat: Seat, why: str) -> None:
        self._seating.seats.remove(seat)
        self._log.info(
            "A worker retires.", action="worker_retire", pid=seat.child.pid, tenant=seat.tenant, reason=why
        )
        self._run(seat.child.stop(), self._endings)

    # Tasks, and the events that they end with.

    async def _start(self) -> None:
        launch = self._launch
        if self._first_uid is not None:
            uid = self._first_uid + next(self._uids) % UIDS
            launch = replace(launch, argv=(*launch.argv, "--uid", str(uid)))
        try:
            child = await start_child(launch)
        except Exception as exc:  # noqa: BLE001 - whatever it is, a start that is not counted as failed hangs
            self._post(partial(self._mourn_start, str(exc) if isinstance(exc, ChildLost) else repr(exc)))
        else:
            self._post(partial(self._welcome, child))

    async def _score(self, seat: Seat, ticket: Ticket) -> None:
        request = ScoreRequest(next(self._ids), ticket.tenant, ticket.job, ticket.deadline_s)
        try:
            reply = await seat.child.ask(request)
        except ChildLost:
            return  # its `lost` has told the dispatcher
        except WireError as exc:
            reply = exc
        self._post(partial(self._finish, seat, ticket, reply))

    def _arrive(self, ticket: Ticket) -> None:
        self._seating.line(ticket.tenant).join(ticket)

    def _welcome(self, child: Child) -> None:
        seat = Seat(child)
        self._starting -= 1
        self._failures, self._retry_s, self._reason, self._seating.starts_fail = 0, 0.0, None, False
        self._card = child.hello.card
        self._seating.seats.append(seat)
        child.lost.add_done_callback(lambda _: self._post(partial(self._mourn, seat)))
        self._log.info(
            "A worker is ready.", action="worker_ready", pid=child.pid, stages_ms=child.hello.stages_ms
        )
        broken = [measure.name for measure in child.hello.sandbox if not measure.held]
        if broken:
            self._log.warning(
                "A worker is less confined than it should be.", action="sandbox", missing=broken
            )

    def _hear(self, line: str) -> None:
        """Log what a worker says of its own bugs; what libraries print might repeat a tenant's text."""
        if line.startswith(UNFORESEEN):
            self._log.error("A worker failed in an unforeseen way.", action="request_failed", where=line)

    def _mourn_start(self, reason: str) -> None:
        first_s, longest_s = BACK_OFF_S
        self._starting -= 1
        self._failures += 1
        self._seating.starts_fail = True
        self._retry_s = time.monotonic() + min(longest_s, first_s * 2 ** min(self._failures - 1, 16))
        self._reason = f"a worker cannot be started: {reason}"
        self._log.error("A worker cannot be started.", action="worker_lost", reason=reason)

    def _mourn(self, seat: Seat) -> None:
        """A worker died: its job goes back to the front of the line, once."""
        if seat not in self._seating.seats:
            return
        self._seating.seats.remove(seat)
        reason = seat.child.lost.result()
        self._log.warning(
            "A worker is lost.", action="worker_lost", pid=seat.child.pid, tenant=seat.tenant, reason=reason
        )
        self._run(seat.child.stop(), self._endings)
        ticket = seat.ticket
        if ticket is None or not ticket.waits:
            return
        if ticket.attempts > 1:
            ticket.fail(WorkerLost())
        else:
            self._seating.line(ticket.tenant).rejoin(ticket)

    def _finish(self, seat: Seat, ticket: Ticket, reply: object) -> None:
        """An answer came; the worker is free."""
        seat.ticket = None
        seat.jobs += 1
        seat.used_s = time.monotonic()
        if not ticket.waits:
            return
        if isinstance(reply, ScoreReply) and len(reply.scores.margins) == len(ticket.job.candidates):
            queue_ms = (ticket.sent_s - ticket.arrived_s) * 1000
            retried = ticket.attempts > 1
            ticket.answer.set_result(Scored(reply.scores, seat.child.pid, queue_ms, reply.worker_ms, retried))
        else:
            ticket.fail(_error(reply))


def _look_again() -> None:
    """The event that changes nothing itself."""


async def _assign(child: Child, tenant: str) -> None:
    with contextlib.suppress(ChildLost):
        await child.tell(Assign(tenant))


def _error(reply: object) -> Exception:
    """What a failed answer means to the caller."""
    match reply:
        case FrameTooLarge():
            return BodyTooLarge("The request's images are too large together.")
        case WireError():
            return BadRequest("The request holds text that is not valid Unicode.")
        case Failure(code="deadline"):
            return DeadlineExceeded()
        case TooLong(index=index, limit_tokens=limit_tokens):
            return DocumentTooLong(index, limit_tokens)
        case Failure(code="job_too_long", detail=detail):
            return JobTooLong(detail or "The query does not fit into the model's context.")
        case _:  # model_failed, internal, or no sense at all
            return ModelFailed("The model gave no usable score.")


def _environ(threads: int, offline: bool) -> dict[str, str]:
    """A worker's whole environment."""
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
    numeric = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        # Workers share the cores: threads that spin as they wait made a job 30 times slower on a busy machine.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    hub = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"} if offline else {}
    return bare_environ(**inherited, **numeric, **hub)
