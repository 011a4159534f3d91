"""Several jobs at once on a few threads: the shortest work first, packs shared between jobs.

Each idle thread takes the next piece of work that can be done, computes it alone and looks again: one thread to
a pack, for on a CPU two threads inside one small product gain little over one. What is next:

1. of a job that has waited for `AGE_LIMIT_S`, the oldest first: nothing starves;
2. else of the job with the least work left: a small request never waits for all of a large one;
3. a pack with room to spare takes in candidates of the tenant's further jobs, in the same order, whatever their
   prefixes.

Where jobs belong to several tenants, no pack holds two tenants' candidates, and nothing that is kept of one tenant's
work is found by another's (`memory.Store`). State changes under one lock, which is never held while a tensor is
computed or a caller's `done` runs.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from models import Done, Job, JobExpired, Pixels, Scores, Work
from models.memory import FeatureCache, Hasher, Pins, PrefixMemory, Store
from models.packing import Grid, Pack, Share, pack
from models.prompt import Sheet
from models.run import Run, Script

AGE_LIMIT_S = 0.5
"""A job that has waited so long goes before shorter ones."""
JOIN_TOKENS = 256
"""With another thread to spare, a pack as large as this takes in no more jobs."""

OUT_OF_MEMORY = "can't allocate memory"
"""What torch says on a CPU, in a RuntimeError, where numpy raises MemoryError."""


class Model(Protocol):
    """What an engine computes with. Every method may be called from several threads at once."""

    def grid(self, pixels: Pixels, number: int) -> Grid:
        """How many visual tokens an image is. Raises `ModelFailed`."""
        ...

    def write(self, job: Job, grids: Mapping[Pixels, Grid]) -> Sheet:
        """The prompt. Raises `JobTooLong`."""
        ...

    def see(self, images: Sequence[Pixels]) -> list[Tensor]:
        """Visual tokens [tokens, hidden] of each image."""
        ...

    def read(
        self, packed: Pack, features: Sequence[Mapping[int, Tensor]], memories: Sequence[PrefixMemory | None]
    ) -> list[float]:
        """Margins of a pack's candidates, part by part; `features` and `memories` are one per part."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """`cache_bytes` bounds a tenant's features kept without a session, `session_bytes` all that one session keeps."""

    threads: int
    pack_tokens: int
    cache_bytes: int = 128 << 20
    session_bytes: int = 128 << 20


@dataclass(frozen=True, slots=True)
class _Task:
    """One piece of work for `runs`: `compute` without the lock; what it gives, one a run, is applied under it."""

    stage: str
    runs: tuple[Run, ...]
    compute: Callable[[], Sequence[Callable[[], None]]]


class Engine:
    """See `models.Reranker`, whose `begin`, `cancel`, `end_session`, `forget` and `rest` these are. `done` must not raise."""

    def __init__(self, model: Model, context: bytes, limits: Limits) -> None:
        """`context` is as in `memory.Hasher`."""
        self._model = model
        self._context = context
        self._limits = limits
        self._runs: dict[int, Run] = {}
        self._stores: dict[str, Store] = {}
        self._changed = threading.Condition()
        self._idle = 0
        self._resting = False
        self._threads: list[threading.Thread] = []
        self._work_done = Work()

    @property
    def work(self) -> Work:
        with self._changed:
            return self._work_done

    def begin(
        self,
        ticket: int,
        job: Job,
        done: Done,
        *,
        tenant: str = "",
        session: str | None = None,
        deadline_s: float | None = None,
    ) -> None:
        with self._changed:
            if ticket in self._runs:
                raise ValueError(f"ticket {ticket} is in use")
            store = self._store(tenant)
            run = Run(ticket, job, done, store, math.inf if deadline_s is None else deadline_s)
            store.users += 1
            if session is not None:
                run.pins = store.sessions.setdefault(session, Pins(self._limits.session_bytes))
                run.pins.users += 1
            self._runs[ticket] = run
            self._start_threads()
            self._changed.notify()

    def cancel(self, ticket: int) -> None:
        with self._changed:
            if (run := self._runs.pop(ticket, None)) is not None:
                run.ended = True
                self._release(run)

    def end_session(self, session: str, *, tenant: str = "") -> None:
        with self._changed:
            store = self._stores.get(tenant)
            if store is not None and (pins := store.sessions.pop(session, None)) is not None:
                pins.end()

    def forget(self, tenant: str) -> None:
        with self._changed:
            if (store := self._stores.pop(tenant, None)) is not None:
                store.end()

    def rest(self) -> None:
        with self._changed:
            self._resting = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads, self._resting = [], False

    def _store(self, tenant: str) -> Store:
        if tenant not in self._stores:
            self._stores[tenant] = Store(Hasher(self._context), FeatureCache(self._limits.cache_bytes))
        return self._stores[tenant]

    def _start_threads(self) -> None:
        while len(self._threads) < self._limits.threads:
            name = f"engine-{len(self._threads)}"
            self._threads.append(threading.Thread(target=self._work, name=name, daemon=True))
            self._threads[-1].start()

    def _work(self) -> None:
        torch.set_num_threads(1)  # of this thread's own products: OpenMP counts for each thread apart
        with torch.inference_mode():
            while True:
                with self._changed:
                    while (task := self._next(time.monotonic())) is None:
                        if self._resting:
                            return
                        self._idle += 1
                        self._changed.wait()
                        self._idle -= 1
                self._carry_out(task)
                del task  # while it waits, a thread keeps nobody's pixels

    def _carry_out(self, task: _Task) -> None:
        """Compute, apply, and tell those who are done."""
        began_s = time.perf_counter()
        failure: Exception | None = None
        results: Sequence[Callable[[], None]] = ()
        try:
            results = task.compute()
        except Exception as exc:  # noqa: BLE001 - told to whom it concerns; the thread goes on
            failure = MemoryError() if OUT_OF_MEMORY in str(exc) else exc
        elapsed_ms = (time.perf_counter() - began_s) * 1000 / len(task.runs)
        outcomes: list[tuple[Done, Scores | Exception]] = []
        with self._changed:
            for place, run in enumerate(task.runs):
                run.tasks -= 1
                run.stages_ms[task.stage] += elapsed_ms
                outcome = failure or _apply(run, results[place])
                if isinstance(outcome, Scores):
                    self._work_done += run.reuse
                if outcome is not None and not run.ended:
                    self._runs.pop(run.ticket, None)
                    run.ended = True
                    outcomes.append((run.done, outcome))
                self._release(run)
            self._changed.notify_all()
        del failure, results  # a traceback holds this frame: without it, nobody's pixels outlive their job
        for done, outcome in outcomes:
            done(outcome)

    def _release(self, run: Run) -> None:
        """Let go of what is kept once the job has ended and no thread reads it any more."""
        if not run.ended or run.tasks or run.released:
            return
        run.released = True
        run.store.users -= 1
        run.store.wipe_unused()
        if run.pins is not None:
            run.pins.users -= 1
            run.pins.wipe_unused()
            run.pins = None

    def _next(self, now: float) -> _Task | None:
        """The next piece of work, under the lock. None where all that is left waits for another thread."""
        order = self._order(now)
        for place, run in enumerate(order):
            task: _Task | None = None
            if now > run.deadline_s:
                del self._runs[run.ticket]
                task = _Task("forward", (run,), _expire)
            elif run.take_writing():
                task = _Task("tokenize", (run,), partial(self._write, run))
            elif numbers := run.take_images():
                task = _Task("vision", (run,), partial(self._see, run, numbers))
            elif (share := run.take_share(self._limits.pack_tokens, first=True)) is not None:
                others = [other for other in order[place + 1 :] if other.store is run.store]
                shared = [(run, share), *self._join(share.tokens, others, now)]
                self._count_pack(sum(each.tokens for _, each in shared))
                task = _Task("forward", tuple(run for run, _ in shared), partial(self._read, shared))
            if task is not None:
                for each in task.runs:
                    each.tasks += 1
                return task
        return None

    def _count_pack(self, tokens: int) -> None:
        room = max(tokens, self._limits.pack_tokens)  # one candidate may be more than fits
        self._work_done += Work(packs=1, packed_tokens=tokens, room_tokens=room)

    def _order(self, now: float) -> list[Run]:
        def rank(run: Run) -> tuple[bool, float]:
            aged = now - run.arrived_s > AGE_LIMIT_S
            return (False, run.arrived_s) if aged else (True, run.left_tokens)

        return sorted(self._runs.values(), key=rank)

    def _join(self, tokens: int, others: Sequence[Run], now: float) -> Iterator[tuple[Run, Share]]:
        """Shares of other jobs for a pack that has `tokens` already."""
        enough = JOIN_TOKENS if self._idle else self._limits.pack_tokens
        for run in others:
            if tokens >= enough:
                return
            room = self._limits.pack_tokens - tokens
            if now <= run.deadline_s and (share := run.take_share(room)) is not None:
                tokens += share.tokens
                yield run, share

    # What threads compute, without the lock.

    def _write(self, run: Run) -> Sequence[Callable[[], None]]:
        job = run.job
        distinct = {item: place for place, item in enumerate(dict.fromkeys(job.candidates))}
        images = tuple(dict.fromkeys(item.image for item in (job.query, *distinct) if item.image is not None))
        sheet = self._model.write(
            replace(job, candidates=tuple(distinct)),
            {pixels: self._model.grid(pixels, number) for number, pixels in enumerate(images)},
        )
        script = Script(
            sheet,
            tuple(distinct[item] for item in job.candidates),
            images,
            tuple(map(run.store.hasher.image, images)),
        )
        return [
            partial(
                run.write,
                script,
                run.store.hasher,
                run.store.cache,
                pack_tokens=self._limits.pack_tokens,
                threads=self._limits.threads,
            )
        ]

    def _see(self, run: Run, numbers: Sequence[int]) -> Sequence[Callable[[], None]]:
        features = self._model.see(run.images(numbers))
        return [partial(run.see, dict(zip(numbers, features, strict=True)), run.store.cache)]

    def _read(self, shared: Sequence[tuple[Run, Share]]) -> Sequence[Callable[[], None]]:
        margins = self._model.read(
            pack([share for _, share in shared]),
            [run.features for run, _ in shared],
            [run.prefix for run, _ in shared],
        )
        results, done = [], 0
        for run, share in shared:
            results.append(partial(run.read, share, margins[done : done + len(share.candidates)]))
            done += len(share.candidates)
        return results


def _expire() -> NoReturn:
    raise JobExpired("the job's deadline passed before it was computed")


def _apply(run: Run, result: Callable[[], None]) -> Scores | Exception | None:
    """What to tell of a job, if this was the last of it."""
    if run.ended:
        return None
    try:
        result()
    except Exception as exc:  # noqa: BLE001 - told to whom it concerns; the thread goes on
        return exc
    return run.scores() if run.finished else None
