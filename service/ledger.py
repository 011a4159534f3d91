"""What a decision leaves behind: a hold settled, a session opened or closed, and one entry, never with any input in it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.costs import most_tokens
from service.errors import CLIENT_CLOSED, describe
from service.watch import metrics
from tenants.audit import Decision, Entry, micro_units, tell_item
from tenants.errors import QuotaExceeded
from tenants.limits import limits_of
from tenants.sessions import make_session_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from uuid import UUID

    from models import ModelCard
    from service.asks import Ask, Exchange
    from service.errors import Trouble
    from service.fleet.router import Scored
    from service.rerank import Ranking
    from tenants.audit import Audit
    from tenants.evidence import Evidence
    from tenants.quotas import Hold, Quotas
    from tenants.sessions import Session, Sessions

SLACK_S = 30.0
"""How much longer than a request's deadline its slot stays taken, should it never be settled."""


@dataclass(slots=True)
class Held:
    """What is held for an ask, and the ask as it is now: with the images that were fetched for it."""

    hold: Hold
    ask: Ask


class Ledger:
    """Holds quota, settles it, and writes the entry of every decision of a known caller."""

    def __init__(
        self,
        *,
        quotas: Quotas,
        sessions: Sessions,
        audit: Audit,
        evidence: Evidence,
        deadline_s: float,
        model: str,
    ) -> None:
        self.quotas = quotas
        self.evidence = evidence
        self.sessions = sessions
        self.audit = audit
        self.most_s = deadline_s + SLACK_S
        self.model = model

    async def hold(self, exchange: Exchange, ask: Ask, card: ModelCard | None) -> Hold:
        """Reserve what the ask costs at most, and tell the exchange where its caller's limits stand.

        Raises `QuotaExceeded`, `RequestTooCostly`, `DatabaseUnavailable`.
        """
        caller = exchange.known_caller
        tokens = most_tokens(ask, card)
        if card is None:  # the bound is a guess: it reserves all there is, and refuses nothing for good
            tokens = min(tokens, limits_of(caller).at_once("tokens") or tokens)
        try:
            hold = await self.quotas.hold(
                caller, exchange.request_id, images=len(ask.images), tokens=tokens, most_s=self.most_s
            )
        except QuotaExceeded as exc:
            exchange.standings = exc.standings
            for limit in exc.violated:
                metrics.LIMITS.labels(limit, "refused").inc()
            raise
        exchange.standings = hold.standings
        for limit in hold.shadowed:
            metrics.LIMITS.labels(limit, "shadowed").inc()
        return hold

    @asynccontextmanager
    async def holding(self, exchange: Exchange, ask: Ask, card: ModelCard | None) -> AsyncIterator[Held]:
        """Hold what the ask costs while the block works for a caller who is connected, who settles it after the block.

        Where the block raises, what is held is settled as refused, shielded: however it ends, no slot stays held and no
        decision is without its entry. Raises what `hold` and `Exchange.while_connected` raise.
        """
        with exchange.stage("hold"):
            held = Held(await self.hold(exchange, ask, card), ask)
        try:
            async with exchange.while_connected():
                yield held
        except BaseException as exc:
            await asyncio.shield(self.settle_refused(exchange, held.hold, held.ask, describe(exc)))
            raise

    async def settle_answered(
        self,
        exchange: Exchange,
        hold: Hold,
        ask: Ask,
        scored: Scored,
        ranking: Ranking,
        card: ModelCard | None,
    ) -> None:
        """Free the slot and write what was answered, in one transaction: no entry, no answer."""
        entry = await self._entry(
            exchange,
            Decision.ANSWERED,
            code="ok",
            status=200,
            ask=ask,
            ranking=ranking,
            card=card,
            stages_ms={**exchange.stages_ms, "queue": scored.queue_ms, "worker": scored.worker_ms},
            shadowed=hold.shadowed,
        )
        entry_id = await self.quotas.settle(hold, entry, tokens=ranking.input_tokens)
        await self._recorded(exchange, entry_id)

    async def settle_unranked(
        self, exchange: Exchange, hold: Hold, ask: Ask, details: Mapping[str, object] | None = None
    ) -> None:
        """Free the slot and write what was done, in one transaction: for what is screened or cleaned, and not ranked."""
        entry = await self._entry(
            exchange,
            Decision.ANSWERED,
            code="ok",
            status=200,
            ask=ask,
            stages_ms=exchange.stages_ms,
            shadowed=hold.shadowed,
            details=details,
        )
        await self._recorded(exchange, await self.quotas.settle(hold, entry, tokens=0))

    async def settle_refused(self, exchange: Exchange, hold: Hold, ask: Ask, trouble: Trouble) -> None:
        """Free the slot and write why there is no answer.

        What failed on our side gives its images back. Tokens stay charged only where the caller hung up: they may
        have been read.
        """
        entry = await self._entry(
            exchange,
            _decision(trouble),
            code=trouble.code,
            status=trouble.status,
            ask=ask,
            stages_ms=exchange.stages_ms,
            shadowed=hold.shadowed,
        )
        images = 0 if trouble.status >= 500 else None
        tokens = None if trouble.status == CLIENT_CLOSED else 0
        entry_id = await self.quotas.settle(hold, entry, images=images, tokens=tokens)
        await self._recorded(exchange, entry_id)

    async def open_session(self, exchange: Exchange, ttl_s: int) -> Session:
        """Open a session and write so, in one transaction. Raises `QuotaExceeded`, `RequestTooCostly`."""
        session_id = make_session_id()
        entry = await self._entry(
            exchange, Decision.ANSWERED, code="ok", status=201, stages_ms={}, session=session_id
        )
        session, entry_id = await self.sessions.open(exchange.known_caller, session_id, entry, ttl_s=ttl_s)
        exchange.entry_id = str(entry_id)
        return session

    async def close_session(self, exchange: Exchange, session_id: str) -> None:
        """Close a session and write so, in one transaction. Raises `SessionNotFound`."""
        entry = await self._entry(
            exchange, Decision.ANSWERED, code="ok", status=204, stages_ms={}, session=session_id
        )
        exchange.entry_id = str(await self.sessions.close(exchange.known_caller.tenant, session_id, entry))

    async def refuse(self, exchange: Exchange, trouble: Trouble) -> None:
        """Write a decision that held nothing: a wrong request, a limit that is used up."""
        entry = await self._entry(
            exchange,
            _decision(trouble),
            code=trouble.code,
            status=trouble.status,
            stages_ms=exchange.stages_ms,
        )
        exchange.entry_id = str(await self.audit.record(entry))

    async def _recorded(self, exchange: Exchange, entry_id: UUID) -> None:
        """The entry stands: it is the receipt, and what was screened may be learnt from."""
        exchange.entry_id = str(entry_id)
        caller = exchange.known_caller
        if exchange.screened is not None:
            prints = await self.audit.fingerprints(caller.tenant)
            if caller.subject or not exchange.end_user:  # a token speaks for its own subject alone
                end_user = prints.subject(caller.subject or caller.key_id)
            else:
                end_user = prints.end_user(exchange.end_user)
            self.evidence.note(caller.tenant, exchange.screened.evidence(entry_id, end_user, caller.policy))

    async def _entry(
        self,
        exchange: Exchange,
        decision: Decision,
        *,
        code: str,
        status: int,
        stages_ms: Mapping[str, float],
        ask: Ask | None = None,
        ranking: Ranking | None = None,
        card: ModelCard | None = None,
        session: str | None = None,
        shadowed: tuple[str, ...] = (),
        details: Mapping[str, object] | None = None,
    ) -> Entry:
        caller = exchange.known_caller
        prints = await self.audit.fingerprints(caller.tenant)
        items = [prints.item(item.text, item.image) for item in ask.items] if ask is not None else []
        queries = len(items) - len(ask.documents) if ask is not None else 0
        details = dict(details or {})
        if queries > 1:
            details["queries"] = [tell_item(item) for item in items[:queries]]
        if caller.subject:
            details["subject"] = prints.subject(caller.subject)
        if exchange.end_user:
            details["end_user"] = prints.end_user(exchange.end_user)
        if exchange.screened is not None:
            details["screening"] = exchange.screened.details()
        if card is not None and (card.manifest or card.revision):
            details["model"] = {"manifest": card.manifest, "revision": card.revision}
        exchange.query = ask.query.text if ask is not None else None
        exchange.entry = Entry(
            request_id=exchange.request_id,
            tenant=caller.tenant,
            key_id=caller.key_id,
            role=caller.role,
            operation=exchange.operation,
            decision=decision,
            code=code,
            status=status,
            query=items[0] if queries == 1 else None,
            documents=tuple(items[queries:]),
            document_count=len(items) - queries,
            image_count=len(ask.images) if ask is not None else 0,
            places=tuple((place.index, micro_units(place.score)) for place in ranking.places)
            if ranking is not None
            else (),
            input_tokens=ranking.input_tokens if ranking is not None else 0,
            image_tokens=ranking.image_tokens if ranking is not None else 0,
            model=self.model if card is not None else "",
            model_digest=card.digest if card is not None else "",
            stages_us=tuple((name, round(ms * 1000)) for name, ms in stages_ms.items()),
            client=prints.address(exchange.client_address),
            session=session or (ask.session if ask is not None else None) or "",
            shadowed=shadowed,
            details=details,
        )
        return exchange.entry


def _decision(trouble: Trouble) -> Decision:
    if trouble.status >= 500:
        return Decision.FAILED
    return Decision.DENIED if trouble.status in (401, 403) else Decision.REFUSED
