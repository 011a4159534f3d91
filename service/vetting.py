"""From untrusted texts and images to clean pixels and a verdict on each, before any model sees one.

Texts are read while images are decoded; text that was read in an image goes the way of all texts. Where the policy says
so, the tenant's own worker is asked what an image shows. What was found before in the same content is not looked for
again (`screening/recall.py`).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from service import questions
from service.errors import ImageRejected
from service.fleet.router import Party
from service.screened import Part, Screened
from service.screening.calibration import load_calibration
from service.screening.judge import Rules, Side, Verdict, judge
from service.screening.reading import OwnList
from service.screening.signals import Findings, Looks, Signal
from service.watch import metrics
from tenants.adaptation import effective
from tenants.kinds import AskModel
from tenants.risk import Action, Category, Mode

if TYPE_CHECKING:
    from collections.abc import Iterable

    from models import Pixels
    from service.asks import Ask, Exchange, RawItem
    from service.fleet.router import Fleet
    from service.processes.wire import Detector
    from service.screening.pool import Screen
    from service.screening.readers import Readers
    from service.screening.recall import Recall
    from tenants.access import Caller
    from tenants.policy import Policy

GREY = (0.3, 0.8)
"""Scores between which the detectors neither clear an image nor are sure of it."""
IN_IMAGE = "image_text"
"""Begins the rule of what was found in text that was read in an image."""
EARLY_CHARACTERS = 32_768
"""So much text is read while quota is being held: some 5 ms of the reader."""
NO_LOOKS = Looks()
NOTHING = Verdict(Action.ALLOW, (), 0.0, ())


Begun = asyncio.Task[list[Part]] | None
"""The reading of an ask's texts, where it has begun."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What was found in an image, and the text that was read in it."""

    findings: Findings
    text: tuple[str, ...]


class Vetting:
    """Screens the items of requests. One instance serves every request."""

    def __init__(
        self, *, screen: Screen, readers: Readers, recall: Recall[Findings | Seen], fleet: Fleet
    ) -> None:
        self._screen = screen
        self._readers = readers
        self._recall = recall
        self._fleet = fleet
        self._tables = load_calibration()

    @contextmanager
    def reading(self, exchange: Exchange, ask: Ask) -> Iterator[Begun]:
        """Begin to read an ask's texts before its quota is held, to be handed to the call; dropped at the block's end.

        Of a long ask nothing is read yet: who is over a limit must not cost more than to be told so.
        """
        items, query = _sided(ask)
        if sum(len(item.text or "") for item, _ in items) > EARLY_CHARACTERS:
            yield None
            return
        begun = asyncio.create_task(self._read_items(exchange.known_caller, items, query, ask.instruction))
        begun.add_done_callback(lambda task: task.cancelled() or task.exception())  # seen, if nobody asks
        try:
            yield begun
        finally:
            begun.cancel()

    async def __call__(
        self,
        exchange: Exchange,
        ask: Ask,
        *,
        left_s: Callable[[], float],
        begun: Begun = None,
    ) -> Screened:
        """Screen all of an ask. Raises `ContentRefused` besides what `screen` raises.

        Where scores are asked for in the request's order there is no place for a gap, nor for another order: a document
        is judged there as a query is.
        """
        items, query = _sided(ask)
        screened = await self.screen(
            exchange, items, query=query, instruction=ask.instruction, left_s=left_s, begun=begun
        )
        screened.refuse()
        return screened

    async def screen(
        self,
        exchange: Exchange,
        items: Sequence[tuple[RawItem, Side]],
        *,
        left_s: Callable[[], float],
        query: str | None = None,
        instruction: str | None = None,
        flags_only: bool = False,
        begun: Begun = None,
    ) -> Screened:
        """A verdict on each text and image; nothing is refused yet. The exchange keeps what was decided.

        With `flags_only` no action is harder than to flag. `query` is what the texts are to be ranked by; an
        `instruction` is judged with the first item. Raises `ImageRejected` with the field of the image, `ScreeningLost`
        and, where the model is asked, what `Fleet.score` raises, each of its questions having until `left_s()` seconds
        from when it is put.
        """
        caller = exchange.known_caller
        with exchange.stage("clean"):
            reading = begun or self._read_items(caller, items, query, instruction)
            parts, pixels = await self._look(caller, items, query, reading)
        versions = {mode: self._version(mode) for mode in Mode}
        rules = Rules.of(
            caller.policy,
            lambda category, mode: effective(
                caller.policy, caller.adapted, category, mode, detectors=versions[mode]
            ),
        )
        if flags_only:
            rules = rules.told_only()
        verdicts = [self._judge(part, rules) for part in parts]
        for place, part in enumerate(parts):
            if part.mode is Mode.IMAGE and _is_to_ask(caller.policy.ask_model, verdicts[place]):
                with exchange.stage("ask"):
                    told = await self._ask(caller, pixels[items[part.item][0].where], left_s())
                findings = replace(part.findings, signals=part.findings.signals + told)
                parts[place] = replace(part, findings=findings)
                verdicts[place] = self._judge(parts[place], rules)
        screened = Screened(pixels, tuple(zip(parts, verdicts, strict=True)), rules, versions)
        exchange.screened = screened
        _count(screened)
        return screened

    def _version(self, mode: Mode) -> str:
        """Of all that scores such parts: with another one, what thresholds have learnt means something else."""
        detectors = self._readers.detectors if mode is Mode.TEXT else self._screen.detectors
        told = repr((self._tables.digest, _versions(detectors))).encode()
        return hashlib.sha256(told).hexdigest()[:16]

    def _judge(self, part: Part, rules: Rules) -> Verdict:
        if not part.findings.signals and not part.findings.failed:
            return NOTHING
        return judge(part.findings, rules, self._tables, where=part.where, mode=part.mode, side=part.side)

    async def _look(
        self,
        caller: Caller,
        items: Sequence[tuple[RawItem, Side]],
        query: str | None,
        reading: Awaitable[list[Part]],
    ) -> tuple[list[Part], dict[str, Pixels]]:
        """The parts, by item, and the clean images by their items' `where`."""
        if all(item.image is None for item, _ in items):
            return await reading, {}

        async def read() -> list[Part]:
            return await reading

        try:
            async with asyncio.TaskGroup() as group:
                texts = group.create_task(read())
                images = group.create_task(self._see_items(caller, items, query))
        except ExceptionGroup as failures:  # the other was cancelled: what failed first is the answer
            raise failures.exceptions[0] from None
        seen, pixels = images.result()
        return sorted(texts.result() + seen, key=lambda part: part.item), pixels

    async def _read_items(
        self,
        caller: Caller,
        items: Sequence[tuple[RawItem, Side]],
        query: str | None,
        instruction: str | None,
    ) -> list[Part]:
        """The items' texts. An instruction is there to speak of ranking."""
        texts = [(place, item, side, item.text) for place, (item, side) in enumerate(items) if item.text]
        wanted = [text for *_, text in texts] + ([instruction] if instruction else [])
        found = await self._read(caller, wanted, query)
        parts = [
            Part(place, item.where, Mode.TEXT, side, each)
            for (place, item, side, _), each in zip(texts, found, strict=False)
        ]
        if instruction:
            findings = _without(found[-1], Category.INJECTION)
            parts.insert(0, Part(0, "instruction", Mode.TEXT, Side.QUERY, findings))
        return parts

    async def _see_items(
        self, caller: Caller, items: Sequence[tuple[RawItem, Side]], query: str | None
    ) -> tuple[list[Part], dict[str, Pixels]]:
        """The items' images, and the text in them."""
        images = [(place, item, side) for place, (item, side) in enumerate(items) if item.image is not None]
        seen, pixels = await self._clean(caller, [item for _, item, _ in images])
        texts = ["\n".join(each.text) for each in seen]
        found = iter(await self._read(caller, [text for text in texts if text], query))
        parts = []
        for (place, item, side), each, text in zip(images, seen, texts, strict=True):
            where = item.image_where or item.where
            parts.append(Part(place, where, Mode.IMAGE, side, each.findings))
            if text:
                read_there = _in_image(next(found))
                parts.append(Part(place, where, Mode.TEXT, side, read_there, in_image=True))
        return parts, pixels

    async def _read(self, caller: Caller, texts: Sequence[str], query: str | None) -> list[Findings]:
        """What is found in each text; equal ones are read once, and not again while they are remembered."""
        if not texts:
            return []
        tenant, lists = str(caller.tenant), own_lists(caller.policy)
        context = repr((_versions(self._readers.detectors), query, lists)).encode("utf-8", "surrogatepass")
        keys = [self._recall.key(tenant, b"text\0" + _bytes(text), context) for text in texts]
        known: dict[bytes, Findings] = {}
        unread: dict[bytes, str] = {}
        for key, text in zip(keys, texts, strict=True):
            found = self._recall.find(tenant, key)
            if isinstance(found, Findings):
                known[key] = found
            else:
                unread[key] = text
        metrics.note_kept("text_findings", hits=len(known), misses=len(unread))
        read = await self._readers.read(tuple(unread.values()), query=query, lists=lists, tenant=tenant)
        for key, found in zip(unread, read, strict=True):
            known[key] = found
            if not found.failed:
                self._recall.keep(tenant, key, found)
        return [known[key] for key in keys]

    async def _clean(self, caller: Caller, items: Sequence[RawItem]) -> tuple[list[Seen], dict[str, Pixels]]:
        """What is seen in each image, and its pixels. What is known already is decoded and not looked at again."""
        tenant = str(caller.tenant)
        policy = caller.policy
        risk = any(policy.action(category) is not Action.ALLOW for category in Category)  # else nobody asks
        looks = Looks(risk=risk, text=policy.image_text)
        context = repr((_versions(self._screen.detectors), looks)).encode()
        keys = [self._recall.key(tenant, b"image\0" + (item.image or b""), context) for item in items]
        seen: dict[int, Seen] = {}
        for place, key in enumerate(keys):
            found = self._recall.find(tenant, key)
            if isinstance(found, Seen):
                seen[place] = found
        metrics.note_kept("image_findings", hits=len(seen), misses=len(items) - len(seen))
        pixels: dict[str, Pixels] = {}
        known = sorted(seen)
        for places, wanted in ((known, NO_LOOKS), ([p for p in range(len(items)) if p not in seen], looks)):
            try:
                images = [items[place].image or b"" for place in places]
                cleaned = await self._screen.clean(images, wanted, tenant=tenant)
            except ImageRejected as exc:
                exc.field = items[places[exc.index]].image_where if exc.index is not None else None
                raise
            for place, each in zip(places, cleaned, strict=True):
                pixels[items[place].where] = each.pixels
                if place not in seen:
                    seen[place] = Seen(each.findings, each.text)
                    if not each.findings.failed:
                        self._recall.keep(tenant, keys[place], seen[place])
        return [seen[place] for place in range(len(items))], pixels

    async def _ask(self, caller: Caller, image: Pixels, left_s: float) -> tuple[Signal, ...]:
        """What the tenant's own worker says about an image."""
        scored = await self._fleet.score(
            str(caller.tenant),
            questions.question(image),
            deadline_s=left_s,
            party=Party.of(str(caller.tenant), caller.policy),
        )
        return questions.answers(scored.scores.margins)


def _sided(ask: Ask) -> tuple[list[tuple[RawItem, Side]], str | None]:
    """An ask's items, each with how it is judged, and the one query that documents are compared with."""
    queries = len(ask.items) - len(ask.documents)
    side = Side.DOCUMENT if ask.ranked else Side.QUERY
    items = [(item, Side.QUERY if place < queries else side) for place, item in enumerate(ask.items)]
    return items, None if ask.queries else ask.query.text


def own_lists(policy: Policy) -> tuple[OwnList, ...]:
    """A tenant's own words as the reader takes them."""
    return tuple(OwnList(category, words) for category, words in policy.lexicons if words)


def _is_to_ask(asks: AskModel, verdict: Verdict) -> bool:
    if asks is not AskModel.GREY:
        return asks is AskModel.ALWAYS
    low, high = GREY
    return any(low <= risk.score < high and risk.category in questions.ASKED for risk in verdict.risks)


def _without(findings: Findings, category: Category) -> Findings:
    kept = tuple(signal for signal in findings.signals if signal.category is not category)
    return replace(findings, signals=kept)


def _in_image(findings: Findings) -> Findings:
    """The same, by rules that say where it was found."""
    signals = tuple(
        replace(signal, rule=f"{IN_IMAGE}.{signal.rule or signal.detector}") for signal in findings.signals
    )
    return replace(findings, signals=signals)


def _versions(detectors: Iterable[Detector]) -> tuple[tuple[str, bool, str], ...]:
    return tuple((detector.name, detector.active, detector.version) for detector in detectors)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _count(screened: Screened) -> None:
    for reason in screened.reasons:
        category = "none" if reason.category is None else str(reason.category)
        metrics.RISKS.labels(category, str(reason.action)).inc()
    for part, _ in screened.parts:
        for detector in part.findings.failed:
            metrics.DETECTOR_FAILURES.labels(detector).inc()
