"""Starts of workers: what is started, how many at once, and when again after one failed."""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from models import ANYONE, ModelCard, Trust
from service.errors import ModelUnavailable, Overloaded, ServiceError
from service.fleet.messages import SCORING
from service.fleet.trusting import REFUSED, arguments
from service.processes.children import ChildLost, Launch, bare_environ
from service.processes.wire import Vocabulary

FAILURES_TO_REFUSE = 2
"""Failed starts in a row after which waiting requests are refused instead of kept."""
BACK_OFF_S = (0.5, 30.0)
"""Pause after the first failed start, doubled by each further one, and the longest pause."""
STARTS_AT_ONCE = 2
NO_START = "No worker can be started at the moment."
FIRST_UID, UIDS = 61_184, 3_000
"""Users of workers where the gateway is root; systemd, too, keeps this range for users without a name."""
KEPT_BYTES = 32 * 1024 * 1024
"""So much freed memory, and any tensor as large, a worker keeps for its next pass."""
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


def stopping() -> Overloaded:
    return Overloaded("The service is stopping.", reason="stopping")


class Starts:
    """Counts the starts that are under way and those that failed. `now` is on the clock of `time.monotonic`."""

    def __init__(
        self,
        launch: Launch,
        *,
        first_uid: int | None,
        own_weights: bool = False,
        uids: Iterator[int] | None = None,
    ) -> None:
        """`first_uid` counts only where we are root; `uids` counts users, and is shared by who starts beside us.

        `own_weights` says which workers these are: those that must have a copy that no other process sees.
        """
        self.launch = launch
        self.own_weights = own_weights
        self.reason: str | None = None if own_weights else "no worker has been started yet"
        """Why there is none, or why the last start failed; None once one came up, or where none needs to."""
        self.refusal: str | None = None
        """Why the model's files may not be served, where that ended the last start; holds no path."""
        self.card: ModelCard | None = None
        self._first_uid = first_uid if os.geteuid() == 0 else None
        self.uids = uids or itertools.count(os.getpid())  # two gateways of one host should not share users
        self._memory: int | None = None
        self._under_way = 0
        self._failures = 0
        self._retry_s = 0.0

    @property
    def fail(self) -> bool:
        """Whether the last one failed."""
        return self._failures > 0

    @property
    def proven(self) -> bool:
        """Whether a worker came up, and none failed to since."""
        return self.card is not None and not self.fail

    @property
    def hopeless(self) -> bool:
        """Whether those who wait for a start should be told to come back later."""
        return self._failures >= FAILURES_TO_REFUSE or self.refusal is not None

    def excuse(self, now: float) -> ServiceError:
        """What they are told."""
        retry_after_s = max(1, math.ceil(self._retry_s - now))
        if self.refusal is not None:
            return ModelUnavailable(reason="model_refused", retry_after_s=retry_after_s)
        return Overloaded(NO_START, reason="worker_start", retry_after_s=retry_after_s)

    def due(self, now: float, wanted: int) -> int:
        """How many to begin now where `wanted` workers are missing; while they fail, one by one and ever later."""
        if now < self._retry_s:
            return 0
        at_once = 1 if self.fail else STARTS_AT_ONCE
        return max(0, min(at_once, wanted) - self._under_way)

    def begin_owner(self, module: str, offer: int, vocabulary: Vocabulary) -> Launch:
        """What to start as owner of the weights; it writes into the empty memory `offer`."""
        place = self.launch.argv.index("-m") + 1
        argv = (*self.launch.argv[:place], module, *self.launch.argv[place + 1 :])
        return self._dress(replace(self.launch, argv=argv, vocabulary=vocabulary), "--offer", offer)

    def failed_owner(self, reason: str) -> None:
        self._count_failure(f"the weights cannot be lent: {reason}")

    def share(self) -> None:
        """Give every worker from now on the same memory for its weights (`models.sealing`), where the system has such."""
        if sys.platform == "linux":
            self._memory = os.memfd_create("weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)

    def unshare(self) -> None:
        """Let go of that memory; the workers that hold it keep it."""
        if self._memory is not None:
            os.close(self._memory)
            self._memory = None

    def begin(self, *, share: bool = True, offer: int | None = None) -> Launch:
        """What to start, now under way until `succeeded` or `failed` is told.

        It has weights of its own unless it may `share` them: those that `offer` offers, or else sealed ones.
        """
        self._under_way += 1
        if not share:
            return self._dress(
                replace(self.launch, argv=(*self.launch.argv, "--own-weights")), "--shared", None
            )
        if offer is not None:
            return self._dress(self.launch, "--offer", offer)
        return self._dress(self.launch, "--shared", self._memory)

    def succeeded(self, card: ModelCard | None) -> None:
        self._under_way -= 1
        self._failures, self._retry_s, self.reason, self.refusal, self.card = 0, 0.0, None, None, card

    def failed(self, exc: Exception) -> str:
        """Why, in words for the operator."""
        self._under_way -= 1
        reason = str(exc) if isinstance(exc, ChildLost) else repr(exc)
        refused = isinstance(exc, ChildLost) and exc.status == REFUSED
        self.refusal = exc.last_words.partition(": ")[2] if isinstance(exc, ChildLost) and refused else None
        self._count_failure(f"a worker cannot be started: {reason}")
        return reason

    def forget(self) -> None:
        """None is under way any more: they were cancelled."""
        self._under_way = 0

    def _count_failure(self, reason: str) -> None:
        first_s, longest_s = BACK_OFF_S
        self._failures += 1
        self._retry_s = time.monotonic() + min(longest_s, first_s * 2 ** min(self._failures - 1, 16))
        self.reason = reason

    def _dress(self, launch: Launch, name: str, descriptor: int | None) -> Launch:
        """With a user of its own, and with a descriptor to inherit."""
        argv = launch.argv
        if self._first_uid is not None:
            argv = (*argv, "--uid", str(self._first_uid + next(self.uids) % UIDS))
        if descriptor is not None:
            argv = (*argv, name, str(descriptor))
        return replace(launch, argv=argv, shared=descriptor)


def worker_launch(
    *,
    worker: str,
    model: str,
    device: str,
    dtype: str,
    threads: int,
    offline: bool,
    start_s: float,
    silence_s: float,
    told: Callable[[str], None],
    trust: Trust = ANYONE,
    memory_bytes: int | None = None,
) -> Launch:
    """How to start a worker; `worker` is the module that it runs. On a CPU it may take `memory_bytes` beside what it loads."""
    return Launch(
        # -P: no module is taken from the working directory
        (
            *(sys.executable, "-P", "-m", worker, "--fd", "{fd}", "--parent", "{parent}"),
            *("--model", model, "--device", device, "--dtype", dtype, "--threads", str(threads)),
            *arguments(trust),
            *(() if memory_bytes is None else ("--memory", str(memory_bytes))),
        ),
        SCORING,
        _environ(threads, offline),
        start_s=start_s,
        silence_s=silence_s,
        told=told,
        secret=trust.seal_key or None,
    )


def _environ(threads: int, offline: bool) -> dict[str, str]:
    """A worker's whole environment."""
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
    numeric = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",  # numpy's would start its threads before the lock, which would not bind them
        "TOKENIZERS_PARALLELISM": "false",
        # Workers share the cores: threads that spin as they wait made a job 30 times slower on a busy machine.
        "OMP_WAIT_POLICY": "PASSIVE",
        # A pass's tensors come and go: pages that went back to the kernel each time would be cleared each time.
        "MALLOC_MMAP_THRESHOLD_": str(KEPT_BYTES),
        "MALLOC_TRIM_THRESHOLD_": str(KEPT_BYTES),
    }
    hub = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"} if offline else {}
    return bare_environ(**inherited, **numeric, **hub)
