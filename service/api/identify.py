"""Who sends a request, from its headers and its connection alone: key, token or client certificate.

What is presented must hold, all of it, and must agree: a caller that is two at once is nobody. Every refusal is one
and the same answer.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from tenants.access import Means
from tenants.errors import CertificateInvalid, Forbidden, KeyMalformed, KeyUnknown, Unauthenticated
from tenants.key_text import Plane

if TYPE_CHECKING:
    from starlette.types import Scope

    from service.api.addresses import Proxies
    from service.asks import Exchange
    from service.refusals import Refusals
    from tenants.access import Access, Caller, Identity
    from tenants.certificates import Certificates
    from tenants.tokens import Tokens
    from tenants.uses import Uses

ADMIN_PATHS = ("/admin/", "/audit/", "/metrics")
"""What belongs to the admin plane; every other path is the data plane's."""
TOKEN_LENGTH = 8192


class Identify:
    """From a request to its caller. One instance serves every request."""

    def __init__(
        self,
        *,
        access: Access,
        uses: Uses,
        refusals: Refusals,
        proxies: Proxies,
        tokens: Tokens | None = None,
        certificates: Certificates | None = None,
        reads_client_cert: bool = False,
    ) -> None:
        """`reads_client_cert`: believe the header `Client-Cert` (RFC 9440) of the trusted proxies."""
        self.access = access
        self.tokens = tokens
        self.certificates = certificates
        self.reads_client_cert = reads_client_cert
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
            caller = await self._caller(scope, exchange)
        except Unauthenticated as exc:
            self.refusals.note(exc, exchange, status=401)
            raise
        except Forbidden as exc:
            self.refusals.note(exc, exchange, status=403)
            raise
        if caller.means is Means.KEY:
            self.uses.note(caller.tenant, caller.key_id, exchange.client_address)
        return caller

    async def _caller(self, scope: Scope, exchange: Exchange) -> Caller:
        headers, plane = Headers(scope=scope), plane_of_path(scope["path"])
        callers = []
        token = read_bearer(headers)
        if token is not None:
            callers.append(await self._by_token(token, plane, exchange.client_address))
        identity = self._certificate(scope, headers)
        if identity is not None:
            callers.append(await self.access.admit(identity, plane=plane))
        if not callers:
            raise KeyMalformed
        first = callers[0]
        for other in callers[1:]:
            if (other.tenant, other.role) != (first.tenant, first.role):
                raise KeyUnknown(reason="conflict", tenant=first.tenant, key_id=first.key_id)
        return first

    async def _by_token(self, token: str, plane: Plane, address: str) -> Caller:
        """By a key, or by a provider's token where any provider is configured: only that has dots."""
        if self.tokens is not None and "." in token:
            return await self.access.admit(self.tokens.verify(token, plane=plane), plane=plane)
        return await self.access.authenticate(token, plane=plane, address=address)

    def _certificate(self, scope: Scope, headers: Headers) -> Identity | None:
        """Whom the client certificate speaks for: the one that a trusted proxy hands on, else the connection's own."""
        if self.certificates is None:
            return None
        peer = (scope.get("client") or ("", 0))[0]
        if self.reads_client_cert and self.proxies.trusts(peer):
            leaf = headers.getlist("client-cert")
            if leaf:
                return self.certificates.identify(
                    *read_client_cert(leaf, headers.getlist("client-cert-chain"))
                )
        presented = scope.get("extensions", {}).get("tls", {}).get("client_cert_chain", [])
        return self.certificates.identify(presented[0], None) if presented else None


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


def read_client_cert(leaf: list[str], chain: list[str]) -> tuple[bytes, list[bytes]]:
    """RFC 9440: one byte sequence, and a list of them. Raises `CertificateInvalid` for anything else."""
    between = ",".join(chain)
    try:
        if len(leaf) != 1:
            raise ValueError("more than one")
        return _bytes(leaf[0]), [_bytes(each) for each in between.split(",")] if between.strip() else []
    except ValueError as exc:
        raise CertificateInvalid(reason="certificate_malformed") from exc


def _bytes(text: str) -> bytes:
    """A byte sequence of RFC 8941, section 3.3.5: base64 between colons."""
    text = text.strip()
    if len(text) < 2 or text[0] != ":" or text[-1] != ":":
        raise ValueError("not between colons")
    return base64.b64decode(text[1:-1], validate=True)
