"""What the log is told of keys that are known and were refused: off the request path, and never a flood.

Whether a key is known must not show in how long a refusal takes, so its entry is written later, by a task of its
own. Of one key at most `MOST_A_MINUTE` refusals a minute have an entry each; the rest are counted, and one entry at
the minute's end says how many.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from service.watch import metrics
from service.watch.logs import get_logger, where_it_broke
from tenants.access import TenantId
from tenants.audit import Decision, Entry
from tenants.errors import DatabaseUnavailable, Forbidden, TenancyError, Unauthenticated

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.asks import Exchange
    from tenants.audit import Audit

MOST_A_MINUTE = 10
WINDOW_S = 60.0
MOST_WAITING = 10_000
AGAIN_S = 1.0

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Refusal:
    """One refusal of a known key, or the sum of those beyond the limit."""

    tenant: TenantId
    key_id: str
    reason: str
    status: int
    address: str
    operation: str
    request_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    at_us: int = field(default_factory=lambda: time.time_ns() // 1000)
    repeated: int = 0


@dataclass(slots=True)
class Window:
    """A minute of one key."""

    began_s: float
    told: int = 0
    untold: int = 0
    last: Refusal | None = None


class Refusals:
    """Notes refusals and writes their entries. One per gateway."""

    def __init__(self, audit: Audit, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._audit = audit
        self._clock = clock
        self._windows: dict[tuple[TenantId, str], Window] = {}
        self._waiting: deque[Refusal] = deque(maxlen=MOST_WAITING)
        self._more = asyncio.Event()

    def note(self, exc: Unauthenticated | Forbidden, exchange: Exchange, *, status: int) -> None:
        """Remember a refusal; nothing where it is of no known key."""
        tenant, key_id = getattr(exc, "tenant", None), getattr(exc, "key_id", None)
        if tenant is None or key_id is None:
            return
        reason = exc.reason if isinstance(exc, Unauthenticated) else "suspended"
        metrics.KEY_REFUSALS.labels(reason).inc()
        refusal = Refusal(
            tenant,
            key_id,
            reason,
            status,
            exchange.client_address,
            exchange.operation,
            request_id=exchange.request_id,
        )
        self.sum_up()
        window = self._windows.setdefault((tenant, key_id), Window(self._clock()))
        if window.told < MOST_A_MINUTE:
            window.told += 1
            self._wait(refusal)
        else:
            window.untold += 1
            window.last = refusal

    def sum_up(self, *, all_of_them: bool = False) -> None:
        """Close the windows whose minute is over, each with one refusal that says how many were not told."""
        edge_s = self._clock() - WINDOW_S
        while self._windows:
            which, window = next(iter(self._windows.items()))  # the oldest: windows begin in order
            if window.began_s > edge_s and not all_of_them:
                return
            del self._windows[which]
            if window.last is not None:
                last = window.last
                self._wait(
                    Refusal(
                        last.tenant,
                        last.key_id,
                        last.reason,
                        last.status,
                        last.address,
                        last.operation,
                        repeated=window.untold,
                    )
                )

    async def write(self) -> None:
        """Write entries as they come, until it is cancelled. An outage of the database only makes them late."""
        while True:
            try:
                async with asyncio.timeout(WINDOW_S / 10):
                    await self._more.wait()
            except TimeoutError:
                self.sum_up()
                continue
            try:
                await self.write_waiting()
            except DatabaseUnavailable:
                await asyncio.sleep(AGAIN_S)

    async def write_waiting(self) -> None:
        """Write what waits. Raises `DatabaseUnavailable`; what is not written yet goes on waiting."""
        while self._waiting:
            refusal = self._waiting[0]
            try:
                await self._audit.record(await self._entry(refusal))
            except DatabaseUnavailable:
                raise
            except (
                TenancyError
            ) as exc:  # a tenant that is gone, or whose audit key is destroyed: nothing to write
                log.error(
                    "a refusal has no entry",
                    action="entry_failed",
                    request_id=refusal.request_id,
                    error=type(exc).__name__,
                    where=where_it_broke(exc),
                )
            if self._waiting and self._waiting[0] is refusal:
                self._waiting.popleft()
        self._more.clear()

    def _wait(self, refusal: Refusal) -> None:
        self._waiting.append(refusal)
        self._more.set()

    async def _entry(self, refusal: Refusal) -> Entry:
        prints = await self._audit.fingerprints(refusal.tenant)
        return Entry(
            request_id=refusal.request_id,
            tenant=refusal.tenant,
            key_id=refusal.key_id,
            role="",
            operation=refusal.operation,
            decision=Decision.DENIED,
            code=refusal.reason,
            status=refusal.status,
            at_us=refusal.at_us,
            client=prints.address(refusal.address),
            details={"repeated": refusal.repeated} if refusal.repeated else {},
        )
