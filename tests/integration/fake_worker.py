"""A worker whose reranker is a puppet: the real main, wire and sandbox around a model that obeys the query.

The query's text is a command, `NAME ARGUMENT`; anything else scores candidates by the length of their text:

    sleep SECONDS    until then, until it is cancelled, or until its deadline
    hang SECONDS     deaf to all of that
    stuck            in a computation that lets no other thread of the process run
    meet NUMBER      until so many jobs are here at once, with the same command
    running          scores: how many jobs are here now, this one included
    session          scores: how many sessions of this tenant are kept; `reused_images`: how many jobs its session had before
    compile          one kernel more
    exit             the process ends
    too-long, whole, fail, raise TEXT, nan, uid, open PATH

`--model` is how it starts: `puppet`, `missing`, `silent`; `puppet-own-missing` is missing for who wants own weights.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from models import (
    CandidateTooLong,
    Done,
    Job,
    JobExpired,
    JobTooLong,
    ModelCard,
    ModelFailed,
    ModelNotFound,
    Reranker,
    Scores,
    Work,
)
from service.fleet.worker import run


@dataclass(eq=False)
class Running:
    """One job, on a thread of its own."""

    job: Job
    tenant: str = ""
    deadline_s: float = math.inf
    cancelled: threading.Event = field(default_factory=threading.Event)


class Puppet:
    """Scores by command, any number of jobs at a time."""

    card = ModelCard("puppet", "sha256:0", 0, "none", "cpu", "none", 100)

    def __init__(self) -> None:
        self.compilations = 0
        self.work = Work()
        self._running: dict[int, Running] = {}
        self._sessions: Counter[tuple[str, str]] = Counter()
        self._met: set[str] = set()
        self._changed = threading.Condition()

    def score(self, job: Job) -> Scores:
        return self._obey(Running(job))

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
        running = Running(job, tenant, math.inf if deadline_s is None else deadline_s)
        with self._changed:
            before = 0 if session is None else self._sessions[tenant, session]
            if session is not None:
                self._sessions[tenant, session] += 1
            self._running[ticket] = running
            self._changed.notify_all()

        def work() -> None:
            outcome: Scores | Exception
            try:
                outcome = replace(self._obey(running), reused_images=before)
            except Exception as exc:
                outcome = exc
            with self._changed:
                self._running.pop(ticket, None)
                self._changed.notify_all()
            if not running.cancelled.is_set():
                done(outcome)

        threading.Thread(target=work, daemon=True).start()

    def cancel(self, ticket: int) -> None:
        with self._changed:
            running = self._running.pop(ticket, None)
            if running is not None:
                running.cancelled.set()
            self._changed.notify_all()

    def end_session(self, session: str, *, tenant: str = "") -> None:
        with self._changed:
            del self._sessions[tenant, session]

    def forget(self, tenant: str) -> None:
        with self._changed:
            for key in [key for key in self._sessions if key[0] == tenant]:
                del self._sessions[key]

    def rest(self) -> None:
        """It has no threads but those of its jobs."""

    def _obey(self, running: Running) -> Scores:
        job = running.job
        command, _, argument = (job.query.text or "").partition(" ")
        margins = tuple(float(len(item.text or "")) for item in job.candidates)
        if command == "sleep":
            left_s = max(0.0, running.deadline_s - time.monotonic())
            if not running.cancelled.wait(min(float(argument), left_s)) and left_s < float(argument):
                raise JobExpired
        elif command == "hang":
            time.sleep(float(argument))
        elif command == "stuck":
            re.fullmatch("(a+)+", "a" * 64 + "b")
        elif command == "meet":
            self._meet(running, int(argument))
        elif command == "running":
            margins = (float(len(self._running)),) * len(margins)
        elif command == "session":
            mine = sum(tenant == running.tenant for tenant, _ in self._sessions)
            margins = (float(mine),) * len(margins)
        elif command == "exit":
            os._exit(1)
        elif command == "compile":
            self.compilations += 1
        elif command == "work":
            self.work += Work(*range(1, 10))
        elif command == "too-long":
            raise JobTooLong("the query has 101 tokens, more than 100")
        elif command == "whole" and not job.truncate:
            raise CandidateTooLong(job.candidates[-1], 7)
        elif command == "fail":
            raise ModelFailed
        elif command == "raise":
            raise RuntimeError(f"secret text: {argument}")
        elif command == "nan":
            margins = (float("nan"),) * len(margins)
        elif command == "open":
            margins = (float(_can_read(argument)),)
        pixels = sum(item.image.width * item.image.height for item in job.candidates if item.image)
        return Scores(
            margins, input_tokens=1, image_tokens=pixels, computed_tokens=1, stages_ms={"forward": 0.5}
        )

    def _meet(self, running: Running, number: int) -> None:
        asked = running.job.query.text or ""

        def met() -> bool:
            if sum(other.job.query.text == asked for other in self._running.values()) >= number:
                self._met.add(asked)  # who leaves first must not keep the others here
            return asked in self._met

        with self._changed:
            self._changed.notify_all()
            if not self._changed.wait_for(met, running.deadline_s - time.monotonic()):
                raise JobExpired


def _can_read(path: str) -> bool:
    try:
        return bool(Path(path).read_bytes())
    except PermissionError:
        return False


def _load(options: argparse.Namespace) -> Reranker:
    if options.model == "missing" or (options.model == "puppet-own-missing" and options.own_weights):
        raise ModelNotFound("no model called missing")
    if options.model == "silent":
        time.sleep(60)
    return Puppet()


if __name__ == "__main__":
    run(sys.argv[1:], _load)
