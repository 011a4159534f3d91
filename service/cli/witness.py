"""`witness …`: a second process, with a key and a folder of its own, that cosigns the checkpoints of logs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from service.cli.console import JsonFlag, print_records
from service.witness.store import Store, StoreBroken
from tenants.checkpoint import VerifyKey
from tenants.errors import ProofInvalid

app = typer.Typer(
    help="A witness: run it where whoever runs the log has no access.", invoke_without_command=True
)
FOLDER = Path("witness")


@app.callback()
def witness(
    context: typer.Context,
    folder: Annotated[
        Path, typer.Option(help="The witness's own folder, made where there is none.")
    ] = FOLDER,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8081,
) -> None:
    """Cosign the checkpoints of known logs until SIGTERM or Ctrl-C. No setting, no database."""
    context.obj = folder
    if context.invoked_subcommand is None:
        # A program of its own: what holds the key has no code loaded that it does not need.
        os.execv(  # noqa: S606 - an argument list of ours
            sys.executable,
            [sys.executable, "-m", "service.witness", str(folder.absolute()), host, str(port)],
        )


@app.command("key")
def show_key(context: typer.Context) -> None:
    """Show the witness's public key. Gateways and auditors keep it."""
    typer.echo(_store(context.obj).cosigner.key.text)


@app.command("add-log")
def add_log(
    context: typer.Context,
    key: Annotated[str, typer.Argument(metavar="VKEY", help="What `audit key` of the log prints.")],
) -> None:
    """Know a log from now on, by its public key. A witness that runs need not be told."""
    try:
        added = _store(context.obj).add_log(VerifyKey.parse(key.strip()))
    except ProofInvalid as exc:
        raise typer.BadParameter(str(exc)) from None
    typer.echo("The log is known." if added else "The log was known already.")


@app.command("list")
def list_logs(context: typer.Context, as_json: JsonFlag = False) -> None:
    """Show the known logs, and where what was cosigned last lies: a checkpoint for `tools/verify.py`."""
    store = _store(context.obj)
    found = []
    for key in store.logs():
        held = store.newest(key.name)
        found.append(
            {
                "origin": key.name,
                "size": held[1].size if held else 0,
                "key": key.text,
                "checkpoint": str(store.checkpoint_file(key.name)) if held else None,
            }
        )
    print_records("Known logs", ["origin", "size", "checkpoint"], found, as_json=as_json)


def _store(folder: Path) -> Store:
    try:
        return Store(folder)
    except (StoreBroken, OSError) as exc:
        raise typer.BadParameter(str(exc)) from None
