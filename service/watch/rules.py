"""Which alerts there are, and where they go: one TOML file, read once, refused whole with every fault.

    group_by = ["alertname", "tenant"]   # alerts that are equal in these are told together
    group_wait = "30s"
    group_interval = "5m"
    repeat_interval = "4h"
    shipped_rules = true                 # false: only the rules of this file

    [[rule]]
    name = "RequestRateSustained"        # the label alertname
    anomaly = "rate_anomaly"             # or metric = "…", match = { label = "value" }, above or below = N, increase = "5m"
    confirmed = true                     # of an anomaly: only where it was seen in two buckets of three
    severity = "critical"                # info, warning or critical
    for = "0s"                           # how long it must hold before it fires
    keep = "10m"                         # of an anomaly: how long it holds after it was last seen
    contain = "15m"                      # of an anomaly: the key is refused for so long. Unset: it is not
    group_by = ["alertname"]             # instead of the file's
    labels = { team = "search" }
    summary = "…"                        # with $tenant, and with what the anomaly tells
    runbook = "docs/alerts.md#requestrate"

    [[sink]]                             # `service.watch.sinks` has the kinds and their fields
    name = "pager"
    kind = "webhook"

Durations are written as Prometheus writes them: 30s, 5m, 4h, 1d. Pure, but that files which a sink names are read.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from service.errors import InvalidAlerts
from service.watch.anomalies import TOLD
from service.watch.metrics import REGISTRY

SHIPPED = Path(__file__).with_name("alerts.toml")
FILE_BYTES = 256 * 1024
MOST_RULES, MOST_SINKS = 200, 20
SEVERITIES = ("info", "warning", "critical")
LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]{0,63}")
RULE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
SINK_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")
DURATION = re.compile(r"(\d{1,6})(ms|s|m|h|d)")
UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}
OWN_LABELS = frozenset({"alertname", "severity"})
LEAST_CONTAINED_S, MOST_CONTAINED_S = 60.0, 86_400.0
TEXT_LENGTH = 2_000


@dataclass(frozen=True, slots=True)
class Condition:
    """A metric of this gateway, and what its value must be. Samples of one name that match are added up."""

    metric: str
    match: Mapping[str, str]
    above: float | None
    below: float | None
    increase_s: float | None
    """Not the value counts, but by how much it has grown in this time."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of alert."""

    name: str
    severity: str
    anomaly: str | None = None
    confirmed: bool = False
    condition: Condition | None = None
    for_s: float = 0.0
    keep_s: float = 600.0
    contain_s: float | None = None
    group_by: tuple[str, ...] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    summary: str = ""
    runbook: str = ""


@dataclass(frozen=True, slots=True)
class Routing:
    """When groups of alerts are told."""

    group_by: tuple[str, ...] = ("alertname", "tenant")
    group_wait_s: float = 30.0
    group_interval_s: float = 300.0
    repeat_interval_s: float = 14_400.0


@dataclass(frozen=True, slots=True)
class SinkTable:
    """One sink as it is written; `service.watch.sinks` reads the rest."""

    name: str
    kind: str
    severity: str
    heartbeat_s: float | None
    raw: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Configured:
    """The whole file, and what it builds upon."""

    rules: tuple[Rule, ...]
    routing: Routing
    sinks: tuple[SinkTable, ...] = ()


def read_rules(path: Path | None) -> Configured:
    """The rules in force; without a file the shipped ones. Raises `InvalidAlerts` with every fault."""
    shipped = _read(SHIPPED.read_text(encoding="utf-8"))
    if path is None:
        return shipped
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidAlerts(f"{path.name} cannot be read: {type(exc).__name__}") from exc
    return _read(text, shipped)


def duration_s(text: str) -> float:
    """Of `30s`, `5m`, `4h`, `1d`, or several of them: `1h30m`. Raises ValueError."""
    parts = DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError("a duration is written as 30s, 5m, 4h or 1d")
    return sum(int(number) * UNITS_S[unit] for number, unit in parts)


class Table:
    """One table of the file: each value is taken once, and what is wrong or left over is a fault."""

    def __init__(self, raw: object, where: str, faults: list[str]) -> None:
        self._raw = dict(raw) if isinstance(raw, dict) else {}
        self._where = where
        self.faults = faults
        if not isinstance(raw, dict):
            faults.append(f"{where} must be a table")

    def fault(self, name: str, what: str) -> None:
        self.faults.append(f"{self._where}{name} {what}")

    def has(self, name: str) -> bool:
        return name in self._raw

    def text(self, name: str, default: str = "", *, needed: bool = False) -> str:
        value = self._raw.pop(name, None)
        if value is None and not needed:
            return default
        if not isinstance(value, str) or not 0 < len(value) <= TEXT_LENGTH or not value.isprintable():
            self.fault(name, "must be a text")
            return default
        return value

    def one_of(self, name: str, words: tuple[str, ...], default: str) -> str:
        value = self.text(name, default)
        if value not in words:
            self.fault(name, f"must be one of {', '.join(words)}")
            return default
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._raw.pop(name, default)
        if not isinstance(value, bool):
            self.fault(name, "must be true or false")
            return default
        return value

    def number(self, name: str) -> float | None:
        value = self._raw.pop(name, None)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fault(name, "must be a number")
            return None
        return float(value)

    def whole(self, name: str, default: int, least: int, most: int) -> int:
        value = self._raw.pop(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.fault(name, f"must be a whole number from {least} to {most}")
            return default
        return value

    def duration(self, name: str, default: float | None, least_s: float = 0.0) -> float | None:
        value = self._raw.pop(name, None)
        if value is None:
            return default
        try:
            seconds = duration_s(value) if isinstance(value, str) else -1.0
        except ValueError:
            seconds = -1.0
        if seconds < least_s:
            self.fault(name, f"must be a duration as 30s, 5m, 4h or 1d, of {least_s:g} s at least")
            return default
        return seconds

    def texts(self, name: str) -> tuple[str, ...] | None:
        value = self._raw.pop(name, None)
        if value is None:
            return None
        if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
            self.fault(name, "must be a list of texts")
            return None
        return tuple(value)

    def mapping(self, name: str) -> dict[str, str]:
        value = self._raw.pop(name, {})
        if not isinstance(value, dict) or not all(
            LABEL.fullmatch(key) and isinstance(each, str) for key, each in value.items()
        ):
            self.fault(name, "must be a table of labels and texts")
            return {}
        return value

    def tables(self, name: str, most: int) -> list[Any]:
        value = self._raw.pop(name, [])
        if not isinstance(value, list) or len(value) > most:
            self.fault(name, f"must be written as [[{name}]], at most {most} times")
            return []
        return value

    def rest(self) -> dict[str, Any]:
        """What is left, taken: somebody else reads it."""
        left, self._raw = self._raw, {}
        return left

    def end(self) -> None:
        if self._raw:
            self.faults.append(
                f"{self._where or 'the file '}has unknown fields: {', '.join(sorted(self._raw))}"
            )


def _read(text: str, shipped: Configured | None = None) -> Configured:
    if len(text) > FILE_BYTES:
        raise InvalidAlerts(f"the file is larger than {FILE_BYTES} bytes")
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise InvalidAlerts(f"not TOML: {exc}") from exc
    faults: list[str] = []
    file = Table(raw, "", faults)
    usual = Routing()
    routing = Routing(
        group_by=_group_by(file) or usual.group_by,
        group_wait_s=file.duration("group_wait", usual.group_wait_s) or 0.0,
        group_interval_s=file.duration("group_interval", usual.group_interval_s, 1.0) or 0.0,
        repeat_interval_s=file.duration("repeat_interval", usual.repeat_interval_s, 60.0) or 0.0,
    )
    with_shipped = file.flag("shipped_rules", True)
    own = [
        _rule(Table(each, f"rule[{place}].", faults))
        for place, each in enumerate(file.tables("rule", MOST_RULES))
    ]
    sinks = [
        _sink(Table(each, f"sink[{place}].", faults))
        for place, each in enumerate(file.tables("sink", MOST_SINKS))
    ]
    file.end()
    for what, names in (("rule", [each.name for each in own]), ("sink", [each.name for each in sinks])):
        if len(set(names)) < len(names):
            faults.append(f"two {what}s have the same name")
    if faults:
        raise InvalidAlerts("; ".join(faults))
    named = {rule.name for rule in own}
    kept = shipped.rules if shipped is not None and with_shipped else ()
    return Configured((*(rule for rule in kept if rule.name not in named), *own), routing, tuple(sinks))


def _rule(table: Table) -> Rule:
    name = table.text("name", needed=True)
    if name and RULE_NAME.fullmatch(name) is None:
        table.fault("name", "is 1 to 64 letters, digits and underscores, and begins with a letter")
    if table.has("anomaly") == table.has("metric"):
        table.fault("", "needs one of anomaly and metric, and not both")
    anomaly = table.one_of("anomaly", tuple(TOLD), "") if table.has("anomaly") else None
    condition = _condition(table) if table.has("metric") else None
    labels = table.mapping("labels")
    if wrong := sorted(OWN_LABELS & set(labels)):
        table.fault("labels", f"may not name {', '.join(wrong)}")
    contain_s = table.duration("contain", None, LEAST_CONTAINED_S)
    if contain_s is not None and (contain_s > MOST_CONTAINED_S or "key" not in TOLD.get(anomaly or "", ())):
        table.fault("contain", "is of an anomaly of keys, and of a day at most")
    rule = Rule(
        name=name,
        severity=table.one_of("severity", SEVERITIES, "warning"),
        anomaly=anomaly,
        confirmed=table.flag("confirmed", False),
        condition=condition,
        for_s=table.duration("for", 0.0) or 0.0,
        keep_s=table.duration("keep", 600.0, 10.0) or 0.0,
        contain_s=contain_s,
        group_by=_group_by(table),
        labels=labels,
        summary=_template(table, anomaly, labels),
        runbook=table.text("runbook"),
    )
    table.end()
    return rule


def _condition(table: Table) -> Condition:
    metric, match = table.text("metric", needed=True), table.mapping("match")
    above, below = table.number("above"), table.number("below")
    if (above is None) == (below is None):
        table.fault("", "needs one of above and below, and not both")
    if metric and metric not in sample_names():
        table.fault("metric", f"is no metric of ours: {metric[:64]}")
    return Condition(metric, match, above, below, table.duration("increase", None, 10.0))


def _template(table: Table, anomaly: str | None, labels: Mapping[str, str]) -> str:
    text = table.text("summary", needed=True)
    known = {"tenant", "value", *labels, *TOLD.get(anomaly or "", ())}
    template = Template(text)
    if not template.is_valid() or (unknown := sorted(set(template.get_identifiers()) - known)):
        table.fault(
            "summary", f"names what is not told: {', '.join(unknown) if template.is_valid() else '$'}"
        )
    return text


def _group_by(table: Table) -> tuple[str, ...] | None:
    names = table.texts("group_by")
    if names is not None and not all(LABEL.fullmatch(name) for name in names):
        table.fault("group_by", "must be a list of labels")
    return names


def _sink(table: Table) -> SinkTable:
    name = table.text("name", needed=True)
    if name and SINK_NAME.fullmatch(name) is None:
        table.fault("name", "is 1 to 32 of a-z, 0-9 and inner hyphens")
    return SinkTable(
        name,
        table.text("kind", needed=True),
        table.one_of("severity", SEVERITIES, "warning"),
        table.duration("heartbeat", None, 10.0),
        table.rest(),
    )


def sample_names() -> frozenset[str]:
    """The names of all samples that this gateway's metrics can have."""
    names: set[str] = set()
    for family in REGISTRY.collect():
        if family.type == "counter":
            names.add(f"{family.name}_total")
        elif family.type == "histogram":
            names |= {f"{family.name}_count", f"{family.name}_sum"}
        else:
            names.add(family.name)
    return frozenset(names)
