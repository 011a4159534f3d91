"""`audit …`: the log of decisions."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from service.cli.console import JsonFlag, TenantName, print_record, print_records, progress, tell
from service.cli.opening import at_desk, installation
from service.desk import Desk
from service.installation import Installation, bring_up_to_date
from tenants.audit import Recorded, decode
from tenants.database import Database
from tenants.errors import LogBroken
from tenants.log_export import export_log
from tenants.sequencer import Sequencer, log_signer

app = typer.Typer(help="The log of decisions.", no_args_is_help=True)
COLUMNS = ["recorded_at", "operation", "decision", "code", "status", "document_count", "request_id"]


@app.command("list")
def list_entries(
    tenant: TenantName,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Entries at most, newest first.")] = 20,
    as_json: JsonFlag = False,
) -> None:
    """Show a tenant's newest entries. No entry holds any input, only keyed fingerprints."""

    async def find(desk: Desk) -> list[dict[str, Any]]:
        found = await desk.directory.find_tenant(tenant)
        recorded = await desk.audit.list_entries(found.id, limit=limit)
        return [{"id": str(each.id), "recorded_at": each.recorded_at, **_body(each)} for each in recorded]

    print_records(f"Entries of {tenant}", COLUMNS, at_desk(find), as_json=as_json)


@app.command("key")
def show_key(as_json: JsonFlag = False) -> None:
    """Show the log's public key. Auditors keep it: every checkpoint and receipt is verified by it."""
    with installation() as (_settings, found):
        key = log_signer(found.log_key).key
    if as_json:
        print_record("The log's key", {"origin": key.name, "key": key.text}, as_json=True)
    else:
        typer.echo(key.text)


@app.command("export")
def export(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Where to write it; must not be there yet. - is stdout.")
    ],
    tenant: Annotated[
        str | None, typer.Option(metavar="NAME", help="This tenant's entries; others' as hashes alone.")
    ] = None,
    bodies: Annotated[bool, typer.Option(help="With the entries' bytes, or with their hashes alone.")] = True,
    cosigned: Annotated[
        bool, typer.Option("--cosigned", help="Up to the newest checkpoint that witnesses have cosigned.")
    ] = False,
) -> None:
    """Write the log, in lines of JSON that tools/verify.py checks. Needs the database's owner, as `migrate` does.

    What waits for the tree is put into it first, for no service may be running.
    """

    async def write(owner_url: str, out: IO[bytes]) -> None:
        with progress() as bar:
            task = bar.add_task("Writing entries", total=None)
            async for line in export_log(
                owner_url,
                tenant=tenant,
                bodies=bodies,
                cosigned=cosigned,
                told=lambda done, size: bar.update(task, completed=done, total=size),
            ):
                out.write(line)

    with installation() as (_settings, found):
        if found.owner_url is None:
            raise typer.BadParameter("set PERICARP_OWNER_DATABASE_URL: only the owner reads all of the log")
        bring_up_to_date(found)
        asyncio.run(_integrate(found))
        if str(file) == "-":
            asyncio.run(write(found.owner_url, sys.stdout.buffer))
            sys.stdout.buffer.flush()
            return
        try:
            with file.open("xb") as out:
                asyncio.run(write(found.owner_url, out))
        except FileExistsError:
            raise typer.BadParameter("FILE is there already") from None
        except BaseException:
            file.unlink(missing_ok=True)  # half an export is none
            raise


def _body(recorded: Recorded) -> dict[str, Any]:
    """What an entry says; of one whose body was pruned, that alone."""
    if not recorded.body:
        return dict.fromkeys(COLUMNS[1:], "") | {"operation": "(pruned)"}
    return tell(decode(recorded.body))


async def _integrate(found: Installation) -> None:
    database = Database(found.app_url, pool_size=1, call_pool_size=1)
    await database.open()
    try:
        sequencer = Sequencer(database, log_signer(found.log_key))
        while (await sequencer.step()).integrated:
            pass
    except LogBroken as exc:
        typer.echo(f"LogBroken: {exc}. What is stored is exported as it is.", err=True)
    finally:
        await database.close()
