"""What the gateway says to a worker and to the owner of lent weights, and what they say to it."""

from __future__ import annotations

from dataclasses import dataclass, field

from models import Job, Scores, Work
from service.processes.wire import COMMON, Vocabulary


@dataclass(frozen=True, slots=True)
class Assign:
    """From now on this worker serves `tenant`, or the tenants of `group`, and never another."""

    tenant: str | None
    group: str | None = None


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Score a job, beside those that are there. `session` keeps what it computes until `EndSession`.

    `group` is the one that the tenant is pooled in, if it is. `deadline_s` is on the clock of `time.monotonic`, which a
    machine's processes share.
    """

    id: int
    tenant: str
    job: Job
    deadline_s: float
    session: str | None = None
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody waits for the answer to the request of this id any more: drop what is left of it, say nothing."""

    id: int


@dataclass(frozen=True, slots=True)
class EndSession:
    """Wipe what is kept under the tenant's `session`."""

    session: str
    tenant: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Wipe all that is kept of the tenant's work; it has none here at present."""

    tenant: str


@dataclass(frozen=True, slots=True)
class ScoreReply:
    """The scores of one job. `worker_ms` passed at the worker, beside other jobs or not.

    `compilations` counts all that the worker compiled since it said Hello, `work` what it did since then.
    """

    id: int
    scores: Scores
    worker_ms: float
    compilations: int = 0
    work: Work = field(default_factory=Work)


@dataclass(frozen=True, slots=True)
class TooLong:
    """The job has no scores: candidate `index` may not be cut, and only `limit_tokens` of its text fit."""

    id: int
    index: int
    limit_tokens: int


SCORING = Vocabulary(*COMMON, Assign, ScoreRequest, Cancel, EndSession, Forget, ScoreReply, TooLong)


@dataclass(frozen=True, slots=True)
class Check:
    """Look whether the weights are as they were written."""

    id: int


@dataclass(frozen=True, slots=True)
class Checked:
    """`intact`: they are. `reason` says why there are none to be lent; then there never will be.

    `size_bytes` is what they take of the GPU's memory, `check_ms` what looking took.
    """

    id: int
    intact: bool
    reason: str | None = None
    size_bytes: int = 0
    check_ms: float = 0.0


OWNING = Vocabulary(*COMMON, Check, Checked)
