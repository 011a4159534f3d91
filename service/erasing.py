"""What goes out of the log: by a person's or a tenant's right, and at the end of its time; each told by an entry first.

Leaves never go, so every receipt and every proof holds as before (docs/log.md, "Erasure").
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING

from service.deeds import GATEWAY, Actor

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from service.deeds import Deeds
    from tenants.access import TenantId
    from tenants.audit import Audit
    from tenants.database import Database
    from tenants.erasure import Erasure
    from tenants.pruning import Due, Pruning
    from tenants.sequencer import Sequencer

ENTRIES = 1_000
"""Entries that one entry names at most, where a subject is erased."""
AGAIN_S = 0.1


@dataclass(frozen=True, slots=True)
class Erased:
    """What was erased of a subject."""

    entries: int
    """Entries whose bodies are gone."""
    rows: int
    """Rows that thresholds had learnt from."""
    warrants: tuple[str, ...]
    """Ids of the entries that say so."""


class Erasing:
    """Erases tenants' links and subjects' entries, and prunes what is older than its policy keeps it."""

    def __init__(
        self,
        *,
        database: Database,
        deeds: Deeds,
        audit: Audit,
        erasure: Erasure,
        pruning: Pruning,
        sequencer: Sequencer,
    ) -> None:
        self._database = database
        self._deeds = deeds
        self._audit = audit
        self._erasure = erasure
        self._pruning = pruning
        self._sequencer = sequencer
        self._pruned_on: date | None = None

    async def erase(self, actor: Actor, tenant: TenantId, *, reason: str) -> None:
        """Destroy the tenant's audit key: from now on nothing ties an entry of before to an input, an address or a person.

        New entries are under a new key. Raises `TenantNotFound`.
        """
        async with self._deeds.deed(actor, "audit_erase", tenant=tenant) as deed:
            deed.details = {"reason": reason}
            await self._erasure.replace_key(tenant)
        self._audit.forget(f"tenant:{tenant}")

    async def erase_subject(self, actor: Actor, tenant: TenantId, subject: str, *, reason: str) -> Erased:
        """Take away the body of every entry of a token's `sub`, of a name in a certificate, or of an end user.

        Up to now, and as far back as the present audit key reaches. Returns once they are gone, which takes their
        warrants' way into the tree. Raises `TenantNotFound`, `LogBroken`: what has a warrant then goes later.
        """
        prints = await self._audit.fingerprints(tenant)
        names = (prints.subject(subject), prints.end_user(subject))
        found: list[UUID] = [each async for page in self._erasure.find(tenant, names) for each in page]
        rows, warrants = 0, []
        for first in range(0, max(len(found), 1), ENTRIES):
            named = found[first : first + ENTRIES]
            telling = replace(actor, request_id=str(uuid.uuid4())) if first else actor
            async with self._database.together():
                async with self._deeds.deed(telling, "subject_erase", tenant=tenant) as deed:
                    removed = await self._erasure.forget_end_user(tenant, names)
                    rows += removed
                    deed.details = {
                        "reason": reason,
                        "rows": removed,
                        "entries": [str(each) for each in named],
                    }
                assert telling.receipt is not None, "the entry is written at the end of its deed"
                if named:
                    await self._pruning.issue(tenant, uuid.UUID(telling.receipt))
            warrants.append(telling.receipt)
            if named:
                await self._fulfil(tenant, uuid.UUID(telling.receipt))
        return Erased(len(found), rows, tuple(warrants))

    async def prune_due(self, told: Callable[[TenantId, int], None]) -> None:
        """The daily step: announce bodies whose time is over, and take away what is announced and in the tree.

        Any number of gateways may try at once. `told` hears how many bodies of which tenant went.
        """
        for tenant, warrant in await self._pruning.list_open():
            if pruned := await self._pruning.prune(tenant, warrant):
                told(tenant, pruned)
        today = datetime.now(UTC).date()
        if self._pruned_on == today:
            return
        due = await self._pruning.list_due()
        for each in due:
            await self._announce(each)
        if not due:
            self._pruned_on = today

    async def _announce(self, due: Due) -> None:
        actor = Actor(GATEWAY)
        async with self._database.together():
            async with self._deeds.deed(actor, "log_prune", tenant=due.tenant) as deed:
                deed.happened = await self._pruning.claim(due)
                deed.details = {
                    "before_us": due.before_us,
                    "bodies": due.bodies,
                    "retention_days": due.retention_days,
                }
            if actor.receipt is not None:
                await self._pruning.issue(due.tenant, uuid.UUID(actor.receipt))

    async def _fulfil(self, tenant: TenantId, warrant: UUID) -> None:
        """See to it that a warrant comes into the tree, and that its bodies go."""
        while not await self._pruning.is_in_tree(tenant, warrant):
            step = await self._sequencer.step()
            if step.size is None:  # another integrates at the moment
                await asyncio.sleep(AGAIN_S)
        await self._pruning.prune(tenant, warrant)
