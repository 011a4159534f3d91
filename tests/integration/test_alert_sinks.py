"""Alerts reach a real mail server, a real webhook receiver, apprise and Alertmanager; and what happens where they do not."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
import secrets
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from service.watch import delivery, sinks
from service.watch.alerts import Alerts, Notification, fingerprint
from service.watch.anomalies import Anomaly
from service.watch.delivery import Deliveries, Delivery
from service.watch.metrics import REGISTRY
from service.watch.rules import Routing, Rule, read_rules
from service.watch.sinks import LogSink, Place, SinkFailed, build_sinks, sign
from tests.integration.receivers import (
    HOST,
    PASSWORD,
    USER,
    Tls,
    mail_server,
    make_tls,
    until,
    webhook_receiver,
)

pytestmark = pytest.mark.filterwarnings("ignore:::aiosmtpd.smtp")
"""It warns of what these tests mean to do: a login over TLS that was there before it."""
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
"""The secret of the Standard Webhooks specification's own example."""


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return make_tls(tmp_path_factory.mktemp("tls"))


@pytest.fixture(autouse=True)
def _leave_no_log_behind() -> Iterator[None]:
    yield
    structlog.reset_defaults()
    logging.getLogger("apprise").setLevel(logging.NOTSET)


def notification(severity: str = "critical", *, over: bool = False) -> Notification:
    """As the real thing makes it."""
    now = [0.0]
    rule = Rule(
        "Burst", severity, anomaly="rate_anomaly", keep_s=10, summary="$per_minute", runbook="docs/x.md"
    )
    alerts = Alerts([rule], Routing(("tenant",), 0.0, 60.0, 3_600.0), clock=lambda: now[0], wall=time.time)
    alerts.raise_anomaly(Anomaly("rate_anomaly", {"tenant": "acme", "key": "k1"}, {"per_minute": 240.0}))
    (told,) = alerts.tick()
    if over:
        now[0] = 100.0
        (told,) = alerts.tick()
    return told


def place(folder: Path, **fields: object) -> Place:
    """A sink as the file names it."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in {"name": "pager", **fields}.items()]
    path = folder / "alerts.toml"
    path.write_text("[[sink]]\n" + "\n".join(lines))
    (built,) = build_sinks(read_rules(path).sinks)
    return built


def secret_file(folder: Path, text: str) -> str:
    path = folder / f"secret-{secrets.token_hex(4)}"
    path.touch(0o600)
    path.write_text(text)
    return str(path)


def mail(folder: Path, ours: Tls, port: int, **fields: object) -> Place:
    usual = {
        "kind": "mail",
        "host": HOST,
        "port": port,
        "sender": "pericarp@example.org",
        "recipients": ["ops@example.org", "night@example.org"],
        "ca_file": str(ours.ca_file),
    }
    return place(folder, **{**usual, **fields})


def count(outcome: str, sink: str = "pager") -> float:
    return REGISTRY.get_sample_value("pericarp_alerts_total", {"sink": sink, "outcome": outcome}) or 0.0


@asynccontextmanager
async def delivering(*places: Place) -> AsyncIterator[Deliveries]:
    deliveries = Deliveries(places)
    working = asyncio.create_task(deliveries.keep())
    try:
        yield deliveries
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


# -- mail ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implicit", [False, True], ids=["starttls", "tls"])
async def test_a_mail_comes_over_tls_with_a_login(tmp_path: Path, tls: Tls, implicit: bool) -> None:
    with mail_server(tls, implicit=implicit, login=True) as mailbox:
        sink = mail(
            tmp_path,
            tls,
            mailbox.port,
            tls="tls" if implicit else "starttls",
            username=USER,
            password_file=secret_file(tmp_path, f"{PASSWORD}\n"),
        ).sink
        await sink.send(notification(), "msg_1")
        await sink.send(notification(over=True), "msg_2")
    first, second = mailbox.messages
    assert first["Subject"] == "[FIRING:1] acme (Pericarp)" and second["Subject"].startswith(
        "[RESOLVED] acme"
    )
    assert first["Auto-Submitted"] == "auto-generated" and first["Message-ID"] != second["Message-ID"]
    text = first.get_content()
    assert "FIRING since" in text and "240" in text and "docs/x.md" in text and "key: k1" in text
    sender, recipients, after_starttls = mailbox.envelopes[0]
    assert (sender, recipients) == ("pericarp@example.org", ["ops@example.org", "night@example.org"])
    assert after_starttls is not implicit


async def test_a_mail_server_that_is_wrong_is_a_failure_without_a_secret(
    tmp_path: Path, tls: Tls, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = secret_file(tmp_path, "wrong horse")

    async def fails(place: Place) -> str:
        with pytest.raises(SinkFailed) as caught:
            await place.sink.send(notification(), "msg_1")
        assert "horse" not in str(caught.value)
        return str(caught.value)

    with mail_server(tls, login=True) as mailbox:
        assert await fails(mail(tmp_path, tls, mailbox.port, username=USER, password_file=wrong)) == (
            "SMTPAuthenticationError"
        )
        assert await fails(mail(tmp_path, tls, mailbox.port))  # it asks for a login
        untrusted = mail(tmp_path, tls, mailbox.port, ca_file=str(tls.other_ca_file))
        assert await fails(untrusted)
        with monkeypatch.context() as quick:
            quick.setattr(sinks, "SEND_S", 0.3)
            assert await fails(mail(tmp_path, tls, mailbox.port, tls="tls"))  # it speaks STARTTLS
        assert mailbox.messages == []
    assert await fails(mail(tmp_path, tls, mailbox.port))  # it is gone
    with mail_server(tls) as mailbox:
        mailbox.answer = "451 Later"
        assert await fails(mail(tmp_path, tls, mailbox.port)) == "SMTPDataError"
        other_name = mail(tmp_path, tls, mailbox.port, host="ip6-localhost")
        assert await fails(other_name)


# -- webhooks -----------------------------------------------------------------------------------------------------


def test_a_signature_is_the_one_of_the_specification() -> None:
    """The example of the Standard Webhooks specification, and of the libraries of its reference implementation."""
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    headers = sign(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


@pytest.mark.parametrize("over_tls", [False, True])
async def test_a_webhook_is_signed_and_in_alertmanager_s_shape(
    tmp_path: Path, tls: Tls, over_tls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGER_SECRET", SECRET)
    with webhook_receiver(tls if over_tls else None) as receiver:
        sink = place(
            tmp_path, kind="webhook", url=receiver.url, secret_env="PAGER_SECRET", ca_file=str(tls.ca_file)
        ).sink
        await sink.send(notification(), "msg_7")
    (taken,) = receiver.taken
    assert taken.headers["content-type"] == "application/json"
    assert abs(int(taken.headers["webhook-timestamp"]) - time.time()) < 60
    message = f"msg_7.{taken.headers['webhook-timestamp']}.".encode() + taken.body
    digest = hmac.digest(base64.b64decode(SECRET.removeprefix("whsec_")), message, "sha256")
    assert taken.headers["webhook-signature"] == "v1," + base64.b64encode(digest).decode()
    (alert,) = taken.alerts
    labels = {"alertname": "Burst", "severity": "critical", "tenant": "acme", "key": "k1"}
    assert alert["labels"] == labels and alert["fingerprint"] == fingerprint(labels)
    assert alert["annotations"] == {"summary": "240", "runbook_url": "docs/x.md"}
    assert alert["status"] == "firing" and alert["startsAt"] < alert["endsAt"] and alert["generatorURL"] == ""


async def test_a_receiver_that_is_wrong_is_a_failure(
    tmp_path: Path, tls: Tls, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(built: Place) -> str:
        with pytest.raises(SinkFailed) as caught:
            await built.sink.send(notification(), "msg_1")
        return str(caught.value)

    with webhook_receiver(tls) as receiver:
        hook = place(tmp_path, kind="webhook", url=receiver.url, ca_file=str(tls.ca_file))
        for status in (500, 404, 302):
            receiver.status = lambda status=status: status  # type: ignore[misc]
            assert await fails(hook) == f"it answered {status}"
        receiver.status = lambda: 200
        assert await fails(place(tmp_path, kind="webhook", url=receiver.url)), "a CA that nobody trusts"
        assert receiver.taken == []
        monkeypatch.setattr(sinks, "SEND_S", 0.2)
        receiver.hangs = threading.Event()
        assert await fails(hook) == "TimeoutError"
    assert await fails(hook), "it is gone"


# -- apprise and the log ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")
async def test_apprise_brings_it_where_its_urls_lead(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with webhook_receiver() as receiver:
        address = receiver.url.partition("://")[2]
        urls = f"# where to\njson://token-of-mine:secret@{address}\n"
        sink = place(tmp_path, kind="apprise", urls_file=secret_file(tmp_path, urls)).sink
        await sink.send(notification(), "msg_1")
        (taken,) = receiver.taken
        told = json.loads(taken.body)
        assert told["title"] == "[FIRING:1] acme" and told["type"] == "failure" and "240" in told["message"]
        receiver.status = lambda: 500
        with pytest.raises(SinkFailed, match="not delivered everywhere"):
            await sink.send(notification(), "msg_2")
    with pytest.raises(SinkFailed):
        await sink.send(notification(), "msg_3")
    written = capfd.readouterr()
    assert "token-of-mine" not in written.out + written.err and address not in written.out + written.err


async def test_the_log_has_a_line_for_each_alert() -> None:
    with capture_logs() as lines:
        await LogSink().send(notification(), "msg_1")
        await LogSink().send(notification(over=True), "msg_2")
    assert [(line["action"], line["status"], line["evidence"]["tenant"]) for line in lines] == [
        ("alert", "firing", "acme"),
        ("alert", "resolved", "acme"),
    ]


# -- lines --------------------------------------------------------------------------------------------------------


async def test_what_fails_is_tried_again_until_it_is_taken_and_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "FIRST_PAUSE_S", 0.01)
    before = {outcome: count(outcome) for outcome in ("sent", "failed")}
    with webhook_receiver() as receiver, capture_logs() as lines:
        failures = iter([500, 500, 503])
        receiver.status = lambda: next(failures, 200)
        line = Delivery(place(tmp_path, kind="webhook", url=receiver.url), first_pause_s=0.01)
        working = asyncio.create_task(line.keep())
        line.take(notification())
        await until(lambda: len(receiver.taken) == 1)
        await until(lambda: count("sent") == before["sent"] + 1)
        working.cancel()
    assert count("failed") == before["failed"] + 3
    assert [(each["action"], each["sink"]) for each in lines] == [
        ("alert_failed", "pager"),
        ("alert_sent", "pager"),
    ]
    assert lines[0]["reason"] == "it answered 500"


async def test_a_sink_that_hangs_keeps_no_other_waiting_and_a_full_line_drops_its_oldest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "MOST_WAITING", 5)
    before = count("dropped", "slow")
    with webhook_receiver() as slow, webhook_receiver() as quick:
        slow.hangs = threading.Event()
        places = (
            place(tmp_path, name="slow", kind="webhook", url=slow.url),
            place(tmp_path, name="quick", kind="webhook", url=quick.url),
        )
        async with delivering(*places) as deliveries:
            for sent in range(12):
                deliveries.take([notification()])  # returns at once, whatever the sinks do
                await until(lambda sent=sent: len(quick.taken) == sent + 1)  # type: ignore[misc]
            assert count("dropped", "slow") == before + 7
            assert slow.taken == []
            slow.hangs.set()
            await until(lambda: len(slow.taken) >= 4)


async def test_a_sink_is_sent_only_what_is_grave_enough(tmp_path: Path) -> None:
    with webhook_receiver() as receiver:
        built = place(tmp_path, kind="webhook", url=receiver.url, severity="critical")
        async with delivering(built) as deliveries:
            deliveries.take([notification("info"), notification("warning"), notification("critical")])
            await until(lambda: bool(receiver.taken))
    assert [taken.alerts[0]["labels"]["severity"] for taken in receiver.taken] == ["critical"]


async def test_a_heartbeat_comes_at_its_interval_and_does_not_pile_up(tmp_path: Path) -> None:
    now = [0.0]
    with webhook_receiver() as receiver:
        line = Delivery(
            place(tmp_path, kind="webhook", url=receiver.url, severity="critical", heartbeat="60s"),
            clock=lambda: now[0],
        )
        for second in range(0, 301, 10):  # nobody sends yet
            now[0] = second
            line.beat("g1", 0.0)
        working = asyncio.create_task(line.keep())
        await until(lambda: len(receiver.taken) == 1)
        now[0] = 400.0
        line.beat("g1", 0.0)
        line.beat("g1", 0.0)
        await until(lambda: len(receiver.taken) == 2)
        working.cancel()
    (first, second_one) = receiver.named("Watchdog")
    assert (
        first["labels"]
        == second_one["labels"]
        == {
            "alertname": "Watchdog",
            "severity": "info",
            "gateway": "g1",
        }
    )
    assert first["status"] == "firing" and first["endsAt"] <= second_one["endsAt"]


# -- Alertmanager itself ------------------------------------------------------------------------------------------

ALERTMANAGER = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")


@pytest.mark.skipif(ALERTMANAGER is None, reason="the Debian package prometheus-alertmanager is not here")
async def test_alertmanager_takes_what_a_webhook_sends_and_calls_it_the_same(tmp_path: Path) -> None:
    assert ALERTMANAGER is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tmp_path / "alertmanager.yml"
    config.write_text("route: {receiver: none}\nreceivers: [{name: none}]\n")
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            [
                ALERTMANAGER,
                f"--config.file={config}",
                f"--storage.path={tmp_path / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--cluster.listen-address=",
            ],
            stdout=said,
            stderr=said,
        )
    url = f"http://127.0.0.1:{port}/api/v2/alerts"

    def listed() -> list[dict[str, Any]]:
        with urllib.request.urlopen(url, timeout=10) as answer:
            told: list[dict[str, Any]] = json.loads(answer.read())
        return told

    def answers() -> bool:
        assert process.poll() is None, (tmp_path / "said").read_text()
        try:
            listed()
        except OSError:
            return False
        return True

    try:
        await until(answers)
        sink = place(tmp_path, kind="webhook", url=url).sink
        await sink.send(notification(), "msg_1")
        (alert,) = listed()
        labels = {"alertname": "Burst", "severity": "critical", "tenant": "acme", "key": "k1"}
        assert alert["labels"] == labels and alert["fingerprint"] == fingerprint(labels)
        assert alert["status"]["state"] in ("active", "unprocessed")
        await sink.send(notification(over=True), "msg_2")
        await until(lambda: listed() == [])
    finally:
        process.terminate()
        process.wait(30)
