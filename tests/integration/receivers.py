"""What alerts are sent to in tests: a real mail server, and a real HTTP server for webhooks; each can be told to fail."""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import orjson
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

from tests import certificates

HOST = "localhost"
USER, PASSWORD = "pericarp", "correct horse"


@dataclass
class Tls:
    """A CA, and a certificate of this host that it signed."""

    ca_file: Path
    context: ssl.SSLContext
    other_ca_file: Path
    """Of a CA that signed nothing here."""


def make_tls(folder: Path) -> Tls:
    ca, other = certificates.authority("Alerts CA"), certificates.authority("Other CA")
    host = certificates.issue(ca, dns=(HOST,), addresses=("127.0.0.1",), uses=(certificates.SERVER,))
    ca_file, other_file, chain = folder / "ca.pem", folder / "other-ca.pem", folder / "host.pem"
    ca_file.write_bytes(ca.pem)
    other_file.write_bytes(other.pem)
    chain.write_bytes(host.pem + host.key_pem)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(chain)
    return Tls(ca_file, context, other_file)


@dataclass
class Mailbox:
    """A mail server's: what it took, and from whom."""

    port: int = 0
    messages: list[EmailMessage] = field(default_factory=list)
    envelopes: list[tuple[str, list[str], bool]] = field(default_factory=list)
    """Sender, recipients, and whether it came after STARTTLS."""
    answer: str = "250 OK"

    async def handle_DATA(self, _server: SMTP, session: Session, envelope: Envelope) -> str:
        if self.answer.startswith("250"):
            assert isinstance(envelope.content, bytes)
            message = message_from_bytes(envelope.content, policy=policy.default)
            assert isinstance(message, EmailMessage)
            self.messages.append(message)
            self.envelopes.append((envelope.mail_from or "", envelope.rcpt_tos, session.ssl is not None))
        return self.answer


def _login(_server: SMTP, _session: Session, _envelope: Envelope, _mechanism: str, given: Any) -> AuthResult:
    good = isinstance(given, LoginPassword) and (given.login, given.password) == (
        USER.encode(),
        PASSWORD.encode(),
    )
    return AuthResult(success=good, handled=good)


@contextmanager
def mail_server(tls: Tls, *, implicit: bool = False, login: bool = False) -> Iterator[Mailbox]:
    """STARTTLS, or TLS from the first byte on; with a `login` no mail is taken without one."""
    mailbox = Mailbox()
    ready = threading.Event()
    loop = asyncio.new_event_loop()

    def speak() -> SMTP:
        return SMTP(
            mailbox,
            hostname=HOST,
            tls_context=None if implicit else tls.context,
            require_starttls=not implicit,
            auth_required=login,
            auth_require_tls=not implicit,  # it does not know of TLS that was there before it
            authenticator=_login if login else None,
            loop=loop,
        )

    def work() -> None:
        asyncio.set_event_loop(loop)
        server = loop.run_until_complete(
            loop.create_server(speak, "127.0.0.1", 0, ssl=tls.context if implicit else None)
        )
        mailbox.port = server.sockets[0].getsockname()[1]
        ready.set()
        loop.run_forever()
        server.close()
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        loop.run_until_complete(_gathered(left))
        loop.run_until_complete(asyncio.sleep(0))  # transports close in the loop
        loop.close()

    thread = threading.Thread(target=work, name="mail")
    thread.start()
    ready.wait(30)
    try:
        yield mailbox
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)


async def _gathered(tasks: set[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class Taken:
    """One POST that a webhook's receiver got."""

    headers: dict[str, str]
    body: bytes

    @property
    def alerts(self) -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = orjson.loads(self.body)
        return told


@dataclass
class Receiver:
    """A webhook's other side."""

    url: str = ""
    taken: list[Taken] = field(default_factory=list)
    status: Callable[[], int] = lambda: 200
    hangs: threading.Event | None = None
    """Until it is set, nothing is answered."""

    def named(self, alertname: str) -> list[dict[str, Any]]:
        """The alerts of that name, in the order in which they came."""
        return [
            alert
            for taken in self.taken
            for alert in taken.alerts
            if alert["labels"]["alertname"] == alertname
        ]


@contextmanager
def webhook_receiver(tls: Tls | None = None) -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if receiver.hangs is not None:
                receiver.hangs.wait(30)
            status = receiver.status()
            if 200 <= status < 300:
                receiver.taken.append(
                    Taken({name.lower(): value for name, value in self.headers.items()}, body)
                )
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", f"{receiver.url}/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # who sent has gone, or would not take the certificate: that is what is tested

    server = Server(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    receiver.url = (
        f"{'https' if tls else 'http'}://{HOST if tls else '127.0.0.1'}:{server.server_address[1]}/alerts"
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="webhook")
    thread.start()
    try:
        yield receiver
    finally:
        if receiver.hangs is not None:
            receiver.hangs.set()
        server.shutdown()
        thread.join(30)
        server.server_close()


async def until(holds: Callable[[], bool], within_s: float = 30.0) -> None:
    """Wait for something that must come; the time is only there to end a broken run."""
    deadline_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline_s, f"still waiting after {within_s:g} s"
        await asyncio.sleep(0.02)
