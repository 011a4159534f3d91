"""`usage`, `session …`, `worker …`, and the switch for an incident: `contain` and `release`."""

from __future__ import annotations

import asyncio
import time
from datetime import date, datetime, timedelta
from typing import Annotated, Any

import typer

from service.cli.console import JsonFlag, TenantName, print_json, print_records, progress, tell
from service.cli.keys import describe as describe_key
from service.cli.opening import at_desk, operator
from service.cli.tenants import describe as describe_tenant
from service.desk import Desk
from tenants.access import TenantId

STOPPED_WITHIN_S = 15.0
"""Two seconds for the gateways to stop everything, and what their reports may be late."""
LOOK_EVERY_S = 0.5

session_app = typer.Typer(help="Open sessions: list, close.", no_args_is_help=True)
worker_app = typer.Typer(help="Worker processes of all gateways.", no_args_is_help=True)
KeyOption = Annotated[
    str | None, typer.Option("--key", metavar="ID", help="Of one key alone, not the whole tenant.")
]
Reason = Annotated[str, typer.Option(help="A sentence for whoever reads the log.")]


def show_usage(
    tenant: TenantName,
    since: Annotated[
        datetime | None,
        typer.Option(formats=["%Y-%m-%d"], help="First day, in UTC; 30 days before the last if left out."),
    ] = None,
    until: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Last day, in UTC; today if left out.")
    ] = None,
    key: KeyOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show what a tenant used, by day and key, newest day first. A refused request used nothing."""

    async def find(desk: Desk) -> list[dict[str, Any]]:
        found = await desk.directory.find_tenant(tenant)
        policy = (await desk.directory.policies.current(found.id)).policy
        last: date = until.date() if until else await desk.use.today(found.id)
        first = since.date() if since else last - timedelta(days=30)
        listed = await desk.use.by_day(found, policy, since=first, until=last, key_id=key)
        return [{"day": each.day.isoformat(), "key_id": each.key_id, **tell(each.use)} for each in listed]

    columns = ["day", "key_id", "requests", "images", "tokens", "refused", "shadowed"]
    print_records(f"Usage of {tenant}", columns, at_desk(find), as_json=as_json)


@session_app.command("list")
def list_sessions(tenant: TenantName, as_json: JsonFlag = False) -> None:
    """List a tenant's open sessions, newest first."""

    async def find(desk: Desk) -> list[dict[str, Any]]:
        found = await desk.directory.find_tenant(tenant)
        return [tell(session) for session in await desk.sessions.list_open(found.id)]

    columns = ["id", "created_at", "last_used_at", "requests", "expires_at"]
    print_records(f"Sessions of {tenant}", columns, at_desk(find), as_json=as_json)


@session_app.command("close")
def close_session(
    tenant: TenantName,
    session_id: Annotated[str, typer.Argument(metavar="ID", help="The session's id, ses_….")],
) -> None:
    """Close a session. Running gateways wipe what their workers keep of it within 5 seconds."""

    async def close(desk: Desk) -> None:
        found = await desk.directory.find_tenant(tenant)
        await desk.administration.close_session(operator(), found.id, session_id)

    at_desk(close)
    typer.echo(f"Session {session_id} is closed.", err=True)


@worker_app.command("list")
def list_workers(
    tenant: Annotated[str | None, typer.Argument(metavar="[TENANT]", help="Of that tenant alone.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List the workers that serve tenants, as their gateways told of them in the last seconds.

    The database is asked, not the gateways: one that just started a worker may tell of it 5 seconds later, and one
    that was killed is forgotten after a minute.
    """

    async def find(desk: Desk) -> list[dict[str, Any]]:
        names = {str(each.id): each.name for each in await desk.directory.list_tenants()}
        if tenant is None:
            listed = await desk.presences.list_all()
        else:
            listed = await desk.presences.list((await desk.directory.find_tenant(tenant)).id)
        return [
            {
                "tenant": names.get(str(each.tenant), str(each.tenant)),
                "gateway": str(each.gateway),
                "pid": each.pid,
                "running": each.running,
                "jobs": each.jobs,
                "since": each.since,
                "reported_at": each.reported_at,
            }
            for each in listed
        ]

    columns = ["tenant", "gateway", "pid", "running", "jobs", "since", "reported_at"]
    print_records("Workers", columns, at_desk(find), as_json=as_json)


def contain(
    tenant: TenantName,
    key: KeyOption = None,
    reason: Reason = "",
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until gateways tell of no worker of it any more.")
    ] = True,
    as_json: JsonFlag = False,
) -> None:
    """Stop a tenant, or one key, at once and everywhere: the switch for an incident.

    Its keys are refused and its requests broken off at every gateway within 2 seconds; a tenant's workers are killed.
    What ran, since when, and how much is in the log before anything is stopped (`audit list`). `release` undoes it.
    """

    async def stop(desk: Desk) -> dict[str, Any]:
        found = await desk.directory.find_tenant(tenant)
        if key is not None:
            return describe_key(await desk.switch.contain_key(operator(), found.id, key, reason=reason))
        contained = await desk.switch.contain(operator(), found.id, reason=reason)
        left = await _await_end(desk, found.id) if wait else None
        return {**describe_tenant(contained), "workers_left": left}

    told = at_desk(stop)
    if as_json:
        print_json(told)
    else:
        typer.echo(f"{f'Key {key}' if key else tenant} is contained.")
    if told.get("workers_left"):
        typer.echo(
            f"{told['workers_left']} workers are still told of: if their gateway is dead, that ends within a minute; "
            "if it lives and cannot reach the database, stop it.",
            err=True,
        )
        raise typer.Exit(1)


def release(
    tenant: TenantName, key: KeyOption = None, reason: Reason = "", as_json: JsonFlag = False
) -> None:
    """Undo `contain`: the keys work again as they did before."""

    async def let_go(desk: Desk) -> dict[str, Any]:
        found = await desk.directory.find_tenant(tenant)
        if key is not None:
            return describe_key(await desk.switch.release_key(operator(), found.id, key, reason=reason))
        return describe_tenant(await desk.switch.release(operator(), found.id, reason=reason))

    told = at_desk(let_go)
    if as_json:
        print_json(told)
    else:
        typer.echo(f"{f'Key {key}' if key else tenant} is released.")


async def _await_end(desk: Desk, tenant: TenantId) -> int:
    """How many workers of the tenant are still told of, once there are none or the time is over."""
    deadline_s = time.monotonic() + STOPPED_WITHIN_S
    with progress() as shown:
        bar = shown.add_task("Stopping workers", total=None)
        most = 0
        while True:
            left = len(await desk.presences.list(tenant))
            most = max(most, left)
            shown.update(bar, total=most, completed=most - left)
            if not left or time.monotonic() > deadline_s:
                return left
            await asyncio.sleep(LOOK_EVERY_S)
