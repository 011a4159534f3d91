"""What an auditor asks of the log, and the entry that says so: nothing is answered before that entry stands.

Each tenant is asked for itself, under its own row security; whoever may see all of them gets what each one answers, put
into one order. An input is looked for by its fingerprint under the key of each tenant that is asked, so it is never in a
query's own entry either.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC
from typing import TYPE_CHECKING, Any
from uuid import UUID

from service.deeds import OPERATOR
from tenants.access import INSTALLATION, Role
from tenants.audit import Decision, Entry, micro_units
from tenants.errors import EntryNotFound, SealBroken, TenantNotFound
from tenants.search import MOST_BYTES, Count, Filter, Found, Page, Position

if TYPE_CHECKING:
    from service.deeds import Actor, Deeds
    from tenants.access import TenantId
    from tenants.audit import Audit
    from tenants.lifecycle import Lifecycle
    from tenants.search import Search
    from tenants.searches import SavedSearch, Searches

SEE_ALL = frozenset({Role.PLATFORM_ADMIN, OPERATOR})
"""Who asks every tenant's log; whoever else, its own."""
BATCH = 1000
"""Entries that an export holds at a time."""
SHARE = 16
"""Entries that are read of each of many tenants at least."""


Filters = list[tuple["TenantId", Filter]]
"""What is asked of whom."""


@dataclass(frozen=True, slots=True)
class Input:
    """A text, or an image's bytes as they were sent."""

    text: str | None = None
    image: bytes | None = None


@dataclass(frozen=True, slots=True)
class Reach:
    """Whose entries are asked for, and in whose log that is told."""

    tenants: tuple[TenantId, ...]
    home: TenantId
    """Of one tenant that still exists its own, so that its auditor reads of it; else the asker's."""
    everything: bool = False


@dataclass(frozen=True, slots=True)
class Question:
    """Entries that are looked for."""

    reach: Reach
    filters: Filters
    told: Mapping[str, object]
    """The same in strings and integers, for the log and for cursors; an input as its fingerprint."""


@dataclass(frozen=True, slots=True)
class Export:
    """Entries in batches, newest first, and how many they were when it began."""

    count: int
    batches: AsyncIterator[tuple[Found, ...]]


class Inquiry:
    """Asks the log."""

    def __init__(
        self, *, search: Search, searches: Searches, audit: Audit, lifecycle: Lifecycle, deeds: Deeds
    ) -> None:
        self._search = search
        self._searches = searches
        self._deeds = deeds
        self._audit = audit
        self._lifecycle = lifecycle

    async def reach(self, role: str, own: TenantId, tenant: UUID | None) -> Reach:
        """Whose log someone of that role and tenant asks; `tenant` is the one that was named.

        An auditor asks its own tenant's. Whoever sees all of them may name one, also one that was purged. The
        operator's own is `INSTALLATION`. Raises `TenantNotFound`, for what is not there as for what is not theirs.
        """
        if role not in SEE_ALL:
            if tenant not in (None, own):
                raise TenantNotFound
            return Reach((own,), own)
        if tenant is None:
            return Reach(await self._lifecycle.in_log(), own, everything=True)
        try:
            found = (await self._lifecycle.find(tenant)).id
        except TenantNotFound:
            purged = tuple(each for each in await self._lifecycle.in_log() if each == tenant)
            if not purged:
                raise
            return Reach(purged, own)
        return Reach((found,), found)

    async def question(self, reach: Reach, asked: Filter, looked_for: Input | None = None) -> Question:
        """What each tenant is asked. One whose key is destroyed has no fingerprints any more: no input of it is found."""
        told = tell_filter(asked)
        if reach.everything:
            told["tenant"] = "all"
        elif reach.tenants[0] != reach.home:
            told["tenant"] = str(reach.tenants[0])
        if looked_for is None:
            return Question(reach, [(tenant, asked) for tenant in reach.tenants], told)
        told["input"] = "text" if looked_for.image is None else "image"
        with suppress(TenantNotFound, SealBroken):  # the installation's own log has no key
            told["fingerprint"] = await self._fingerprint(reach.home, looked_for)
        filters = []
        for tenant in reach.tenants:
            with suppress(TenantNotFound, SealBroken):
                fingerprint = await self._fingerprint(tenant, looked_for)
                filters.append((tenant, replace(asked, fingerprint=fingerprint)))
        return Question(reach, filters, told)

    async def page(
        self, actor: Actor, question: Question, *, most: int, before: Position | None = None
    ) -> Page:
        """The newest entries behind `before`, at most `most`."""
        page = await self._newest(question.filters, most + 1, before)
        found = page.found[:most]
        await self._tell(actor, question, "audit.query", count=len(found))
        return Page(found, page.more or len(page.found) > most)

    async def read(self, actor: Actor, reach: Reach, entry_id: UUID) -> Found:
        """One entry. Raises `EntryNotFound`, for another tenant's as for none."""
        found = None
        for tenant in reach.tenants:
            with suppress(EntryNotFound):
                found = await self._search.find(tenant, entry_id)
                break
        if found is None:
            raise EntryNotFound
        question = await self.question(reach, Filter())
        await self._tell(actor, question, "audit.read", entry=str(entry_id), count=1)
        return found

    async def count(self, actor: Actor, question: Question) -> tuple[Count, ...]:
        """How many entries of each day, operation and decision; newest day first."""
        counts = await self._counts(question.filters)
        await self._tell(actor, question, "audit.counts", count=sum(each.count for each in counts))
        return counts

    async def export(self, actor: Actor, question: Question, *, form: str) -> Export:
        """All of them as they stand now, read while they are written out. What is appended later is not among them."""
        count = sum(each.count for each in await self._counts(question.filters))
        first = await self._newest(question.filters, BATCH, None)
        await self._tell(actor, question, "audit.export", count=count, format=form)
        return Export(count, self._batches(question.filters, first))

    async def save(
        self, actor: Actor, tenant: TenantId, name: str, filters: Mapping[str, Any], asked: Filter
    ) -> SavedSearch:
        """Save `filters`, which are `asked` as the API has them. Raises `Invalid`, `SearchExists`."""
        async with self._deeds.deed(actor, "search_save", tenant=tenant, status=201) as deed:
            saved = await self._searches.save(tenant, name, filters, by=actor.key_id)
            deed.details = {"name": name, "filters": tell_filter(asked)}
        return saved

    async def saved(self, tenant: TenantId, name: str) -> SavedSearch:
        """A saved search of the tenant. Raises `SearchNotFound`."""
        return await self._searches.find(tenant, name)

    async def list_saved(self, tenant: TenantId) -> tuple[SavedSearch, ...]:
        """The tenant's saved searches, by name."""
        return await self._searches.list(tenant)

    async def delete_saved(self, actor: Actor, tenant: TenantId, name: str) -> None:
        """Raises `SearchNotFound`."""
        async with self._deeds.deed(actor, "search_delete", tenant=tenant, status=204) as deed:
            await self._searches.delete(tenant, name)
            deed.details = {"name": name}

    async def _batches(self, filters: Filters, page: Page) -> AsyncIterator[tuple[Found, ...]]:
        yield page.found
        while page.more and page.found:
            page = await self._newest(filters, BATCH, page.found[-1].position)
            yield page.found

    async def _fingerprint(self, tenant: TenantId, looked_for: Input) -> str:
        prints = await self._audit.fingerprints(tenant)
        if looked_for.image is not None:
            return prints.image(looked_for.image)
        return prints.text(looked_for.text or "")

    async def _newest(self, filters: Filters, most: int, before: Position | None) -> Page:
        """The newest of all: of many tenants a share of each is read, and more of those that turn out to have them."""
        share = most if len(filters) == 1 else min(most, most // max(1, len(filters)) + SHARE)
        heap: list[tuple[float, int, int, int]] = []
        pages: dict[int, Page] = {}

        async def fetch(which: int, behind: Position | None) -> None:
            tenant, asked = filters[which]
            pages[which] = await self._search.page(tenant, asked, most=share, before=behind)
            for at, found in enumerate(pages[which].found):
                heapq.heappush(heap, (-found.recorded_at.timestamp(), -found.id.int, which, at))

        for which in range(len(filters)):
            await fetch(which, before)
        if len(filters) == 1:
            return pages[0]
        newest: list[Found] = []
        size = 0
        while heap and len(newest) < most and size < MOST_BYTES:
            *_, which, at = heapq.heappop(heap)
            newest.append(pages[which].found[at])
            size += len(newest[-1].body)
            if at + 1 == len(pages[which].found) and pages[which].more:
                await fetch(which, newest[-1].position)
        return Page(tuple(newest), bool(heap))

    async def _counts(self, filters: Filters) -> tuple[Count, ...]:
        summed: Counter[tuple[str, str, str]] = Counter()
        for tenant, asked in filters:
            for each in await self._search.count(tenant, asked):
                summed[each.day, each.operation, each.decision] += each.count
        counts = sorted(
            (Count(*what, count) for what, count in summed.items()),
            key=lambda each: (each.operation, each.decision),
        )
        return tuple(sorted(counts, key=lambda each: each.day, reverse=True))

    async def _tell(self, actor: Actor, question: Question, operation: str, **details: object) -> None:
        """Write who asked what, and how much came of it. Raises `DatabaseUnavailable`; nothing is answered then."""
        home = question.reach.home
        address = ""
        if actor.address and home != INSTALLATION:
            address = (await self._audit.fingerprints(home)).address(actor.address)
        entry = Entry(
            request_id=actor.request_id,
            tenant=home,
            key_id=actor.key_id,
            role=actor.role,
            operation=operation,
            decision=Decision.ANSWERED,
            code="ok",
            status=200,
            client=address,
            details={"filters": question.told, **details},
        )
        actor.receipt = str(await self._audit.record(entry))


def tell_filter(asked: Filter) -> dict[str, object]:
    """What is looked for as an entry tells it: strings and integers, by the names that the API has for them."""
    moments = {"from": asked.since, "to": asked.until}
    words = {
        "last_days": asked.last_days,
        "actor": asked.key_id,
        "operation": asked.operation,
        "decision": asked.decision,
        "action": asked.action,
        "session": asked.session,
        "request_id": None if asked.request_id is None else str(asked.request_id),
        "category": asked.category,
        "risk_above": None if asked.risk_above is None else micro_units(asked.risk_above),
        "fingerprint": asked.fingerprint,
    }
    told = {
        name: moment.astimezone(UTC).isoformat() for name, moment in moments.items() if moment is not None
    }
    return told | {name: value for name, value in words.items() if value is not None}
