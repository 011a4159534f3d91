"""A worker's main: load one model, score a warm-up, say Hello; then read, score, write, one job at a time.

    python -m service.fleet.worker --fd N --parent PID --model NAME --device D --dtype T --threads N [--uid N]

A worker serves the tenant that its first `Assign` names, and no other for as long as it lives. It holds no
key, no database and no listener; all it reads is pixels and text, all it writes is numbers. Where it starts
as root it loads as root, for model files may be root's own, and drops that before it says Hello.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from models import (
    CandidateTooLong,
    Item,
    Job,
    JobTooLong,
    ModelError,
    ModelFailed,
    Pixels,
    Reranker,
    Scores,
    load,
)
from service.processes.parent import UNFORESEEN, Parent, leave, name_process
from service.processes.sandbox import Confinement, confine
from service.processes.wire import (
    SCORING,
    Assign,
    Failure,
    Hello,
    ScoreReply,
    ScoreRequest,
    TooLong,
    WireError,
)

OPEN_FILES = 1024
CANNOT_LOAD = 4
"""Exit status: the model cannot be loaded, or its warm-up gave no usable score."""
BROKEN = 5
"""Exit status: the parent broke the protocol, or scoring failed in unforeseen ways too often in a row."""
INTERNAL_FAILURES = 3
"""Unforeseen failures in a row after which a worker gives up: a CUDA error, for one, never heals."""

Load = Callable[[argparse.Namespace], Reranker]


def run(argv: Sequence[str], load_model: Load) -> NoReturn:
    """Be a worker until the parent goes away. `load_model` is the only thing that tests replace."""
    options = _parse(argv)
    parent = Parent(options.fd, options.parent, SCORING)
    name_process("prc-worker")
    faulthandler.enable()  # frames only, no values
    start_s = time.perf_counter()
    try:
        reranker = load_model(options)
        loaded_s = time.perf_counter()
        _warm_up(reranker)
    except ModelError as exc:
        print(f"{type(exc).__name__}: {exc}", file=sys.stderr, flush=True)  # noqa: T201
        leave(CANNOT_LOAD)
    warm_s = time.perf_counter()
    gc.collect()
    gc.freeze()  # the model outlives every job: no collection needs to walk it
    sandbox = confine(Confinement(uid=options.uid, open_files=OPEN_FILES))
    parent.follow_to_death()  # a change of user cleared it
    # Once more as the new user: what a first job would import must not fail for want of permission then.
    _warm_up(reranker)
    stages_ms = {"load": (loaded_s - start_s) * 1000, "warm_up": (warm_s - loaded_s) * 1000}
    parent.send(Hello(os.getpid(), reranker.card, sandbox, stages_ms))
    _serve(parent, reranker)


def _serve(parent: Parent, reranker: Reranker) -> NoReturn:
    tenant: str | None = None
    failures = 0
    while True:
        message = parent.receive()
        if isinstance(message, Assign) and tenant in (None, message.tenant):
            tenant = message.tenant
            name_process("prc-w-" + "".join(filter(str.isalnum, tenant))[:8])
        elif isinstance(message, ScoreRequest) and message.tenant == tenant:
            reply = _answer(reranker, message)
            try:
                parent.send(reply)
            except WireError:
                parent.send(Failure(message.id, "internal"))
            failures = failures + 1 if isinstance(reply, Failure) and reply.code == "internal" else 0
            if failures == INTERNAL_FAILURES:
                leave(BROKEN)
        else:  # another tenant's work, above all
            leave(BROKEN)
        del message


def _answer(reranker: Reranker, request: ScoreRequest) -> ScoreReply | TooLong | Failure:
    if time.monotonic() > request.deadline_s:
        return Failure(request.id, "deadline")
    start_s = time.perf_counter()
    try:
        scores = reranker.score(request.job)
        _check(request.job, scores)
    except CandidateTooLong as exc:
        return TooLong(request.id, request.job.candidates.index(exc.item), exc.limit_tokens)
    except JobTooLong as exc:
        return Failure(request.id, "job_too_long", str(exc))
    except ModelFailed as exc:
        return Failure(request.id, "model_failed", str(exc))
    except Exception as exc:  # noqa: BLE001 - one job must not end the worker
        _tell(exc)
        return Failure(request.id, "internal")
    return ScoreReply(request.id, scores, (time.perf_counter() - start_s) * 1000)


def _warm_up(reranker: Reranker) -> None:
    """Score text and a small image, so that Hello means: this worker scores. Raises ModelFailed."""
    image = Pixels(56, 56, bytes(56 * 56 * 3))
    for job in (
        Job(Item("warm up"), (Item("a text"), Item("another, somewhat longer text"))),
        Job(Item("warm up", image), (Item("a text"), Item(image=image))),
    ):
        _check(job, reranker.score(job))


def _check(job: Job, scores: Scores) -> None:
    if len(scores.margins) != len(job.candidates) or not all(map(math.isfinite, scores.margins)):
        raise ModelFailed("not one finite score per candidate")


def _tell(exc: Exception) -> None:
    """What broke, and where, on stderr; never its message, which may repeat what a tenant sent."""
    frames = traceback.extract_tb(exc.__traceback__)[-4:]
    where = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))
    print(f"{UNFORESEEN}{type(exc).__name__} at {where}", file=sys.stderr, flush=True)  # noqa: T201


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("worker", description="Started by the gateway only.", allow_abbrev=False)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--uid", type=int)
    return parser.parse_args(argv)


def _load(options: argparse.Namespace) -> Reranker:
    return load(options.model, device=options.device, dtype=options.dtype, threads=options.threads)


if __name__ == "__main__":
    run(sys.argv[1:], _load)
