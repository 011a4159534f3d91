"""Screening by itself: what was measured of texts and images, told and never acted upon. Holds quota, writes its entry."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from service.screening.judge import Side
from service.watch import metrics
from tenants.risk import Category, Mode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.asks import Ask, Exchange
    from service.ledger import Ledger
    from service.screened import Screened
    from service.screening.fetch import Fetcher
    from service.vetting import Vetting


@dataclass(frozen=True, slots=True)
class Measured:
    """One category of one input: the higher score of its parts, in which modes it was measured, and whether it counts."""

    score: float
    modes: frozenset[Mode]
    stopped: bool
    """Whether a part reached the threshold that is in force for its mode."""


@dataclass(frozen=True, slots=True)
class Opinion:
    """What was measured of one input."""

    flagged: bool
    measured: dict[Category, Measured]
    missing: tuple[str, ...]
    """Detectors that could not look at a part of it."""


class Moderation:
    """From an ask without documents to an opinion on each of its queries. One instance serves every request."""

    def __init__(self, *, ledger: Ledger, vetting: Vetting, fetch: Fetcher, deadline_s: float) -> None:
        self._ledger = ledger
        self._fetch = fetch
        self._vetting = vetting
        self._deadline_s = deadline_s

    async def __call__(
        self, exchange: Exchange, ask: Ask, inputs: Sequence[Sequence[int]]
    ) -> tuple[Opinion, ...]:
        """Hold, fetch, screen, settle. `inputs` are the places of each input's items among the ask's.

        Raises what `Vetting.screen` and `Ledger.hold` raise. Nothing is refused for what it holds.
        """
        async with self._ledger.holding(exchange, ask, None) as held:
            held.ask = await self._fetch(exchange, exchange.known_caller.policy.fetches_from, ask)
            screened = await self._vetting.screen(
                exchange,
                [(item, Side.DOCUMENT) for item in held.ask.items],
                left_s=partial(self._left_s, exchange),
                flags_only=True,
            )
        with exchange.stage("settle"):
            await asyncio.shield(self._ledger.settle_unranked(exchange, held.hold, held.ask))
        metrics.note_stages(exchange.stages_ms)
        metrics.note_images(str(exchange.known_caller.tenant), len(held.ask.images))
        return tuple(opinion(screened, places) for places in inputs)

    def _left_s(self, exchange: Exchange) -> float:
        return max(0.0, self._deadline_s - exchange.elapsed_ms / 1000)


def opinion(screened: Screened, places: Sequence[int]) -> Opinion:
    """What was measured of the items at these places, taken as one input."""
    parts = [(part, verdict) for part, verdict in screened.parts if part.item in places]
    measured: dict[Category, Measured] = {}
    for part, verdict in parts:
        for risk in verdict.risks:
            before = measured.get(risk.category, Measured(0.0, frozenset(), stopped=False))
            stopped = risk.score >= screened.rules.thresholds[risk.category, part.mode]
            measured[risk.category] = Measured(
                max(before.score, risk.score),
                before.modes | {Mode.IMAGE if part.in_image else part.mode},
                before.stopped or stopped,
            )
    missing = sorted({name for part, _ in parts for name in part.findings.failed})
    return Opinion(any(verdict.reasons for _, verdict in parts), measured, tuple(missing))
