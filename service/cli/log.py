"""`audit …`: the log of decisions."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from service.cli.console import JsonFlag, TenantName, print_records, tell
from service.cli.opening import at_desk
from service.desk import Desk
from tenants.audit import decode

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
        return [
            {"id": str(each.id), "recorded_at": each.recorded_at, **tell(decode(each.body))}
            for each in recorded
        ]

    print_records(f"Entries of {tenant}", COLUMNS, at_desk(find), as_json=as_json)
