"""The command line: `python -m service COMMAND`. Each command opens the installation and calls one function.

Commands that print things take `--json`. None of them needs the service to run: the embedded Postgres is
started for the command, or shared with the service that runs on it.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from pydantic import ValidationError

from cobblestone import NotAuthentic
from models import ModelError
from service.backup import BackupError
from service.cli import (
    alerts,
    backup,
    doctor,
    erase,
    health,
    incidents,
    inquiry,
    keys,
    live,
    log,
    models,
    tenants,
    thresholds,
    tokens,
    witness,
)
from service.cli.opening import installation
from service.errors import ServiceError
from service.installation import bring_up_to_date
from service.processes.sandbox import keep_out_of_files
from tenants.embedded import EmbeddedError
from tenants.errors import TenancyError

app = typer.Typer(
    name="pericarp",
    help="A multi-tenant multimodal rerank service. Settings come from PERICARP_* variables; see the README.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(tenants.app, name="tenant")
app.add_typer(keys.app, name="key")
app.add_typer(live.session_app, name="session")
app.add_typer(live.worker_app, name="worker")
app.add_typer(tokens.app, name="token")
app.add_typer(thresholds.app, name="thresholds")
log.app.command("query")(inquiry.query)
app.add_typer(log.app, name="audit")
log.app.command("erase")(erase.erase)
app.add_typer(witness.app, name="witness")
app.add_typer(models.app, name="model")
app.add_typer(incidents.app, name="incident")
app.add_typer(alerts.app, name="alert")
app.command("health")(health.health)
app.add_typer(backup.app, name="backup")
app.command("usage")(live.show_usage)
app.command("contain")(live.contain)
app.command("release")(live.release)
app.command("doctor")(doctor.doctor)


@app.command()
def serve(
    demo: Annotated[
        bool,
        typer.Option("--demo", help="Make tenant `demo` with a search key and print a request to paste."),
    ] = False,
) -> None:
    """Start everything and answer requests until SIGTERM or Ctrl-C."""
    from service.serving import run  # the web stack is not needed by any other command

    with installation() as (settings, found):
        bring_up_to_date(found)
        run(settings, found, demo=demo)


@app.command()
def migrate() -> None:
    """Bring the database to this version's schema."""
    with installation() as (_settings, found):
        if found.owner_url is None:
            raise typer.BadParameter("set PERICARP_OWNER_DATABASE_URL: only the owner may change the schema")
        bring_up_to_date(found)
    typer.echo("The schema is up to date.")


def main() -> None:
    """Run a command; what is wrong with settings, tenants or the database ends it with one sentence."""
    keep_out_of_files()
    try:
        app()
    except ValidationError as exc:
        for error in exc.errors(include_url=False, include_input=False):
            name = "PERICARP_" + "_".join(map(str, error["loc"])).upper() if error["loc"] else "settings"
            typer.echo(f"{name}: {error['msg']}", err=True)
        sys.exit(2)
    except (TenancyError, ServiceError, EmbeddedError, ModelError, NotAuthentic, BackupError) as exc:
        typer.echo(f"{type(exc).__name__}: {exc}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
