"""The switch for an incident: what a contained tenant or key runs is stopped, at every gateway within two seconds.

Whoever contains says so in the database, and every gateway looks there twice a second for what it must not run: of
contained and deleted tenants, and of contained keys. It first writes what ran, since when, in how many workers, as
an entry of that tenant; then it breaks the requests off, and kills the tenant's workers with all that they keep.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING
from uuid import uuid4

from service.deeds import GATEWAY, Actor, Deed, Deeds
from service.fleet.router import TenantState
from service.watch.logs import get_logger
from tenants.presence import Presence, Presences

if TYPE_CHECKING:
    from service.asks import Exchange, Running
    from service.fleet.router import Fleet, WorkerState
    from tenants.access import TenantId
    from tenants.audit import Audit
    from tenants.directory import Tenant
    from tenants.keys import Key
    from tenants.lifecycle import Lifecycle
    from tenants.presence import ToldWorker

log = get_logger(__name__)


class Switch:
    """Contains and releases: what the API and the command line call."""

    def __init__(self, *, deeds: Deeds, lifecycle: Lifecycle, presences: Presences) -> None:
        self._deeds = deeds
        self._lifecycle = lifecycle
        self._presences = presences

    async def contain(self, actor: Actor, tenant: TenantId, *, reason: str = "") -> Tenant:
        """Stop a tenant: its keys, its requests, its workers. Idempotent. Raises `TenantNotFound`."""
        async with self._deeds.deed(actor, "contain", tenant=tenant) as deed:
            contained = await self._lifecycle.contain(tenant)
            deed.details = {
                "reason": reason,
                "workers": [_evidence(each) for each in await self._presences.list(tenant)],
            }
        return contained

    async def release(self, actor: Actor, tenant: TenantId, *, reason: str = "") -> Tenant:
        """Undo `contain`. Idempotent. Raises `TenantNotFound`."""
        async with self._deeds.deed(actor, "release", tenant=tenant) as deed:
            deed.details = {"reason": reason}
            return await self._lifecycle.release(tenant)

    async def contain_key(self, actor: Actor, tenant: TenantId, key_id: str, *, reason: str = "") -> Key:
        """Stop one key and its requests. Idempotent. Raises `KeyNotFound`."""
        async with self._deeds.deed(actor, "key_contain", tenant=tenant) as deed:
            deed.details = {"key": key_id, "reason": reason}
            return await self._lifecycle.contain_key(tenant, key_id)

    async def release_key(self, actor: Actor, tenant: TenantId, key_id: str, *, reason: str = "") -> Key:
        """Undo `contain_key`. Idempotent. Raises `KeyNotFound`."""
        async with self._deeds.deed(actor, "key_release", tenant=tenant) as deed:
            deed.details = {"key": key_id, "reason": reason}
            return await self._lifecycle.release_key(tenant, key_id)

    async def suspend_key(self, tenant: TenantId, key_id: str, *, lasts_s: float, rule: str) -> Key | None:
        """Stop one search key and its requests for `lasts_s` seconds, as a rule of alerts says. Raises `KeyNotFound`.

        None, and there is no entry, where it is contained by somebody, revoked, or no search key. Again, its end moves.
        """
        async with self._deeds.deed(Actor(GATEWAY), "key_suspend", tenant=tenant) as deed:
            key = await self._lifecycle.suspend_key(tenant, key_id, lasts_s=lasts_s)
            deed.happened = key is not None
            deed.details = {"key": key_id, "rule": rule, "lasts_s": round(lasts_s)}
        return key

    async def resume_due(self) -> int:
        """Let in again the keys whose suspension is over; how many."""
        resumed = 0
        for tenant, key_id in await self._lifecycle.list_due_releases():
            async with self._deeds.deed(Actor(GATEWAY), "key_resume", tenant=tenant) as deed:
                key = await self._lifecycle.resume_key(tenant, key_id)
                deed.happened = key is not None
                deed.details = {"key": key_id}
            resumed += key is not None
        return resumed


class Enforcement:
    """Stops here what must not run, and tells of the workers here. One for each gateway, in its event loop."""

    def __init__(
        self,
        *,
        deeds: Deeds,
        lifecycle: Lifecycle,
        presences: Presences,
        audit: Audit,
        fleet: Fleet,
        running: Running,
    ) -> None:
        self.gateway = uuid4()
        """What reports and entries call this gateway; another one after each start."""
        self._deeds = deeds
        self._lifecycle = lifecycle
        self._presences = presences
        self._audit = audit
        self._fleet = fleet
        self._running = running
        self._turn = asyncio.Lock()
        self._killed: set[int] = set()
        """Workers that are on their way out, and told of."""

    async def enforce(self) -> None:
        """Stop what is contained, or of a tenant that is contained or deleted. Raises `DatabaseUnavailable`.

        The evidence is in the log before anything is stopped.
        """
        async with self._turn:  # two at once would tell the same twice
            requests = [each for each in self._running.all() if not each.halted]
            alive = self._fleet.workers()
            self._killed &= {each.pid for each in alive}
            workers = [each for each in alive if each.pid not in self._killed]
            serving = [tenant for each in workers for tenant in _tenants(each)]
            tenants = {_tenant(each) for each in requests} | {each.tenant for each in serving}
            if not tenants:
                return
            halted, keys = await self._lifecycle.halted(sorted(tenants), sorted(map(_key, requests)))
            for tenant in halted:
                await self._stop(
                    tenant,
                    [each for each in requests if _tenant(each) == str(tenant)],
                    [
                        (each, theirs)
                        for each in workers
                        for theirs in _tenants(each)
                        if theirs.tenant == str(tenant)
                    ],
                )
            for key_id in keys:
                of_key = [each for each in requests if _key(each) == key_id and not each.halted]
                if of_key and of_key[0].caller is not None:
                    await self._stop(of_key[0].caller.tenant, of_key, [])

    async def report(self) -> None:
        """Tell what this gateway's workers do. Raises `DatabaseUnavailable`."""
        await self._presences.report(
            self.gateway,
            [
                Presence(theirs.tenant, each.pid, theirs.running, theirs.jobs, theirs.age_s)
                for each in self._fleet.workers()
                for theirs in _tenants(each)
            ],
        )

    async def _stop(
        self, tenant: TenantId, requests: list[Exchange], workers: list[tuple[WorkerState, TenantState]]
    ) -> None:
        deed = Deed(
            tenant,
            {
                "gateway": str(self.gateway),
                "requests": [
                    {
                        "id": each.request_id,
                        "key": _key(each),
                        "operation": each.operation,
                        "ran_ms": round(each.elapsed_ms),
                    }
                    for each in requests
                ],
                "workers": [
                    {
                        "pid": each.pid,
                        "running": theirs.running,
                        "jobs": theirs.jobs,
                        "since_us": round((time.time() - theirs.age_s) * 1_000_000),
                    }
                    for each, theirs in workers
                ],
            },
        )
        await self._audit.record(await self._deeds.entry(Actor(GATEWAY), "stop", deed))
        for request in requests:
            request.halt()
        if workers:
            self._killed |= {each.pid for each, _theirs in workers}
            await self._fleet.expel(str(tenant))
        log.warning(
            "stopped what is contained",
            action="contained",
            tenant=str(tenant),
            requests=len(requests),
            workers=len(workers),
        )


def _tenants(worker: WorkerState) -> tuple[TenantState, ...]:
    """Whom a worker serves; also one that it has yet to get the first job of."""
    if worker.tenant is None or worker.tenants:
        return worker.tenants
    return (TenantState(worker.tenant, 0, 0, worker.age_s),)


def _tenant(exchange: Exchange) -> str:
    assert exchange.caller is not None, "only known callers' requests are counted in"
    return str(exchange.caller.tenant)


def _key(exchange: Exchange) -> str:
    assert exchange.caller is not None, "only known callers' requests are counted in"
    return exchange.caller.key_id


def _evidence(worker: ToldWorker) -> dict[str, object]:
    return {
        "gateway": str(worker.gateway),
        "pid": worker.pid,
        "running": worker.running,
        "jobs": worker.jobs,
        "since_us": round(worker.since.timestamp() * 1_000_000),
    }
