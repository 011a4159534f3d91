"""`tenant …`: make, list, change, suspend, delete."""

from __future__ import annotations

from typing import Annotated, Any

import orjson
import typer

from service.administration import DEFAULT_GRACE_DAYS, amend
from service.cli.console import (
    JsonFlag,
    TenantName,
    parse_changes,
    print_json,
    print_record,
    print_records,
    progress,
    tell,
)
from service.cli.opening import at_desk, operator
from service.desk import Desk
from tenants.access import INSTALLATION
from tenants.ceiling import Ceiling
from tenants.directory import Tenant
from tenants.lifecycle import LONGEST_GRACE
from tenants.policies import CeilingVersion, PolicyVersion
from tenants.policy import Policy

app = typer.Typer(
    help="Tenants: make them, change what they may do, suspend and delete them.", no_args_is_help=True
)
COLUMNS = ["name", "id", "state", "created_at", "suspended_at", "contained_at", "purge_after"]
Changes = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[LIMIT=VALUE]...",
        help="For example images_per_minute=600 concurrent_requests=8; image_burst=null is the default.",
    ),
]


@app.command("create")
def create_tenant(
    name: Annotated[str, typer.Argument(help="1 to 63 of a-z, 0-9 and -, no - at either end.")],
    changes: Changes = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a tenant, with the default policy but for the limits that are given."""
    policy = Policy.from_json(orjson.dumps(parse_changes(changes))) if changes else None
    tenant = at_desk(lambda desk: desk.administration.create_tenant(operator(), name, policy))
    _show(tenant, as_json=as_json)


@app.command("list")
def list_tenants(
    state: Annotated[
        str | None, typer.Option(help="active, suspended, contained or deleted; all if left out.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """List tenants by name."""
    listed = at_desk(lambda desk: desk.directory.list_tenants(state=state or ""))
    print_records("Tenants", COLUMNS, [describe(tenant) for tenant in listed], as_json=as_json)


@app.command("show")
def show_tenant(name: TenantName, as_json: JsonFlag = False) -> None:
    """Show one tenant: its state, and since when."""
    _show(at_desk(lambda desk: desk.directory.find_tenant(name)), as_json=as_json)


@app.command("policy")
def change_policy(
    name: TenantName,
    changes: Changes = None,
    expected: Annotated[
        int | None, typer.Option(help="Change it only while this is the version in force.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show a tenant's policy, or change some of its limits; a change is in force everywhere within 2 seconds.

    A policy that contradicts itself is refused whole, with every limit that is wrong. Lowering a limit below what
    is used now is allowed, and what happens then is told.
    """

    async def change(desk: Desk) -> tuple[PolicyVersion, tuple[str, ...]]:
        tenant = await desk.directory.find_tenant(name)
        now = await desk.directory.policies.current(tenant.id)
        if not changes:
            return now, ()
        policy = amend(now.policy, parse_changes(changes))
        return await desk.administration.change_policy(
            operator(), tenant, policy, expected=now.version if expected is None else expected
        )

    version, notes = at_desk(change)
    policy = orjson.loads(version.policy.to_json())
    if as_json:
        print_json(policy)
    else:
        print_record(f"Policy of {name}, version {version.version}", policy, as_json=False)
    for note in notes:
        typer.echo(note, err=True)


@app.command("history")
def show_history(
    name: TenantName,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Versions at most, newest first.")] = 20,
    as_json: JsonFlag = False,
) -> None:
    """Show every version of a tenant's policy: who set it, when, and what it says."""

    async def find(desk: Desk) -> tuple[PolicyVersion, ...]:
        tenant = await desk.directory.find_tenant(name)
        return await desk.directory.policies.history(tenant.id, most=limit)

    versions = [
        {
            "version": each.version,
            "set_at": each.set_at,
            "set_by": each.set_by.name or each.set_by.role,
            "policy": orjson.loads(each.policy.to_json()),
        }
        for each in at_desk(find)
    ]
    print_records(f"Policies of {name}", ["version", "set_at", "set_by"], versions, as_json=as_json)


@app.command("ceiling")
def change_ceiling(
    name: Annotated[
        str | None, typer.Argument(metavar="[TENANT]", help="The tenant's name; --all for every tenant's.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[LIMIT=VALUE]...", help="Limits to bound; LIMIT=null bounds one no more."),
    ] = None,
    everyone: Annotated[bool, typer.Option("--all", help="The ceiling of every tenant.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show or change what policies may be at most: a tenant's, or with --all every tenant's.

    A policy that is above a new ceiling is lowered with it, in the same transaction.
    """
    words = [*([name] if everyone and name else []), *(changes or [])]
    if not everyone and name is None:
        raise typer.BadParameter("name a tenant, or say --all")

    async def change(desk: Desk) -> tuple[CeilingVersion, int]:
        tenant = INSTALLATION if everyone else (await desk.directory.find_tenant(name or "")).id
        now = await desk.directory.policies.ceiling(tenant)
        if not words:
            return now, 0
        fields = {**orjson.loads(now.ceiling.to_json()), **parse_changes(words)}
        ceiling = Ceiling.from_json(
            orjson.dumps({field: value for field, value in fields.items() if value is not None})
        )
        version, lowered = await desk.administration.set_ceiling(
            operator(), tenant, ceiling, expected=now.version
        )
        return version, len(lowered)

    version, lowered = at_desk(change)
    title = f"Ceiling of {'every tenant' if everyone else name}, version {version.version}"
    print_record(title, orjson.loads(version.ceiling.to_json()), as_json=as_json)
    if lowered:
        typer.echo(f"{lowered} policies were above it and are lowered.", err=True)


@app.command("suspend")
def suspend_tenant(name: TenantName, as_json: JsonFlag = False) -> None:
    """Refuse every key of a tenant, everywhere within 2 seconds. What runs may end; `contain` stops that too."""
    _show(
        _change(name, lambda desk, tenant: desk.administration.suspend(operator(), tenant.id)),
        as_json=as_json,
    )


@app.command("resume")
def resume_tenant(name: TenantName, as_json: JsonFlag = False) -> None:
    """Let a suspended tenant in again."""
    _show(
        _change(name, lambda desk, tenant: desk.administration.resume(operator(), tenant.id)), as_json=as_json
    )


@app.command("delete")
def delete_tenant(
    name: TenantName,
    grace_days: Annotated[
        int,
        typer.Option(min=0, max=LONGEST_GRACE.days, help="Days in which `tenant restore` brings it back."),
    ] = DEFAULT_GRACE_DAYS,
    as_json: JsonFlag = False,
) -> None:
    """Refuse a tenant at once, and purge it after a grace period.

    Until then nothing is removed. The purge removes every row but the log's entries, and the key of its
    fingerprints: nothing ties an entry to an input any more. A gateway purges within a minute; so does
    `tenant purge`.
    """
    _show(
        _change(name, lambda desk, tenant: desk.administration.delete(operator(), tenant.id, grace_days)),
        as_json=as_json,
    )


@app.command("restore")
def restore_tenant(name: TenantName, as_json: JsonFlag = False) -> None:
    """Undo a deletion, as long as nothing was purged."""
    _show(
        _change(name, lambda desk, tenant: desk.administration.restore(operator(), tenant.id)),
        as_json=as_json,
    )


@app.command("purge")
def purge_tenants(as_json: JsonFlag = False) -> None:
    """Purge every deleted tenant whose grace is over, now. Prints how many rows of each went."""

    async def purge(desk: Desk) -> list[dict[str, Any]]:
        due = await desk.lifecycle.list_due(most=10_000)
        purged = []
        with progress() as shown:
            for tenant in shown.track(due, description="Purging"):
                removed = await desk.administration.purge(tenant, operator())
                if removed:
                    purged.append({"name": tenant.name, "id": str(tenant.id), "removed": removed})
        return purged

    print_records("Purged", ["name", "id", "removed"], at_desk(purge), as_json=as_json)


def describe(tenant: Tenant) -> dict[str, Any]:
    """A tenant with its state."""
    return {**tell(tenant), "id": str(tenant.id), "state": tenant.state}


def _change(name: str, change: Any) -> Tenant:
    async def work(desk: Desk) -> Tenant:
        changed: Tenant = await change(desk, await desk.directory.find_tenant(name))
        return changed

    return at_desk(work)


def _show(tenant: Tenant, *, as_json: bool) -> None:
    record = describe(tenant)
    if as_json:
        print_json(record)
    else:
        print_records("Tenant", COLUMNS, [record], as_json=False)
