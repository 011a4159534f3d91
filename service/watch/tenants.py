"""Which tenants metrics tell apart: those with the most requests, a fixed number of them; all others are one.

A request's label is decided as it is counted and never afterwards, so every series only grows, and the sum over all is
what happened. Requests are counted by Space-Saving (Metwally, Agrawal, El Abbadi, ICDT 2005) in a fixed number of
counters, halved at every ranking: what a tenant did long ago gives it no label now.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

OTHER = "other"
RANK_EVERY_S = 600.0
"""Between two rankings: at most so often, and then at most all labels, change hands."""
COUNTERS = 10
"""For each label. Whoever has more than one in so many of all requests is among the counted, always."""
CLEARLY = 2.0
"""So many times the requests of who has a label it takes to get it: those who are about even do not take turns."""


@dataclass(slots=True)
class _Count:
    requests: float = 0.0
    inherited: float = 0.0
    """Of these, how many may have been another's, whose counter this was."""

    @property
    def sure(self) -> float:
        return self.requests - self.inherited


class TopTenants:
    """Gives at most `most` tenants a label of their own. Belongs to one event loop.

    `dropped` is told who has none any more.
    """

    def __init__(
        self,
        most: int,
        *,
        dropped: Callable[[str], None] = lambda _tenant: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most = most
        self._dropped = dropped
        self._clock = clock
        self._named: set[str] = set()
        self._counts: dict[str, _Count] = {}
        self._ranked_s = clock()

    def allow(self, most: int) -> None:
        """Begin anew, with so many labels."""
        for tenant in self._named:
            self._dropped(tenant)
        self._named.clear()
        self._counts.clear()
        self.most = most

    def __len__(self) -> int:
        """How many tenants are counted: at most `COUNTERS` for each label."""
        return len(self._counts)

    @property
    def named(self) -> frozenset[str]:
        """Those with a label of their own."""
        return frozenset(self._named)

    def count(self, tenant: str) -> str:
        """Count a request of `tenant`; its label."""
        if not self.most:
            return OTHER
        self._counter(tenant).requests += 1
        if self._clock() - self._ranked_s >= RANK_EVERY_S:
            self._rank()
        return self.label(tenant)

    def label(self, tenant: str) -> str:
        """The tenant's label: its own where it has one, or one is free. It keeps it until the next ranking."""
        if len(self._named) < self.most:
            self._named.add(tenant)
        return tenant if tenant in self._named else OTHER

    def _counter(self, tenant: str) -> _Count:
        found = self._counts.get(tenant)
        if found is None:
            found = _Count()
            if len(self._counts) >= COUNTERS * self.most:
                fewest = min(self._counts, key=lambda each: self._counts[each].requests)
                found.requests = found.inherited = self._counts.pop(fewest).requests
            self._counts[tenant] = found
        return found

    def _rank(self) -> None:
        """Let those with clearly more requests have the labels of those with the fewest."""
        self._ranked_s = self._clock()
        challengers = self._by_requests(self._counts.keys() - self._named)
        holders = self._by_requests(self._named)
        while challengers and holders and self._sure(challengers[0]) > CLEARLY * self._sure(holders[-1]):
            loser = holders.pop()
            self._named.remove(loser)
            self._dropped(loser)
            self._named.add(challengers.pop(0))
        for count in self._counts.values():
            count.requests /= 2
            count.inherited /= 2

    def _by_requests(self, tenants: Iterable[str]) -> list[str]:
        return sorted(tenants, key=lambda tenant: (-self._sure(tenant), tenant))

    def _sure(self, tenant: str) -> float:
        return self._counts[tenant].sure if tenant in self._counts else 0.0
