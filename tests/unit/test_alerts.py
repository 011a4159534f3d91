"""Alerts as Alertmanager handles them: grouped, deduplicated, silenced, told again, told when over. And the file of rules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import Counter

from service.errors import InvalidAlerts
from service.watch.alerts import (
    MOST_ALERTS,
    MOST_TOLD,
    Alerts,
    Matcher,
    Notification,
    Silence,
    fingerprint,
)
from service.watch.anomalies import Anomaly
from service.watch.conditions import Conditions
from service.watch.metrics import REGISTRY
from service.watch.rules import SEVERITIES, Condition, Routing, Rule, duration_s, read_rules
from service.watch.sinks import build_sinks
from tenants.access import TenantId

ACME = TenantId(UUID(int=7))
ROOT = Path(__file__).resolve().parents[2]
RATE = Rule("Rate", "warning", anomaly="rate_anomaly", keep_s=120.0, summary="$per_minute of $tenant")
ROUTING = Routing(("alertname", "tenant"), 30.0, 300.0, 3_600.0)


class Clock:
    """Both clocks; the wall's begins elsewhere."""

    def __init__(self) -> None:
        self.now_s = 500.0

    def __call__(self) -> float:
        return self.now_s

    def wall(self) -> float:
        return 1_800_000_000.0 + self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def build(clock: Clock, *rules: Rule, routing: Routing = ROUTING) -> Alerts:
    return Alerts(rules or (RATE,), routing, clock=clock, wall=clock.wall)


def odd(tenant: str = "acme", key: str = "k1", *, confirmed: bool = False) -> Anomaly:
    return Anomaly(
        "rate_anomaly", {"tenant": tenant, "key": key}, {"per_minute": 120.0}, confirmed, ACME, key
    )


def run(
    alerts: Alerts, clock: Clock, seconds: float, *, silences: tuple[Silence, ...] = ()
) -> list[Notification]:
    """A tick a second."""
    told = []
    for _ in range(int(seconds)):
        clock.now_s += 1
        told += alerts.tick(silences)
    return told


def fires(alerts: Alerts) -> list[str]:
    return [each.rule.name for each in alerts.firing]


def keys(notification: Notification, status: str) -> set[str]:
    return {each["labels"]["key"] for each in notification.alerts if each["status"] == status}


def held(alerts: Alerts, clock: Clock, seconds: float, *anomalies: Anomaly) -> list[Notification]:
    """As `run`, with these raised every ten seconds."""
    told = []
    for _ in range(int(seconds / 10)):
        for each in anomalies:
            alerts.raise_anomaly(each)
        told += run(alerts, clock, 10)
    return told


def test_a_group_waits_for_company_and_is_told_once(clock: Clock) -> None:
    alerts = build(clock)
    alerts.raise_anomaly(odd())
    assert run(alerts, clock, 20) == []
    for key in ("k2", "k1", "k3", "k2"):
        alerts.raise_anomaly(odd(key=key))
    alerts.raise_anomaly(odd("beta"))
    first, second = run(alerts, clock, 60)
    assert (first.group, second.group) == (
        {"alertname": "Rate", "tenant": "acme"},
        {"alertname": "Rate", "tenant": "beta"},
    )
    assert (first.firing, first.resolved, first.severity) == (3, 0, "warning")
    assert keys(first, "firing") == {"k1", "k2", "k3"}
    alert = first.alerts[0]
    assert alert["labels"] == {"alertname": "Rate", "severity": "warning", "tenant": "acme", "key": "k1"}
    assert alert["annotations"] == {"summary": "120 of acme"}
    assert alert["startsAt"] == "2027-01-15T08:08:20.000Z" < alert["endsAt"]


def test_what_is_new_is_told_after_the_interval_and_what_goes_on_after_the_repeat(clock: Clock) -> None:
    alerts = build(clock)
    told = held(alerts, clock, 100, odd())
    assert [each.firing for each in told] == [1]
    told = held(alerts, clock, 300, odd(), odd(key="k2"))
    assert [each.firing for each in told] == [2]
    assert held(alerts, clock, 3_500, odd(), odd(key="k2")) == []
    assert [each.firing for each in held(alerts, clock, 400, odd(), odd(key="k2"))] == [2]


def test_what_is_over_is_told_once_with_its_end(clock: Clock) -> None:
    alerts = build(clock)
    held(alerts, clock, 60, odd(), odd(key="k2"))
    (over,) = held(alerts, clock, 400, odd())
    assert (over.firing, over.resolved, keys(over, "resolved")) == (1, 1, {"k2"})
    (ended,) = [each for each in over.alerts if each["status"] == "resolved"]
    assert ended["startsAt"] < ended["endsAt"] == "2027-01-15T08:11:11.000Z"
    (last,) = run(alerts, clock, 1_000)
    assert (last.firing, keys(last, "resolved")) == (0, {"k1"})
    assert fires(alerts) == [] and run(alerts, clock, 5_000) == []


def test_what_was_over_before_anybody_was_told_is_not_told(clock: Clock) -> None:
    alerts = build(clock, routing=Routing(("alertname",), 300.0, 300.0, 3_600.0))
    alerts.raise_anomaly(odd())
    assert run(alerts, clock, 2_000) == []


def test_an_alert_fires_once_it_has_held_for_as_long_as_its_rule_says(clock: Clock) -> None:
    patient = Rule("Patient", "critical", anomaly="rate_anomaly", for_s=60.0, keep_s=30.0, summary="x")
    alerts = build(clock, patient)
    held(alerts, clock, 50, odd())
    assert fires(alerts) == []
    run(alerts, clock, 40)  # it went away, so it begins anew
    held(alerts, clock, 60, odd())
    assert fires(alerts) == []
    alerts.raise_anomaly(odd())
    assert fires(alerts) == ["Patient"]


def test_a_rule_may_ask_for_what_is_confirmed(clock: Clock) -> None:
    sustained = Rule("Sustained", "critical", anomaly="rate_anomaly", confirmed=True, summary="x")
    alerts = build(clock, RATE, sustained)
    alerts.raise_anomaly(odd())
    assert fires(alerts) == ["Rate"]
    alerts.raise_anomaly(odd(confirmed=True))
    assert fires(alerts) == ["Rate", "Sustained"]


def test_a_silenced_alert_is_told_when_the_silence_ends_and_not_before(clock: Clock) -> None:
    alerts = build(clock)
    silence = Silence("s1", (Matcher.parse("tenant=acme"), Matcher.parse('alertname=~"Ra.*"')))
    for _ in range(100):
        alerts.raise_anomaly(odd())
        alerts.raise_anomaly(odd("beta"))
        told = run(alerts, clock, 10, silences=(silence,))
        assert {each.group["tenant"] for each in told} <= {"beta"}
    assert {each.silenced_by for each in alerts.firing} == {("s1",), ()}
    told = [each for each in held(alerts, clock, 310, odd()) if each.group["tenant"] == "acme"]
    assert [each.firing for each in told] == [1]


@pytest.mark.parametrize(
    ("matcher", "holds"),
    [
        ("tenant=acme", True),
        ("tenant = acme ", True),
        ("tenant!=acme", False),
        ("tenant=~ac.*", True),
        ("tenant=~ac", False),
        ("tenant!~beta|gamma", True),
        ('tenant="acme"', True),
        ("key=", True),
        ("key!=", False),
    ],
)
def test_a_matcher_reads_as_alertmanager_s(matcher: str, holds: bool) -> None:
    assert Matcher.parse(matcher)({"tenant": "acme"}) is holds
    assert Matcher.parse(str(Matcher.parse(matcher))) == Matcher.parse(matcher)


@pytest.mark.parametrize("text", ["", "tenant", "=acme", "1x=2", "tenant=~(", "a=" + "b" * 300])
def test_what_is_no_matcher_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"matcher|expression"):
        Matcher.parse(text)


def test_alerts_are_bounded_and_so_is_what_is_told_of_them(clock: Clock) -> None:
    alerts = build(clock)
    before = REGISTRY.get_sample_value("pericarp_alerts_suppressed_total", {"reason": "full"}) or 0.0
    for number in range(MOST_ALERTS + 50):
        alerts.raise_anomaly(odd(key=f"k{number}"))
    assert len(alerts.firing) == MOST_ALERTS
    assert REGISTRY.get_sample_value("pericarp_alerts_suppressed_total", {"reason": "full"}) == before + 50
    (told,) = run(alerts, clock, 31)
    assert (len(told.alerts), told.withheld, told.firing) == (MOST_TOLD, MOST_ALERTS - MOST_TOLD, MOST_ALERTS)


def test_a_key_is_to_be_suspended_once_and_again_when_its_time_is_over(clock: Clock) -> None:
    alerts = build(clock, Rule("Burst", "critical", anomaly="rate_anomaly", contain_s=120.0, summary="x"))
    alerts.raise_anomaly(odd())
    first = alerts.next_suspension()
    assert first is not None and first.contains == (ACME, "k1")
    assert alerts.next_suspension() is first, "until it was done"
    alerts.suspended(first)
    held(alerts, clock, 110, odd())
    assert alerts.next_suspension() is None
    held(alerts, clock, 20, odd())
    assert alerts.next_suspension() is first


def test_no_rule_that_says_nothing_of_it_suspends_anybody(clock: Clock) -> None:
    alerts = build(clock)
    alerts.raise_anomaly(odd(confirmed=True))
    assert alerts.next_suspension() is None
    assert [rule.contain_s for rule in read_rules(None).rules if rule.contain_s is not None] == []


def reference(labels: Mapping[str, str]) -> int:
    """FNV-1a as its authors write it (draft-eastlake-fnv)."""
    data = b"".join(part.encode() + b"\xff" for name in sorted(labels) for part in (name, labels[name]))
    digest = 14695981039346656037
    for byte in data:
        digest = (digest ^ byte) * 1099511628211 % 2**64
    return digest


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z_]{1,9}", fullmatch=True), st.text(max_size=9), max_size=4))
def test_a_fingerprint_is_of_labels_alone_whatever_their_order(labels: dict[str, str]) -> None:
    assert fingerprint(labels) == f"{reference(labels):016x}"
    assert fingerprint(dict(reversed(labels.items()))) == fingerprint(labels)


# -- metrics ------------------------------------------------------------------------------------------------------


def test_a_condition_on_a_counter_s_growth_fires_and_ends(clock: Clock) -> None:
    counter = Counter("test_alert_growth", "Of this test.", ["reason"], registry=REGISTRY)
    try:
        condition = Condition("test_alert_growth_total", {"reason": "broken"}, 2.0, None, 60.0)
        rule = Rule("Grows", "critical", condition=condition, summary="by $value")
        alerts = build(clock, rule)
        conditions = Conditions([rule], alerts, clock=clock)
        conditions.look()
        counter.labels("other").inc(50)
        counter.labels("broken").inc(2)
        clock.now_s += 5
        conditions.look()
        assert fires(alerts) == []
        counter.labels("broken").inc()
        clock.now_s += 5
        conditions.look()
        (alert,) = alerts.firing
        assert alert.annotations["summary"] == "by 3"
        clock.now_s += 120
        conditions.look()
        conditions.look()
        assert fires(alerts) == []
    finally:
        REGISTRY.unregister(counter)


def test_a_condition_on_a_value_holds_while_the_value_does(clock: Clock) -> None:
    rule = Rule(
        "Behind", "warning", condition=Condition("pericarp_log_lag_seconds", {}, 5.0, None, None), for_s=60.0
    )
    low = Rule("Few", "info", condition=Condition("pericarp_log_lag_seconds", {}, None, 3.0, None))
    alerts = build(clock, rule, low)
    conditions = Conditions([rule, low], alerts, clock=clock)
    gauge = REGISTRY._names_to_collectors["pericarp_log_lag_seconds"]
    try:
        gauge.set(9.0)  # type: ignore[attr-defined]
        conditions.look()
        clock.now_s += 59
        conditions.look()
        assert fires(alerts) == []
        clock.now_s += 1
        conditions.look()
        assert fires(alerts) == ["Behind"]
        gauge.set(1.0)  # type: ignore[attr-defined]
        conditions.look()
        assert fires(alerts) == ["Few"]
    finally:
        gauge.set(0.0)  # type: ignore[attr-defined]


# -- the file -----------------------------------------------------------------------------------------------------


def write(folder: Path, text: str) -> Path:
    path = folder / "alerts.toml"
    path.write_text(text)
    return path


def test_the_shipped_rules_stand_and_each_leads_to_a_page_that_is_there() -> None:
    rules = read_rules(None).rules
    assert len(rules) >= 10 and len({rule.name for rule in rules}) == len(rules)
    for rule in rules:
        assert rule.severity in SEVERITIES and rule.summary
        path, _, anchor = rule.runbook.partition("#")
        headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), flags=re.MULTILINE)
        known = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
        assert anchor in known, rule.name


def test_a_file_adds_replaces_and_leaves_out(tmp_path: Path) -> None:
    mine = """
        group_by = ["tenant"]
        group_wait = "5s"
        repeat_interval = "1h30m"
        [[rule]]
        name = "HighRisk"
        anomaly = "risk_score"
        severity = "critical"
        for = "0s"
        keep = "5m"
        contain = "15m"
        labels = { team = "trust" }
        summary = "$category $risk ${team}"
        [[rule]]
        name = "Queue"
        metric = "pericarp_jobs"
        match = { state = "waiting" }
        above = 50
        for = "1m"
        summary = "$value jobs wait."
        """
    shipped, read = read_rules(None), read_rules(write(tmp_path, mine))
    assert read.routing == Routing(("tenant",), 5.0, 300.0, 5_400.0)
    assert len(read.rules) == len(shipped.rules) + 1
    (changed,) = [rule for rule in read.rules if rule.name == "HighRisk"]
    assert (changed.severity, changed.contain_s, changed.labels) == ("critical", 900.0, {"team": "trust"})
    alone = read_rules(write(tmp_path, "shipped_rules = false\n" + mine))
    assert [rule.name for rule in alone.rules] == ["HighRisk", "Queue"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("rule = 1", "must be written as [[rule]]"),
        ("colour = 'red'", "unknown fields: colour"),
        ("group_wait = 30", "group_wait must be a duration"),
        ("group_wait = '5 min'", "group_wait must be a duration"),
        ("group_by = []", "group_by must be a list of texts"),
        ("shipped_rules = 'no'", "must be true or false"),
        ("[[rule]]\nname = 'X'\nsummary = 'x'", "needs one of anomaly and metric"),
        ("[[rule]]\nname = 'X'\nanomaly = 'odd'\nsummary = 'x'", "anomaly must be one of rate_anomaly"),
        ("[[rule]]\nname = 'X'\nanomaly = 'probing'\nsummary = 'x'\nuntil = 1", "unknown fields: until"),
        ("[[rule]]\nname = 'X'\nanomaly = 'probing'\nsummary = '$query'", "names what is not told: query"),
        ("[[rule]]\nname = 'X'\nanomaly = 'probing'\nsummary = '$'", "names what is not told"),
        ("[[rule]]\nname = 'X Y'\nanomaly = 'probing'\nsummary = 'x'", "name is 1 to 64 letters"),
        (
            "[[rule]]\nname = 'X'\nanomaly = 'probing'\nsummary = 'x'\nseverity = 'page'",
            "severity must be one of",
        ),
        (
            "[[rule]]\nname = 'X'\nanomaly = 'probing'\nsummary = 'x'\nlabels = { alertname = 'Y' }",
            "may not name",
        ),
        (
            "[[rule]]\nname = 'X'\nanomaly = 'probing'\nsummary = 'x'\ncontain = '1s'",
            "contain must be a duration",
        ),
        ("[[rule]]\nname = 'X'\nanomaly = 'probing'\nsummary = 'x'\ncontain = '30d'", "of a day at most"),
        ("[[rule]]\nname = 'X'\nanomaly = 'score_drift'\nsummary = 'x'\ncontain = '5m'", "anomaly of keys"),
        ("[[rule]]\nname = 'X'\nmetric = 'up'\nabove = 1\nsummary = 'x'", "is no metric of ours: up"),
        ("[[rule]]\nname = 'X'\nmetric = 'pericarp_jobs'\nsummary = 'x'", "needs one of above and below"),
        ("[[rule]]\nname = 'HighRisk'\nanomaly = 'probing'\nsummary = 'x'\n" * 2, "the same name"),
        ("[[", "not TOML"),
    ],
)
def test_a_wrong_file_is_refused_and_says_why(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(InvalidAlerts, match=re.escape(fault)):
        read_rules(write(tmp_path, text))


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidAlerts) as caught:
        read_rules(write(tmp_path, "a = 1\ngroup_wait = 1\n[[rule]]\nname = 'X'"))
    assert str(caught.value).count(";") >= 3


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidAlerts, match="FileNotFoundError"):
        read_rules(tmp_path / "none.toml")
    (tmp_path / "alerts.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidAlerts, match="UnicodeDecodeError"):
        read_rules(tmp_path / "alerts.toml")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("kind = 'pigeon'", "kind must be one of mail, webhook, apprise"),
        ("kind = 'webhook'\nurl = 'http://pager.example/'", "needs allow_http"),
        ("kind = 'webhook'\nurl = 'ftp://pager.example/'", "must be https://"),
        ("kind = 'webhook'\nurl = 'https://a:b@pager.example/'", "must be https://"),
        ("kind = 'webhook'\nurl = 'https://pager.example/'\nsecret_env = 'NO_SUCH_ONE'", "not set"),
        ("kind = 'webhook'\nurl = 'https://pager.example/'\nsecret_file = '{open}'", "chmod 600"),
        ("kind = 'webhook'\nurl = 'https://pager.example/'\nsecret_file = '{shut}'", "must be whsec_"),
        ("kind = 'webhook'\nurl = 'https://pager.example/'\nca_file = '{shut}'", "no PEM file"),
        ("kind = 'webhook'\nurl = 'https://pager.example/'\npassword = 'x'", "unknown fields: password"),
        (
            "kind = 'mail'\nhost = 'm.example'\nsender = 'a@b.example'\nrecipients = ['c@d.example']\ntls = 'none'",
            "only on",
        ),
        ("kind = 'mail'\nhost = 'm.example'\nsender = 'a@b.example'\nrecipients = ['c d']", "mail addresses"),
        (
            "kind = 'mail'\nhost = 'm.example'\nsender = 'a@b.example'\nrecipients = ['c@d.example']\nusername = 'u'",
            "need each other",
        ),
        (
            "kind = 'mail'\nhost = 'localhost'\nsender = 'a@b.example'\nrecipients = ['c@d.example']\ntls = 'none'\n"
            "username = 'u'\npassword_file = '{shut}'",
            "in the clear",
        ),
        ("kind = 'apprise'\nurls_file = '{shut}'", "URLs that apprise knows"),
    ],
)
def test_a_wrong_sink_is_refused_and_says_why(tmp_path: Path, text: str, fault: str) -> None:
    shut, open_ = tmp_path / "shut", tmp_path / "open"
    for path, mode in ((shut, 0o600), (open_, 0o644)):
        path.write_text("nonsense\n")
        path.chmod(mode)
    text = text.replace("{shut}", str(shut)).replace("{open}", str(open_))
    with pytest.raises(InvalidAlerts, match=re.escape(fault)) as caught:
        build_sinks(read_rules(write(tmp_path, f"[[sink]]\nname = 'pager'\n{text}")).sinks)
    assert "nonsense" not in str(caught.value)


def test_durations_read_as_prometheus_s() -> None:
    assert [duration_s(text) for text in ("30s", "5m", "4h", "1d", "1h30m", "500ms")] == [
        *(30.0, 300.0, 14_400.0, 86_400.0, 5_400.0, 0.5),
    ]
    for text in ("", "5", "m", "5 m", "-5m", "5m "):
        with pytest.raises(ValueError, match="duration"):
            duration_s(text)
