"""The way of one image that is only to be cleaned: the stages of `rerank.py` without a worker."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from service.errors import ImageRejected
from service.watch import metrics

if TYPE_CHECKING:
    from service.asks import Ask, Exchange
    from service.ledger import Ledger
    from service.screening import ImageFormat, Reencoded
    from service.screening.fetch import Fetcher
    from service.screening.pool import Screen


class CleanImage:
    """From an ask whose query is one image to a file of its pixels. One instance serves every request."""

    def __init__(self, *, ledger: Ledger, screen: Screen, fetch: Fetcher) -> None:
        self.ledger = ledger
        self.screen = screen
        self.fetch = fetch

    async def __call__(self, exchange: Exchange, ask: Ask, form: ImageFormat | None) -> Reencoded:
        """Hold, fetch, clean, settle. Raises what `service.errors.TABLE` knows."""
        async with self.ledger.holding(exchange, ask, None) as held:
            held.ask = await self.fetch(exchange, exchange.known_caller.policy.fetches_from, ask)
            with exchange.stage("clean"):
                cleaned = await self._clean(held.ask, form, str(exchange.known_caller.tenant))
        removed = {"removed": list(cleaned.metadata), "trailing_bytes": cleaned.trailing_bytes}
        with exchange.stage("settle"):
            await asyncio.shield(self.ledger.settle_unranked(exchange, held.hold, held.ask, removed))
        metrics.note_stages(exchange.stages_ms)
        metrics.note_images(str(exchange.known_caller.tenant), 1)
        return cleaned

    async def _clean(self, ask: Ask, form: ImageFormat | None, tenant: str) -> Reencoded:
        assert ask.query.image is not None, "fetched, or sent"
        try:
            return await self.screen.reencode(ask.query.image, form, tenant=tenant)
        except ImageRejected as exc:
            exc.field = ask.query.image_where
            raise
