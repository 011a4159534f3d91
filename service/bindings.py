"""Which sessions this gateway's workers may keep something for, and the end of what they keep.

A session is open in Postgres or gone, and gone for good. Each gateway knows which ones it has sent to workers of
its own and asks about those: whoever closed one, and however it ended, the workers hear of it within a sweep.
What is known here is bounded by what is open, for what is gone is forgotten.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.watch.logs import get_logger
from tenants.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from types import TracebackType

    from service.fleet.router import Fleet
    from tenants.access import TenantId
    from tenants.sessions import Sessions

AT_ONCE = 100
"""Expired sessions that are closed in one go, each durably by itself."""

log = get_logger(__name__)


@dataclass(slots=True)
class Binding:
    """One session of which our workers may keep something. `with binding:` a request is on its way to them."""

    until_s: float
    """When it expires unless another gateway's use prolongs it, on the clock of `time.monotonic`."""
    users: int = 0

    def __enter__(self) -> None:
        self.users += 1

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.users -= 1


class Bindings:
    """Uses sessions and ends them at the workers of this gateway. Belongs to one event loop."""

    def __init__(self, *, sessions: Sessions, fleet: Fleet) -> None:
        self._sessions = sessions
        self._fleet = fleet
        self._bound: dict[tuple[TenantId, str], Binding] = {}

    async def use(self, tenant: TenantId, session_id: str) -> Binding:
        """Count a use of an open session; enter the binding at once, until its job is done.

        Raises `SessionNotFound`, `DatabaseUnavailable`; nothing is bound then.
        """
        left_s = await self._sessions.use(tenant, session_id)
        binding = self._bound.setdefault((tenant, session_id), Binding(0.0))
        binding.until_s = time.monotonic() + left_s
        return binding

    async def end(self, tenant: TenantId, session_id: str) -> None:
        """Have our workers wipe what they keep of a session that is gone.

        A request that found it open before and has yet to reach a worker may pin once more: until no such
        request is left, the session is remembered, and the next sweep ends it again.
        """
        binding = self._bound.get((tenant, session_id))
        if binding is None:
            return
        if not binding.users:
            del self._bound[tenant, session_id]
        await self._fleet.end_session(str(tenant), session_id)

    async def sweep(self) -> None:
        """End at our workers what is gone, then close what has expired and let the log say so.

        While the database does not answer, what ought to have expired is ended all the same: were it wrong, a
        session would be cold and nothing else.
        """
        known = tuple(self._bound)
        try:
            gone = await self._sessions.gone(known)
        except DatabaseUnavailable:
            gone = [each for each in known if self._bound[each].until_s < time.monotonic()]
        for tenant, session_id in gone:
            await self.end(tenant, session_id)
        closed = portion = await self._sessions.expire(most=AT_ONCE)
        while portion == AT_ONCE:
            portion = await self._sessions.expire(most=AT_ONCE)
            closed += portion
        if closed:
            log.info("closed expired sessions", action="session_expired", count=closed)
