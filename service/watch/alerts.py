"""Alerts as Prometheus' Alertmanager handles them: grouped, deduplicated, silenced, told again, and told when over.

An alert is what its labels say: the same labels are the same alert, however often it is raised. A group waits
`group_wait` for company before it is told first, tells of what is new or over every `group_interval`, and of what only
goes on every `repeat_interval`. What a silence matches is told to nobody. Labels, annotations and fingerprints are
Alertmanager's (its API v2, `postableAlert`), so what leaves here may go straight to one.

Pure: two clocks are arguments, and whoever calls `tick` sends what it returns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from string import Template
from typing import TYPE_CHECKING, Any

from service.watch import metrics

if TYPE_CHECKING:
    from service.watch.anomalies import Anomaly
    from service.watch.rules import Routing, Rule
    from tenants.access import TenantId

MOST_ALERTS = 1_000
"""Alerts that are held at a time; what is more is counted and not told."""
MOST_TOLD = 100
"""Alerts of one group in one notification; those that began first."""
FNV_OFFSET, FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3
MATCHER = re.compile(r"\s*([a-zA-Z_][a-zA-Z0-9_]*)\s*(=~|!~|!=|=)\s*(.*?)\s*")
MATCHER_LENGTH = 256


@dataclass(frozen=True, slots=True)
class Matcher:
    """One condition on a label, written as Alertmanager writes it: `tenant=acme`, `alertname=~"Log.*"`, `key!=…`."""

    label: str
    operator: str
    value: str

    def __call__(self, labels: Mapping[str, str]) -> bool:
        found = labels.get(self.label, "")
        if self.operator in ("=", "!="):
            return (found == self.value) == (self.operator == "=")
        return (re.fullmatch(self.value, found) is not None) == (self.operator == "=~")

    def __str__(self) -> str:
        return f"{self.label}{self.operator}{self.value}"

    @staticmethod
    def parse(text: str) -> Matcher:
        """Raises ValueError for what is no matcher."""
        found = MATCHER.fullmatch(text)
        if found is None or len(text) > MATCHER_LENGTH:
            raise ValueError("a matcher is LABEL=VALUE, !=, =~ or !~")
        label, operator, value = found.groups()
        if len(value) >= 2 and value[0] == value[-1] == '"':
            value = value[1:-1]
        if operator in ("=~", "!~"):
            try:
                re.compile(value)
            except re.error as exc:
                raise ValueError(f"not a regular expression: {exc}") from exc
        return Matcher(label, operator, value)


@dataclass(frozen=True, slots=True)
class Silence:
    """Alerts that match all of it are told to nobody."""

    id: str
    matchers: tuple[Matcher, ...]

    def matches(self, labels: Mapping[str, str]) -> bool:
        return all(matcher(labels) for matcher in self.matchers)


@dataclass(slots=True)
class Alert:
    """One alert. It is pending until it has held for as long as its rule says."""

    rule: Rule
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    fingerprint: str
    began_s: float
    """Of the clock that never goes back."""
    seen_s: float
    fired_at: float | None = None
    """Seconds since 1970; None while it is pending."""
    ended_at: float | None = None
    silenced_by: tuple[str, ...] = ()
    contains: tuple[TenantId, str] | None = None
    """The tenant's id and the key's, where the rule says to refuse it for a while."""
    contained_s: float | None = None

    @property
    def is_firing(self) -> bool:
        return self.fired_at is not None and self.ended_at is None

    def tell(self, until: float) -> dict[str, Any]:
        """As Alertmanager's API v2 takes it, and with what it is found by and whether it fires.

        `until`: seconds since 1970, to which it counts where nothing more is heard.
        """
        return {
            "labels": dict(self.labels),
            "annotations": dict(self.annotations),
            "startsAt": stamp(self.fired_at or 0.0),
            "endsAt": stamp(until if self.ended_at is None else self.ended_at),
            "generatorURL": "",
            "fingerprint": self.fingerprint,
            "status": "firing" if self.ended_at is None else "resolved",
        }


@dataclass(frozen=True, slots=True)
class Notification:
    """What is told of one group at a time."""

    group: Mapping[str, str]
    alerts: tuple[Mapping[str, Any], ...]
    """As `Alert.tell` has them."""
    firing: int
    resolved: int
    severity: str
    """The gravest of them."""
    withheld: int = 0
    """Alerts of the group that are not in it, for there are too many."""


@dataclass(slots=True)
class _Group:
    labels: Mapping[str, str]
    due_s: float
    alerts: dict[str, Alert] = field(default_factory=dict)
    told_firing: frozenset[str] = frozenset()
    told_resolved: frozenset[str] = frozenset()
    told_s: float | None = None


class Alerts:
    """Every alert of one gateway. Belongs to one event loop."""

    def __init__(
        self,
        rules: Sequence[Rule],
        routing: Routing,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        """`clock`: seconds that never go back. `wall`: seconds since 1970."""
        self._routing = routing
        self._clock = clock
        self._wall = wall
        self._of_anomaly: dict[str, list[Rule]] = {}
        for rule in rules:
            if rule.anomaly is not None:
                self._of_anomaly.setdefault(rule.anomaly, []).append(rule)
        self._alerts: dict[frozenset[tuple[str, str]], Alert] = {}
        self._groups: dict[tuple[tuple[str, str], ...], _Group] = {}
        self._to_suspend: dict[str, Alert] = {}

    @property
    def firing(self) -> tuple[Alert, ...]:
        """Whatever fires now, silenced or not, the oldest first."""
        return tuple(alert for alert in self._alerts.values() if alert.is_firing)

    def raise_anomaly(self, anomaly: Anomaly) -> None:
        """Take in something odd, for each rule that is about it."""
        for rule in self._of_anomaly.get(anomaly.name, ()):
            if rule.confirmed and not anomaly.confirmed:
                continue
            values = {name: f"{value:g}" for name, value in anomaly.values.items()}
            contains = (anomaly.tenant_id, anomaly.key_id) if anomaly.tenant_id else None
            self.hold(rule, anomaly.labels, values, contains)

    def hold(
        self,
        rule: Rule,
        labels: Mapping[str, str],
        values: Mapping[str, str],
        contains: tuple[TenantId, str] | None = None,
    ) -> None:
        """What the rule is about holds now, of these labels."""
        named = _name(rule, labels)
        which = frozenset(named.items())
        now_s = self._clock()
        alert = self._alerts.get(which)
        if alert is not None:
            alert.seen_s = now_s
            self._fire(alert)
            self._ask_suspension(alert)
            return
        if len(self._alerts) >= MOST_ALERTS:
            metrics.ALERTS_SUPPRESSED.labels("full").inc()
            return
        summary = Template(rule.summary).safe_substitute({**named, **values})
        annotations = {"summary": summary} | ({"runbook_url": rule.runbook} if rule.runbook else {})
        fresh = Alert(rule, named, annotations, fingerprint(named), now_s, now_s)
        if rule.contain_s is not None:
            fresh.contains = contains
        self._alerts[which] = fresh
        self._fire(fresh)
        self._ask_suspension(fresh)

    def end(self, rule: Rule, labels: Mapping[str, str]) -> None:
        """What the rule is about holds no longer."""
        alert = self._alerts.get(frozenset(_name(rule, labels).items()))
        if alert is not None:
            self._end(alert)

    def next_suspension(self) -> Alert | None:
        """An alert whose key is to be refused now, until `suspended` is told of it."""
        return next(iter(self._to_suspend.values()), None)

    def suspended(self, alert: Alert) -> None:
        """It was done, or will not be; after its time it may be asked for again."""
        self._to_suspend.pop(alert.fingerprint, None)

    def _ask_suspension(self, alert: Alert) -> None:
        lasts_s = alert.rule.contain_s
        if lasts_s is None or alert.contains is None or not alert.is_firing:
            return
        if alert.contained_s is None or alert.seen_s - alert.contained_s >= lasts_s:
            alert.contained_s = alert.seen_s
            self._to_suspend[alert.fingerprint] = alert

    def tick(self, silences: Iterable[Silence] = ()) -> list[Notification]:
        """What is to be told now."""
        now_s = self._clock()
        kept = tuple(silences)
        for alert in list(self._alerts.values()):
            if alert.rule.anomaly is not None and now_s - alert.seen_s > alert.rule.keep_s:
                self._end(alert)
            silenced_by = tuple(silence.id for silence in kept if silence.matches(alert.labels))
            if silenced_by and not alert.silenced_by and alert.is_firing:
                metrics.ALERTS_SUPPRESSED.labels("silenced").inc()
            alert.silenced_by = silenced_by
        told = []
        for key, group in list(self._groups.items()):
            if group.due_s > now_s:
                continue
            group.due_s = now_s + self._routing.group_interval_s
            notification = self._flush(group, now_s)
            if notification is not None:
                told.append(notification)
            group.alerts = {name: alert for name, alert in group.alerts.items() if alert.is_firing}
            if not group.alerts:
                del self._groups[key]
        return told

    def _fire(self, alert: Alert) -> None:
        if alert.fired_at is not None or alert.seen_s - alert.began_s < alert.rule.for_s:
            return
        alert.fired_at = self._wall()
        names = alert.rule.group_by or self._routing.group_by
        labels = {name: alert.labels[name] for name in names if name in alert.labels}
        key = tuple(sorted(labels.items()))
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(labels, self._clock() + self._routing.group_wait_s)
        group.alerts[alert.fingerprint] = alert

    def _end(self, alert: Alert) -> None:
        """It is over; its group tells so, where it told that it began."""
        if alert.fired_at is not None:
            alert.ended_at = self._wall()
        del self._alerts[frozenset(alert.labels.items())]

    def _flush(self, group: _Group, now_s: float) -> Notification | None:
        """What the group tells, where it has something to tell: Alertmanager's `DedupStage.needsUpdate`."""
        audible = [alert for alert in group.alerts.values() if not alert.silenced_by]
        if not audible:
            return None
        firing = frozenset(alert.fingerprint for alert in audible if alert.is_firing)
        resolved = frozenset(alert.fingerprint for alert in audible if not alert.is_firing)
        if group.told_s is None:
            tells = bool(firing)
        elif not firing <= group.told_firing:
            tells = True
        elif not firing:
            tells = bool(group.told_firing)
        elif not resolved <= group.told_resolved:
            tells = True
        else:
            tells = now_s - group.told_s >= self._routing.repeat_interval_s
        if not tells:
            return None
        known = group.told_firing  # what was never told to fire is not told to be over
        listed = [alert for alert in audible if alert.is_firing or alert.fingerprint in known]
        group.told_firing, group.told_resolved, group.told_s = firing, resolved, now_s
        until = self._wall() + self._routing.repeat_interval_s + 2 * self._routing.group_interval_s
        return Notification(
            group.labels,
            tuple(alert.tell(until) for alert in listed[:MOST_TOLD]),
            firing=len(firing),
            resolved=sum(not alert.is_firing for alert in listed),
            severity=gravest(alert.rule.severity for alert in listed),
            withheld=max(0, len(listed) - MOST_TOLD),
        )


def _name(rule: Rule, labels: Mapping[str, str]) -> dict[str, str]:
    return {**labels, **rule.labels, "alertname": rule.name, "severity": rule.severity}


def gravest(severities: Iterable[str]) -> str:
    """Of info, warning and critical."""
    found = set(severities)
    return next((word for word in ("critical", "warning") if word in found), "info")


def fingerprint(labels: Mapping[str, str]) -> str:
    """Alertmanager's own: FNV-1a of 64 bits over sorted names and values, a byte 255 after each; 16 hexadecimal digits."""
    digest = FNV_OFFSET
    for name in sorted(labels):
        for byte in name.encode() + b"\xff" + labels[name].encode() + b"\xff":
            digest = ((digest ^ byte) * FNV_PRIME) & 0xFFFFFFFFFFFFFFFF
    return f"{digest:016x}"


def stamp(seconds: float) -> str:
    """RFC 3339, in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
