"""The gateway's side of reading texts: one child, one request at a time, and a limit on its time.

A child that took too long is killed, one that died is replaced. Texts that it held were not read: every detector has
failed on them, and the tenant's policy says what that means; they are not sent again, for it would end the same way.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from service.errors import ScreeningLost
from service.processes.children import Cause, Child, ChildLost, Launch, bare_environ, start_child
from service.processes.sandbox import Measure
from service.processes.wire import Detector
from service.screening.diary import Diary
from service.screening.reading import MOST_CHARACTERS, VOCABULARY, OwnList, ReadReply, ReadRequest
from service.screening.signals import Findings
from service.screening.turns import Turns

START_S = 30.0
OURS = ""
"""Waits for a turn as tenants do, to start a child."""
RULE = re.compile(r"[a-z0-9_.-]{0,64}")


class Readers:
    """Reads untrusted texts. Belongs to the event loop on which it was started."""

    def __init__(self, *, timeout_s: float, told: Callable[[str], None] | None = None) -> None:
        """`timeout_s` is for one request to the child; `told` gets each line of its stderr."""
        self._timeout_s = timeout_s
        self._launch = Launch(
            argv=(sys.executable, "-m", "service.screening.reading", "{fd}", "{parent}"),
            vocabulary=VOCABULARY,
            environ=bare_environ(MALLOC_ARENA_MAX="1", OPENBLAS_NUM_THREADS="1"),
            start_s=START_S,
            silence_s=2 * timeout_s + 10.0,
            told=told,
        )
        self._diary = Diary("texts")
        self._child: Child | None = None
        self.losses: Counter[str] = Counter()
        """Children that died or were killed, by cause."""
        self._turns: Turns[None] = Turns()
        self._turns.give(None)
        self._ids = itertools.count(1)
        self._healing: asyncio.Task[None] | None = None
        self._open = False

    @property
    def ready(self) -> bool:
        return self._child is not None and self._child.alive

    @property
    def detectors(self) -> tuple[Detector, ...]:
        """What the child reads with; empty while there is none."""
        return self._child.hello.detectors if self._child is not None and self._child.alive else ()

    @property
    def sandbox(self) -> tuple[Measure, ...]:
        """What confines the child; empty while there is none."""
        return self._child.hello.sandbox if self._child is not None and self._child.alive else ()

    async def start(self) -> None:
        """Start the child. Raises ScreeningLost where it does not come up."""
        self._open = True
        async with self._turns.turn(OURS):
            await self._living()

    async def close(self) -> None:
        """End the child. What is under way ends with ScreeningLost."""
        self._open = False
        if self._healing is not None:
            self._healing.cancel()
        if self._child is not None:
            await self._child.stop()

    async def read(
        self,
        texts: Sequence[str],
        *,
        query: str | None = None,
        lists: tuple[OwnList, ...] = (),
        tenant: str = "",
    ) -> tuple[Findings, ...]:
        """One `Findings` for each text, in order; tenants take turns, some texts each.

        Raises ScreeningLost where no child can be had.
        """
        found: list[Findings] = []
        for batch in _batches(texts):
            async with self._turns.turn(tenant):
                found += await self._ask(batch, query, lists)
        return tuple(found)

    async def _ask(
        self, texts: tuple[str, ...], query: str | None, lists: tuple[OwnList, ...]
    ) -> tuple[Findings, ...]:
        child = await self._living()
        names = tuple(detector.name for detector in child.hello.detectors)
        unread = (Findings(failed=names),) * len(texts)
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await child.ask(ReadRequest(next(self._ids), texts, query, lists))
        except TimeoutError:
            child.kill("took too long over a text", Cause.OVERDUE)
            return unread
        except ChildLost:
            if not self._open:
                raise ScreeningLost from None
            return unread
        if (
            isinstance(reply, ReadReply)
            and len(reply.findings) == len(texts)
            and all(_may_stand(findings, names) for findings in reply.findings)
        ):
            return reply.findings
        child.kill("gave a reply that makes no sense", Cause.PROTOCOL)
        return unread

    async def _living(self) -> Child:
        """The child, started anew where it is gone. Call it in turn. Raises ScreeningLost."""
        if not self._open:
            raise ScreeningLost
        if self._child is not None and self._child.alive:
            return self._child
        if self._child is not None:
            await self._child.stop()
        try:
            self._child = await start_child(self._launch)
        except ChildLost as exc:
            raise ScreeningLost("The text screening does not start.") from exc
        self._diary.tell_confinement(self._child)
        child = self._child
        child.lost.add_done_callback(lambda _: self._notice_loss(child))
        return child

    def _notice_loss(self, child: Child) -> None:
        """A child that dies idle is replaced before anybody needs it."""
        if self._open:
            if child.cause is not None and child.cause is not Cause.STOPPED:
                self.losses[child.cause] += 1
            self._healing = asyncio.get_running_loop().create_task(self._heal())

    async def _heal(self) -> None:
        try:
            async with self._turns.turn(OURS):
                await self._living()
        except ScreeningLost:
            return  # tried again with the next text


def _batches(texts: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The texts in order, so many at a time that nobody waits long for another's."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        if batch and characters + len(text) > MOST_CHARACTERS:
            yield tuple(batch)
            batch, characters = [], 0
        batch.append(text)
        characters += len(text)
    if batch:
        yield tuple(batch)


def _may_stand(findings: Findings, names: tuple[str, ...]) -> bool:
    """Whether a child may have found this: its own detectors, real scores, rules that are names."""
    return set(names).issuperset(findings.failed) and all(
        signal.detector in names and 0.0 <= signal.score <= 1.0 and RULE.fullmatch(signal.rule) is not None
        for signal in findings.signals
    )
