"""TLS that ends here: who connects may prove itself by a certificate, and the app is told of it.

Uvicorn checks client certificates and then says nothing of them; so our own protocol puts the peer's certificate into the
ASGI scope, as the TLS extension of ASGI has it (`scope["extensions"]["tls"]["client_cert_chain"]`, here in DER). It
uses uvicorn's own methods, which is why uvicorn is pinned and a test reads a name back over a real socket.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

if TYPE_CHECKING:
    import asyncio

    from service.settings import Settings


class CertificateProtocol(HttpToolsProtocol):
    """HTTP/1.1 that tells the app of the peer's verified certificate."""

    _peer: bytes | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        connection = transport.get_extra_info("ssl_object")
        self._peer = connection.getpeercert(binary_form=True) if connection is not None else None

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._peer is not None:
            extensions: dict[str, Any] = {"tls": {"client_cert_chain": [self._peer]}}
            self.scope["extensions"] = extensions


def tls_options(settings: Settings) -> dict[str, Any]:
    """What uvicorn is told of TLS; nothing where no certificate is set."""
    if settings.tls_certificate is None:
        return {}
    options: dict[str, Any] = {
        "ssl_certfile": str(settings.tls_certificate),
        "ssl_keyfile": str(settings.tls_key),
        "http": CertificateProtocol,
    }
    if settings.client_ca is not None:
        options |= {
            "ssl_ca_certs": str(settings.client_ca),
            # Optional: who has no certificate may have a key. The door asks for one of them.
            "ssl_cert_reqs": int(ssl.CERT_OPTIONAL),
        }
    return options
