"""Keys that somebody found where no key belongs: whoever shows a live one ends it, and learns nothing."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING

from service.errors import Overloaded
from service.watch import metrics
from service.watch.logs import get_logger
from tenants.audit import Decision, Entry
from tenants.errors import KeyUnknown

if TYPE_CHECKING:
    from collections.abc import Iterable

    from service.asks import Exchange
    from service.refusals import Refusals
    from tenants.access import TenantId
    from tenants.audit import Audit
    from tenants.database import Database
    from tenants.keys import Keys

MOST_WAITING = 8

log = get_logger(__name__)


class Leaks:
    """Takes reports of anybody, one at a time: reports cannot use up the service."""

    def __init__(self, *, database: Database, keys: Keys, audit: Audit, refusals: Refusals) -> None:
        self._database = database
        self._keys = keys
        self._audit = audit
        self._refusals = refusals
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def report(self, exchange: Exchange, texts: Iterable[str]) -> None:
        """Revoke each key whose live secret is shown, with an entry; of other known keys the log is told alone.

        Nothing tells which of them was which. Raises `Overloaded`, `DatabaseUnavailable`; again is harmless.
        """
        if self._waiting >= MOST_WAITING:
            raise Overloaded("Too many reports at once.", reason="reports", retry_after_s=1)
        self._waiting += 1
        try:
            async with self._turn:
                for text in dict.fromkeys(texts):
                    await self._look_at(exchange, text)
        finally:
            self._waiting -= 1

    async def _look_at(self, exchange: Exchange, text: str) -> None:
        proof = await self._keys.prove(text)
        if proof is None:
            return
        tenant, key_id, live = proof
        if live:
            await asyncio.shield(self._revoke(exchange, tenant, key_id))
        else:
            refusal = KeyUnknown(reason="reported", tenant=tenant, key_id=key_id)
            self._refusals.note(refusal, exchange, status=202)

    async def _revoke(self, exchange: Exchange, tenant: TenantId, key_id: str) -> None:
        prints = await self._audit.fingerprints(tenant)
        async with self._database.together():
            await self._keys.revoke(tenant, key_id, reason="leaked")
            await self._audit.append(
                tenant,
                Entry(
                    request_id=str(uuid.uuid4()),
                    tenant=tenant,
                    key_id=key_id,
                    role="",
                    operation="key.leaked",
                    decision=Decision.DENIED,
                    code="leaked",
                    status=202,
                    client=prints.address(exchange.client_address),
                    details={"reported_by_request": exchange.request_id},
                ),
            )
        metrics.KEY_REFUSALS.labels("leaked").inc()
        log.warning("a leaked key was revoked", action="key_leaked", tenant=str(tenant), key_id=key_id)
