"""The hot path, in order of time: the only file that knows it.

A database connection is never held while a worker computes. What was held is settled in the same transaction
that writes the entry, and the answer leaves after it; a refusal or a failure is settled with its own entry.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from models import ModelFailed, Scores
from service.fleet.router import Party
from service.jobs import score_ask
from service.watch import metrics
from tenants.risk import Action

if TYPE_CHECKING:
    from service.asks import Ask, Exchange
    from service.bindings import Bindings
    from service.fleet.router import Fleet
    from service.ledger import Ledger
    from service.screened import Screened
    from service.screening.fetch import Fetcher
    from service.vetting import Begun, Vetting
    from tenants.access import Caller


@dataclass(frozen=True, slots=True)
class Place:
    """One document's place: its index in the request and its relevance, sigmoid(z_yes - z_no)."""

    index: int
    score: float


@dataclass(frozen=True, slots=True)
class Ranking:
    """The answer before it takes a caller's dialect: places by falling relevance, ties in the request's order.

    Of an ask that is not `ranked`, all places in the request's order.
    """

    places: tuple[Place, ...]
    input_tokens: int
    image_tokens: int
    warnings: tuple[str, ...]
    computed_tokens: int
    reused_images: int


@dataclass(frozen=True, slots=True)
class Left:
    """What screening left of an ask: the documents to score, and where each stood in the request."""

    ask: Ask
    indices: tuple[int, ...]
    masked: tuple[int, ...] = ()
    demoted: frozenset[int] = frozenset()

    @staticmethod
    def of(ask: Ask, screened: Screened) -> Left:
        first = len(ask.items) - len(ask.documents)
        masked = {item - first for item in screened.items(Action.MASK)}
        demoted = frozenset(item - first for item in screened.items(Action.DEMOTE))
        indices = tuple(index for index in range(len(ask.documents)) if index not in masked)
        if not masked:
            return Left(ask, indices, demoted=demoted)
        kept = replace(ask, documents=tuple(ask.documents[index] for index in indices))
        return Left(kept, indices, tuple(sorted(masked)), demoted)


class Rerank:
    """From an ask to a ranking. One instance serves every request."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        vetting: Vetting,
        fleet: Fleet,
        bindings: Bindings,
        fetch: Fetcher,
        deadline_s: float,
    ) -> None:
        self.ledger = ledger
        self.vetting = vetting
        self.fleet = fleet
        self.bindings = bindings
        self.fetch = fetch
        self.deadline_s = deadline_s

    async def __call__(self, exchange: Exchange, ask: Ask) -> Ranking:
        """Bind to the session, if one is named, then rank. Raises what `service.errors.TABLE` knows.

        A session that is not open costs nothing: it is looked for before anything is held.
        """
        if ask.session is None:
            return await self._rank(exchange, exchange.known_caller, ask)
        with exchange.stage("session"):
            binding = await self.bindings.use(exchange.known_caller.tenant, ask.session)
        with binding:
            return await self._rank(exchange, exchange.known_caller, ask)

    async def _rank(self, exchange: Exchange, caller: Caller, ask: Ask) -> Ranking:
        """Short texts are read while quota is held: both are waits, for different processes."""
        with self.vetting.reading(exchange, ask) as begun:
            return await self._rank_read(exchange, caller, ask, begun)

    async def _rank_read(self, exchange: Exchange, caller: Caller, ask: Ask, begun: Begun) -> Ranking:
        """Hold, fetch, screen, score, rank, settle.

        Nothing stays held, but where the database goes away between hold and settle: then until the hold's lease ends.
        """
        async with self.ledger.holding(exchange, ask, self.fleet.card) as held:
            left_s = partial(self._left_s, exchange)
            held.ask = ask = await self.fetch(exchange, caller.policy.fetches_from, ask)
            screened = await self.vetting(exchange, ask, left_s=left_s, begun=begun)
            left = Left.of(ask, screened)
            with exchange.stage("score"):
                party = Party.of(str(caller.tenant), caller.policy)
                scored = await score_ask(
                    self.fleet, str(caller.tenant), left.ask, screened.pixels, party=party, left_s=left_s
                )
            ranking = rank(scored.scores, ask.top_n, left, ranked=ask.ranked)
        with exchange.stage("settle"):
            await asyncio.shield(
                self.ledger.settle_answered(exchange, held.hold, ask, scored, ranking, self.fleet.card)
            )
        exchange.stages_ms |= {"queue": scored.queue_ms, "worker": scored.worker_ms}
        metrics.note_stages(exchange.stages_ms)
        metrics.DOCUMENTS.inc(len(ask.documents))
        metrics.note_images(str(caller.tenant), len(ask.images))
        metrics.note_tokens(
            str(caller.tenant),
            charged=ranking.input_tokens,
            images=ranking.image_tokens,
            computed=ranking.computed_tokens,
        )
        metrics.WORKER_RETRIES.inc(int(scored.retried))
        return ranking

    def _left_s(self, exchange: Exchange) -> float:
        return max(0.0, self.deadline_s - exchange.elapsed_ms / 1000)


def rank(scores: Scores, top_n: int, left: Left, *, ranked: bool = True) -> Ranking:
    """The best `top_n` of what is left, by falling margin, or all as they came; those that are demoted come last.

    Raises `ModelFailed` where a margin is not finite.
    """
    margins = scores.margins
    if not all(map(math.isfinite, margins)):
        raise ModelFailed
    order = list(range(len(margins)))
    if ranked:
        # Stable: ties keep their order.
        order.sort(key=lambda place: (left.indices[place] in left.demoted, -margins[place]))
        del order[top_n:]
    return Ranking(
        places=tuple(Place(left.indices[place], sigmoid(margins[place])) for place in order),
        input_tokens=scores.input_tokens,
        image_tokens=scores.image_tokens,
        warnings=(
            *(f"documents[{left.indices[place]}] was cut to fit." for place in scores.truncated),
            *(f"documents[{index}] was left out: its content is not allowed here." for index in left.masked),
        ),
        computed_tokens=scores.computed_tokens,
        reused_images=scores.reused_images,
    )


def sigmoid(margin: float) -> float:
    """1 / (1 + e^-x) without overflow on either side."""
    if margin >= 0:
        return 1.0 / (1.0 + math.exp(-margin))
    return math.exp(margin) / (1.0 + math.exp(margin))
