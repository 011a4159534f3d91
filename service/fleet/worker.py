"""A worker's main: load one model, score a warm-up, say Hello; then begin every job that is read, and answer it.

    python -m service.fleet.worker --fd N --parent PID --model NAME --device D --dtype T --threads N [--memory BYTES]
        [--uid N] [--shared N | --offer N | --own-weights] [--signer KEY --signature FILE --seal-key N]

A worker serves the tenant, or the group of tenants, that its first `Assign` names, and no other for as long as it
lives; what it keeps of one tenant's work is of no use to another's. It holds no
key, no database and no listener; all it reads is pixels and text, all it writes is numbers. The main thread only
reads: the reranker works on several jobs at a time on threads of its own, and an answer leaves from the thread on
which its job ended. Where it starts as root it loads as root, for model files may be root's own, and drops that
before it says Hello. By then it is locked in as well (`processes/lock.py`), and has scored its warm-up once more: what the
lock does not allow must not first be found out with somebody's job. On a GPU it is only kept off the network.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

from models import (
    CandidateTooLong,
    Item,
    Job,
    JobExpired,
    JobTooLong,
    ModelCard,
    ModelError,
    ModelFailed,
    ModelRefused,
    Pixels,
    Reranker,
    Scores,
    load,
)
from service.fleet.messages import (
    SCORING,
    Assign,
    Cancel,
    EndSession,
    Forget,
    ScoreReply,
    ScoreRequest,
    TooLong,
)
from service.fleet.trusting import REFUSED, add_arguments, read_trust
from service.processes.lock import lock_in
from service.processes.parent import BROKEN, Parent, leave, name_process, tell_unforeseen
from service.processes.sandbox import Confinement, Measure, confine, go_first
from service.processes.seccomp import NAME, filter_network
from service.processes.wire import Failure, Hello, WireError

OPEN_FILES = 1024
CANNOT_LOAD = 4
"""Exit status: the model cannot be loaded, or its warm-up gave no usable score."""
INTERNAL_FAILURES = 3
"""Unforeseen failures in a row after which a worker gives up: a CUDA error, for one, never heals."""

UNLOCKED = "on a GPU the driver needs more than the table allows"
UNSOUND = "not one finite score per candidate"

Load = Callable[[argparse.Namespace], Reranker]


def run(argv: Sequence[str], load_model: Load) -> NoReturn:
    """Be a worker until the parent goes away. `load_model` is the only thing that tests replace."""
    options = _parse(argv)
    parent = Parent(
        options.fd, options.parent, SCORING, keep=[options.shared, options.offer, options.seal_key]
    )
    name_process("prc-worker")
    faulthandler.enable()  # frames only, no values
    start_s = time.perf_counter()
    try:
        reranker = load_model(options)
        for descriptor in (options.shared, options.offer):
            if descriptor is not None:
                os.close(descriptor)  # the weights stay mapped
        loaded_s = time.perf_counter()
        _warm_up(reranker)
    except ModelError as exc:
        print(f"{type(exc).__name__}: {exc}", file=sys.stderr, flush=True)  # noqa: T201
        leave(REFUSED if isinstance(exc, ModelRefused) else CANNOT_LOAD)
    warm_s = time.perf_counter()
    gc.collect()
    gc.freeze()  # the model outlives every job: no collection needs to walk it
    reranker.rest()  # landlock binds a thread, and those that it starts from then on
    sandbox = _lock_in(parent, reranker.card, options)
    try:
        _warm_up(reranker)
    except Exception as exc:  # noqa: BLE001 - the interpreter's own end is more than a locked process may do
        tell_unforeseen(exc)
        leave(CANNOT_LOAD)
    stages_ms = {"load": (loaded_s - start_s) * 1000, "warm_up": (warm_s - loaded_s) * 1000}
    parent.send(Hello(os.getpid(), reranker.card, sandbox, stages_ms))
    desk = Desk(parent, reranker)
    while True:
        try:
            desk.obey(parent.receive())  # not by a name: a worker at rest keeps nobody's pixels
        except Exception as exc:  # noqa: BLE001 - as above
            tell_unforeseen(exc)
            leave(BROKEN)


class Desk:
    """Takes what the parent says: one tenant or group for life, any number of its jobs at a time.

    Messages come on the main thread, jobs end on the reranker's.
    """

    def __init__(self, parent: Parent, reranker: Reranker) -> None:
        self._parent = parent
        self._reranker = reranker
        self._assigned: Assign | None = None
        self._warm_compilations = reranker.compilations
        self._warm_work = reranker.work
        self._failures = 0
        self._counting = threading.Lock()

    def obey(self, message: object) -> None:
        """Do what `message` says. Another tenant's work, or what makes no sense, ends the process."""
        match message:
            case Assign(tenant=tenant, group=group) if self._assigned in (None, message) and (
                (tenant is None) != (group is None)
            ):
                self._assigned = message
                name = filter(str.isalnum, tenant or group or "")
                name_process(("prc-g-" if tenant is None else "prc-w-") + "".join(name)[:8])
            case ScoreRequest() if self._serves(message):
                self._begin(message)
            case Cancel(id=ticket) if self._assigned is not None:
                self._reranker.cancel(ticket)
            case EndSession(session=session, tenant=tenant) if self._assigned is not None:
                self._reranker.end_session(session, tenant=tenant)
            case Forget(tenant=tenant) if self._assigned is not None:
                self._reranker.forget(tenant)
            case _:
                leave(BROKEN)

    def _serves(self, request: ScoreRequest) -> bool:
        """Whether it is this worker's own tenant that asks, or one of this worker's own group."""
        if self._assigned is None or request.group != self._assigned.group:
            return False
        return self._assigned.group is not None or request.tenant == self._assigned.tenant

    def _begin(self, request: ScoreRequest) -> None:
        end = partial(self._end, request, time.perf_counter())
        if time.monotonic() > request.deadline_s:
            end(JobExpired())
            return
        try:
            self._reranker.begin(
                request.id,
                request.job,
                end,
                tenant=request.tenant,
                session=request.session,
                deadline_s=request.deadline_s,
            )
        except Exception as exc:  # noqa: BLE001 - one job must not end the worker
            end(exc)

    def _end(self, request: ScoreRequest, start_s: float, outcome: Scores | Exception) -> None:
        """Answer one request, on whichever thread its job ended."""
        reply = self._reply(request, start_s, outcome)
        try:
            self._parent.send(reply)
        except WireError:
            self._parent.send(Failure(request.id, "internal"))
        with self._counting:
            unforeseen = isinstance(reply, Failure) and reply.code == "internal"
            self._failures = self._failures + 1 if unforeseen else 0
            if self._failures == INTERNAL_FAILURES:
                leave(BROKEN)

    def _reply(
        self, request: ScoreRequest, start_s: float, outcome: Scores | Exception
    ) -> ScoreReply | TooLong | Failure:
        match outcome:
            case Scores() if _is_sound(request.job, outcome):
                worker_ms = (time.perf_counter() - start_s) * 1000
                compilations = self._reranker.compilations - self._warm_compilations
                work = self._reranker.work - self._warm_work
                return ScoreReply(request.id, outcome, worker_ms, compilations, work)
            case Scores():
                return Failure(request.id, "model_failed", UNSOUND)
            case JobExpired():
                return Failure(request.id, "deadline")
            case CandidateTooLong(item=item, limit_tokens=limit_tokens):
                return TooLong(request.id, request.job.candidates.index(item), limit_tokens)
            case JobTooLong():
                return Failure(request.id, "job_too_long", str(outcome))
            case ModelFailed():
                return Failure(request.id, "model_failed", str(outcome))
            case MemoryError():
                return Failure(request.id, "memory")
            case _:
                tell_unforeseen(outcome)
                return Failure(request.id, "internal")


def _lock_in(parent: Parent, card: ModelCard, options: argparse.Namespace) -> tuple[Measure, ...]:
    """Give up all but memory, the socket and stderr; on a GPU, whose driver asks for files, the network alone."""
    if not card.device.startswith("cuda"):
        return lock_in(parent, uid=options.uid, data_bytes=options.memory, computes=True)
    sandbox = (go_first(), *confine(Confinement(uid=options.uid, open_files=OPEN_FILES)))
    parent.follow_to_death()  # a change of user cleared it
    return (*sandbox, filter_network(), Measure(NAME, False, UNLOCKED), Measure("data", False, UNLOCKED))


def _warm_up(reranker: Reranker) -> None:
    """Score text and a small image, so that Hello means: this worker scores. Raises ModelFailed."""
    image = Pixels(60, 50, bytes(60 * 50 * 3))  # of a size that the model must change
    for job in (
        Job(Item("warm up"), (Item("a text"), Item("another, somewhat longer text"))),
        Job(Item("warm up", image), (Item("a text"), Item(image=image))),
    ):
        if not _is_sound(job, reranker.score(job)):
            raise ModelFailed(UNSOUND)


def _is_sound(job: Job, scores: Scores) -> bool:
    return len(scores.margins) == len(job.candidates) and all(map(math.isfinite, scores.margins))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("worker", description="Started by the gateway only.", allow_abbrev=False)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--memory", type=int)
    parser.add_argument("--uid", type=int)
    add_arguments(parser)
    sharing = parser.add_mutually_exclusive_group()
    sharing.add_argument("--shared", type=int)
    sharing.add_argument("--offer", type=int)
    sharing.add_argument("--own-weights", action="store_true")
    return parser.parse_args(argv)


def _load(options: argparse.Namespace) -> Reranker:
    return load(
        options.model,
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        shared=options.shared,
        offer=options.offer,
        own_weights=options.own_weights,
        trust=read_trust(options),
    )


if __name__ == "__main__":
    run(sys.argv[1:], _load)
