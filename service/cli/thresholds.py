"""`thresholds …`: what is in force and why, feedback, the daily step, rollback, canaries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from service.cli.console import JsonFlag, TenantName, print_record, print_records, tell
from service.cli.opening import at_desk, operator
from service.desk import Desk
from tenants.access import INSTALLATION
from tenants.canaries import Canary
from tenants.errors import Fault, Invalid
from tenants.reviews import Place, Review, Verdict
from tenants.risk import Category, Mode
from tenants.thresholds import Change, Standing

app = typer.Typer(
    help="Thresholds that learn from reviewed items: show, label, step, roll back.", no_args_is_help=True
)
CHANGES = [
    "changed_at",
    "category",
    "mode",
    "version",
    "before",
    "after",
    "reason",
    "frozen",
    "set_by",
    "evidence",
]
STANDINGS = ["category", "mode", "threshold", "anchor", "bounds", "frozen", "version"]
REVIEWS = ["screened_at", "entry", "item", "category", "mode", "stopped", "drawn", "appealed_at"]
Entry = Annotated[UUID, typer.Argument(help="The receipt of the decision.")]
Item = Annotated[str, typer.Argument(help="Its place there: query, documents[3].")]
OfCategory = Annotated[Category, typer.Argument(help="What it is judged for.")]
OfMode = Annotated[Mode, typer.Argument(help="Its text or its image.")]


class _FileCanary(BaseModel):
    """A canary as the file has it."""

    model_config = ConfigDict(extra="forbid")

    category: Category
    mode: Mode
    name: str
    score: float
    detectors: str


@app.command("list")
def list_thresholds(
    tenant: TenantName,
    history: Annotated[
        int, typer.Option(min=0, max=10_000, help="Changes to show instead, at most, newest first.")
    ] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Show the thresholds in force, or their last changes with before, after, reason and evidence."""

    async def find(desk: Desk) -> tuple[tuple[Standing, ...], tuple[Change, ...]]:
        found = await desk.directory.find_tenant(tenant)
        changes = await desk.thresholds.history(found.id, most=history) if history else ()
        return await desk.thresholds.list(found.id), changes

    standings, changes = at_desk(find)
    if history:
        print_records(f"Changes of {tenant}", CHANGES, [*map(describe, changes)], as_json=as_json)
    else:
        print_records(f"Thresholds of {tenant}", STANDINGS, [*map(tell, standings)], as_json=as_json)


@app.command("waiting")
def list_waiting(
    tenant: TenantName,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Items at most, the oldest first.")] = 50,
    as_json: JsonFlag = False,
) -> None:
    """List items that were drawn at random or are appealed, and wait for a reviewer."""

    async def find(desk: Desk) -> tuple[Review, ...]:
        found = await desk.directory.find_tenant(tenant)
        return await desk.reviews.waiting(found.id, most=limit)

    reviews = [_describe_review(each) for each in at_desk(find)]
    print_records(f"Waiting of {tenant}", REVIEWS, reviews, as_json=as_json)


@app.command("label")
def label_item(
    tenant: TenantName,
    entry: Entry,
    item: Item,
    category: OfCategory,
    mode: OfMode,
    verdict: Annotated[Verdict, typer.Argument(help="What the reviewer says.")],
    as_json: JsonFlag = False,
) -> None:
    """Decide on an item as a reviewer. It counts once for its end user and day; what it makes stricter is at once."""

    async def label(desk: Desk) -> dict[str, Any]:
        found = await desk.directory.find_tenant(tenant)
        place = Place(entry, item, category, mode)
        review, change = await desk.adapting.label(operator(), found.id, place, verdict)
        return {**_describe_review(review), "change": None if change is None else describe(change)}

    print_record("Review", at_desk(label), as_json=as_json)


@app.command("appeal")
def appeal_item(
    tenant: TenantName,
    entry: Entry,
    item: Item,
    category: OfCategory,
    mode: OfMode,
    as_json: JsonFlag = False,
) -> None:
    """Ask for a reviewer's decision on an item that was stopped. It moves nothing by itself."""

    async def appeal(desk: Desk) -> dict[str, Any]:
        found = await desk.directory.find_tenant(tenant)
        return _describe_review(
            await desk.adapting.appeal(operator(), found.id, Place(entry, item, category, mode))
        )

    print_record("Review", at_desk(appeal), as_json=as_json)


@app.command("step")
def step_thresholds(
    tenant: Annotated[
        str | None, typer.Argument(metavar="[TENANT]", help="Of that tenant; else of all that are due.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Take the daily step now, instead of when a gateway does. More steps on a day go no further than one."""

    async def step(desk: Desk) -> list[dict[str, Any]]:
        if tenant is not None:
            due = [(await desk.directory.find_tenant(tenant)).id]
        else:
            due = [(await desk.lifecycle.find(each)).id for each in await desk.thresholds.due()]
        names = {each.id: each.name for each in await desk.directory.list_tenants()}
        return [
            {"tenant": names[each], **describe(change)}
            for each in due
            for change in await desk.adapting.step(each, operator())
        ]

    print_records("Changes", ["tenant", *CHANGES], at_desk(step), as_json=as_json)


@app.command("rollback")
def roll_back(
    tenant: TenantName,
    category: Annotated[Category | None, typer.Option(help="Of that category; all if left out.")] = None,
    mode: Annotated[Mode | None, typer.Option(help="Of texts or images; both if left out.")] = None,
    version: Annotated[
        int | None,
        typer.Option(min=1, help="To what one was after that change; to the policy's own if left out."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Undo what was learnt, at once and everywhere. Votes of before count no more."""
    if version is not None and (category is None or mode is None):
        raise typer.BadParameter("a version needs --category and --mode")

    async def back(desk: Desk) -> tuple[Change, ...]:
        found = await desk.directory.find_tenant(tenant)
        return await desk.adapting.roll_back(operator(), found.id, category, mode, version=version)

    print_records(f"Rolled back of {tenant}", CHANGES, [*map(describe, at_desk(back))], as_json=as_json)


@app.command("canaries")
def change_canaries(
    name: Annotated[
        str | None, typer.Argument(metavar="[TENANT]", help="The tenant's name; --all for every tenant's.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Argument(
            exists=True, dir_okay=False, help="JSON: a list of category, mode, name, score, detectors."
        ),
    ] = None,
    everyone: Annotated[bool, typer.Option("--all", help="The canaries of every tenant.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show the canaries, or replace all of them: fixed items that must be stopped, by what they scored."""
    if everyone and name is not None and file is None:
        file, name = Path(name), None
    if everyone is (name is not None):
        raise typer.BadParameter("name a tenant, or say --all")

    async def change(desk: Desk) -> tuple[Canary, ...]:
        tenant = INSTALLATION if name is None else (await desk.directory.find_tenant(name)).id
        if file is not None:
            await desk.adapting.set_canaries(operator(), tenant, _read(file))
        return await desk.canaries.list(tenant)

    canaries = [tell(each) for each in at_desk(change)]
    columns = ["category", "mode", "name", "score", "detectors"]
    print_records(f"Canaries of {name or 'every tenant'}", columns, canaries, as_json=as_json)


def describe(change: Change) -> dict[str, Any]:
    """A change as people read it."""
    return {**tell(change), "set_by": change.set_by.name or change.set_by.role}


def _describe_review(review: Review) -> dict[str, Any]:
    told = tell(review)
    place: Place = told.pop("place")
    return {
        "entry": str(place.entry_id),
        "item": place.item,
        "category": place.category,
        "mode": place.mode,
        **told,
        "decided_by": review.decided_by.name or review.decided_by.role or None,
    }


def _read(file: Path) -> list[Canary]:
    """The canaries of a file. Raises `Invalid` with all that is wrong."""
    try:
        read = TypeAdapter(list[_FileCanary]).validate_json(file.read_bytes())
    except ValidationError as exc:
        raise Invalid(
            tuple(
                Fault(".".join(map(str, error["loc"])), error["msg"])
                for error in exc.errors(include_url=False, include_input=False)
            )
        ) from None
    return [Canary(**each.model_dump()) for each in read]
