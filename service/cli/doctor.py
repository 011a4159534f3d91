"""`doctor`: what of all that is promised holds on this host, as a table or as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.console import JsonFlag, print_json, print_table, progress
from service.settings import Settings

if TYPE_CHECKING:
    from service.doctor.check import Result


def doctor(
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Where the service answers, if not where the settings say: http://127.0.0.1:8080",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Make this check alone; may be given several times."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check every promise on this host, and print what holds, what was looked at, and what to do.

    Run it as the user that the service runs as, with the same settings, beside the service or without one: what it
    cannot see it says. Nothing is changed; the embedded Postgres is started for it where nobody runs it.

    "holds": it was looked at, and is so. "does not hold": it is not, and the last column says what to do. "cannot tell":
    it could not be looked at, which is never a pass.

    Exit status: 0 everything holds; 1 something does not, or cannot be told; 2 wrong usage or settings.

    Examples: `doctor --json` for a monitor; `doctor --only "log tree" --only backups` for a cron job.
    """
    from service.doctor.check import State, make
    from service.doctor.examination import CHECKS
    from service.doctor.sight import Sight

    unknown = sorted(set(only or ()) - {check.name for check in CHECKS})
    if unknown:
        raise typer.BadParameter(f"no check is named {', '.join(unknown)}", param_hint="--only")
    chosen = [check for check in CHECKS if not only or check.name in only]
    results: list[Result] = []
    with Sight(Settings(), url) as sight, progress() as bar:
        task = bar.add_task("Checking", total=len(chosen))
        for result in make(chosen, sight):
            results.append(result)
            bar.update(task, advance=1)
    counts = Counter(result.state for result in results)
    if as_json:
        print_json(
            {"holds": counts[State.HOLDS] == len(results), "checks": [asdict(each) for each in results]}
        )
    else:
        print_table(
            "What holds on this host",
            ["check", "state", "what was looked at", "what to do"],
            [(each.name, each.state, each.seen, each.remedy) for each in results],
        )
        typer.echo(", ".join(f"{counts[state]} {state}" for state in State))
    raise typer.Exit(0 if counts[State.HOLDS] == len(results) else 1)
