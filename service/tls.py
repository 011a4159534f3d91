"""TLS that ends here: who connects may prove itself by a certificate, and the app is told of it.

TLS 1.2 and 1.3 alone, with forward secrecy and authenticated ciphers (RFC 9325). The certificate is read again on SIGHUP,
for whoever connects from then on; one that cannot be used changes nothing.

Uvicorn checks client certificates and then says nothing of them; so our own protocol puts the peer's certificate into the
ASGI scope, as the TLS extension of ASGI has it (`scope["extensions"]["tls"]["client_cert_chain"]`, here in DER). It
uses uvicorn's own methods, which is why uvicorn is pinned and a test reads a name back over a real socket.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any

from service.connections import Connection
from service.watch.logs import get_logger

if TYPE_CHECKING:
    import asyncio

    from service.settings import Settings

CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""Of TLS 1.2; those of 1.3 are all of this kind."""

log = get_logger(__name__)


class CertificateProtocol(Connection):
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


class ServerTls:
    """The server's side of TLS, for as long as it listens."""

    def __init__(self, settings: Settings) -> None:
        """Raises OSError where a file cannot be read, `ssl.SSLError` among them where it is not what it should be."""
        self._certificate, self._key = settings.tls_certificate, settings.tls_key
        self.context = self._load()
        if settings.client_ca is not None:
            self.context.load_verify_locations(settings.client_ca)
            # Optional: who has no certificate may have a key. The door asks for one of them.
            self.context.verify_mode = ssl.CERT_OPTIONAL

    def reload(self) -> None:
        """Take up a renewed certificate; logs what came of it and never raises. The client CA stays as it was."""
        try:
            self._load()  # whether the two files belong together is found out on a context that nobody uses
            self.context.load_cert_chain(str(self._certificate), str(self._key))
        except OSError as exc:
            log.error(
                "the certificate cannot be used; the one from before stays",
                action="certificate_failed",
                error=type(exc).__name__,
            )
        else:
            log.info("the certificate was read again", action="certificate_read")

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(CIPHERS)
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        context.load_cert_chain(str(self._certificate), str(self._key))
        return context


def server_tls(settings: Settings) -> ServerTls | None:
    """None where TLS does not end here. Raises as `ServerTls`."""
    return None if settings.tls_certificate is None else ServerTls(settings)


def protocol_options(tls: ServerTls | None) -> dict[str, Any]:
    """What uvicorn is told of protocols."""
    if tls is None:
        return {"http": Connection}
    return {"http": CertificateProtocol, "ssl_context_factory": lambda _config, _default: tls.context}
