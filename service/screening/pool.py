"""The gateway's side of screening: a few children, each with one image at a time and a limit on its time.

A child that took too long is killed, one that died is replaced, and the image that it held is refused: 422,
not 503, for sending it again would end the same way. A child is also replaced after `RECYCLE_IMAGES` images,
and after any image on which its decoder choked.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import astuple
from functools import partial
from typing import Any, TypeVar

from models import Pixels
from service.errors import ImageRejected, ScreeningLost
from service.processes.children import Cause, Child, ChildLost, Launch, bare_environ
from service.processes.sandbox import Measure
from service.processes.wire import Detector
from service.screening import (
    FORMATS,
    METADATA,
    REASONS,
    Cleaned,
    ImageFormat,
    ImageLimits,
    Reencoded,
    check_bytes,
    reject,
)
from service.screening.messages import (
    MAX_TEXT_CHARACTERS,
    CleanReply,
    CleanRequest,
    EncodeReply,
    EncodeRequest,
    Equipment,
    Rejected,
    vocabulary,
)
from service.screening.resize import MAX_CLEAN_PIXELS
from service.screening.signals import RISK_DETECTORS, Findings, ImageText, Looks
from service.screening.slot import Slot
from service.screening.turns import Turns

RECYCLE_IMAGES = 512
LARGE_BYTES, KEPT_BYTES = 8 * 1024 * 1024, 64 * 1024 * 1024
"""Above what one line of text takes in the network that reads it: at 1 MiB a page cost three million page faults, and five
times as long."""
START_S = 30.0
DETAIL_CHARACTERS = 300
RULE = re.compile(r"[a-z0-9_.-]{0,64}")
NO_LOOKS = Looks()
SIGNATURES: dict[ImageFormat, bytes] = {"jpeg": b"\xff\xd8\xff", "png": b"\x89PNG\r\n\x1a\n", "webp": b"RIFF"}

Result = TypeVar("Result")

Trust = Callable[[Slot, object], Result | None]
"""A child's reply as the gateway believes it, or nothing."""


class Screen:
    """Turns untrusted images into pixels. Belongs to the event loop on which it was started."""

    def __init__(
        self,
        *,
        limits: ImageLimits,
        children: int,
        timeout_s: float,
        equipment: Equipment | None = None,
        told: Callable[[str], None] | None = None,
    ) -> None:
        """`timeout_s` is for one image, from when a child takes it; `told` gets each line of a child's stderr.

        Without `equipment`, children decode and can look for nothing.
        """
        self.limits = limits
        self.timeout_s = timeout_s
        self._launch = Launch(
            argv=(
                sys.executable,
                "-m",
                "service.screening.child",
                "{fd}",
                "{parent}",
                "{shared}",
                *(str(number) for number in astuple(limits)),
                *([equipment.to_argument()] if equipment is not None else []),
            ),
            vocabulary=vocabulary(limits),
            # One malloc arena: each further one takes 64 MB of the child's address space for nothing. What small
            # images take is kept for the next one, for fresh pages cost as much as decoding; large ones give it back.
            environ=bare_environ(
                MALLOC_ARENA_MAX="1",
                OPENBLAS_NUM_THREADS="1",
                MALLOC_MMAP_THRESHOLD_=str(LARGE_BYTES),
                MALLOC_TRIM_THRESHOLD_=str(KEPT_BYTES),
            ),
            start_s=START_S,
            # A child at work is timed image by image; silence is for one that hangs while idle.
            silence_s=2 * timeout_s + 10.0,
            told=told,
        )
        self._slots = [Slot() for _ in range(children)]
        self.losses: Counter[str] = Counter()
        """Children that died or were killed, by cause; those that were replaced in good health are not among them."""
        self._idle: Turns[Slot] = Turns()
        self._ids = itertools.count(1)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._open = False

    @property
    def ready(self) -> bool:
        """True while at least one child can take an image."""
        return self._open and any(slot.alive for slot in self._slots)

    async def start(self) -> None:
        """Start every child. Raises ScreeningLost where none comes up."""
        self._open = True
        self._idle = Turns()
        for slot in self._slots:
            self._idle.give(slot)
        await asyncio.gather(*(self._child_of(slot) for slot in self._slots), return_exceptions=True)
        if not self.ready:
            await self.close()
            raise ScreeningLost("The image screening does not start.")

    async def close(self) -> None:
        """End every child. What is under way ends with ScreeningLost."""
        self._open = False
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(slot.stop() for slot in self._slots))
        self._idle.give(Slot())  # wakes whoever waits for a slot

    @property
    def detectors(self) -> tuple[Detector, ...]:
        """What the children look with, as one that lives says; empty while none does."""
        for slot in self._slots:
            if slot.child is not None and slot.child.alive:
                return slot.child.hello.detectors
        return ()

    @property
    def sandbox(self) -> tuple[Measure, ...]:
        """What confines the children, as one that lives says; empty while none does."""
        for slot in self._slots:
            if slot.child is not None and slot.child.alive:
                return slot.child.hello.sandbox
        return ()

    async def clean(
        self, images: Sequence[bytes], looks: Looks = NO_LOOKS, *, tenant: str = ""
    ) -> list[Cleaned]:
        """The images as pixels, in their order, with what `looks` asks for; the same bytes are decoded once.

        Tenants take turns, one image each.

        Raises ImageRejected for the first image (in their order) that is refused, its `index` set, and
        ScreeningLost. Cancelling is safe: a child at work finishes what it holds before it takes another.
        """
        places: dict[bytes, list[int]] = {}
        for index, image in enumerate(images):
            places.setdefault(image, []).append(index)
        results: dict[bytes, Cleaned] = {}
        failures: dict[int, BaseException] = {}
        # A call queues with a few takers only, so that its thousand images do not shut out another's one.
        left = iter(places)
        takers = min(len(self._slots), len(places))
        async with asyncio.TaskGroup() as group:
            for _ in range(takers):
                group.create_task(self._take(tenant, left, looks, places, results, failures))
        if failures:
            raise failures[min(failures)]
        return [results[image] for image in images]

    async def reencode(self, image: bytes, form: ImageFormat | None = None, *, tenant: str = "") -> Reencoded:
        """The image as a new file of its pixels alone, of `form` or of the format that it had.

        Raises ImageRejected, ScreeningLost. Cancelling is safe, as with `clean`.
        """
        check_bytes(len(image), self.limits)
        request = EncodeRequest(next(self._ids), image, form or "")
        return await self._in_child(tenant, request, partial(self._trust_file, form=form))

    async def _take(
        self,
        tenant: str,
        left: Iterator[bytes],
        looks: Looks,
        places: dict[bytes, list[int]],
        results: dict[bytes, Cleaned],
        failures: dict[int, BaseException],
    ) -> None:
        """Clean image after image until none is left or one failed.

        They are taken in order: those before a failed one are done or under way, and the first failure is
        certain.
        """
        for image in left:
            index = places[image][0]
            try:
                check_bytes(len(image), self.limits)
                request = CleanRequest(next(self._ids), image, looks)
                trust = partial(self._trust_pixels, looks=looks)
                results[image] = await self._in_child(tenant, request, trust)
            except ImageRejected as exc:
                exc.index = index
                failures[index] = exc
            except ScreeningLost as exc:
                failures[index] = exc
            if failures:
                return

    async def _in_child(
        self, tenant: str, request: CleanRequest | EncodeRequest, trust: Trust[Result]
    ) -> Result:
        """One image in the next child that is free."""
        slot = await self._idle.take(tenant)
        if not self._open:
            self._idle.give(slot)  # wakes the next one who waits, to the same end
            raise ScreeningLost
        # A task of its own: if the caller goes away, the slot is free again only when its child is.
        task = self._spawn(self._in_slot(slot, request, trust))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled() and not self._open:  # by `close`, not by our caller
                raise ScreeningLost from None
            raise

    async def _in_slot(
        self, slot: Slot, request: CleanRequest | EncodeRequest, trust: Trust[Result]
    ) -> Result:
        """One image in one slot, which is then handed back, with a fresh child where the old one is spent."""
        try:
            return await self._ask(slot, request, trust)
        finally:
            slot.images += 1
            if slot.alive and slot.images < RECYCLE_IMAGES:
                self._idle.give(slot)
            elif self._open:
                self._spawn(self._replace(slot))

    async def _ask(self, slot: Slot, request: CleanRequest | EncodeRequest, trust: Trust[Result]) -> Result:
        try:
            child = await self._child_of(slot)
        except ChildLost as exc:
            raise ScreeningLost from exc
        try:
            async with asyncio.timeout(self.timeout_s):
                reply = await child.ask(request)
        except TimeoutError:
            child.kill("took too long over an image", Cause.OVERDUE)
            raise reject(
                "timeout",
                f"The image took more than {self.timeout_s:g} s. Scale it down or save it again.",
            ) from None
        except ChildLost:
            if not self._open:
                raise ScreeningLost from None
            raise _crashed() from None
        if isinstance(reply, Rejected) and reply.reason in REASONS:
            if reply.spent:
                child.kill("its decoder choked on an image", Cause.DECODER)
            raise reject(reply.reason, reply.detail[:DETAIL_CHARACTERS], reply.limit)
        trusted = trust(slot, reply)
        if trusted is None:  # a child that says what it should not is not asked again
            child.kill("gave a reply that makes no sense", Cause.PROTOCOL)
            raise _crashed()
        return trusted

    def _trust_pixels(self, slot: Slot, reply: object, looks: Looks) -> Cleaned | None:
        if not (
            slot.child is not None
            and slot.region is not None
            and isinstance(reply, CleanReply)
            and reply.columns >= 1
            and reply.rows >= 1
            and reply.columns * reply.rows <= MAX_CLEAN_PIXELS
            and self._may_describe(reply)
            and _may_stand(reply.findings, slot.child.hello.detectors, looks)
            and sum(map(len, reply.text)) <= (MAX_TEXT_CHARACTERS if looks.text is not ImageText.OFF else 0)
        ):
            return None
        pixels = slot.region.take(reply.columns * reply.rows * 3)
        return Cleaned(
            Pixels(reply.columns, reply.rows, pixels),
            reply.width,
            reply.height,
            _format(reply.format),
            reply.metadata,
            reply.trailing_bytes,
            reply.findings,
            reply.text,
        )

    def _trust_file(self, _slot: Slot, reply: object, form: ImageFormat | None) -> Reencoded | None:
        if not (
            isinstance(reply, EncodeReply)
            and self._may_describe(reply)
            and form in (None, reply.format)
            and len(reply.image) <= self.limits.bytes
            and reply.image.startswith(SIGNATURES[_format(reply.format)])
        ):
            return None
        return Reencoded(
            reply.image,
            _format(reply.format),
            reply.width,
            reply.height,
            reply.metadata,
            reply.trailing_bytes,
        )

    def _may_describe(self, reply: CleanReply | EncodeReply) -> bool:
        """Whether there may be such an image."""
        return (
            1 <= reply.width <= self.limits.side
            and 1 <= reply.height <= self.limits.side
            and reply.format in FORMATS
            and reply.trailing_bytes >= 0
            and set(reply.metadata) <= set(METADATA)
        )

    async def _child_of(self, slot: Slot) -> Child:
        """The slot's child, started anew where there is none alive. Raises ChildLost."""
        async with slot.starting:
            if slot.child is not None and slot.child.alive:
                return slot.child
            child = await slot.start(self._launch)
            child.lost.add_done_callback(lambda _: self._notice_loss(slot, child))
            return child

    def _notice_loss(self, slot: Slot, child: Child) -> None:
        """A child that dies idle is replaced before anybody needs it."""
        if self._open:
            if child.cause is not None and child.cause is not Cause.STOPPED:
                self.losses[child.cause] += 1
            self._spawn(self._heal(slot))

    async def _replace(self, slot: Slot) -> None:
        """A fresh child for a slot that is in nobody's hands; then it is idle again, even if that failed."""
        try:
            async with slot.starting:
                await slot.stop()
            await self._heal(slot)
        finally:
            self._idle.give(slot)

    async def _heal(self, slot: Slot) -> None:
        """Start a child where one was lost. One that does not start is tried again with the next image."""
        try:
            await self._child_of(slot)
        except ChildLost:
            return

    def _spawn(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        """A task that outlives its caller but not `close`."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen: its caller may be gone


def _may_stand(findings: Findings, detectors: tuple[Detector, ...], looks: Looks) -> bool:
    """Whether a child may have found this: its own detectors, real scores, rules that are names, and nobody silent.

    A detector of ours that was asked gives a signal or has failed: an image never passes for want of an answer.
    """
    heard = {*findings.failed, *(signal.detector for signal in findings.signals)}
    if not (heard.issuperset(RISK_DETECTORS) if looks.risk else not findings.signals):
        return False
    names = {detector.name for detector in detectors}
    return names.issuperset(findings.failed) and all(
        signal.detector in names and 0.0 <= signal.score <= 1.0 and RULE.fullmatch(signal.rule)
        for signal in findings.signals
    )


def _format(name: str) -> ImageFormat:
    (form,) = (form for form in FORMATS if form == name)
    return form


def _crashed() -> ImageRejected:
    return reject("crashed", "Decoding the image failed. Save it again as PNG or JPEG.")
