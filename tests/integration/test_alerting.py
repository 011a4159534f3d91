"""From requests over HTTP to an alert at a webhook: a key bursts, a silence silences, a rule suspends a key and lets it in."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
import structlog

from service.__main__ import main
from service.alerting import SPEAK_EVERY_S
from service.deeds import OPERATOR, Actor
from service.desk import build_desk
from service.installation import Installation
from service.watch.anomalies import Anomalies, Anomaly, Observation
from tenants.access import INSTALLATION, Role, TenantId
from tenants.audit import decode
from tenants.database import Database
from tenants.policy import Policy
from tests.integration.conftest import Secrets, run_as_superuser
from tests.integration.receivers import Receiver, webhook_receiver
from tests.integration.served import Served, serve, until

ROOT = Path(__file__).resolve().parents[2]
PER_MINUTE = 20
CANARY = "zirconium-marmalade-742"
ASK = {"query": CANARY, "documents": [f"{CANARY} a", "b"]}
RULES = """
group_wait = "0s"
group_interval = "1s"
shipped_rules = false

[[rule]]
name = "Burst"
anomaly = "rate_anomaly"
summary = "$per_minute a minute"

[[rule]]
name = "Refused"
anomaly = "refusal_rate"
severity = "critical"
contain = "1h"
summary = "$refused_percent % of $key"

[[sink]]
name = "pager"
kind = "webhook"
url = "{url}"
heartbeat = "1h"
"""


@dataclass(frozen=True, slots=True)
class Shop:
    """A tenant with a search key of its own."""

    name: str
    tenant: TenantId
    key: str
    key_id: str


@pytest.fixture(scope="module", autouse=True)
def said() -> Iterator[StringIO]:
    """What the service logs, kept apart from what commands print."""
    written = StringIO()
    structlog.configure(
        processors=[structlog.processors.JSONRenderer()], logger_factory=structlog.PrintLoggerFactory(written)
    )
    yield written
    structlog.reset_defaults()


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with webhook_receiver() as started:
        yield started


@pytest.fixture(scope="module")
def rules(receiver: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alerts") / "alerts.toml"
    path.write_text(RULES.replace("{url}", receiver.url))
    return path


@pytest.fixture(scope="module")
def service(app_url: str, installation_secrets: Secrets, rules: Path) -> Iterator[Served]:
    with serve(
        app_url, *installation_secrets.keys, alerts=rules, anomaly_key_per_minute=PER_MINUTE
    ) as served:
        yield served


@pytest.fixture
def shop(service: Served) -> Shop:
    return make_shop(service)


def make_shop(service: Served, role: Role = Role.SEARCH, **policy: Any) -> Shop:
    async def make() -> Shop:
        name = f"shop-{secrets.token_hex(4)}"
        tenant = await service.desk.directory.create_tenant(name, Policy(**policy))
        key, text = await service.desk.directory.keys.create(tenant.id, role)
        return Shop(name, tenant.id, text, key.id)

    return service.wait(make())


def ask(service: Served, shop: Shop, times: int, body: object = ASK, **headers: str) -> list[int]:
    with service.client(shop.key) as client:
        return [client.post("/v1/rerank", json=body, headers=headers).status_code for _ in range(times)]


def about(receiver: Receiver, alertname: str, shop: Shop) -> list[dict[str, Any]]:
    return [each for each in receiver.named(alertname) if each["labels"].get("tenant") == shop.name]


def entries(service: Served, shop: Shop, operation: str) -> list[dict[str, Any]]:
    return [entry for entry in service.entries(shop.name) if entry["operation"] == operation]


@dataclass(frozen=True, slots=True)
class Done:
    """What a command left."""

    returncode: int
    stdout: str
    stderr: str


class Console:
    """Runs `alert …`."""

    def __init__(self, app_url: str, home: Path, rules: Path) -> None:
        self._env = {
            "PERICARP_DATABASE_URL": app_url,
            "PERICARP_HOME": str(home),
            "PERICARP_ALERTS": str(rules),
        }

    def start(self, *words: str) -> subprocess.CompletedProcess[str]:
        """In a process of its own, as a user does; that takes seconds."""
        return subprocess.run(
            [sys.executable, "-m", "service", "alert", *words],
            env={**os.environ, **self._env},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def run(self, *words: str, **env: str) -> Done:
        """The same, in this process."""
        out, err = (TextIOWrapper(BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**self._env, **env}.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["pericarp", "alert", *words])
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            with pytest.raises(SystemExit) as ended:
                main()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Done(code or 0, *(_text(each) for each in (out, err)))

    def tell(self, *words: str) -> Any:
        done = self.run(*words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def _text(stream: TextIOWrapper) -> str:
    assert isinstance(stream.buffer, BytesIO)
    return stream.buffer.getvalue().decode()


@pytest.fixture(scope="module")
def console(app_url: str, rules: Path, tmp_path_factory: pytest.TempPathFactory) -> Console:
    return Console(app_url, tmp_path_factory.mktemp("home"), rules)


# -- requests, alerts, silences -----------------------------------------------------------------------------------


def test_a_burst_is_told_by_webhook_listed_and_silenced(
    service: Served, receiver: Receiver, shop: Shop, console: Console
) -> None:
    assert ask(service, shop, PER_MINUTE - 1) == [200] * (PER_MINUTE - 1)
    assert about(receiver, "Burst", shop) == []
    ask(service, shop, 1, **{"Pericarp-End-User": "jane@example.com"})
    until(lambda: bool(about(receiver, "Burst", shop)))
    (alert,) = about(receiver, "Burst", shop)
    assert alert["labels"] == {
        "alertname": "Burst",
        "severity": "warning",
        "tenant": shop.name,
        "key": shop.key_id,
        "scope": "key",
    }
    assert alert["annotations"]["summary"] == f"{PER_MINUTE} a minute"

    until(
        lambda: (
            shop.name in json.dumps([alert.alert for alert in service.wait(service.desk.told_alerts.list())])
        )
    )
    (listed,) = [each for each in console.tell("list") if each["labels"].get("tenant") == shop.name]
    assert (listed["alertname"], listed["fingerprint"], listed["silenced_by"]) == (
        "Burst",
        alert["fingerprint"],
        [],
    )

    other = make_shop(service)
    started = console.start(
        "silence", "add", f"tenant={other.name}", 'alertname=~"Bu.*"', "--comment", "a test", "--json"
    )
    assert started.returncode == 0, started.stderr
    silence = json.loads(started.stdout)
    until(lambda: silence["id"] in _silences(service))
    time.sleep(2 * SPEAK_EVERY_S)  # until then the gateway need not know of it
    ask(service, other, 2 * PER_MINUTE)
    until(
        lambda: (
            silence["id"]
            in json.dumps([each.alert for each in service.wait(service.desk.told_alerts.list())])
        )
    )
    assert about(receiver, "Burst", other) == []
    ended = console.run("silence", "end", silence["id"], "--by", "night shift")
    assert ended.returncode == 0 and ended.stdout == f"{silence['id']} is over.\n"
    until(lambda: bool(about(receiver, "Burst", other)))
    told = {entry["operation"]: entry for entry in _installation_entries(service)}
    assert told["admin.alert_silence"]["role"] == "operator"
    assert told["admin.alert_silence"]["details"]["comment"] == "a test"
    assert told["admin.alert_silence"]["details"]["matchers"] == [f"tenant={other.name}", "alertname=~Bu.*"]
    assert told["admin.alert_unsilence"]["details"] == {"silence": silence["id"], "by": "night shift"}
    again = console.run("silence", "end", silence["id"])
    assert again.returncode == 1 and again.stderr.startswith("SilenceNotFound: ")


def _silences(service: Served) -> set[str]:
    return {str(each.id) for each in service.wait(service.desk.silences.list_open())}


def _installation_entries(service: Served) -> list[dict[str, Any]]:
    listed = service.wait(service.desk.audit.list_entries(INSTALLATION, limit=1_000))
    return [asdict(decode(each.body)) for each in listed]


def test_a_client_of_a_busy_key_is_named_by_a_fingerprint(
    service: Served, receiver: Receiver, shop: Shop
) -> None:
    ask(service, shop, PER_MINUTE + 5, **{"Pericarp-End-User": "jane@example.com"})
    until(lambda: len(about(receiver, "Burst", shop)) >= 2)
    (client,) = [each for each in about(receiver, "Burst", shop) if each["labels"]["scope"] == "end_user"]
    assert len(client["labels"]["end_user"]) == 43
    assert "jane" not in json.dumps(receiver.named("Burst"))


def test_a_policy_may_call_less_an_anomaly(service: Served, receiver: Receiver) -> None:
    shop = make_shop(service, anomaly_requests_per_minute=5)
    ask(service, shop, 6)
    until(lambda: bool(about(receiver, "Burst", shop)))


def test_strangers_are_told_of_by_their_network_and_probes_of_health_are_not(
    service: Served, receiver: Receiver
) -> None:
    with service.client("") as client:
        for _ in range(30):
            assert client.get("/healthz").status_code == 200
        for _ in range(12):
            assert client.post("/v1/rerank", json=ASK).status_code == 401
    until(lambda: any(each["labels"].get("scope") == "stranger" for each in receiver.named("Burst")))
    (stranger,) = [each for each in receiver.named("Burst") if each["labels"].get("scope") == "stranger"]
    assert stranger["labels"]["network"] == "127.0.0.0/24"


def test_no_alert_row_or_line_holds_a_text_a_key_or_an_address(
    service: Served, receiver: Receiver, shop: Shop, said: StringIO
) -> None:
    ask(service, shop, PER_MINUTE + 1)
    until(lambda: bool(about(receiver, "Burst", shop)))
    written = json.dumps([taken.body.decode() for taken in receiver.taken])
    written += json.dumps([dict(each.alert) for each in service.wait(service.desk.told_alerts.list())])
    assert '"action": "alert"' in said.getvalue()
    written += said.getvalue()
    for secret in (CANARY, shop.key, shop.key.split("_")[3], "127.0.0.1", "jane"):
        assert secret not in written


def test_a_heartbeat_comes_with_the_gateway(receiver: Receiver, service: Served) -> None:
    until(lambda: bool(receiver.named("Watchdog")))
    assert {each["labels"]["severity"] for each in receiver.named("Watchdog")} == {"info"}


def test_what_breaks_while_looking_is_counted_and_the_answer_leaves(
    service: Served, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    with service.client() as platform:

        def failures() -> float:
            (line,) = [
                line
                for line in platform.get("/metrics").text.splitlines()
                if line.startswith("pericarp_observation_failures_total ")
            ]
            return float(line.split()[1])

        def broken(_anomalies: Anomalies, _seen: Observation) -> list[Anomaly]:
            raise LookupError

        before = failures()
        monkeypatch.setattr(Anomalies, "observe", broken)
        assert ask(service, shop, 2) == [200, 200]
        monkeypatch.undo()
        assert failures() >= before + 2


# -- suspension ---------------------------------------------------------------------------------------------------


def test_a_rule_suspends_a_key_and_its_time_ends(
    service: Served, receiver: Receiver, shop: Shop, superuser_url: str
) -> None:
    statuses = ask(service, shop, 30, {"query": 7})
    assert set(statuses) <= {422, 401}
    until(lambda: ask(service, shop, 1) == [401])
    until(lambda: bool(about(receiver, "Refused", shop)))
    (suspended,) = entries(service, shop, "admin.key_suspend")
    assert (suspended["role"], suspended["key_id"]) == ("gateway", "")
    assert suspended["details"] == {"key": shop.key_id, "rule": "Refused", "lasts_s": 3600}
    with service.client() as platform:
        path = f"/admin/v1/tenants/{shop.tenant}/keys/{shop.key_id}"
        told = platform.get(path).json()
        assert told["state"] == "contained" and told["contained_until"] > told["contained_at"]
        asyncio.run(
            run_as_superuser(
                superuser_url,
                f"update pericarp.key set contained_until = clock_timestamp() where id = '{shop.key_id}'",
            )
        )
        until(lambda: ask(service, shop, 1) == [200])
        told = platform.get(path).json()
        assert (told["state"], told["contained_at"], told["contained_until"]) == ("active", None, None)
    (resumed,) = entries(service, shop, "admin.key_resume")
    assert (resumed["role"], resumed["details"]) == ("gateway", {"key": shop.key_id})


async def test_a_suspension_outlives_its_gateway_and_what_somebody_contained_stays(
    app_url: str, installation_secrets: Secrets, superuser_url: str
) -> None:
    installation = Installation(app_url, None, *installation_secrets.keys)
    databases = [Database(app_url), Database(app_url)]
    for database in databases:
        await database.open()
    try:
        first, second = (build_desk(database, installation) for database in databases)
        tenant = (await first.directory.create_tenant(f"shop-{secrets.token_hex(4)}")).id
        roles = (Role.SEARCH, Role.SEARCH, Role.TENANT_ADMIN)
        suspended, contained, admin = [
            (await first.directory.keys.create(tenant, role))[0].id for role in roles
        ]
        key = await first.switch.suspend_key(tenant, suspended, lasts_s=60, rule="R")
        assert key is not None and key.contained_until is not None
        longer = await second.switch.suspend_key(tenant, suspended, lasts_s=600, rule="R")
        assert longer is not None and longer.contained_until is not None
        assert longer.contained_at == key.contained_at and longer.contained_until > key.contained_until
        assert await first.switch.suspend_key(tenant, admin, lasts_s=60, rule="R") is None
        await first.switch.contain_key(Actor(OPERATOR), tenant, contained)
        assert await first.switch.suspend_key(tenant, contained, lasts_s=60, rule="R") is None
        assert (await second.lifecycle.resume_key(tenant, suspended)) is None, "it is not over"
        await run_as_superuser(
            superuser_url, f"update pericarp.key set contained_until = now() where id = '{suspended}'"
        )
        counts = await asyncio.gather(first.switch.resume_due(), second.switch.resume_due())
        states = {each.id: each.contained_at for each in await first.directory.keys.list(tenant)}
        assert sum(counts) <= 1 and states[suspended] is None and states[contained] is not None
        await first.switch.suspend_key(tenant, suspended, lasts_s=60, rule="R")
        made_lasting = await first.switch.contain_key(Actor(OPERATOR), tenant, suspended)
        assert made_lasting.contained_at is not None and made_lasting.contained_until is None
    finally:
        for database in databases:
            await database.close()


# -- the command line ---------------------------------------------------------------------------------------------


def test_the_command_line_tests_sinks_and_checks_rules(
    console: Console, receiver: Receiver, tmp_path: Path
) -> None:
    before = len(receiver.named("Watchdog"))
    (sent,) = console.tell("test")
    assert sent == {"sink": "pager", "sent": True, "reason": ""}
    assert len(receiver.named("Watchdog")) == before + 1
    told = console.tell("rules")
    assert [rule["name"] for rule in told["rules"]] == ["Burst", "Refused"]
    assert told["sinks"] == [{"name": "pager", "severity": "warning", "heartbeat_s": 3600.0}]
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("group_wait = 1\n[[sink]]\nname = 'x'\nkind = 'webhook'\nurl = 'https://127.0.0.1:1/'")
    refused = console.run("rules", PERICARP_ALERTS=str(wrong))
    assert refused.returncode == 1 and refused.stderr.startswith(
        "InvalidAlerts: group_wait must be a duration"
    )
    wrong.write_text("[[sink]]\nname = 'x'\nkind = 'webhook'\nurl = 'https://127.0.0.1:1/'")
    failed = console.run("test", PERICARP_ALERTS=str(wrong))
    assert failed.returncode == 1 and "ConnectError" in failed.stdout
    nothing = console.run("silence", "add", "tenant!=acme")
    assert nothing.returncode == 1 and "would silence everything" in nothing.stderr


def test_a_gateway_suspends_so_many_keys_an_hour_and_no_more(
    service: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 3
    monkeypatch.setattr("service.alerting.MOST_SUSPENSIONS", most)
    shops = [make_shop(service) for _ in range(most + 2)]
    for shop in shops:
        ask(service, shop, 22, {"query": 7})

    def suspended() -> int:
        return sum(bool(entries(service, shop, "admin.key_suspend")) for shop in shops)

    until(lambda: suspended() >= most - 1)  # another test may have had one
    assert suspended() <= most
    assert ask(service, shops[-1], 1, {"query": 7}) == [422]
