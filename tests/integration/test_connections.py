"""Connections as strangers open them: patience with an end, and TLS that is new enough and takes up a renewed certificate."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from structlog.testing import capture_logs

from service.connections import HEADER_BYTES, Connection
from service.settings import Settings
from service.tls import ServerTls, protocol_options
from tests import certificates

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    body = await Request(scope, receive).body()
    await Response(body)(scope, receive, send)


@asynccontextmanager
async def listening(tls: ServerTls | None = None) -> AsyncIterator[int]:
    """The port of a server whose app sends back what it gets."""
    options: dict[str, Any] = protocol_options(tls)
    config = uvicorn.Config(echo, port=0, log_config=None, lifespan="off", **options)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve(None))
    while not server.started:
        assert not serving.done()
        await asyncio.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await serving


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "headers_s", 0.3)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("beginning", [b"", b"POST / HT", HEAD, HEAD + b"\r\nbody" + HEAD])
async def test_headers_that_do_not_end_close_the_connection(beginning: bytes) -> None:
    """Also those of a second request, after the first was answered."""
    async with listening() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(beginning)
        answer = b""
        try:
            async with asyncio.timeout(20):
                answer = await reader.read()
        except ConnectionResetError:
            pass  # so it was aborted
        assert answer.count(b"200 OK") == beginning.count(b"body")
        writer.close()


@pytest.mark.usefixtures("hasty")
async def test_a_body_and_an_idle_connection_have_more_time() -> None:
    async with listening() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            writer.write(HEAD + b"\r\n")
            await asyncio.sleep(0.6)
            writer.write(b"body")
            assert (await reader.readuntil(b"body")).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(0.6)
        writer.close()


async def test_headers_without_end_fill_no_memory() -> None:
    async with listening() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD + b"X: " + b"a" * (4 * HEADER_BYTES))
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writer.close()


class Files:
    """A server's certificate and key, which can be renewed, and the CA that signs them."""

    def __init__(self, folder: Path) -> None:
        self.ca = certificates.authority()
        self.certificate, self.key = folder / "server.pem", folder / "server.key"
        self.renew()

    def renew(self) -> int:
        """The new one's serial number."""
        issued = certificates.issue(self.ca, dns=("localhost",), uses=(certificates.SERVER,))
        self.certificate.write_bytes(issued.pem)
        self.key.write_bytes(issued.key_pem)
        return issued.certificate.serial_number

    def serve(self) -> ServerTls:
        return ServerTls(Settings(tls_certificate=self.certificate, tls_key=self.key))

    async def serial_number(self, port: int, **limits: Any) -> int:
        """Of the certificate that the server shows."""
        context = ssl.create_default_context(cadata=self.ca.pem.decode())
        for name, value in limits.items():
            setattr(context, name, value)
        _, writer = await asyncio.open_connection("localhost", port, ssl=context, family=socket.AF_INET)
        shown = writer.get_extra_info("ssl_object").getpeercert()["serialNumber"]
        writer.close()
        return int(shown, 16)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


async def test_a_renewed_certificate_is_taken_up_and_a_broken_one_is_not(files: Files) -> None:
    tls = files.serve()
    async with listening(tls) as port:
        first = await files.serial_number(port)
        second = files.renew()
        assert await files.serial_number(port) == first != second
        with capture_logs() as logs:
            tls.reload()
            assert await files.serial_number(port) == second
            whole = files.key.read_bytes()
            files.renew()
            files.key.write_bytes(whole)  # the new certificate with the old key
            tls.reload()
            files.certificate.unlink()
            tls.reload()
        assert await files.serial_number(port) == second
    assert [line["action"] for line in logs] == ["certificate_read", *["certificate_failed"] * 2]


async def test_old_protocols_and_weak_ciphers_are_refused(files: Files) -> None:
    tls = files.serve()
    names = {cipher["name"] for cipher in tls.context.get_ciphers()}
    assert all(name.startswith(("TLS_", "ECDHE-")) and "CBC" not in name for name in names)
    assert not any(name.endswith(("-SHA", "-SHA256")) and "GCM" not in name for name in names)
    async with listening(tls) as port:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            await files.serial_number(port, minimum_version=version, maximum_version=version)
        with pytest.raises((ssl.SSLError, ConnectionResetError)), pytest.warns(DeprecationWarning):
            await files.serial_number(
                port, minimum_version=ssl.TLSVersion.TLSv1_1, maximum_version=ssl.TLSVersion.TLSv1_1
            )
