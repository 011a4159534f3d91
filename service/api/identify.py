"""Who sends a request, from its headers and its connection alone: key, token or client certificate.

What is presented must hold, all of it, and must agree: a caller that is two at once is nobody. Every refusal is one
and the same answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from tenants.access import Means
from tenants.errors import Forbidden, KeyMalformed, Unauthenticated
from tenants.key_text import Plane

if TYPE_CHECKING:
    from starlette.types import Scope

    from service.api.addresses import Proxies
    from service.asks import Exchange
    from service.refusals import Refusals
    from tenants.access import Access, Caller
    from tenants.uses import Uses

ADMIN_PATHS = ("/admin/", "/metrics")
"""What belongs to the admin plane; every other path is the data plane's."""
TOKEN_LENGTH = 8192


class Identify:
    """From a request to its caller. One instance serves every request."""

    def __init__(self, *, access: Access, uses: Uses, refusals: Refusals, proxies: Proxies) -> None:
        self.access = access
        self.uses = uses
        self.refusals = refusals
        self.proxies = proxies

    def address(self, scope: Scope) -> str:
        """Where the request comes from."""
        return self.proxies.client_address(scope, Headers(scope=scope))

    async def __call__(self, scope: Scope, exchange: Exchange) -> Caller:
        """The caller. Raises `Unauthenticated`, `Forbidden` (a suspended tenant), `DatabaseUnavailable`.

        A refused key that is known is noted for the log; a key that is let in is noted as used.
        """
        try:
            caller = await self._caller(Headers(scope=scope), exchange, plane_of_path(scope["path"]))
        except Unauthenticated as exc:
            self.refusals.note(exc, exchange, status=401)
            raise
        except Forbidden as exc:
            self.refusals.note(exc, exchange, status=403)
            raise
        if caller.means is Means.KEY:
            self.uses.note(caller.tenant, caller.key_id, exchange.client_address)
        return caller

    async def _caller(self, headers: Headers, exchange: Exchange, plane: Plane) -> Caller:
        token = read_bearer(headers)
        if token is None:
            raise KeyMalformed
        return await self.access.authenticate(token, plane=plane, address=exchange.client_address)


def plane_of_path(path: str) -> Plane:
    """Which plane a path belongs to, one that leads nowhere as well."""
    return Plane.ADMIN if path.startswith(ADMIN_PATHS) else Plane.DATA


def read_bearer(headers: Headers) -> str | None:
    """What `Authorization: Bearer …` presents; None where the header is missing.

    Raises `KeyMalformed` for two of them, another scheme, or more than a token.
    """
    given = headers.getlist("authorization")
    if not given:
        return None
    scheme, _, token = given[0].partition(" ")
    token = token.strip()
    if len(given) > 1 or scheme.lower() != "bearer" or not 0 < len(token) <= TOKEN_LENGTH:
        raise KeyMalformed
    return token
