"""A world outside for remote images: a real TLS server on this host, and a resolver and routes that a test writes.

Names and routes are all that is not real: addresses are checked, and connections are opened, encrypted and read, by the
service's own code.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpcore2

from service.screening.fetch import Network
from tests import certificates

PUBLIC = "93.184.215.14"
"""Where the server seems to be."""
HOSTS = ("img.example", "cdn.example")
Write = Callable[[bytes], Awaitable[None]]
Serve = Callable[[Write], Awaitable[None]]


def answer(body: bytes, status: str = "200 OK", **headers: str) -> Serve:
    """A plain answer, with its length unless another is given."""
    given = {"Content-Length": str(len(body)), **{name.replace("_", "-"): headers[name] for name in headers}}
    head = "".join(f"{name}: {value}\r\n" for name, value in given.items())

    async def serve(write: Write) -> None:
        await write(f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body)

    return serve


def redirect(to: str) -> Serve:
    return answer(b"", "302 Found", Location=to)


def drip(body: bytes, every_s: float) -> Serve:
    """A byte at a time: each read comes in time, the whole never."""

    async def serve(write: Write) -> None:
        await write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        for byte in body:
            await write(bytes([byte]))
            await asyncio.sleep(every_s)

    return serve


async def flood(write: Write) -> None:
    """Chunks that promise no length: 13 MB of them, for a server that cannot stop would not end with its test."""
    await write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(200):
        await write(b"10000\r\n" + bytes(65_536) + b"\r\n")
        await asyncio.sleep(0.01)


async def silent(_write: Write) -> None:
    await asyncio.sleep(60)


@dataclass
class Outside:
    """What answers there, by path, and what was asked."""

    authority: Path
    """The PEM file of the CA that signed for `HOSTS`."""
    port: int = 0
    pages: dict[str, Serve] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """Requests as they came, head only."""


class Routes(Network):
    """Names as a test has them; what goes to `PUBLIC` comes to the server, and nothing goes anywhere else."""

    def __init__(self, outside: Outside, names: dict[str, list[list[str]]] | None = None) -> None:
        """`names` has for each name its addresses, of each time that it is asked for; the last answer stays."""
        super().__init__()
        self.outside = outside
        self.names = names if names is not None else {host: [[PUBLIC]] for host in HOSTS}
        self.connected: list[str] = []
        self._near = httpcore2.AnyIOBackend()

    async def resolve(self, host: str) -> list[str]:
        if host not in self.names:
            raise OSError("no such name")
        answers = self.names[host]
        return answers.pop(0) if len(answers) > 1 else answers[0]

    async def connect(self, address: str) -> httpcore2.AsyncNetworkStream:
        self.connected.append(address)
        if address != PUBLIC:
            raise httpcore2.ConnectError("nobody there")
        return await self._near.connect_tcp("127.0.0.1", self.outside.port)


@contextmanager
def outside(folder: Path) -> Iterator[Outside]:
    """The server, in a thread of its own."""
    ca = certificates.authority("Outside CA")
    host = certificates.issue(ca, dns=HOSTS, uses=(certificates.SERVER,))
    authority, chain = folder / "outside-ca.pem", folder / "outside.pem"
    authority.write_bytes(ca.pem)
    chain.write_bytes(host.pem + host.key_pem)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(chain)
    world = Outside(authority)
    loop = asyncio.new_event_loop()

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            world.asked.append(head)

            async def write(data: bytes) -> None:
                writer.write(data)
                await writer.drain()

            await world.pages.get(head.split()[1], answer(b"", "404 Not Found"))(write)
        except (OSError, asyncio.IncompleteReadError):
            pass  # who fetched has gone: that is what is tested
        finally:
            writer.close()

    ready = threading.Event()

    def work() -> None:
        asyncio.set_event_loop(loop)
        server = loop.run_until_complete(asyncio.start_server(speak, "127.0.0.1", 0, ssl=tls))
        world.port = server.sockets[0].getsockname()[1]
        ready.set()
        loop.run_forever()
        server.close()
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        loop.run_until_complete(_gathered(left))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    thread = threading.Thread(target=work, name="outside")
    thread.start()
    ready.wait()
    try:
        yield world
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)


async def _gathered(tasks: set[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)
