"""What Prometheus, Alertmanager and Grafana are given in `deploy/`: it names what there is, says what to do, and works.

Names and labels are looked up in our own registry, by our own reading of PromQL; the tools' own checks run where they are
(Debian: `prometheus`, `prometheus-alertmanager`).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Counter, Histogram
from prometheus_client.metrics import MetricWrapperBase

from service.watch import metrics

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "prometheus" / "pericarp.rules.yml"
CASES = ROOT / "deploy" / "prometheus" / "pericarp.rules.test.yml"
ALERTMANAGER = ROOT / "deploy" / "alertmanager" / "alertmanager.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "pericarp.json"
MONITORING = (ROOT / "docs" / "monitoring.md").read_text()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()

FUNCTIONS = {"histogram_quantile", "increase", "label_values", "max", "min", "rate", "sum", "time", "vector"}
WORDS = {"by", "or"}
OF_EVERY_SCRAPE = {"job", "instance"}
TOKEN = re.compile(
    r"""(?P<space>\s+)|(?P<string>"[^"\\]*")|(?P<range>\[[^\]]+\])|(?P<number>\d+(?:\.\d+)?)"""
    r"""|(?P<name>[a-zA-Z_:][\w:]*)|(?P<operator>=~|!~|!=|==|<=|>=|[-+*/(){},<>=])"""
)


def declared() -> dict[str, set[str]]:
    """Every series by its name, with the labels that it has besides those that a scrape adds."""
    series: dict[str, set[str]] = {"up": set()}
    for metric in (each for each in vars(metrics).values() if isinstance(each, MetricWrapperBase)):
        labels = set(metric._labelnames)
        name = metric._name
        if isinstance(metric, Counter):
            series[f"{name}_total"] = labels
        elif isinstance(metric, Histogram):
            series |= {f"{name}_bucket": labels | {"le"}, f"{name}_sum": labels, f"{name}_count": labels}
        else:
            series[name] = labels
    for family in metrics.REGISTRY.collect():
        if family.name.startswith("process_"):
            series |= {sample.name: set(sample.labels) for sample in family.samples}
    return series


SERIES = declared()


def tokens(expression: str) -> Iterator[tuple[str, str]]:
    """Kind and text of every token. Fails on what is none: nothing may be overlooked."""
    place = 0
    while place < len(expression):
        found = TOKEN.match(expression, place)
        assert found is not None and found.lastgroup is not None, f"no PromQL: {expression[place:]}"
        place = found.end()
        if found.lastgroup != "space":
            yield found.lastgroup, found.group()


def faults(expression: str) -> list[str]:
    """Names in a PromQL expression that nothing has, and labels that their metric lacks."""
    found, left = [], list(tokens(expression))
    grouped: set[str] = set()
    labels = set().union(OF_EVERY_SCRAPE)
    name = ""
    while left:
        kind, text = left.pop(0)
        if kind == "name" and text == "by":
            assert left.pop(0)[1] == "("
            while (each := left.pop(0)[1]) != ")":
                grouped |= {each} - {","}
        elif kind == "name" and text not in FUNCTIONS | WORDS:
            name = text
            if name not in SERIES:
                found.append(f"no metric {name}")
            labels |= SERIES.get(name, set())
        elif text == "{":
            while left and left[0][1] != "}":
                label, matches, value = left.pop(0)[1], left.pop(0)[1], left.pop(0)
                assert matches in ("=", "!=", "=~", "!~") and value[0] == "string", expression
                if label not in SERIES.get(name, set()) | OF_EVERY_SCRAPE:
                    found.append(f"{name} has no label {label}")
                if left[0][1] == ",":
                    left.pop(0)
            assert left.pop(0)[1] == "}"
    return found + [f"nothing here has the label {label}" for label in sorted(grouped - labels)]


def matched(expression: str) -> Iterator[tuple[str, str, str]]:
    """Every value that a label is compared with: metric, label, value; alternatives one by one."""
    for name, inside in re.findall(r"([a-z_]+)\{([^}]*)\}", expression):
        for label, values in re.findall(r'(\w+)(?:=~|!~|!=|=)"([^"]*)"', inside):
            for value in values.split("|"):
                yield name, label, value


def rules() -> list[dict[str, Any]]:
    """All alerts."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    """The dashboard's panels but its headings."""
    board = json.loads(DASHBOARD.read_text())
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def asked() -> list[tuple[str, str]]:
    """Every expression of the rules and of the dashboard, with where it stands."""
    queries = [(rule["alert"], rule["expr"]) for rule in rules()]
    for panel in panels():
        queries += [(panel["title"], target["expr"]) for target in panel["targets"]]
    for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]:
        if variable["type"] == "query":
            selector = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"])
            assert selector is not None
            queries.append((variable["name"], f"max by ({selector[2]}) ({selector[1]})"))
    return queries


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ('sum by (job) (rate(pericarp_requests_total{status=~"5.."}[5m])) > 0.01', []),
        ("pericarp_requests", ["no metric pericarp_requests"]),
        ('pericarp_requests_total{code="1"}', ["pericarp_requests_total has no label code"]),
        ("sum by (code) (pericarp_requests_total)", ["nothing here has the label code"]),
        ("pericarp_stage_seconds", ["no metric pericarp_stage_seconds"]),
        ("histogram_quantile(0.9, sum by (le) (pericarp_stage_seconds_bucket))", []),
        ("avg(up)", ["no metric avg"]),
    ],
)
def test_names_and_labels_that_nothing_has_are_found(expression: str, told: list[str]) -> None:
    assert faults(expression) == told


@pytest.mark.parametrize(
    ("where", "expression"), [pytest.param(*each, id=f"{n}") for n, each in enumerate(asked())]
)
def test_rules_and_dashboard_ask_for_what_there_is(where: str, expression: str) -> None:
    assert faults(expression) == [], where


def test_values_of_labels_are_those_that_are_documented() -> None:
    """An alert on a word that is never counted would be silent for ever."""
    missing = []
    for where, expression in asked():
        for name, label, value in matched(expression):
            if label in OF_EVERY_SCRAPE or value.startswith("$") or label in ("status", "operation"):
                continue
            (row,) = (line for line in OPERATIONS.splitlines() if line.startswith(f"| `{name}`"))
            if f"`{value}`" not in row and not is_code(name, value):
                missing.append(f"{where}: {name} {label}={value}")
    assert missing == []


def is_code(name: str, value: str) -> bool:
    """Whether it is an error's code, which the API's page lists."""
    api = (ROOT / "docs" / "api.md").read_text()
    return name.endswith(("_refusals_total", "_unauthenticated_total")) and f"| `{value}` |" in api


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: str(rule["alert"]))
def test_every_alert_says_what_is_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning", "none")
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert rule["annotations"]["runbook"] == f"docs/monitoring.md#{rule['alert'].lower()}"
    section = re.search(rf"^### {rule['alert']}\n\n(.+?)(?=\n\n#|\Z)", MONITORING, re.MULTILINE | re.DOTALL)
    assert section is not None, "its section in docs/monitoring.md"
    assert len(section[1].split()) >= 15, "and that says something"


def test_every_alert_has_a_case_in_which_it_fires_and_the_healthy_day_has_none() -> None:
    cases = yaml.safe_load(CASES.read_text())["tests"]
    fires = {}
    for case in cases:
        (check,) = case["promql_expr_test"]
        assert check["expr"] == 'count by (alertname) (ALERTS{alertstate="firing"})'
        labels = [sample["labels"] for sample in check["exp_samples"]]
        fires[case["name"]] = {re.findall(r'"(\w+)"', label)[0] for label in labels}
    assert set().union(*fires.values()) == {rule["alert"] for rule in rules()}
    assert fires["A healthy day: nothing but the watchdog"] == {"PericarpWatchdog"}
    healthy = {series["series"].split("{")[0] for series in cases[0]["input_series"]}
    needed = {name for rule in rules() for name in re.findall(r"[a-z_]+(?=[{\[ ])", rule["expr"])} & set(
        SERIES
    )
    assert needed <= healthy, "a day on which nothing was counted proves nothing"


def test_the_dashboard_is_whole() -> None:
    board = json.loads(DASHBOARD.read_text())
    every = board["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    assert len({panel["title"] for panel in every}) == len(every)
    taken: set[tuple[int, int]] = set()
    for panel in every:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
    for panel in panels():
        assert panel["description"] and panel["targets"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}", "of whichever Prometheus is chosen"
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_every_metric_is_on_the_dashboard_or_known_not_to_be() -> None:
    """Who adds a metric decides whether an operator wants to see it first."""
    shown = " ".join(expression for _, expression in asked())
    left_out = {
        name
        for name in SERIES
        if name.startswith("pericarp_") and not re.search(rf"\b{name}\b", shown) and "seconds_" not in name
    }
    assert left_out == {
        "pericarp_lent_bytes",
        "pericarp_lent_workers",
        "pericarp_packs_total",
        "pericarp_tenant_images_total",
        "pericarp_tenant_input_tokens_total",
    }


def run(tool: str, *arguments: str) -> str:
    """What a tool prints. Skips where it is not installed."""
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} (Debian: prometheus, prometheus-alertmanager) is not here")
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_takes_the_rules() -> None:
    assert f"{len(rules())} rules found" in run("promtool", "check", "rules", str(RULES))


def test_the_alerts_fire_where_they_should_and_nowhere_else() -> None:
    run("promtool", "test", "rules", str(CASES))


def test_promtool_takes_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    expressions = [
        re.sub(r"\$\w+", ".*", expression.replace("$__rate_interval", "5m"))
        for _, expression in asked()[len(rules()) :]
    ]
    recorded = [{"record": f"panel:{number}", "expr": each} for number, each in enumerate(expressions)]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": recorded}]}))
    assert f"{len(expressions)} rules found" in run("promtool", "check", "rules", str(file))


def test_amtool_takes_the_sample_and_routes_by_severity() -> None:
    run("amtool", "check-config", str(ALERTMANAGER))
    for alert, severity, receiver in (
        ("PericarpLogBroken", "critical", "pager"),
        ("PericarpErrors", "warning", "mail"),
        ("PericarpWatchdog", "none", "dead-man"),
    ):
        routed = run(
            "amtool",
            *("config", "routes", "test", "--config.file", str(ALERTMANAGER)),
            *(f"alertname={alert}", f"severity={severity}"),
        )
        assert routed.strip() == receiver
