"""How commands read and print: tables for people, JSON for machines, progress where something takes long."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

WIDE = 160
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
TenantName = Annotated[str, typer.Argument(metavar="TENANT", help="The tenant's name.")]
KeyId = Annotated[
    str, typer.Argument(metavar="ID", help="The key's id: the 12 characters after prc_live_ or prc_admin_.")
]


def print_json(value: object) -> None:
    """One JSON value on stdout."""
    # The driver's UUIDs are a subclass that orjson leaves to `default`.
    sys.stdout.buffer.write(
        orjson.dumps(value, default=str, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    )
    sys.stdout.buffer.flush()


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(cell, row))
    # Where nobody looks, a table is as wide as it needs to be.
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)


def print_records(
    title: str, columns: Sequence[str], records: Sequence[dict[str, Any]], *, as_json: bool
) -> None:
    """Several records: some columns for people, all fields for machines."""
    if as_json:
        print_json(records)
    else:
        print_table(title, columns, [[record[column] for column in columns] for record in records])


def print_record(title: str, record: dict[str, Any], *, as_json: bool) -> None:
    """One record with all its fields."""
    if as_json:
        print_json(record)
    else:
        print_table(title, ["field", "value"], list(record.items()))


def progress() -> Progress:
    """Progress on stderr: seen by people, and no part of what is printed."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def tell(record: object) -> dict[str, Any]:
    """A record of ours as a dictionary; what is nested stays as it is."""
    assert is_dataclass(record) and not isinstance(record, type)
    return {field.name: getattr(record, field.name) for field in fields(record)}


def cell(value: object) -> str:
    """A value as a table shows it. Times are UTC."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value))
    if isinstance(value, dict):
        return ", ".join(f"{name}={cell(each)}" for name, each in value.items())
    return "" if value is None else str(value)


def parse_changes(changes: Iterable[str]) -> dict[str, Any]:
    """NAME=VALUE words; a value is JSON, or else text."""
    parsed = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise typer.BadParameter(f"{change!r} is not NAME=VALUE")
        try:
            parsed[name] = orjson.loads(value)
        except orjson.JSONDecodeError:
            parsed[name] = value
    return parsed
