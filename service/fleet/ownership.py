"""Who owns the weights that workers of a GPU share: the owner is started, checked, replaced, and outlives its workers.

A GPU has one owner process at a time, so its memory never holds the weights twice: a new one starts when the last
worker of the old one is reaped and the old one has ended. An owner is sound until it dies or finds the weights changed;
the fleet ends the workers of one that is not. Where weights cannot be lent, every worker loads its own.

Belongs to the event loop of its fleet, whose dispatcher calls `advance` after every event.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from models import ModelCard
from service.fleet.messages import OWNING, Check, Checked
from service.fleet.router import LentState
from service.fleet.starts import Starts
from service.processes.children import Cause, Child, ChildLost, Launch, start_child

NVIDIA_DEVICES = ("/dev/nvidiactl", "/dev/dxg")
"""What there is where NVIDIA's driver runs: on Linux, and in Linux on Windows."""
ANSWER_S = 60.0
"""An owner that has not checked the weights for so long is taken to hang: it takes a fraction of a second."""
TRIES = 2
"""Failed starts of an owner in a row after which workers load their own weights."""


@dataclass(slots=True, eq=False)
class Owner:
    """One owner process; `descriptor` is of the memory with its offer, `size_bytes` what it lends."""

    child: Child
    descriptor: int
    size_bytes: int
    users: int = 0
    """Workers that were given the offer and are not reaped yet."""
    sound: bool = True


class Ownership:
    """At most one owner, and what became of those before it."""

    def __init__(
        self, starts: Starts, *, owner: str | None, check_s: float, changed: Callable[[], None]
    ) -> None:
        """`owner` is the module that an owner runs, None where nothing is to be lent; `changed` wakes the dispatcher.

        The weights are checked every `check_s` seconds.
        """
        self._starts = starts
        self._module = owner
        self._check_s = check_s
        self._changed = changed
        self._owner: Owner | None = None
        self._starting: Child | None = None
        self._task: asyncio.Task[None] | None = None
        self._ids = itertools.count(1)
        self._failures = 0
        self._checks = self._changes = 0
        self._log = structlog.get_logger(source="fleet")

    @property
    def settled(self) -> bool:
        """Whether workers may be started now: there is a sound owner, or there will never be one."""
        return self._module is None or (self._owner is not None and self._owner.sound)

    @property
    def state(self) -> LentState:
        owner = self._owner if self._owner is not None and self._owner.sound else None
        return LentState(
            size_bytes=owner.size_bytes if owner else 0,
            workers=owner.users if owner else 0,
            checks=self._checks,
            changes=self._changes,
        )

    def begin(self, *, share: bool = True) -> tuple[Launch, Owner | None]:
        """What to start as a worker, and whose weights it maps, until `give_back`; None: its own, or sealed ones.

        One that may not `share` has its own.
        """
        owner = self._owner
        if not share or owner is None or not owner.sound or self._module is None:
            return self._starts.begin(share=share), None
        owner.users += 1
        return self._starts.begin(offer=owner.descriptor), owner

    def welcome(self, owner: Owner | None, card: ModelCard | None) -> Owner | None:
        """A worker came to life: whose weights it maps in truth. Where it could not, nobody else will."""
        if owner is None or card is None or card.unlent is None:
            return owner
        if owner.sound:
            self.give_up(card.unlent)
        self.give_back(owner)
        return None

    def give_back(self, owner: Owner | None) -> None:
        """A worker is reaped, or did not come to life."""
        if owner is not None:
            owner.users -= 1
            self._changed()

    def give_up(self, reason: str) -> None:
        """Lend nothing any more; workers from now on load their own. Those that have borrowed stay as they are."""
        if self._module is not None:
            self._module = None
            self._log.warning(
                "Workers load weights of their own: they cannot be shared.",
                action="weights_own",
                reason=reason,
            )

    def advance(self, now: float) -> None:
        """Begin what can be begun; `now` is on the clock of `time.monotonic`."""
        if self._task is not None:
            if not self._task.done():
                return
            self._task = None
        owner = self._owner
        if owner is None:
            if self._module is not None and self._starts.due(now, 1):
                self._task = asyncio.create_task(self._start(self._module), name="owner")
        elif not owner.users and (not owner.sound or self._module is None):
            self._task = asyncio.create_task(self._stop(owner), name="owner")

    async def close(self) -> None:
        """End the owner. Every worker is gone by now."""
        self._module = None
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        if self._owner is not None:
            await self._stop(self._owner)
        elif self._starting is not None:
            await self._starting.stop()

    async def _start(self, module: str) -> None:
        descriptor = os.memfd_create("offer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            self._starting = await start_child(self._starts.begin_owner(module, descriptor, OWNING))
            checked = await self._ask(self._starting)
            if checked.reason is not None:
                await self._starting.stop()  # what it has of the GPU is free before a worker needs it
                self.give_up(checked.reason)
            elif not checked.intact:
                self._starting.kill("the weights were changed before they were lent", Cause.WEIGHTS)
                raise ChildLost(self._starting.lost.result())
            else:
                self._owner = Owner(self._starting, descriptor, checked.size_bytes)
                self._failures = 0
                self._watch(self._owner, checked.check_ms)
        except Exception as exc:  # noqa: BLE001 - whatever it is, a start that is not counted as failed hangs
            reason = str(exc) if isinstance(exc, ChildLost) else repr(exc)
            self._failures += 1
            self._starts.failed_owner(reason)
            self._log.error("An owner of weights cannot be started.", action="weights_lost", reason=reason)
            if self._starting is not None:
                await self._starting.stop()
            if self._failures >= TRIES:
                self.give_up(reason)
        finally:
            if self._owner is None:
                os.close(descriptor)
            self._changed()

    def _watch(self, owner: Owner, check_ms: float) -> None:
        """Look at the weights now and then, and hear of the owner's death."""
        self._log.info(
            "Weights are lent.",
            action="weights_lent",
            pid=owner.child.pid,
            size_bytes=owner.size_bytes,
            check_ms=check_ms,
        )
        watching = asyncio.create_task(self._check(owner), name="weights")

        def end(lost: asyncio.Future[str]) -> None:
            watching.cancel()
            if owner.sound:
                owner.sound = False
                self._log.error(
                    "The owner of the weights is lost, and so are its workers.",
                    action="weights_lost",
                    pid=owner.child.pid,
                    reason=lost.result(),
                    workers=owner.users,
                )
            self._changed()

        owner.child.lost.add_done_callback(end)

    async def _check(self, owner: Owner) -> None:
        try:
            while True:
                await asyncio.sleep(self._check_s)
                checked = await self._ask(owner.child)
                self._checks += 1
                if not checked.intact:
                    break
            self._changes += 1
            owner.sound = False
            self._log.critical(
                "Weights were changed after they were lent: their workers are ended.",
                action="weights_changed",
                pid=owner.child.pid,
                workers=owner.users,
            )
            self._changed()
        except ChildLost:
            pass  # its `lost` has told
        finally:
            if owner.sound:
                owner.child.kill("its weights are not checked any more")

    async def _ask(self, child: Child) -> Checked:
        """Have the weights looked at. Raises ChildLost, also where no answer comes: then it is killed."""
        try:
            async with asyncio.timeout(ANSWER_S):
                answer = await child.ask(Check(next(self._ids)))
        except TimeoutError:
            child.kill(f"did not check the weights within {ANSWER_S:g} s", Cause.OVERDUE)
            raise ChildLost(child.lost.result()) from None
        if not isinstance(answer, Checked):
            child.kill("broke the protocol", Cause.PROTOCOL)
            raise ChildLost(child.lost.result())
        return answer

    async def _stop(self, owner: Owner) -> None:
        owner.sound = False
        await owner.child.stop()
        os.close(owner.descriptor)
        self._owner = None
        self._changed()


def may_lend(device: str) -> bool:
    """Whether there may be a GPU to share; the owner itself finds out, for the gateway knows nothing of CUDA."""
    if sys.platform != "linux" or device == "cpu":
        return False
    return device != "auto" or any(Path(path).exists() for path in NVIDIA_DEVICES)
