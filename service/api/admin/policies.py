"""Policies and ceilings: read, changed under If-Match, and every version there was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from service.administration import amend
from service.api.admin.described import IF_MATCH, raw_body, refusals
from service.api.admin.entrance import Told, page, read_cursor, respond, tags, write_cursor
from service.api.admin.shapes import CeilingAnswer, PolicyAnswer, PolicyPage
from service.errors import BadRequest, PreconditionMissing
from tenants.access import INSTALLATION, Scope
from tenants.ceiling import Ceiling
from tenants.errors import PolicyChanged
from tenants.policy import Policy

if TYPE_CHECKING:
    from service.administration import Administration
    from service.api.admin.entrance import Entrance
    from tenants.access import TenantId
    from tenants.policies import CeilingVersion, Policies, PolicyVersion

LISTING = "policy"


def build_policies_router(
    *, entrance: Entrance, administration: Administration, policies: Policies
) -> APIRouter:
    """The routes of policies and ceilings."""
    router = APIRouter(tags=["admin: policies"])

    @router.get(
        "/tenants/{tenant_id}/policy",
        name="policy_read",
        response_model=PolicyAnswer,
        responses=refusals(404),
        summary="The policy in force",
    )
    async def read_policy(request: Request, tenant_id: str) -> Response:
        """Its version is the answer's ETag, for `If-Match` of a change."""
        tenant = await entrance.tenant(request, tenant_id, Scope.POLICY)
        version = await policies.current(tenant.id)
        return respond(request, Told(tell(str(tenant.id), version), headers=_tag(version.version)))

    @router.put(
        "/tenants/{tenant_id}/policy",
        name="policy_set",
        response_model=PolicyAnswer,
        responses=refusals(404, 412, 422, 428),
        openapi_extra=raw_body(
            "Every field that differs from the defaults.",
            whole={"kind": "research", "images_per_minute": 100},
        )
        | IF_MATCH,
        summary="Replace the policy",
    )
    async def set_policy(request: Request, tenant_id: str) -> Response:
        """What is left out takes its default. A policy that contradicts itself, or is above the ceiling, is refused
        whole, with every field that is wrong. Lowering a limit below what is used now is allowed: `notes` tell what
        happens then. In force everywhere within two seconds."""
        return await _change(request, tenant_id, whole=True)

    @router.patch(
        "/tenants/{tenant_id}/policy",
        name="policy_change",
        response_model=PolicyAnswer,
        responses=refusals(404, 412, 422, 428),
        openapi_extra=raw_body(
            "The fields to change; `null` is the default (RFC 7396).",
            lower={"concurrent_requests": 2},
            default={"image_burst": None},
        )
        | IF_MATCH,
        summary="Change some fields of the policy",
    )
    async def change_policy(request: Request, tenant_id: str) -> Response:
        """As PUT, but what is left out stays as it is."""
        return await _change(request, tenant_id, whole=False)

    async def _change(request: Request, tenant_id: str, *, whole: bool) -> Response:
        tenant = await entrance.tenant(request, tenant_id, Scope.POLICY)
        now = await policies.current(tenant.id)
        expected = _expected(request, now.version)
        sent = _object(await entrance.body(request))
        policy = Policy.from_json(orjson.dumps(sent)) if whole else amend(now.policy, sent)
        actor = entrance.actor(request)
        changed, notes = await administration.change_policy(actor, tenant, policy, expected=expected)
        told = tell(str(tenant.id), changed, notes)
        return respond(request, Told(told, headers=_tag(changed.version)), actor)

    @router.get(
        "/tenants/{tenant_id}/policy/versions",
        name="policy_versions",
        response_model=PolicyPage,
        responses=refusals(404, 422),
        summary="Every version of the policy",
    )
    async def list_versions(
        request: Request,
        tenant_id: str,
        limit: Annotated[int, Query(ge=1, le=100, description="Versions on a page.")] = 20,
        cursor: Annotated[
            str | None, Query(max_length=1000, description="`next_cursor` of the page before.")
        ] = None,
    ) -> Response:
        """Newest first, with who set it and when."""
        tenant = await entrance.tenant(request, tenant_id, Scope.POLICY)
        position = read_cursor(cursor, LISTING, 1)
        before = None if position is None else _number(position[0])
        listed = await policies.history(tenant.id, most=limit + 1, before=before)
        told = page(
            [tell(str(tenant.id), version) for version in listed],
            limit,
            lambda at: write_cursor(LISTING, str(listed[at].version)),
        )
        return respond(request, Told(told))

    @router.get(
        "/tenants/{tenant_id}/ceiling",
        name="ceiling_read",
        response_model=CeilingAnswer,
        responses=refusals(404),
        summary="What the policy may be at most",
    )
    async def read_ceiling(request: Request, tenant_id: str) -> Response:
        """`ceiling` is the tenant's own, `bounds` all that bounds what you may set: an administrator of the tenant is
        also bounded by what the platform has granted. The version of `ceiling` is the ETag."""
        tenant = await entrance.tenant(request, tenant_id, Scope.POLICY)
        return await _tell_ceiling(request, tenant.id)

    @router.put(
        "/tenants/{tenant_id}/ceiling",
        name="ceiling_set",
        response_model=CeilingAnswer,
        responses=refusals(404, 412, 422, 428),
        openapi_extra=raw_body("Every field that bounds something.", low={"images_per_minute": 600})
        | IF_MATCH,
        summary="Set a tenant's ceiling",
    )
    async def set_ceiling(request: Request, tenant_id: str) -> Response:
        """For the platform's administrators. A policy above it is lowered in the same transaction."""
        entrance.platform(request)
        tenant = await entrance.tenant(request, tenant_id, Scope.TENANTS)
        return await _set_ceiling(request, tenant.id)

    @router.get(
        "/ceiling",
        name="platform_ceiling_read",
        response_model=CeilingAnswer,
        responses=refusals(404),
        summary="The ceiling of every tenant",
    )
    async def read_platform_ceiling(request: Request) -> Response:
        """For the platform's administrators. It counts where a tenant's own says nothing."""
        entrance.platform(request)
        return await _tell_ceiling(request, INSTALLATION)

    @router.put(
        "/ceiling",
        name="platform_ceiling_set",
        response_model=CeilingAnswer,
        responses=refusals(404, 412, 422, 428),
        openapi_extra=raw_body("Every field that bounds something.", low={"retention_days": 400}) | IF_MATCH,
        summary="Set the ceiling of every tenant",
    )
    async def set_platform_ceiling(request: Request) -> Response:
        """For the platform's administrators. Every policy above it is lowered in the same transaction."""
        entrance.platform(request)
        return await _set_ceiling(request, INSTALLATION)

    async def _tell_ceiling(request: Request, tenant: TenantId) -> Response:
        version = await policies.ceiling(tenant)
        bounds = version.ceiling
        if tenant != INSTALLATION:
            bounds = await policies.bounds(tenant, entrance.actor(request).role)
        return respond(request, Told(_tell(version, bounds), headers=_tag(version.version)))

    async def _set_ceiling(request: Request, tenant: TenantId) -> Response:
        now = await policies.ceiling(tenant)
        expected = _expected(request, now.version)
        ceiling = Ceiling.from_json(orjson.dumps(_object(await entrance.body(request))))
        actor = entrance.actor(request)
        version, lowered = await administration.set_ceiling(actor, tenant, ceiling, expected=expected)
        told = _tell(version, version.ceiling) | {"lowered": [str(each) for each in lowered]}
        return respond(request, Told(told, headers=_tag(version.version)), actor)

    return router


def tell(tenant: str, version: PolicyVersion, notes: tuple[str, ...] = ()) -> dict[str, Any]:
    """A version of a policy as the API shows it."""
    return {
        "object": "policy",
        "tenant": tenant,
        "version": version.version,
        "set_at": version.set_at,
        "set_by": {"role": version.set_by.role, "key_id": version.set_by.name or None},
        "policy": orjson.loads(version.policy.to_json()),
        "notes": list(notes),
    }


def _tell(version: CeilingVersion, bounds: Ceiling) -> dict[str, Any]:
    return {
        "object": "ceiling",
        "version": version.version,
        "set_at": version.set_at,
        "set_by": {"role": version.set_by.role, "key_id": version.set_by.name or None},
        "ceiling": orjson.loads(version.ceiling.to_json()),
        "bounds": orjson.loads(bounds.to_json()),
        "lowered": [],
    }


def _tag(version: int) -> dict[str, str]:
    return {"ETag": f'"{version}"'}


def _expected(request: Request, now: int) -> int | None:
    """The version that the caller has seen; None where any will do. Raises `PreconditionMissing`, `PolicyChanged`."""
    header = request.headers.get("if-match")
    if header is None:
        raise PreconditionMissing(
            "Send the ETag of the version that you have seen as If-Match, or If-Match: * for any.",
            field="If-Match",
        )
    if header.strip() == "*":
        return None
    if f'"{now}"' not in tags(header):
        raise PolicyChanged(now)
    return now


def _object(body: bytes) -> dict[str, Any]:
    try:
        sent = orjson.loads(body or b"{}")
    except orjson.JSONDecodeError as exc:
        raise BadRequest(f"The body is not valid JSON: {exc}.") from None
    if not isinstance(sent, dict):
        raise BadRequest("The body must be one JSON object.")
    return sent


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise BadRequest("cursor is not one that this listing gave; begin without one.", field="cursor")
    return int(text)
