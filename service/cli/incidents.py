"""`incident …`: what is kept of an incident, before anything that may have changed it goes on."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer

from service.cli.console import JsonFlag, print_json, progress
from service.cli.opening import installation, operator, work_in
from service.custody import read_seal_key
from service.deeds import OPERATOR
from service.desk import Desk
from service.preserving import Window, preserve, unseal
from tenants.access import INSTALLATION
from tenants.directory import Tenant

BEFORE = timedelta(hours=24)
"""How much before the entry that is named, or before now, is kept."""

app = typer.Typer(
    help="What is kept of an incident. docs/incidents.md has the whole way: detect, contain, preserve, recover, report.",
    no_args_is_help=True,
)
Out = Annotated[Path, typer.Argument(metavar="OUT", help="A folder that is not there yet.")]
SealDescriptor = Annotated[
    int | None,
    typer.Option(
        "--seal-fd",
        min=0,
        metavar="N",
        help="Descriptor with the key that seals it: 32 bytes, or 64 hex digits.",
    ),
]


@app.command("export")
def export(
    out: Out,
    tenant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Whom it is about; all tenants if left out.")
    ] = None,
    entry: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="An entry of it, that of its `contain` say: its tenant, and 24 hours before it.",
        ),
    ] = None,
    since: Annotated[
        str | None, typer.Option("--from", metavar="TIME", help="2026-11-01T00:00:00Z; else 24 hours before.")
    ] = None,
    until: Annotated[str | None, typer.Option("--to", metavar="TIME", help="Now if left out.")] = None,
    metrics: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What /metrics said, as curl saved it.", exists=True)
    ] = None,
    seal_fd: SealDescriptor = None,
    as_json: JsonFlag = False,
) -> None:
    """Preserve an incident: the log with its proofs, entries, counts, configuration, versions, under one signature.

    Run it before anything is restored or erased. Needs the database's owner, as `audit export` does. It is an entry
    itself. tools/verify_incident.py checks what it wrote, with the key that `audit key` prints. No input is in it: the
    log has fingerprints alone. Seal it with: openssl rand -out incident.key 32; incident export OUT --seal-fd 3
    3<incident.key.
    """
    if tenant is not None and entry is not None:
        raise typer.BadParameter("give --tenant or --entry")
    key = read_seal_key(seal_fd, ())
    window_to = _moment("--to", until) or datetime.now(UTC)
    window_from = _moment("--from", since)
    actor = operator()

    async def write(desk: Desk) -> int:
        about, at = await _about(desk, tenant, entry)
        window = Window(window_from or min(at or window_to, window_to) - BEFORE, window_to)
        if window.since >= window.until:
            raise typer.BadParameter("--from is not before --to")
        with progress() as shown:
            bar = shown.add_task("Writing the log", total=None)
            return await preserve(
                desk,
                found,
                settings,
                out,
                actor=actor,
                window=window,
                tenant=about,
                metrics=metrics.read_bytes() if metrics else None,
                key=key,
                told=lambda done, size: shown.update(bar, completed=done, total=size),
            )

    with installation() as (settings, found):
        if found.owner_url is None:
            raise typer.BadParameter("set PERICARP_OWNER_DATABASE_URL: only the owner reads all of the log")
        try:
            out.mkdir(mode=0o700)
        except FileExistsError:
            raise typer.BadParameter("OUT is there already") from None
        try:
            entries = work_in(found, write)
        except BaseException:
            shutil.rmtree(out)
            raise
    if as_json:
        print_json(
            {"folder": str(out), "entries": entries, "sealed": key is not None, "entry": actor.receipt}
        )
    else:
        typer.echo(f"Preserved {entries} entries in {out}; this export is entry {actor.receipt}.", err=True)


@app.command("open")
def open_sealed(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A sealed export.", exists=True, file_okay=False)
    ],
    out: Out,
    seal_fd: Annotated[int, typer.Option("--seal-fd", min=0, metavar="N", help="Descriptor with its key.")],
) -> None:
    """Write the plain files of a sealed export to OUT. tools/verify_incident.py then says what they are worth."""
    key = read_seal_key(seal_fd, ())
    assert key is not None, "a descriptor was given"
    try:
        out.mkdir(mode=0o700)
    except FileExistsError:
        raise typer.BadParameter("OUT is there already") from None
    try:
        unseal(folder, out, key)
    except BaseException:
        shutil.rmtree(out)
        raise
    typer.echo(f"Opened: {out}", err=True)


async def _about(desk: Desk, name: str | None, entry: str | None) -> tuple[Tenant | None, datetime | None]:
    """Whom it is about, and when the entry that was named was recorded."""
    if entry is None:
        return (None if name is None else await desk.directory.find_tenant(name)), None
    try:
        wanted = UUID(entry)
    except ValueError:
        raise typer.BadParameter("--entry is no id of an entry") from None
    reach = await desk.inquiry.reach(OPERATOR, INSTALLATION, None)
    found = await desk.inquiry.read(operator(), reach, wanted)
    if found.tenant == INSTALLATION:
        return None, found.recorded_at
    return await desk.lifecycle.find(found.tenant), found.recorded_at


def _moment(option: str, text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise typer.BadParameter(f"{option} is a time with its zone: 2026-11-01T00:00:00Z")
    return at
