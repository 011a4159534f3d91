"""What of an ask goes to a worker: one job for each distinct query, and their scores put together again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from models import Item, Job, Scores
from service.errors import DocumentTooLong
from service.fleet.router import Scored

if TYPE_CHECKING:
    from models import Pixels
    from service.asks import Ask, RawItem
    from service.fleet.router import Fleet, Party

JOBS_AT_ONCE = 4
"""Of one request, so many jobs may be in line or at the worker: no request fills its tenant's queue."""


@dataclass(frozen=True, slots=True)
class Share:
    """One query's part of an ask: its job, and which of the ask's documents are the candidates."""

    job: Job
    documents: tuple[int, ...]


def shares(ask: Ask, pixels: Mapping[str, Pixels]) -> tuple[Share, ...]:
    """The ask as jobs. `pixels` has the clean image of every item that has one, by the item's `where`."""

    def item(raw: RawItem) -> Item:
        return Item(raw.text, pixels.get(raw.where))

    together: dict[tuple[str | None, str | None], list[int]] = {}
    for index in range(len(ask.documents)):
        query = ask.queries[index] if ask.queries else ask.query
        together.setdefault((query.text, query.sent_image), []).append(index)
    return tuple(
        Share(
            Job(
                item(ask.queries[documents[0]] if ask.queries else ask.query),
                tuple(item(ask.documents[index]) for index in documents),
                ask.instruction,
                ask.max_tokens_per_doc,
                ask.truncate,
            ),
            tuple(documents),
        )
        for documents in together.values()
    )


async def score_ask(
    fleet: Fleet,
    tenant: str,
    ask: Ask,
    pixels: Mapping[str, Pixels],
    *,
    party: Party,
    left_s: Callable[[], float],
) -> Scored:
    """All scores, in the order of the ask's documents. Raises what `Fleet.score` raises, for the first that fails.

    `pixels` has the clean image of every item that has one, by the item's `where`. Each job has until `left_s()`
    seconds from when it is its turn.
    """
    parts = shares(ask, pixels)
    if not parts:  # screening left no document: nothing to score, and nobody to ask
        return Scored(Scores((), 0, 0, 0), worker=0, queue_ms=0.0, worker_ms=0.0)
    room = asyncio.Semaphore(JOBS_AT_ONCE)

    async def score(part: Share) -> Scored:
        async with room:
            try:
                return await fleet.score(
                    tenant, part.job, deadline_s=left_s(), session=ask.session, party=party
                )
            except DocumentTooLong as exc:
                index = part.documents[exc.index]
                where = ask.documents[index].where
                raise DocumentTooLong(index, exc.limit_tokens, where=where) from None

    if len(parts) == 1:
        return await score(parts[0])
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(score(part)) for part in parts]
    except ExceptionGroup as failures:  # the others were cancelled: what failed first is the answer
        raise failures.exceptions[0] from None
    return _together(parts, [task.result() for task in tasks])


def _together(parts: tuple[Share, ...], scored: list[Scored]) -> Scored:
    """Sums, but for the times: of jobs that ran beside each other, the longest."""
    margins: dict[int, float] = {}
    truncated: list[int] = []
    stages_ms: dict[str, float] = {}
    for part, each in zip(parts, scored, strict=True):
        margins |= zip(part.documents, each.scores.margins, strict=True)
        truncated += [part.documents[index] for index in each.scores.truncated]
        for stage, ms in each.scores.stages_ms.items():
            stages_ms[stage] = stages_ms.get(stage, 0.0) + ms
    scores = Scores(
        margins=tuple(margins[index] for index in sorted(margins)),
        input_tokens=sum(each.scores.input_tokens for each in scored),
        image_tokens=sum(each.scores.image_tokens for each in scored),
        computed_tokens=sum(each.scores.computed_tokens for each in scored),
        truncated=tuple(sorted(truncated)),
        reused_images=sum(each.scores.reused_images for each in scored),
        stages_ms=stages_ms,
    )
    return replace(
        scored[-1],
        scores=scores,
        queue_ms=max(each.queue_ms for each in scored),
        worker_ms=max(each.worker_ms for each in scored),
        retried=any(each.retried for each in scored),
    )
