"""Places that tenants wait for in turn: whoever asks for a thousand waits behind its own, not before another's one."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

Place = TypeVar("Place")


class Turns(Generic[Place]):
    """Free places, and who waits for one: tenant by tenant in turn, each one's oldest first. Belongs to one event loop."""

    def __init__(self) -> None:
        self._free: deque[Place] = deque()
        self._lines: OrderedDict[str, deque[asyncio.Future[Place]]] = OrderedDict()
        """In the order of whose turn it is; no deque is empty."""

    def __len__(self) -> int:
        """How many are free."""
        return len(self._free)

    def give(self, place: Place) -> None:
        """It is free: the next one's whose turn it is, if anybody waits."""
        while self._lines:
            tenant, line = self._lines.popitem(last=False)
            waiting = line.popleft()
            if line:
                self._lines[tenant] = line  # at the end
            if not waiting.done():
                waiting.set_result(place)
                return
        self._free.append(place)

    async def take(self, tenant: str) -> Place:
        """A place of one's own until it is given back. Cancelling is safe."""
        if self._free:
            return self._free.popleft()
        waiting: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        self._lines.setdefault(tenant, deque()).append(waiting)
        try:
            return await waiting
        except asyncio.CancelledError:
            if not waiting.cancelled():
                self.give(waiting.result())  # it was given as we were cancelled
            raise

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[Place]:
        """A place for as long as the block lasts."""
        place = await self.take(tenant)
        try:
            yield place
        finally:
            self.give(place)
