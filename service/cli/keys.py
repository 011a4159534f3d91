"""`key …`: make, list, change, rotate, revoke."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import orjson
import typer

from service.administration import state_of
from service.cli.console import (
    JsonFlag,
    KeyId,
    TenantName,
    cell,
    parse_changes,
    print_json,
    print_record,
    print_records,
    tell,
)
from service.cli.opening import at_desk, operator
from service.desk import Desk
from tenants.access import Role, Scope, TenantId
from tenants.key_limits import KeyLimits
from tenants.keys import Changes, Key

app = typer.Typer(help="API keys: make, list, change, rotate, revoke.", no_args_is_help=True)
COLUMNS = ["id", "role", "name", "state", "created_at", "last_used_at", "expires_at", "revoked_at"]
Limits = Annotated[
    list[str] | None,
    typer.Option(
        "--limit",
        metavar="NAME=VALUE",
        help="A limit of its own, below the tenant's: requests_per_minute=60.",
    ),
]
Networks = Annotated[
    list[str] | None,
    typer.Option("--allow", metavar="NETWORK", help="Let it in from there alone: 203.0.113.0/24."),
]
Scopes = Annotated[
    list[Scope] | None, typer.Option("--scope", help="A right; all of the role's if left out.")
]


@app.command("create")
def create_key(
    tenant: TenantName,
    role: Annotated[Role, typer.Option(help="What the key may do.")] = Role.SEARCH,
    name: Annotated[str | None, typer.Option(help="A name to tell it by.")] = None,
    expires_in_days: Annotated[int | None, typer.Option(min=1, help="Refuse it after so many days.")] = None,
    scope: Scopes = None,
    allow: Networks = None,
    limit: Limits = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a key. Its text is shown this once and stored nowhere."""
    expires_at = datetime.now(UTC) + timedelta(days=expires_in_days) if expires_in_days else None
    limits = KeyLimits.from_json(orjson.dumps(parse_changes(limit or [])))

    async def create(desk: Desk) -> tuple[Key, str]:
        found = await desk.directory.find_tenant(tenant)
        return await desk.administration.create_key(
            operator(),
            found.id,
            role,
            name=name,
            expires_at=expires_at,
            scopes=scope or None,
            allowed_cidrs=allow or (),
            limits=limits,
        )

    key, text = at_desk(create)
    if as_json:
        print_json({**describe(key), "key": text})
    else:
        typer.echo(text)
        typer.echo(f"Key {key.id} of {tenant}, role {key.role}. Keep it: it is not shown again.", err=True)


@app.command("list")
def list_keys(tenant: TenantName, as_json: JsonFlag = False) -> None:
    """List a tenant's keys, revoked and expired ones too."""

    async def find(desk: Desk) -> tuple[Key, ...]:
        return await desk.directory.keys.list((await desk.directory.find_tenant(tenant)).id)

    print_records(f"Keys of {tenant}", COLUMNS, [describe(key) for key in at_desk(find)], as_json=as_json)


@app.command("show")
def show_key(key_id: KeyId, as_json: JsonFlag = False) -> None:
    """Show a key: its rights, addresses, limits, and when it was last used."""
    key = _change(key_id, lambda desk, tenant: desk.directory.keys.find(tenant, key_id))
    print_record(f"Key {key_id}", describe(key), as_json=as_json)


@app.command("change")
def change_key(
    key_id: KeyId,
    name: Annotated[str | None, typer.Option(help="A new name.")] = None,
    expires_in_days: Annotated[
        int | None, typer.Option(min=0, help="Refuse it after so many days from now; 0: it never expires.")
    ] = None,
    scope: Scopes = None,
    allow: Networks = None,
    anywhere: Annotated[bool, typer.Option("--anywhere", help="Let it in from every address.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Change a key's name, expiry, rights or addresses, in force everywhere within 2 seconds. The rest stays."""
    if anywhere and allow:
        raise typer.BadParameter("--anywhere and --allow contradict each other")
    changes = Changes(
        name=name,
        expires_at=datetime.now(UTC) + timedelta(days=expires_in_days) if expires_in_days else None,
        never_expires=expires_in_days == 0,
        scopes=frozenset(scope) if scope else None,
        allowed_cidrs=() if anywhere else tuple(allow) if allow else None,
    )
    key = _change(
        key_id, lambda desk, tenant: desk.administration.change_key(operator(), tenant, key_id, changes)
    )
    print_record(f"Key {key_id}", describe(key), as_json=as_json)


@app.command("limits")
def change_limits(
    key_id: KeyId,
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[LIMIT=VALUE]...", help="For example requests_per_minute=60; LIMIT=null ends one."
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show a key's own limits, or change some; none may be above its tenant's."""

    async def change(desk: Desk, tenant: TenantId) -> Key:
        key = await desk.directory.keys.find(tenant, key_id)
        if not changes:
            return key
        fields = {**orjson.loads(key.limits.to_json()), **parse_changes(changes)}
        limits = KeyLimits.from_json(
            orjson.dumps({field: value for field, value in fields.items() if value is not None})
        )
        return await desk.administration.change_key(operator(), tenant, key_id, Changes(limits=limits))

    limits = orjson.loads(_change(key_id, change).limits.to_json())
    print_record(f"Limits of key {key_id}", limits, as_json=as_json)


@app.command("rotate")
def rotate_key(
    key_id: KeyId,
    overlap_hours: Annotated[
        float,
        typer.Option(min=0, max=720, help="The old secret stays valid so long; 0 ends all old ones at once."),
    ] = 24.0,
    as_json: JsonFlag = False,
) -> None:
    """Give a key a new secret; its id, limits and usage stay. Two secrets at most are live."""
    key, text, old_ends_at = _change(
        key_id,
        lambda desk, tenant: desk.administration.rotate_key(
            operator(), tenant, key_id, overlap_s=round(overlap_hours * 3600)
        ),
    )
    if as_json:
        print_json({**describe(key), "key": text, "old_ends_at": old_ends_at})
    else:
        typer.echo(text)
        ends = f"ends at {cell(old_ends_at)} UTC" if old_ends_at else "has ended"
        typer.echo(f"Key {key.id}: the old secret {ends}. Keep the new one: it is not shown again.", err=True)


@app.command("revoke")
def revoke_key(key_id: KeyId, as_json: JsonFlag = False) -> None:
    """Refuse a key for good, everywhere within 2 seconds. `contain --key` can be undone."""
    key = _change(key_id, lambda desk, tenant: desk.administration.revoke_key(operator(), tenant, key_id))
    if as_json:
        print_json(describe(key))
    else:
        typer.echo(f"Key {key.id} is revoked since {cell(key.revoked_at)}.")


def describe(key: Key) -> dict[str, Any]:
    """A key without its secret."""
    return {
        **tell(key),
        "state": state_of(key),
        "tenant": str(key.tenant),
        "limits": orjson.loads(key.limits.to_json()),
    }


def _change(key_id: str, change: Callable[[Desk, TenantId], Awaitable[Any]]) -> Any:
    async def work(desk: Desk) -> Any:
        return await change(desk, await desk.directory.keys.find_tenant(key_id))

    return at_desk(work)
