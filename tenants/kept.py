"""What was read of keys and identities, kept for a moment: the bound on how late a revocation is in force."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

KEPT_S = 1.5
"""The bound of 2 s, less what an answer may take to come back."""
MOST_KEPT = 10_000

Found = TypeVar("Found")


class Kept(Generic[Found]):
    """What was read, for `kept_s` seconds from before it was read; unknown ids as well as known ones."""

    def __init__(self, kept_s: float, clock: Callable[[], float]) -> None:
        self._kept_s = kept_s
        self._clock = clock
        self._found: dict[tuple[str, ...], tuple[float, Found]] = {}
        self._drops = 0

    async def get(self, asked: tuple[str, ...], read: Callable[[], Awaitable[Found]]) -> tuple[Found, float]:
        """Found and how many seconds ago it may have been true at the earliest."""
        kept = self._found.get(asked)
        if kept is not None:
            age_s = self._clock() - kept[0]
            if age_s < self._kept_s:
                return kept[1], age_s
            del self._found[asked]
        started_s, drops = self._clock(), self._drops
        found = await read()
        # Dropped meanwhile: what was read may be from before the change, and serves this once only.
        if self._kept_s > 0 and drops == self._drops:
            if len(self._found) >= MOST_KEPT:
                del self._found[next(iter(self._found))]
            self._found[asked] = (started_s, found)
        return found, self._clock() - started_s

    def drop(self, which: Callable[[tuple[str, ...], Found], bool]) -> None:
        """Forget some of it."""
        self._drops += 1
        for asked in [asked for asked, (_, found) in self._found.items() if which(asked, found)]:
            del self._found[asked]
