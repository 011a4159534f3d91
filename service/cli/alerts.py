"""`alert …`: the rules in force, what fires, silences, and whether every sink can be reached."""

from __future__ import annotations

import asyncio
import getpass
from typing import Annotated, Any
from uuid import UUID, uuid4

import typer

from service.cli.console import JsonFlag, cell, print_json, print_records, tell
from service.cli.opening import at_desk, operator
from service.desk import Desk
from service.settings import Settings
from service.watch.delivery import heartbeat
from service.watch.rules import Rule, duration_s, read_rules
from service.watch.sinks import SinkFailed, build_sinks
from tenants.silences import KeptSilence

TEST_S = 300.0

app = typer.Typer(
    help="Alerts: rules, what fires, silences, a test of every sink. See docs/alerts.md.",
    no_args_is_help=True,
)
silence_app = typer.Typer(
    help="Silences: add, list, end. A silenced alert is told to nobody.", no_args_is_help=True
)
app.add_typer(silence_app, name="silence")

By = Annotated[
    str, typer.Option("--by", metavar="NAME", help="Who does this; your account's name if left out.")
]


@app.command("test")
def test_sinks(
    sink: Annotated[str | None, typer.Option(metavar="NAME", help="That sink alone.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Send an alert `Watchdog` to every sink of PERICARP_ALERTS, once and now; exit 1 where one does not take it.

    From this host and account, not from the service: run it as the service's own user.
    """
    places = build_sinks(read_rules(Settings().alerts).sinks)
    chosen = [place.sink for place in places if sink in (None, place.sink.name)]
    if not chosen:
        raise typer.BadParameter("there is no such sink" if sink else "PERICARP_ALERTS names no sink")

    async def send_all() -> list[dict[str, Any]]:
        notification = heartbeat("alert test", 0.0, TEST_S)
        results = []
        for each in chosen:
            try:
                await each.send(notification, f"msg_{uuid4().hex}")
            except SinkFailed as exc:
                results.append({"sink": each.name, "sent": False, "reason": str(exc)})
            else:
                results.append({"sink": each.name, "sent": True, "reason": ""})
        return results

    results = asyncio.run(send_all())
    print_records("Sinks", ["sink", "sent", "reason"], results, as_json=as_json)
    if not all(result["sent"] for result in results):
        raise typer.Exit(1)


@app.command("list")
def list_alerts(as_json: JsonFlag = False) -> None:
    """List the alerts that fire, as the gateways told of them in the last two minutes; silenced ones too."""

    async def find(desk: Desk) -> list[dict[str, Any]]:
        return [
            {
                "alertname": each.alert["labels"]["alertname"],
                "severity": each.alert["labels"]["severity"],
                "since": each.alert["startsAt"],
                "labels": {
                    name: value
                    for name, value in sorted(each.alert["labels"].items())
                    if name not in ("alertname", "severity")
                },
                "summary": each.alert["annotations"].get("summary", ""),
                "runbook": each.alert["annotations"].get("runbook_url", ""),
                "silenced_by": each.alert["silencedBy"],
                "fingerprint": each.alert["fingerprint"],
                "gateway": str(each.gateway),
                "told_at": each.told_at,
            }
            for each in await desk.told_alerts.list()
        ]

    columns = ["alertname", "severity", "since", "labels", "summary", "silenced_by"]
    print_records("Alerts", columns, at_desk(find), as_json=as_json)


@app.command("rules")
def list_rules(as_json: JsonFlag = False) -> None:
    """List the rules in force, the shipped ones and those of PERICARP_ALERTS; exit 1 where the file or a sink is wrong."""
    configured = read_rules(Settings().alerts)
    sinks = [
        {"name": place.sink.name, "severity": place.severity, "heartbeat_s": place.heartbeat_s}
        for place in build_sinks(configured.sinks)
    ]
    rules = [{**tell(rule), "about": _about(rule)} for rule in configured.rules]
    if as_json:
        rules = [{**rule, "condition": rule["condition"] and tell(rule["condition"])} for rule in rules]
        print_json({"rules": rules, "routing": tell(configured.routing), "sinks": sinks})
        return
    columns = ["name", "severity", "about", "for_s", "contain_s", "summary"]
    print_records("Rules", columns, rules, as_json=False)
    print_records("Sinks, besides the log", ["name", "severity", "heartbeat_s"], sinks, as_json=False)


@silence_app.command("add")
def add_silence(
    matchers: Annotated[
        list[str],
        typer.Argument(
            metavar="MATCHER…",
            help="LABEL=VALUE, !=, =~ or !~ (a whole regular expression); all of them must match.",
        ),
    ],
    lasts: Annotated[
        str, typer.Option("--for", metavar="DURATION", help="How long: 30m, 2h, 1d, 1h30m.")
    ] = "2h",
    comment: Annotated[str, typer.Option(help="Why, for whoever reads the log.")] = "",
    by: By = "",
    as_json: JsonFlag = False,
) -> None:
    """Silence alerts for a while: `alert silence add alertname=RequestRate tenant=acme --for 2h --comment "load test"`.

    Gateways know within 2 seconds. A silenced rule suspends no key. The silence is an entry of the installation's log.
    """
    try:
        lasts_s = duration_s(lasts)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--for") from exc

    async def add(desk: Desk) -> KeptSilence:
        return await desk.silencing.add(
            operator(), matchers, lasts_s=lasts_s, by=by or getpass.getuser(), comment=comment
        )

    silence = at_desk(add)
    if as_json:
        print_json(tell(silence))
    else:
        typer.echo(f"{silence.id} silences {', '.join(silence.matchers)} until {cell(silence.ends_at)} UTC.")


@silence_app.command("list")
def list_silences(
    everything: Annotated[bool, typer.Option("--all", help="Those that are over too.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """List silences by their end."""

    async def find(desk: Desk) -> list[dict[str, Any]]:
        listed = await (desk.silences.list_all() if everything else desk.silences.list_open())
        return [tell(silence) for silence in listed]

    columns = ["id", "matchers", "ends_at", "created_by", "comment"]
    print_records("Silences", columns, at_desk(find), as_json=as_json)


@silence_app.command("end")
def end_silence(
    silence: Annotated[UUID, typer.Argument(metavar="ID", help="The silence's id.")],
    by: By = "",
    as_json: JsonFlag = False,
) -> None:
    """End a silence now."""

    async def end(desk: Desk) -> KeptSilence:
        return await desk.silencing.end(operator(), silence, by=by or getpass.getuser())

    ended = at_desk(end)
    if as_json:
        print_json(tell(ended))
    else:
        typer.echo(f"{ended.id} is over.")


def _about(rule: Rule) -> str:
    if rule.condition is None:
        return f"{rule.anomaly}{', confirmed' if rule.confirmed else ''}"
    condition = rule.condition
    match = ",".join(f'{name}="{value}"' for name, value in condition.match.items())
    metric = f"{condition.metric}{{{match}}}" if match else condition.metric
    if condition.increase_s is not None:
        metric = f"{metric} in {condition.increase_s:g} s"
    return (
        f"{metric} > {condition.above:g}"
        if condition.above is not None
        else f"{metric} < {condition.below:g}"
    )
