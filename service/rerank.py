"""The hot path, in order of time: the only file that knows it.

A database connection is never held while a worker computes. What was held is settled in the same transaction
that writes the entry, and the answer leaves after it; a refusal or a failure is settled with its own entry.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from models import ModelFailed, Scores
from service.errors import ImageRejected, describe
from service.fleet.router import Party
from service.jobs import score_ask
from service.watch import metrics

if TYPE_CHECKING:
    from models import Pixels
    from service.asks import Ask, Exchange
    from service.bindings import Bindings
    from service.fleet.router import Fleet
    from service.ledger import Ledger
    from service.screening.fetch import Fetcher
    from service.screening.pool import Screen
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


class Rerank:
    """From an ask to a ranking. One instance serves every request."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        screen: Screen,
        fleet: Fleet,
        bindings: Bindings,
        fetch: Fetcher,
        deadline_s: float,
    ) -> None:
        self.ledger = ledger
        self.screen = screen
        self.fleet = fleet
        self.bindings = bindings
        self.fetch = fetch
        self.deadline_s = deadline_s

    async def __call__(self, exchange: Exchange, ask: Ask) -> Ranking:
        """Bind to the session, if one is named, then rank. Raises what `service.errors.TABLE` knows.

        A session that is not open costs nothing: it is looked for before anything is held.
        """
        assert exchange.caller is not None
        if ask.session is None:
            return await self._rank(exchange, exchange.caller, ask)
        with exchange.stage("session"):
            binding = await self.bindings.use(exchange.caller.tenant, ask.session)
        with binding:
            return await self._rank(exchange, exchange.caller, ask)

    async def _rank(self, exchange: Exchange, caller: Caller, ask: Ask) -> Ranking:
        """Hold, fetch, clean, score, rank, settle.

        Nothing stays held, but where the database goes away between hold and settle: then until the hold's lease ends.
        """
        with exchange.stage("hold"):
            hold = await self.ledger.hold(exchange, ask, self.fleet.card)
        try:
            async with exchange.while_connected():
                ask = await self.fetch(exchange, caller.policy.fetches_from, ask)
                with exchange.stage("clean"):
                    pixels = await self._clean(ask)
                with exchange.stage("score"):
                    party = Party.of(str(caller.tenant), caller.policy)
                    left_s = partial(self._left_s, exchange)
                    scored = await score_ask(
                        self.fleet, str(caller.tenant), ask, pixels, party=party, left_s=left_s
                    )
            ranking = rank(scored.scores, ask.top_n, ranked=ask.ranked)
        except BaseException as exc:
            # Shielded: however this ends, no slot stays held and no decision is without its entry.
            await asyncio.shield(self.ledger.settle_refused(exchange, hold, ask, describe(exc)))
            raise
        with exchange.stage("settle"):
            await asyncio.shield(
                self.ledger.settle_answered(exchange, hold, ask, scored, ranking, self.fleet.card)
            )
        exchange.stages_ms |= {"queue": scored.queue_ms, "worker": scored.worker_ms}
        for stage, elapsed_ms in exchange.stages_ms.items():
            metrics.STAGE_SECONDS.labels(stage).observe(elapsed_ms / 1000)
        metrics.DOCUMENTS.inc(len(ask.documents))
        metrics.IMAGES.inc(len(ask.images))
        metrics.WORKER_RETRIES.inc(int(scored.retried))
        return ranking

    async def _clean(self, ask: Ask) -> dict[str, Pixels]:
        """Bytes to pixels, by the item's `where`, in a screening child. Raises `ImageRejected` with the field of the image."""
        images = ask.images
        try:
            cleaned = await self.screen.clean([item.image for item in images if item.image is not None])
        except ImageRejected as exc:
            exc.field = images[exc.index].image_where if exc.index is not None else None
            raise
        return {item.where: clean.pixels for item, clean in zip(images, cleaned, strict=True)}

    def _left_s(self, exchange: Exchange) -> float:
        return max(0.0, self.deadline_s - exchange.elapsed_ms / 1000)


def rank(scores: Scores, top_n: int, *, ranked: bool = True) -> Ranking:
    """The best `top_n` by falling margin, or all as they came. Raises `ModelFailed` where a margin is not finite."""
    margins = scores.margins
    if not all(map(math.isfinite, margins)):
        raise ModelFailed
    order = list(range(len(margins)))
    if ranked:
        order.sort(key=lambda index: -margins[index])  # stable: ties keep their order
        del order[top_n:]
    return Ranking(
        places=tuple(Place(index, sigmoid(margins[index])) for index in order),
        input_tokens=scores.input_tokens,
        image_tokens=scores.image_tokens,
        warnings=tuple(f"documents[{index}] was cut to fit." for index in scores.truncated),
        computed_tokens=scores.computed_tokens,
        reused_images=scores.reused_images,
    )


def sigmoid(margin: float) -> float:
    """1 / (1 + e^-x) without overflow on either side."""
    if margin >= 0:
        return 1.0 / (1.0 + math.exp(-margin))
    return math.exp(margin) / (1.0 + math.exp(margin))
