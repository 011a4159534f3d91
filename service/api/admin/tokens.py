"""Tokens and client certificates that a tenant denies although they are valid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.admin.described import IDEMPOTENT, body_of, refusals
from service.api.admin.entrance import Told, parse, respond
from service.api.admin.shapes import DeniedToken, DeniedTokens, TokenDenial
from tenants.access import Scope

if TYPE_CHECKING:
    from service.administration import Administration
    from service.api.admin.entrance import Entrance
    from service.deeds import Actor
    from tenants.denials import Denial, Denials


def build_tokens_router(*, entrance: Entrance, administration: Administration, denials: Denials) -> APIRouter:
    """The routes of denied tokens."""
    router = APIRouter(prefix="/tenants/{tenant_id}/denied-tokens", tags=["admin: keys"])

    @router.post(
        "",
        name="token_deny",
        status_code=201,
        response_model=DeniedToken,
        responses=refusals(404, 409, 422),
        openapi_extra=body_of(
            TokenDenial,
            token={"issuer": "jwt:corp", "jti": "3f2a9c"},
            certificate={
                "issuer": "mtls:shop",
                "jti": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            },
        )
        | IDEMPOTENT,
        summary="Deny a token or a client certificate",
    )
    async def deny_token(request: Request, tenant_id: str) -> Response:
        """Refused everywhere within two seconds, until it would have expired anyway. Twice is as good as once."""
        tenant = await entrance.tenant(request, tenant_id, Scope.KEYS)

        async def act(body: bytes, actor: Actor) -> Told:
            asked = parse(body, TokenDenial)
            return Told(tell(await administration.deny_token(actor, tenant.id, asked.issuer, asked.jti)), 201)

        return await entrance.once(request, act)

    @router.get(
        "",
        name="token_list_denied",
        response_model=DeniedTokens,
        responses=refusals(404),
        summary="List what a tenant denies",
    )
    async def list_denied(request: Request, tenant_id: str) -> Response:
        """Newest first, all of them: what expired is dropped with the next denial."""
        tenant = await entrance.tenant(request, tenant_id, Scope.KEYS)
        denied = [tell(denial) for denial in await denials.list(tenant.id)]
        return respond(request, Told({"object": "list", "data": denied}))

    return router


def tell(denial: Denial) -> dict[str, Any]:
    """A denial as the API shows it."""
    return {
        "object": "denied_token",
        "issuer": denial.issuer,
        "jti": denial.jti,
        "denied_at": denial.denied_at,
        "until": denial.until,
    }
