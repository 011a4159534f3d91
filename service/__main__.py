"""The command line: `python -m service COMMAND`. Each command opens the installation and calls one function.

Commands that print things take `--json`. None of them needs the service to run: the embedded Postgres is
started for the command, or shared with the service that runs on it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, TypeVar

import orjson
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from service.installation import Installation, bring_up_to_date, opened
from service.settings import Settings
from tenants.access import Role, Scope
from tenants.audit import Audit, decode
from tenants.database import Database
from tenants.directory import Directory, Tenant
from tenants.embedded import EmbeddedError
from tenants.errors import TenancyError
from tenants.key_limits import KeyLimits
from tenants.keys import Key
from tenants.policy import Policy

Result = TypeVar("Result")
WIDE = 160
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]

app = typer.Typer(
    name="pericarp",
    help="A multi-tenant multimodal rerank service. Settings come from PERICARP_* variables; see the README.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
tenants_app = typer.Typer(help="Tenants: make, list, change their limits.", no_args_is_help=True)
keys_app = typer.Typer(help="API keys: make, list, rotate, revoke.", no_args_is_help=True)
audit_app = typer.Typer(help="The log of decisions.", no_args_is_help=True)
app.add_typer(tenants_app, name="tenant")
app.add_typer(keys_app, name="key")
app.add_typer(audit_app, name="audit")


@app.command()
def serve(
    demo: Annotated[
        bool,
        typer.Option("--demo", help="Make tenant `demo` with a search key and print a request to paste."),
    ] = False,
) -> None:
    """Start everything and answer requests until SIGTERM or Ctrl-C."""
    from service.serving import run  # the web stack is not needed by any other command

    with _installation() as (settings, installation):
        bring_up_to_date(installation)
        run(settings, installation, demo=demo)


@app.command()
def migrate() -> None:
    """Bring the database to this version's schema."""
    with _installation() as (_settings, installation):
        if installation.owner_url is None:
            raise typer.BadParameter("set PERICARP_OWNER_DATABASE_URL: only the owner may change the schema")
        bring_up_to_date(installation)
    typer.echo("The schema is up to date.")


@tenants_app.command("create")
def create_tenant(
    name: Annotated[str, typer.Argument(help="1 to 63 of a-z, 0-9 and -, no - at either end.")],
    as_json: JsonFlag = False,
) -> None:
    """Make a tenant with the default policy."""
    tenant = _with_directory(lambda directory: directory.create_tenant(name))
    _show_tenants((tenant,), as_json=as_json, one=True)


@tenants_app.command("list")
def list_tenants(as_json: JsonFlag = False) -> None:
    """List every tenant."""
    _show_tenants(_with_directory(lambda directory: directory.list_tenants()), as_json=as_json)


@tenants_app.command("policy")
def change_policy(
    name: Annotated[str, typer.Argument(help="The tenant's name.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[LIMIT=VALUE]...", help="For example images_per_minute=600 concurrent_requests=8."
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show a tenant's policy, or change some of its limits; a change is in force for the next request."""

    async def change(directory: Directory) -> Policy:
        tenant = await directory.find_tenant(name)
        policy = await directory.find_policy(tenant.id)
        if changes:
            policy = Policy.from_json(
                orjson.dumps({**orjson.loads(policy.to_json()), **_parse_changes(changes)})
            )
            await directory.set_policy(tenant.id, policy)
        return policy

    policy = orjson.loads(_with_directory(change).to_json())
    if as_json:
        _print_json(policy)
    else:
        _print_table(
            f"Policy of {name}", ["limit", "value"], [[key, str(value)] for key, value in policy.items()]
        )


@keys_app.command("create")
def create_key(
    tenant: Annotated[str, typer.Argument(help="The tenant's name.")],
    role: Annotated[Role, typer.Option(help="What the key may do.")] = Role.SEARCH,
    name: Annotated[str | None, typer.Option(help="A name to tell it by.")] = None,
    expires_in_days: Annotated[int | None, typer.Option(min=1, help="Refuse it after so many days.")] = None,
    scope: Annotated[list[Scope] | None, typer.Option(help="A right; all of the role's if left out.")] = None,
    allow: Annotated[
        list[str] | None, typer.Option(metavar="NETWORK", help="Let it in from there alone: 203.0.113.0/24.")
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="A limit of its own, below the tenant's: requests_per_minute=60."
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a key. Its text is shown this once and stored nowhere."""
    expires_at = datetime.now(UTC) + timedelta(days=expires_in_days) if expires_in_days else None
    limits = KeyLimits.from_json(orjson.dumps(_parse_changes(limit or [])))

    async def create(directory: Directory) -> tuple[Key, str]:
        found = await directory.find_tenant(tenant)
        return await directory.keys.create(
            found.id,
            role,
            name=name,
            expires_at=expires_at,
            scopes=scope,
            allowed_cidrs=allow or (),
            limits=limits,
        )

    key, text = _with_directory(create)
    if as_json:
        _print_json({**_tell_key(key), "key": text})
    else:
        typer.echo(text)
        typer.echo(f"Key {key.id} of {tenant}, role {key.role}. Keep it: it is not shown again.", err=True)


@keys_app.command("list")
def list_keys(
    tenant: Annotated[str, typer.Argument(help="The tenant's name.")], as_json: JsonFlag = False
) -> None:
    """List a tenant's keys, revoked and expired ones too."""

    async def find(directory: Directory) -> tuple[Key, ...]:
        return await directory.keys.list((await directory.find_tenant(tenant)).id)

    keys = [_tell_key(key) for key in _with_directory(find)]
    if as_json:
        _print_json(keys)
    else:
        columns = ["id", "role", "name", "created_at", "last_used_at", "expires_at", "revoked_at"]
        _print_table(
            f"Keys of {tenant}", columns, [[_cell(key[column]) for column in columns] for key in keys]
        )


@keys_app.command("revoke")
def revoke_key(
    key_id: Annotated[
        str,
        typer.Argument(metavar="ID", help="The key's id: the 12 characters after prc_live_ or prc_admin_."),
    ],
    as_json: JsonFlag = False,
) -> None:
    """Refuse a key, everywhere within 2 seconds."""

    async def revoke(directory: Directory) -> Key:
        return await directory.keys.revoke(await directory.keys.find_tenant(key_id), key_id)

    key = _with_directory(revoke)
    if as_json:
        _print_json(_tell_key(key))
    else:
        typer.echo(f"Key {key.id} is revoked since {_cell(key.revoked_at)}.")


@keys_app.command("rotate")
def rotate_key(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id.")],
    overlap_hours: Annotated[
        float, typer.Option(min=0, help="The old secret stays valid so long; 0 ends all old ones at once.")
    ] = 24.0,
    as_json: JsonFlag = False,
) -> None:
    """Give a key a new secret; its id, limits and usage stay. Two secrets at most are live."""

    async def rotate(directory: Directory) -> tuple[Key, str, datetime | None]:
        tenant = await directory.keys.find_tenant(key_id)
        return await directory.keys.rotate(tenant, key_id, overlap_s=overlap_hours * 3600)

    key, text, old_ends_at = _with_directory(rotate)
    if as_json:
        _print_json({**_tell_key(key), "key": text, "old_ends_at": old_ends_at})
    else:
        typer.echo(text)
        ends = f"ends at {_cell(old_ends_at)} UTC" if old_ends_at else "has ended"
        typer.echo(f"Key {key.id}: the old secret {ends}. Keep the new one: it is not shown again.", err=True)


@audit_app.command("list")
def list_entries(
    tenant: Annotated[str, typer.Argument(help="The tenant's name.")],
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Entries at most, newest first.")] = 20,
    as_json: JsonFlag = False,
) -> None:
    """Show a tenant's newest entries. No entry holds any input, only keyed fingerprints."""

    async def find(database: Database, installation: Installation) -> list[dict[str, Any]]:
        directory = Directory(database, pepper=installation.pepper, master_key=installation.master_key)
        found = await directory.find_tenant(tenant)
        recorded = await Audit(database, master_key=installation.master_key).list_entries(
            found.id, limit=limit
        )
        return [
            {"id": str(each.id), "recorded_at": each.recorded_at, **dataclasses.asdict(decode(each.body))}
            for each in recorded
        ]

    entries = _with_database(find)
    if as_json:
        _print_json(entries)
    else:
        columns = ["recorded_at", "operation", "decision", "code", "status", "document_count", "request_id"]
        _print_table(
            f"Entries of {tenant}",
            columns,
            [[_cell(entry[column]) for column in columns] for entry in entries],
        )


def main() -> None:
    """Run a command; what is wrong with settings, tenants or the database ends it with one sentence."""
    try:
        app()
    except ValidationError as exc:
        for error in exc.errors(include_url=False, include_input=False):
            name = "PERICARP_" + "_".join(map(str, error["loc"])).upper() if error["loc"] else "settings"
            typer.echo(f"{name}: {error['msg']}", err=True)
        sys.exit(2)
    except (TenancyError, EmbeddedError) as exc:
        typer.echo(f"{type(exc).__name__}: {exc}", err=True)
        sys.exit(1)


@contextmanager
def _installation() -> Iterator[tuple[Settings, Installation]]:
    settings = Settings()
    with opened(settings) as installation:
        yield settings, installation


def _with_database(work: Callable[[Database, Installation], Awaitable[Result]]) -> Result:
    """Open the installation, its schema up to date, and run `work` on its database."""

    async def run(installation: Installation) -> Result:
        async with _database(installation) as database:
            return await work(database, installation)

    with _installation() as (_settings, installation):
        bring_up_to_date(installation)
        return asyncio.run(run(installation))


def _with_directory(work: Callable[[Directory], Awaitable[Result]]) -> Result:
    async def run(database: Database, installation: Installation) -> Result:
        return await work(Directory(database, pepper=installation.pepper, master_key=installation.master_key))

    return _with_database(run)


@asynccontextmanager
async def _database(installation: Installation) -> AsyncIterator[Database]:
    database = Database(installation.app_url, pool_size=1, call_pool_size=1)
    await database.open()
    try:
        yield database
    finally:
        await database.close()


def _parse_changes(changes: list[str]) -> dict[str, Any]:
    parsed = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise typer.BadParameter(f"{change!r} is not LIMIT=VALUE")
        try:
            parsed[name] = orjson.loads(value)
        except orjson.JSONDecodeError:
            parsed[name] = value
    return parsed


def _tell_key(key: Key) -> dict[str, Any]:
    return {**dataclasses.asdict(key), "limits": orjson.loads(key.limits.to_json())}


def _show_tenants(tenants: tuple[Tenant, ...], *, as_json: bool, one: bool = False) -> None:
    rows = [dataclasses.asdict(tenant) for tenant in tenants]
    if as_json:
        _print_json(rows[0] if one else rows)
    else:
        columns = ["name", "id", "created_at", "suspended_at"]
        _print_table("Tenants", columns, [[_cell(row[column]) for column in columns] for row in rows])


def _print_json(value: object) -> None:
    # The driver's UUIDs are a subclass that orjson leaves to `default`.
    sys.stdout.buffer.write(
        orjson.dumps(value, default=str, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    )


def _print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    # Where nobody looks, a table is as wide as it needs to be.
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)


def _cell(value: object) -> str:
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
    return "" if value is None else str(value)


if __name__ == "__main__":
    main()
