"""A tenant's keys: made, listed, read, changed, rotated, revoked; and the switch that stops one at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from service.administration import state_of
from service.api.admin.described import IDEMPOTENT, body_of, refusals
from service.api.admin.entrance import Told, page, parse, read_cursor, respond, write_cursor
from service.api.admin.shapes import (
    Incident,
    IssuedKey,
    KeyAnswer,
    KeyChange,
    KeyPage,
    NewKey,
    Rotation,
)
from service.api.complaints import refuse
from tenants.access import Role, Scope
from tenants.errors import Fault
from tenants.key_limits import KeyLimits
from tenants.keys import Changes

if TYPE_CHECKING:
    from datetime import datetime

    from service.administration import Administration
    from service.api.admin.entrance import Entrance
    from service.containment import Enforcement, Switch
    from service.deeds import Actor
    from tenants.keys import Key, Keys

LISTING = "keys"


def build_keys_router(
    *,
    entrance: Entrance,
    administration: Administration,
    switch: Switch,
    enforcement: Enforcement,
    keys: Keys,
) -> APIRouter:
    """The routes of keys. A key of another tenant is as unknown as one that was never made."""
    router = APIRouter(prefix="/tenants/{tenant_id}/keys", tags=["admin: keys"])

    @router.post(
        "",
        name="key_create",
        status_code=201,
        response_model=IssuedKey,
        responses=refusals(404, 409, 422),
        openapi_extra=body_of(
            NewKey,
            plain={"name": "shop"},
            narrow={
                "name": "partner",
                "expires_at": "2027-01-01T00:00:00Z",
                "allowed_cidrs": ["203.0.113.0/24"],
                "limits": {"requests_per_minute": 60},
            },
        )
        | IDEMPOTENT,
        summary="Make a key",
    )
    async def create_key(request: Request, tenant_id: str) -> Response:
        """Its text is in this answer and nowhere else. Nobody can hand on a right that they lack, and only the
        platform's administrators make `platform_admin` keys."""
        tenant = await entrance.tenant(request, tenant_id, Scope.KEYS)
        creator = entrance.caller(request, Scope.KEYS)

        async def act(body: bytes, actor: Actor) -> Told:
            asked = parse(body, NewKey)
            if asked.role == Role.PLATFORM_ADMIN and creator.role != Role.PLATFORM_ADMIN:
                raise refuse((Fault("role", "only the platform's administrators make platform_admin keys"),))
            key, text = await administration.create_key(
                actor,
                tenant.id,
                asked.role,
                name=asked.name,
                expires_at=asked.expires_at,
                scopes=asked.scopes,
                allowed_cidrs=asked.allowed_cidrs,
                limits=KeyLimits.from_json(orjson.dumps(asked.limits)),
                creator=creator,
            )
            return Told(issue(key, text), 201, {"Location": f"{request.url.path}/{key.id}"})

        return await entrance.once(request, act)

    @router.get(
        "",
        name="key_list",
        response_model=KeyPage,
        responses=refusals(404, 422),
        summary="List a tenant's keys",
    )
    async def list_keys(
        request: Request,
        tenant_id: str,
        limit: Annotated[int, Query(ge=1, le=200, description="Keys on a page.")] = 50,
        cursor: Annotated[
            str | None, Query(max_length=1000, description="`next_cursor` of the page before.")
        ] = None,
    ) -> Response:
        """Oldest first, revoked and expired ones too."""
        tenant = await entrance.tenant(request, tenant_id, Scope.KEYS)
        (after,) = read_cursor(cursor, LISTING, 1) or (None,)
        listed = await keys.list(tenant.id, after=after, most=limit + 1)
        told = page([tell(key) for key in listed], limit, lambda at: write_cursor(LISTING, listed[at].id))
        return respond(request, Told(told))

    @router.get(
        "/{key_id}", name="key_read", response_model=KeyAnswer, responses=refusals(404), summary="Read a key"
    )
    async def read_key(request: Request, tenant_id: str, key_id: str) -> Response:
        """Without its secret, which nobody can read again."""
        tenant = await entrance.tenant(request, tenant_id, Scope.KEYS)
        return respond(request, Told(tell(await keys.find(tenant.id, key_id))))

    @router.patch(
        "/{key_id}",
        name="key_change",
        response_model=KeyAnswer,
        responses=refusals(404, 422),
        openapi_extra=body_of(
            KeyChange, limits={"limits": {"requests_per_minute": 30}}, forever={"expires_at": None}
        ),
        summary="Change a key's name, expiry, rights, addresses or limits",
    )
    async def change_key(request: Request, tenant_id: str, key_id: str) -> Response:
        """What is left out stays. In force everywhere within two seconds."""
        tenant = await entrance.tenant(request, tenant_id, Scope.KEYS)
        asked = await entrance.read(request, KeyChange)
        actor = entrance.actor(request)
        key = await administration.change_key(
            actor, tenant.id, key_id, _changes(asked), creator=entrance.caller(request, Scope.KEYS)
        )
        return respond(request, Told(tell(key)), actor)

    @router.post(
        "/{key_id}/rotate",
        name="key_rotate",
        response_model=IssuedKey,
        responses=refusals(404, 409, 422),
        openapi_extra=body_of(Rotation, default={}, at_once={"overlap_s": 0}) | IDEMPOTENT,
        summary="Give a key a new secret",
    )
    async def rotate_key(request: Request, tenant_id: str, key_id: str) -> Response:
        """The key keeps its id, rights, limits and usage. The old secret ends after `overlap_s`; at most two are live.
        Nobody rotates a key that has rights which they lack."""
        tenant = await entrance.tenant(request, tenant_id, Scope.KEYS)
        creator = entrance.caller(request, Scope.KEYS)

        async def act(body: bytes, actor: Actor) -> Told:
            asked = parse(body, Rotation)
            key, text, ends_at = await administration.rotate_key(
                actor, tenant.id, key_id, overlap_s=asked.overlap_s, creator=creator
            )
            return Told(issue(key, text, ends_at))

        return await entrance.once(request, act)

    @router.delete(
        "/{key_id}",
        name="key_revoke",
        response_model=KeyAnswer,
        responses=refusals(404),
        summary="Revoke a key for good",
    )
    async def revoke_key(request: Request, tenant_id: str, key_id: str) -> Response:
        """It is refused everywhere within two seconds, and stays in the list. Twice is as good as once."""
        tenant = await entrance.tenant(request, tenant_id, Scope.KEYS)
        actor = entrance.actor(request)
        return respond(request, Told(tell(await administration.revoke_key(actor, tenant.id, key_id))), actor)

    @router.post(
        "/{key_id}/contain",
        name="key_contain",
        response_model=KeyAnswer,
        responses=refusals(404, 409, 422),
        openapi_extra=body_of(Incident, why={"reason": "Seen in a public repository."}) | IDEMPOTENT,
        summary="Stop a key at once, everywhere",
    )
    async def contain_key(request: Request, tenant_id: str, key_id: str) -> Response:
        """It is refused, and its requests are broken off: here before the answer, at every other gateway within two
        seconds. The tenant's other keys, and its workers, go on. Unlike a revocation it can be undone."""
        tenant = await entrance.tenant(request, tenant_id, Scope.CONTAIN)

        async def act(body: bytes, actor: Actor) -> Told:
            asked = parse(body, Incident)
            return Told(tell(await switch.contain_key(actor, tenant.id, key_id, reason=asked.reason)))

        response = await entrance.once(request, act)
        await enforcement.enforce()
        return response

    @router.post(
        "/{key_id}/release",
        name="key_release",
        response_model=KeyAnswer,
        responses=refusals(404, 409, 422),
        openapi_extra=body_of(Incident, why={"reason": "It was a test key."}) | IDEMPOTENT,
        summary="Undo containing a key",
    )
    async def release_key(request: Request, tenant_id: str, key_id: str) -> Response:
        """It works again, unless it is revoked or expired."""
        tenant = await entrance.tenant(request, tenant_id, Scope.CONTAIN)

        async def act(body: bytes, actor: Actor) -> Told:
            asked = parse(body, Incident)
            return Told(tell(await switch.release_key(actor, tenant.id, key_id, reason=asked.reason)))

        return await entrance.once(request, act)

    return router


def tell(key: Key) -> dict[str, Any]:
    """A key as the API shows it."""
    return {
        "id": key.id,
        "object": "key",
        "tenant": str(key.tenant),
        "role": key.role,
        "name": key.name,
        "state": state_of(key),
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        "revoked_reason": key.revoked_reason,
        "contained_at": key.contained_at,
        "contained_until": key.contained_until,
        "scopes": list(key.scopes),
        "allowed_cidrs": list(key.allowed_cidrs),
        "limits": orjson.loads(key.limits.to_json()),
        "last_used_at": key.last_used_at,
        "last_used_address": key.last_used_address,
    }


def issue(key: Key, text: str, old_ends_at: datetime | None = None) -> dict[str, Any]:
    """A key with its text, for the one answer that has it."""
    return tell(key) | {"key": text, "old_ends_at": old_ends_at}


def _changes(asked: KeyChange) -> Changes:
    sent = asked.model_fields_set
    if nulls := sorted(name for name in sent - {"expires_at"} if getattr(asked, name) is None):
        raise refuse(tuple(Fault(name, "may be left out, not null") for name in nulls))
    return Changes(
        name=asked.name,
        expires_at=asked.expires_at,
        never_expires="expires_at" in sent and asked.expires_at is None,
        scopes=None if asked.scopes is None else frozenset(asked.scopes),
        allowed_cidrs=None if asked.allowed_cidrs is None else tuple(asked.allowed_cidrs),
        limits=None if asked.limits is None else KeyLimits.from_json(orjson.dumps(asked.limits)),
    )
