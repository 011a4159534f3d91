"""Where alerts go: by mail, to a webhook that is signed, or to whatever apprise speaks to. The log has them always.

    [[sink]]
    name = "mail"
    kind = "mail"
    host = "mail.example.org"
    tls = "starttls"                     # or "tls", from the first byte on; "none" only on this host
    port = 587                           # 587, 465 with tls
    sender = "pericarp@example.org"
    recipients = ["operators@example.org"]
    username = "pericarp"                # with password_file or password_env
    password_file = "/etc/pericarp/mail-password"

    [[sink]]
    name = "pager"
    kind = "webhook"
    url = "https://pager.example.org/alerts"   # http:// only on this host, or with allow_http = true
    secret_env = "PAGER_SECRET"          # or secret_file: whsec_ and base64, as Standard Webhooks has it; unset: unsigned

    [[sink]]
    name = "chat"
    kind = "apprise"
    urls_file = "/etc/pericarp/apprise"  # a URL a line

    ca_file = "…"                        # of a mail or webhook: the CA that signs for the host
    severity = "warning"                 # the least that is sent; info, warning or critical
    heartbeat = "5m"                     # an alert Watchdog so often, whose absence is the alarm

Secrets are read once, at the start, from a file that its owner alone may read, or from the environment. They are in no
argument list, no log line and no error. A certificate is always verified, and no redirect is followed, no proxy asked:
these places are the operator's own, so they may be in a private network, as those of tenants' images may not.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import logging
import os
import ssl
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import format_datetime, make_msgid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import httpcore2
import orjson

from service import __version__
from service.errors import InvalidAlerts
from service.watch.logs import get_logger
from service.watch.rules import Table

if TYPE_CHECKING:
    from service.watch.alerts import Notification
    from service.watch.rules import SinkTable

SEND_S = 15.0
"""Seconds one notification may take to be sent."""
MOST_RECIPIENTS, MOST_URLS = 50, 50
SECRET_PREFIX = "whsec_"  # noqa: S105 - the prefix of every secret, and none itself
SECRET_BYTES = (24, 64)
"""As Standard Webhooks says."""
SECRET_FILE_BYTES = 64 * 1024

log = get_logger(__name__)


class SinkFailed(Exception):
    """A notification could not be sent; the message is a word or two of ours, and names nothing secret."""


class Sink(Protocol):
    """Sends one notification at a time."""

    @property
    def name(self) -> str: ...

    async def send(self, notification: Notification, id_: str) -> None:
        """Returns once the other side has taken it. `id_` is the same in every try. Raises `SinkFailed`."""


@dataclass(frozen=True, slots=True)
class Place:
    """A sink, and what it is sent."""

    sink: Sink
    severity: str = "info"
    heartbeat_s: float | None = None


def build_sinks(tables: Sequence[SinkTable]) -> tuple[Place, ...]:
    """Every sink that the file names. Raises `InvalidAlerts` with every fault; reads the files of secrets."""
    faults: list[str] = []
    places = []
    for each in tables:
        table = Table(dict(each.raw), f"sink {each.name}: ", faults)
        build = _KINDS.get(each.kind)
        if build is None:
            faults.append(f"sink {each.name}: kind must be one of {', '.join(_KINDS)}")
            continue
        sink = build(each.name, table)
        table.end()
        places.append(Place(sink, each.severity, each.heartbeat_s))
    if faults:
        raise InvalidAlerts("; ".join(faults))
    return tuple(places)


class LogSink:
    """A line of the log for each alert."""

    name = "log"

    async def send(self, notification: Notification, id_: str) -> None:
        for alert in notification.alerts:
            log.warning(
                "an alert",
                action="alert",
                status=alert["status"],
                message=alert["annotations"].get("summary", ""),
                evidence=alert["labels"],
                fingerprint=alert["fingerprint"],
            )


class MailSink:
    """SMTP over TLS (RFC 3207, RFC 8314)."""

    def __init__(
        self,
        name: str,
        *,
        host: str,
        port: int,
        tls: str,
        sender: str,
        recipients: tuple[str, ...],
        username: str | None = None,
        password: str | None = None,
        ca_file: str | None = None,
    ) -> None:
        self.name = name
        self._host = host
        self._port = port
        self._tls = tls
        self._sender = sender
        self._recipients = recipients
        self._username = username
        self._password = password
        self._context = None if tls == "none" else ssl.create_default_context(cafile=ca_file)
        import aiosmtplib  # 0.1 s and some MB, for those alone who have such a sink

        self._smtp = aiosmtplib

    async def send(self, notification: Notification, id_: str) -> None:
        message = EmailMessage()
        message["From"] = self._sender
        message["To"] = ", ".join(self._recipients)
        message["Subject"] = f"{headline(notification)} (Pericarp)"
        message["Date"] = format_datetime(datetime.now(UTC))
        message["Message-ID"] = make_msgid(id_, self._sender.rpartition("@")[2])
        message["Auto-Submitted"] = "auto-generated"
        message.set_content(body(notification))
        try:
            async with asyncio.timeout(SEND_S):
                await self._smtp.send(
                    message,
                    hostname=self._host,
                    port=self._port,
                    username=self._username,
                    password=self._password,
                    timeout=SEND_S,
                    use_tls=self._tls == "tls",
                    start_tls=self._tls == "starttls",
                    tls_context=self._context,
                )
        except (self._smtp.SMTPException, OSError) as exc:  # OSError: TimeoutError and ssl.SSLError as well
            raise SinkFailed(type(exc).__name__) from exc


class WebhookSink:
    """POST of a JSON array as Alertmanager's `/api/v2/alerts` takes it, signed as Standard Webhooks has it.

    `webhook-signature` is `v1,` and the base64 of HMAC-SHA-256 over `webhook-id`, a dot, `webhook-timestamp` (seconds
    since 1970), a dot, and the body. Who receives it refuses a timestamp that is more than five minutes off, and an id
    that it has seen: one id is one notification, however often it is tried.
    """

    def __init__(
        self, name: str, *, url: str, secret: bytes | None = None, ca_file: str | None = None
    ) -> None:
        self.name = name
        self._url = url
        self._secret = secret
        self._context = ssl.create_default_context(cafile=ca_file)

    async def send(self, notification: Notification, id_: str) -> None:
        content = orjson.dumps(notification.alerts)
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"pericarp/{__version__}",
            "Connection": "close",
            **sign(self._secret, id_, int(time.time()), content),
        }
        try:
            async with (
                asyncio.timeout(SEND_S),
                httpcore2.AsyncConnectionPool(ssl_context=self._context, max_connections=1) as pool,
                pool.stream("POST", self._url, headers=list(headers.items()), content=content) as response,
            ):
                status = response.status
        except (httpcore2.NetworkError, httpcore2.TimeoutException, httpcore2.ProtocolError, OSError) as exc:
            raise SinkFailed(type(exc).__name__) from exc
        if not 200 <= status < 300:
            raise SinkFailed(f"it answered {status:d}")


class AppriseSink:
    """Whatever apprise speaks to: Telegram, WeCom, Slack and a hundred others, by URLs that hold their own secrets."""

    def __init__(self, name: str, *, urls: tuple[str, ...]) -> None:
        import apprise

        self.name = name
        # It names hosts and answers in its lines, and what is in a URL is secret.
        logging.getLogger("apprise").setLevel(logging.CRITICAL + 1)
        self._apprise = apprise.Apprise(asset=apprise.AppriseAsset(app_id="Pericarp", app_desc="Pericarp"))
        self.taken = sum(bool(self._apprise.add(url)) for url in urls)

    async def send(self, notification: Notification, id_: str) -> None:
        kind = "success" if not notification.firing else "warning"
        if notification.firing and notification.severity == "critical":
            kind = "failure"
        try:
            async with asyncio.timeout(SEND_S):
                sent = await self._apprise.async_notify(
                    title=headline(notification), body=body(notification), notify_type=kind
                )
        except Exception as exc:
            raise SinkFailed(type(exc).__name__) from exc
        if not sent:
            raise SinkFailed("not delivered everywhere")


def sign(secret: bytes | None, id_: str, timestamp: int, content: bytes) -> dict[str, str]:
    """The headers of Standard Webhooks; without a secret there is no signature."""
    headers = {"webhook-id": id_, "webhook-timestamp": str(timestamp)}
    if secret is not None:
        digest = hmac.digest(secret, f"{id_}.{timestamp}.".encode() + content, "sha256")
        headers["webhook-signature"] = f"v1,{base64.b64encode(digest).decode()}"
    return headers


def headline(notification: Notification) -> str:
    """One line: how many fire, and which group it is."""
    state = f"FIRING:{notification.firing}" if notification.firing else "RESOLVED"
    return f"[{state}] {' '.join(notification.group.values())}".strip()


def body(notification: Notification) -> str:
    """Every alert in a few lines."""
    lines = []
    for alert in notification.alerts:
        until = f", until {alert['endsAt']}" if alert["status"] == "resolved" else ""
        lines.append(f"{alert['status'].upper()} since {alert['startsAt']}{until}")
        lines += [f"  {text}" for text in alert["annotations"].values()]
        lines += [f"  {name}: {value}" for name, value in sorted(alert["labels"].items())]
        lines.append(f"  fingerprint: {alert['fingerprint']}\n")
    if notification.withheld:
        lines.append(f"and {notification.withheld} more: `python -m service alert list` has them all\n")
    return "\n".join(lines)


def _mail(name: str, table: Table) -> MailSink:
    host, tls = table.text("host", needed=True), table.one_of("tls", ("starttls", "tls", "none"), "starttls")
    if tls == "none" and not _is_here(host):
        table.fault("tls", "may be none only on this host")
    username, password = table.text("username") or None, _secret(table, "password")
    if (username is None) != (password is None):
        table.fault("username", "and a password need each other")
    if username is not None and tls == "none":
        table.fault("username", "would be sent in the clear")
    recipients = table.texts("recipients") or ()
    sender = table.text("sender", needed=True)
    if not 0 < len(recipients) <= MOST_RECIPIENTS or not all(map(_is_mailbox, (sender, *recipients))):
        table.fault("recipients", f"and sender must be mail addresses, {MOST_RECIPIENTS} at most")
    port = table.whole("port", 465 if tls == "tls" else 587, 1, 65_535)
    ca_file = _ca_file(table)
    return MailSink(
        name,
        host=host,
        port=port,
        tls=tls,
        sender=sender,
        recipients=recipients,
        username=username,
        password=password,
        ca_file=ca_file,
    )


def _webhook(name: str, table: Table) -> WebhookSink:
    url, allow_http = table.text("url", needed=True), table.flag("allow_http", False)
    parts = urlsplit(url)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.username is not None
        or parts.fragment
    ):
        table.fault("url", "must be https://, a host, and perhaps a port, a path and a query")
    elif parts.scheme == "http" and not allow_http and not _is_here(parts.hostname):
        table.fault("url", "is http:// and leads elsewhere: that needs allow_http = true")
    secret, key = _secret(table, "secret"), None
    if secret is not None:
        try:
            key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
        except binascii.Error:
            key = b""
        if not secret.startswith(SECRET_PREFIX) or not SECRET_BYTES[0] <= len(key) <= SECRET_BYTES[1]:
            table.fault("secret", f"must be {SECRET_PREFIX} and the base64 of 24 to 64 random bytes")
    return WebhookSink(name, url=url, secret=key, ca_file=_ca_file(table))


def _apprise(name: str, table: Table) -> AppriseSink:
    text = _secret(table, "urls") or ""
    urls = tuple(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))
    sink = AppriseSink(name, urls=urls[:MOST_URLS])
    if not urls or len(urls) > MOST_URLS or sink.taken != len(urls):
        table.fault("urls", f"must be 1 to {MOST_URLS} URLs that apprise knows, one a line")
    return sink


_KINDS: Mapping[str, Any] = {"mail": _mail, "webhook": _webhook, "apprise": _apprise}


def _secret(table: Table, name: str) -> str | None:
    """What `NAME_file` or `NAME_env` leads to."""
    path, variable = table.text(f"{name}_file") or None, table.text(f"{name}_env") or None
    if path is not None and variable is not None:
        table.fault(name, f"is in {name}_file or in {name}_env, not in both")
    if variable is not None:
        value = os.environ.get(variable)
        if not value:
            table.fault(f"{name}_env", "names a variable that is not set")
        return value
    if path is None:
        return None
    try:
        with Path(path).open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(SECRET_FILE_BYTES).decode()
    except (OSError, UnicodeDecodeError) as exc:
        table.fault(f"{name}_file", f"cannot be read: {type(exc).__name__}")
        return None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        table.fault(f"{name}_file", "may be read by others than its owner: chmod 600")
    return content.strip() or None


def _ca_file(table: Table) -> str | None:
    path = table.text("ca_file") or None
    if path is None:
        return None
    try:
        ssl.create_default_context(cafile=path)
    except (OSError, ssl.SSLError) as exc:
        table.fault("ca_file", f"is no PEM file of certificates: {type(exc).__name__}")
        return None
    return path


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_mailbox(text: str) -> bool:
    local, _, domain = text.rpartition("@")
    return bool(local and domain) and text.isascii() and not any(mark in text for mark in ' ,;<>"\t\r\n')
