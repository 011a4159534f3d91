"""Tenants: made, listed, read, suspended, resumed, deleted and restored; and the switch that stops one at once."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from service.administration import DEFAULT_GRACE_DAYS
from service.api.admin.described import IDEMPOTENT, body_of, refusals
from service.api.admin.entrance import Told, page, parse, read_cursor, respond, write_cursor
from service.api.admin.shapes import Incident, NewTenant, TenantAnswer, TenantPage
from tenants.access import Role, Scope
from tenants.errors import TenantNotFound
from tenants.lifecycle import LONGEST_GRACE
from tenants.policy import Policy

if TYPE_CHECKING:
    from service.administration import Administration
    from service.api.admin.entrance import Entrance
    from service.containment import Enforcement, Switch
    from service.deeds import Actor
    from tenants.directory import Directory, Tenant

State = Literal["active", "suspended", "contained", "deleted"]
LISTING = "tenants"


def build_tenants_router(
    *,
    entrance: Entrance,
    administration: Administration,
    switch: Switch,
    enforcement: Enforcement,
    directory: Directory,
) -> APIRouter:
    """The routes of tenants."""
    router = APIRouter(prefix="/tenants", tags=["admin: tenants"])

    @router.post(
        "",
        name="tenant_create",
        status_code=201,
        response_model=TenantAnswer,
        responses=refusals(409, 422),
        openapi_extra=body_of(
            NewTenant,
            plain={"name": "acme"},
            tuned={"name": "beta", "policy": {"kind": "enterprise", "images_per_minute": 600}},
        )
        | IDEMPOTENT,
        summary="Make a tenant",
    )
    async def create_tenant(request: Request) -> Response:
        """For the platform's administrators. Its policy has the defaults but for the fields that are sent."""
        entrance.platform(request)

        async def act(body: bytes, actor: Actor) -> Told:
            asked = parse(body, NewTenant)
            policy = Policy.from_json(orjson.dumps(asked.policy))
            tenant = await administration.create_tenant(actor, asked.name, policy)
            return Told(tell(tenant), 201, {"Location": f"/admin/v1/tenants/{tenant.id}"})

        return await entrance.once(request, act)

    @router.get(
        "", name="tenant_list", response_model=TenantPage, responses=refusals(422), summary="List tenants"
    )
    async def list_tenants(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=200, description="Tenants on a page.")] = 50,
        cursor: Annotated[
            str | None, Query(max_length=1000, description="`next_cursor` of the page before.")
        ] = None,
        name: Annotated[str | None, Query(max_length=63, description="The one tenant of that name.")] = None,
        state: Annotated[State | None, Query(description="Tenants in that state alone.")] = None,
    ) -> Response:
        """By name. The platform's administrators see every tenant, a tenant's administrator its own."""
        caller = entrance.caller(request, Scope.POLICY)
        after = read_cursor(cursor, LISTING, 1) or ("",)
        if caller.role != Role.PLATFORM_ADMIN or name is not None:
            wanted = name if caller.role == Role.PLATFORM_ADMIN else caller.tenant_name
            listed = await _find(directory, wanted or "")
            listed = [
                tenant
                for tenant in listed
                if (name is None or tenant.name == name)
                and (state is None or tenant.state == state)
                and tenant.name > after[0]
            ]
        else:
            listed = list(await directory.list_tenants(after=after[0], most=limit + 1, state=state or ""))
        told = page(
            [tell(tenant) for tenant in listed], limit, lambda at: write_cursor(LISTING, listed[at].name)
        )
        return respond(request, Told(told))

    @router.get(
        "/{tenant_id}",
        name="tenant_read",
        response_model=TenantAnswer,
        responses=refusals(404),
        summary="Read a tenant",
    )
    async def read_tenant(request: Request, tenant_id: str) -> Response:
        """Deleted ones too, until they are purged."""
        return respond(request, Told(tell(await entrance.tenant(request, tenant_id, Scope.POLICY))))

    @router.post(
        "/{tenant_id}/suspend",
        name="tenant_suspend",
        response_model=TenantAnswer,
        responses=refusals(404, 409, 422),
        openapi_extra=IDEMPOTENT,
        summary="Suspend a tenant",
    )
    async def suspend_tenant(request: Request, tenant_id: str) -> Response:
        """Every key of it is refused within two seconds; requests under way may end. Twice is as good as once."""
        tenant = await _platforms(request, tenant_id)
        return await entrance.once(
            request, lambda _body, actor: _told(administration.suspend(actor, tenant.id))
        )

    @router.post(
        "/{tenant_id}/resume",
        name="tenant_resume",
        response_model=TenantAnswer,
        responses=refusals(404, 409, 422),
        openapi_extra=IDEMPOTENT,
        summary="Resume a suspended tenant",
    )
    async def resume_tenant(request: Request, tenant_id: str) -> Response:
        """Its keys work again, but for those that are revoked, expired or contained."""
        tenant = await _platforms(request, tenant_id)
        return await entrance.once(
            request, lambda _body, actor: _told(administration.resume(actor, tenant.id))
        )

    @router.delete(
        "/{tenant_id}",
        name="tenant_delete",
        status_code=202,
        response_model=TenantAnswer,
        responses=refusals(404, 422),
        summary="Delete a tenant, with a grace period",
    )
    async def delete_tenant(
        request: Request,
        tenant_id: str,
        grace_days: Annotated[
            int,
            Query(
                ge=0, le=LONGEST_GRACE.days, description="Days until it is purged; 0: within a minute or two."
            ),
        ] = DEFAULT_GRACE_DAYS,
    ) -> Response:
        """It is refused at once. Until `purge_after` it can be restored; then every row of it goes but the log's
        entries, and the key of its fingerprints, so that nothing ties an entry to an input any more."""
        tenant = await _platforms(request, tenant_id)
        actor = entrance.actor(request)
        deleted = await administration.delete(actor, tenant.id, grace_days)
        await enforcement.enforce()
        return respond(request, Told(tell(deleted), 202), actor)

    @router.post(
        "/{tenant_id}/restore",
        name="tenant_restore",
        response_model=TenantAnswer,
        responses=refusals(404, 409, 422),
        openapi_extra=IDEMPOTENT,
        summary="Undo a deletion",
    )
    async def restore_tenant(request: Request, tenant_id: str) -> Response:
        """As long as it is not purged. Its keys work again as they did."""
        tenant = await _platforms(request, tenant_id)
        return await entrance.once(
            request, lambda _body, actor: _told(administration.restore(actor, tenant.id))
        )

    @router.post(
        "/{tenant_id}/contain",
        name="contain",
        response_model=TenantAnswer,
        responses=refusals(404, 409, 422),
        openapi_extra=body_of(Incident, why={"reason": "A worker of it crashes again and again."})
        | IDEMPOTENT,
        summary="Stop a tenant at once, everywhere",
    )
    async def contain_tenant(request: Request, tenant_id: str) -> Response:
        """The switch for an incident. Its keys are refused, its requests broken off, its workers killed: here before
        the answer, at every other gateway within two seconds. What ran, since when, and how much is in the log
        before anything is stopped. A tenant's administrator may contain its own tenant; its keys are refused then,
        so only the platform's can release it."""
        tenant = await entrance.tenant(request, tenant_id, Scope.CONTAIN)

        async def act(body: bytes, actor: Actor) -> Told:
            asked = parse(body, Incident)
            return Told(tell(await switch.contain(actor, tenant.id, reason=asked.reason)))

        response = await entrance.once(request, act)
        await enforcement.enforce()
        return response

    @router.post(
        "/{tenant_id}/release",
        name="release",
        response_model=TenantAnswer,
        responses=refusals(404, 409, 422),
        openapi_extra=body_of(Incident, why={"reason": "The image that did it is refused now."}) | IDEMPOTENT,
        summary="Undo containing a tenant",
    )
    async def release_tenant(request: Request, tenant_id: str) -> Response:
        """Its keys work again as they did; workers start with its next request."""
        tenant = await entrance.tenant(request, tenant_id, Scope.CONTAIN)

        async def act(body: bytes, actor: Actor) -> Told:
            asked = parse(body, Incident)
            return Told(tell(await switch.release(actor, tenant.id, reason=asked.reason)))

        return await entrance.once(request, act)

    async def _platforms(request: Request, tenant_id: str) -> Tenant:
        """The tenant of a path that only the platform's administrators may use."""
        entrance.platform(request)
        return await entrance.tenant(request, tenant_id, Scope.TENANTS)

    return router


async def _find(directory: Directory, name: str) -> list[Tenant]:
    """The tenant of that name, if there is one."""
    try:
        return [await directory.find_tenant(name)]
    except TenantNotFound:
        return []


async def _told(work: Awaitable[Tenant]) -> Told:
    return Told(tell(await work))


def tell(tenant: Tenant) -> dict[str, Any]:
    """A tenant as the API shows it."""
    return {
        "id": str(tenant.id),
        "object": "tenant",
        "name": tenant.name,
        "state": tenant.state,
        "created_at": tenant.created_at,
        "suspended_at": tenant.suspended_at,
        "contained_at": tenant.contained_at,
        "deleted_at": tenant.deleted_at,
        "purge_after": tenant.purge_after,
    }
