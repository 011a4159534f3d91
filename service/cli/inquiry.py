"""`audit query`: what auditors ask over HTTP, asked on this host; shown, or written to a file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import IO, Annotated, Any
from uuid import UUID

import typer
from pydantic import ValidationError

from service.api.complaints import complaints
from service.api.inquiry.shapes import Filters
from service.cli.console import JsonFlag, print_json, print_records, progress
from service.cli.opening import at_desk, operator
from service.deeds import OPERATOR
from service.desk import Desk
from service.exports import FORMS, summary, tell
from service.inquiry import Input, Question
from tenants.access import INSTALLATION
from tenants.audit import Decision
from tenants.errors import TenantNotFound
from tenants.risk import Action, Category

COLUMNS = [
    "recorded_at",
    "tenant",
    "operation",
    "decision",
    "action",
    "code",
    "status",
    "key_id",
    "id",
    "backup",
]


class Format(StrEnum):
    """How a file is written."""

    JSONL = "jsonl"
    CSV = "csv"
    OCSF = "ocsf"


LIMIT = 20


def query(
    tenant: Annotated[
        str | None, typer.Argument(metavar="[TENANT]", help="Its name, or its id if it is purged; else all.")
    ] = None,
    since: Annotated[
        str | None,
        typer.Option("--from", metavar="TIME", help="Recorded then or later: 2026-11-01T00:00:00Z."),
    ] = None,
    until: Annotated[str | None, typer.Option("--to", metavar="TIME", help="Recorded before then.")] = None,
    last_days: Annotated[int | None, typer.Option(metavar="N", help="Recorded in the last N days.")] = None,
    actor: Annotated[str | None, typer.Option(metavar="KEY", help="The id of the key.")] = None,
    operation: Annotated[str | None, typer.Option(help="As entries call it: rerank, admin.contain.")] = None,
    decision: Annotated[Decision | None, typer.Option(help="What became of the request.")] = None,
    action: Annotated[Action | None, typer.Option(help="The hardest that screening did.")] = None,
    category: Annotated[Category | None, typer.Option(help="A score of it was at least 0.1.")] = None,
    risk_above: Annotated[
        float | None, typer.Option(help="The score was above that; of any category.")
    ] = None,
    request: Annotated[str | None, typer.Option(metavar="ID", help="The request's id.")] = None,
    session: Annotated[str | None, typer.Option(metavar="ID", help="A session's id.")] = None,
    fingerprint: Annotated[str | None, typer.Option(help="Of a text or image, as entries have it.")] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="With a text that was sent, but for its last line end; - is stdin."
        ),
    ] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="The image that was sent.")] = None,
    limit: Annotated[
        int, typer.Option(min=1, max=10_000, help="Entries to show at most, newest first.")
    ] = LIMIT,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write all of them there instead; must not be there yet. - is stdout."
        ),
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="Of that file.")] = Format.JSONL,
    as_json: JsonFlag = False,
) -> None:
    """Find entries, of a tenant or of all: who did what, and what was decided. Asking is an entry too."""
    sent = {
        "from": since,
        "to": until,
        "last_days": last_days,
        "actor": actor,
        "operation": operation,
        "decision": decision,
        "action": action,
        "category": category,
        "risk_above": risk_above,
        "request_id": request,
        "session": session,
        "fingerprint": fingerprint,
    }
    asked = _check({name: value for name, value in sent.items() if value is not None})
    looked_for = _input(text, image)
    if looked_for is not None and fingerprint is not None:
        raise typer.BadParameter("--fingerprint is the same filter as --text and --image; give one of them")

    async def question(desk: Desk) -> Question:
        named = None if tenant is None else await _tenant(desk, tenant)
        reach = await desk.inquiry.reach(OPERATOR, INSTALLATION, named)
        return await desk.inquiry.question(reach, asked.filter(), looked_for)

    async def show(desk: Desk) -> list[dict[str, Any]]:
        page = await desk.inquiry.page(operator(), await question(desk), most=limit)
        backups = await desk.backups.of_entries([(each.tenant, each.id) for each in page.found])
        return [
            (tell(each) if as_json else summary(each)) | {"backup": backups[each.id]} for each in page.found
        ]

    async def write(desk: Desk, out: IO[bytes]) -> int:
        export = await desk.inquiry.export(operator(), await question(desk), form=form)
        written = 0
        out.write(FORMS[form].head)
        with progress() as shown:
            bar = shown.add_task("Writing entries", total=export.count)
            async for batch in export.batches:
                out.write(b"".join(map(FORMS[form].line, batch)))
                written += len(batch)
                shown.update(bar, completed=written)
        return written

    if file is None:
        found = at_desk(show)
        if as_json:
            print_json(found)
        else:
            columns = COLUMNS if tenant is None else [name for name in COLUMNS if name != "tenant"]
            print_records("Entries", columns, found, as_json=False)
    elif str(file) == "-":
        at_desk(lambda desk: write(desk, sys.stdout.buffer))
        sys.stdout.buffer.flush()
    else:
        written = _write_new(file, lambda out: at_desk(lambda desk: write(desk, out)))
        if as_json:
            print_json({"file": str(file), "format": form, "entries": written})
        else:
            typer.echo(f"Wrote {written} entries to {file}.", err=True)


def _check(sent: dict[str, Any]) -> Filters:
    """The filters, checked as the API checks them."""
    try:
        return Filters.model_validate(sent)
    except ValidationError as exc:
        faults = complaints(exc.errors(include_url=False, include_input=False))
        raise typer.BadParameter("; ".join(map(str, faults))) from None


def _input(text: Path | None, image: Path | None) -> Input | None:
    if text is not None and image is not None:
        raise typer.BadParameter("--text and --image are one filter; give one of them")
    try:
        if text is not None:
            read = sys.stdin.buffer.read() if str(text) == "-" else text.read_bytes()
            return Input(text=read.decode().removesuffix("\n").removesuffix("\r"))
        return None if image is None else Input(image=image.read_bytes())
    except (OSError, UnicodeDecodeError) as exc:
        raise typer.BadParameter(f"{text or image} cannot be read: {exc}") from None


async def _tenant(desk: Desk, name: str) -> UUID:
    """By its name, or by its id, which a purged tenant still has. Raises `TenantNotFound`."""
    try:
        return (await desk.directory.find_tenant(name)).id
    except TenantNotFound:
        try:
            return UUID(name)
        except ValueError:
            raise TenantNotFound from None


def _write_new(file: Path, write: Callable[[IO[bytes]], int]) -> int:
    """What `write` tells, once all of the file is written; half a file is none."""
    try:
        out = file.open("xb")
    except FileExistsError:
        raise typer.BadParameter(f"{file} is there already") from None
    try:
        with out:
            return write(out)
    except BaseException:
        file.unlink(missing_ok=True)
        raise
