"""What a gateway does by itself for as long as it lives; an outage or a bug in one turn must not be the end of all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from service.watch import metrics
from service.watch.logs import get_logger, where_it_broke
from tenants.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from service.adapting import Adapting
    from service.administration import Administration
    from service.erasing import Erasing
    from tenants.access import TenantId
    from tenants.backups import Backups
    from tenants.directory import Tenant
    from tenants.evidence import Evidence
    from tenants.quotas import Quotas
    from tenants.repeats import Repeats
    from tenants.thresholds import Change

ENFORCE_EVERY_S = 0.5
"""What a gateway keeps of a key may let a request in for 1.5 s more: together, two seconds."""
REPORT_EVERY_S = 5.0
REAP_EVERY_S = 10.0
SWEEP_EVERY_S = 5.0
"""How long workers may keep what belongs to a session that expired, or that another gateway closed."""
FORGET_EVERY_S = 3600.0
BACKUPS_EVERY_S = 60.0
TIDY_EVERY_S = 60.0
"""How long a tenant whose grace is over may wait for its purge, an answer that is kept no longer, and the daily steps of
thresholds and of the log."""

log = get_logger(__name__)


async def repeat(every_s: float, work: Callable[[], Awaitable[object]]) -> None:
    """Do `work` every so many seconds. What an outage of the database kept from it, the next turn does."""
    while True:
        await asyncio.sleep(every_s)
        try:
            await work()
        except DatabaseUnavailable:
            continue
        except Exception as exc:  # noqa: BLE001 - a bug in one turn must not be the end of all turns
            log.error(
                "housekeeping failed",
                action="sweep_failed",
                error=type(exc).__name__,
                where=where_it_broke(exc),
            )


async def beat(quotas: Quotas) -> None:
    """Say that this gateway lives: its slots are its own until it stops saying so.

    Where the database is away, nobody else can take the slots meanwhile either.
    """
    if not await quotas.extend_lease():
        log.warning("the lease ran out; what ran under it may be counted as orphaned", action="lease_lost")


async def reap(quotas: Quotas) -> None:
    """Close what dead gateways left held. Where nobody can, nothing is lost: what is orphaned stays until somebody can."""
    if closed := await quotas.reap():
        log.warning("closed orphaned holds", action="hold_orphaned", count=closed)


async def forget(quotas: Quotas) -> None:
    """Delete usage that is older than its tenant keeps it."""
    if forgotten := await quotas.forget_usage():
        log.info("deleted old usage", action="usage_forgotten", count=forgotten)


async def tell_backups(backups: Backups) -> None:
    """Tell metrics how old the newest backups are: a scrape asks no database."""
    standing = await backups.standing()
    metrics.note_backup("run", standing.backup_age_s)
    metrics.note_backup("verify", standing.verified_age_s)
    metrics.note_backup("drill", standing.drilled_age_s)


async def tidy(
    administration: Administration,
    repeats: Repeats,
    adapting: Adapting,
    erasing: Erasing,
    evidence: Evidence,
) -> None:
    """Purge tenants whose grace is over, forget what is kept no longer; once a day step thresholds and prune the log."""

    def tell(tenant: Tenant, removed: dict[str, int]) -> None:
        log.info("purged a tenant", action="tenant_purged", tenant=str(tenant.id), rows=sum(removed.values()))

    await administration.purge_due(tell)

    def tell_steps(tenant: TenantId, changes: tuple[Change, ...]) -> None:
        log.info("stepped thresholds", action="thresholds_stepped", tenant=str(tenant), count=len(changes))

    await repeats.forget()
    await evidence.forget()
    await adapting.step_due(tell_steps)

    def tell_pruned(tenant: TenantId, bodies: int) -> None:
        log.info("pruned old entries", action="log_pruned", tenant=str(tenant), count=bodies)

    await erasing.prune_due(tell_pruned)
