"""What a tenant uses: by day and key, and at the moment, beside limits that are about to be lowered."""

from __future__ import annotations

from datetime import date
from typing import TYPE_CHECKING

from tenants import usage
from tenants.access import Caller, Role
from tenants.usage import Use

if TYPE_CHECKING:
    from tenants.access import TenantId
    from tenants.database import Database
    from tenants.directory import Tenant
    from tenants.policy import Policy
    from tenants.quotas import Quotas
    from tenants.sessions import Sessions
    from tenants.usage import DayUse


class PresentUse:
    """Reads, and changes nothing."""

    def __init__(self, *, database: Database, quotas: Quotas, sessions: Sessions) -> None:
        self._database = database
        self._quotas = quotas
        self._sessions = sessions

    async def today(self, tenant: TenantId) -> date:
        """The day that counts now, in UTC, by the database's clock."""
        return await usage.today(self._database, tenant)

    async def by_day(
        self, tenant: Tenant, policy: Policy, *, since: date, until: date, key_id: str | None = None
    ) -> tuple[DayUse, ...]:
        """Usage from `since` to `until`, both included, newest day first."""
        return await self._quotas.usage_by_day(
            _posing(tenant, policy), since=since, until=until, key_id=key_id
        )

    async def above(self, tenant: Tenant, before: Policy, after: Policy) -> tuple[str, ...]:
        """A sentence for every limit of `after` that is below what is used now: what happens then."""
        notes = []
        open_sessions = len(await self._sessions.list_open(tenant.id))
        if after.sessions < min(before.sessions, open_sessions):
            notes.append(
                f"sessions is now {after.sessions}, and {open_sessions} are open: they go on, and none opens until "
                "enough of them have ended."
            )
        for standing in await self._quotas.look(_posing(tenant, before)):
            used = standing.limit - standing.remaining
            if standing.name == "concurrency" and after.concurrent_requests < used:
                notes.append(
                    f"concurrent_requests is now {after.concurrent_requests}, and {used} are under way: they end as "
                    "they would have, and none begins until fewer are left."
                )
        month = await self._this_month(tenant.id)
        for name, used in (("requests_per_month", month.requests), ("tokens_per_month", month.tokens)):
            most = getattr(after, name)
            if most is not None and most < used:
                notes.append(
                    f"{name} is now {most}, and {used} are used: every request is refused until the month ends."
                )
        return tuple(notes)

    async def _this_month(self, tenant: TenantId) -> Use:
        day = await self.today(tenant)
        sums = await usage.read_sums(self._database, tenant, since=day.replace(day=1), until=day)
        return sum(sums.values(), Use())


def _posing(tenant: Tenant, policy: Policy) -> Caller:
    """As whom limits are looked at: the tenant as a whole, with no key of its own."""
    return Caller(tenant.id, tenant.name, "", Role.PLATFORM_ADMIN, policy)
