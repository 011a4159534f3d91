"""The routes of `/audit/v1` that ask the log."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request
from pydantic import ValidationError
from starlette.responses import Response, StreamingResponse

from service.api.admin.described import body_of, refusals
from service.api.admin.entrance import encode, parse
from service.api.complaints import complaints, refuse
from service.api.inquiry.cursors import read_position, write_position
from service.api.inquiry.shapes import (
    CountsAnswer,
    EntryAnswer,
    EntryPage,
    EntrySearch,
    Filters,
    FoundPage,
    NewSearch,
    SearchAnswer,
    SearchList,
    Wanted,
    WantedExport,
    WantedPage,
)
from service.api.items import decode_image
from service.api.requests import PROBLEMS, read_body
from service.deeds import actor_of
from service.errors import Contained, Forbidden
from service.exports import FORMS, Form, tell
from service.inquiry import Input
from tenants.access import Role, Scope
from tenants.errors import EntryNotFound, Fault

if TYPE_CHECKING:
    from service.asks import Exchange
    from service.deeds import Actor
    from service.inquiry import Export, Inquiry, Question, Reach
    from tenants.access import Caller
    from tenants.searches import SavedSearch

PREFIX = "/audit/v1"
AUDITORS = frozenset({Role.AUDITOR, Role.PLATFORM_ADMIN})
NO_PARQUET = "parquet is not written; export csv or jsonl, and convert it"


def build_inquiry_router(*, inquiry: Inquiry, deadline_s: float) -> APIRouter:
    """The auditors' routes. `deadline_s` is how long a body may take to arrive."""
    router = APIRouter(prefix=PREFIX, tags=["audit"], dependencies=[Depends(_let_in)])

    async def wanted(request: Request, asked: Wanted) -> Filters:
        """What is asked for, with what a saved search says beside it."""
        if asked.search is None:
            return asked
        saved = await inquiry.saved(_caller(request).tenant, asked.search)
        set_here = asked.model_dump(include=set(Filters.model_fields), by_alias=True, exclude_unset=True)
        try:
            return Filters.model_validate({**saved.filters, **set_here})
        except ValidationError as exc:  # together they are a range that holds nothing
            raise refuse(complaints(exc.errors(include_url=False, include_input=False))) from None

    async def reach(request: Request, tenant: UUID | None) -> Reach:
        caller = _caller(request)
        return await inquiry.reach(caller.role, caller.tenant, tenant)

    async def answer_page(request: Request, question: Question, asked: WantedPage) -> dict[str, Any]:
        before = read_position(asked.cursor, question)
        actor = _actor(request)
        page = await inquiry.page(actor, question, most=asked.limit, before=before)
        _receipt(request, actor)
        return {
            "object": "list",
            "data": list(map(tell, page.found)),
            "has_more": page.more,
            "next_cursor": write_position(question, page.found[-1]) if page.more else None,
        }

    @router.get(
        "/entries",
        name="query",
        response_model=EntryPage,
        responses=refusals(),
        summary="Entries of the log, newest first",
    )
    async def list_entries(request: Request, asked: Annotated[WantedPage, Query()]) -> Response:
        """All that is set in the query holds of each of them. Whatever is decided meanwhile, nothing comes twice on the
        following pages, and nothing that stood before the first one is left out."""
        named = await wanted(request, asked)
        question = await inquiry.question(await reach(request, named.tenant), named.filter())
        return _json(await answer_page(request, question, asked))

    @router.post(
        "/entries/search",
        name="query",
        response_model=FoundPage,
        responses=refusals() | {413: PROBLEMS[413]},
        openapi_extra=body_of(
            EntrySearch,
            text={"input": {"text": "an old mountain bike"}, "from": "2026-11-01T00:00:00Z"},
            image={"input": {"image": "data:image/png;base64,iVBO…"}, "limit": 1000},
        ),
        summary="Entries that tell of a text or an image",
    )
    async def search_entries(request: Request) -> Response:
        """The same filters as a body, and `input`: in no URL, in no log, and in the query's own entry as a fingerprint."""
        asked = parse(await read_body(request, deadline_s), EntrySearch)
        named = await wanted(request, asked)
        whose = await reach(request, named.tenant)
        question = await inquiry.question(whose, named.filter(), _input(asked))
        told = await answer_page(request, question, asked)
        fingerprint = None if whose.everything else question.told.get("fingerprint")
        return _json(told | {"fingerprint": fingerprint})

    @router.get(
        "/entries/{entry_id}",
        name="read",
        response_model=EntryAnswer,
        responses=refusals(),
        summary="One entry",
    )
    async def read_entry(
        request: Request,
        entry_id: str,
        tenant: Annotated[UUID | None, Query(description="Of that tenant, for platform keys.")] = None,
    ) -> Response:
        """By its receipt. 404 for none as for another tenant's."""
        try:
            wanted = UUID(entry_id)
        except ValueError:
            raise EntryNotFound from None
        actor = _actor(request)
        found = await inquiry.read(actor, await reach(request, tenant), wanted)
        _receipt(request, actor)
        return _json(tell(found))

    @router.get(
        "/counts",
        name="counts",
        response_model=CountsAnswer,
        responses=refusals(),
        summary="How many entries, by day, operation and decision",
    )
    async def count_entries(request: Request, asked: Annotated[Wanted, Query()]) -> Response:
        """Newest day first."""
        actor = _actor(request)
        named = await wanted(request, asked)
        question = await inquiry.question(await reach(request, named.tenant), named.filter())
        counts = await inquiry.count(actor, question)
        _receipt(request, actor)
        total = sum(each.count for each in counts)
        return _json({"object": "counts", "total": total, "data": counts})

    @router.get(
        "/export",
        name="export",
        response_class=StreamingResponse,
        responses={
            **refusals(),
            200: {"content": {form.media_type: {} for form in FORMS.values()}, "description": "The file."},
        },
        summary="Entries as a file",
    )
    async def export_entries(request: Request, asked: Annotated[WantedExport, Query()]) -> Response:
        """Newest first, all that stand when it begins; `Pericarp-Count` says how many. An export that cannot be
        finished is broken off, so that its length is wrong."""
        form = FORMS.get(asked.format)
        if form is None:
            why = NO_PARQUET if asked.format == "parquet" else f"must be one of {', '.join(FORMS)}"
            raise refuse((Fault("format", why),))
        actor = _actor(request)
        named = await wanted(request, asked)
        question = await inquiry.question(await reach(request, named.tenant), named.filter())
        export = await inquiry.export(actor, question, form=asked.format)
        _receipt(request, actor)
        headers = {
            "Pericarp-Count": str(export.count),
            "Content-Disposition": f'attachment; filename="entries.{form.suffix}"',
            "Cache-Control": "no-store",
        }
        lines = write_lines(request.state.exchange, export, form)
        return StreamingResponse(lines, headers=headers, media_type=form.media_type)

    @router.post(
        "/searches",
        name="search_save",
        status_code=201,
        response_model=SearchAnswer,
        responses=refusals(409),
        openapi_extra=body_of(
            NewSearch, denied={"name": "denied-this-week", "filters": {"decision": "denied", "last_days": 7}}
        ),
        summary="Save a search",
    )
    async def save_search(request: Request) -> Response:
        """For every auditor of the caller's tenant: `search=NAME` in a query is the same as its filters."""
        asked = parse(await read_body(request, deadline_s), NewSearch)
        filters = asked.filters.model_dump(mode="json", by_alias=True, exclude_unset=True)
        actor, tenant = _actor(request), _caller(request).tenant
        saved = await inquiry.save(actor, tenant, asked.name, filters, asked.filters.filter())
        _receipt(request, actor)
        return _json(_tell_saved(saved), status=201, headers={"Location": f"{PREFIX}/searches/{saved.name}"})

    @router.get(
        "/searches",
        name="search_list",
        response_model=SearchList,
        responses=refusals(),
        summary="Saved searches",
    )
    async def list_searches(request: Request) -> Response:
        """All of the caller's tenant, by name."""
        listed = await inquiry.list_saved(_caller(request).tenant)
        return _json({"object": "list", "data": list(map(_tell_saved, listed))})

    @router.get(
        "/searches/{name}",
        name="search_read",
        response_model=SearchAnswer,
        responses=refusals(),
        summary="One saved search",
    )
    async def read_search(request: Request, name: str) -> Response:
        """404 for another tenant's as for none."""
        return _json(_tell_saved(await inquiry.saved(_caller(request).tenant, name)))

    @router.delete(
        "/searches/{name}",
        name="search_delete",
        status_code=204,
        response_class=Response,
        responses=refusals(),
        summary="Delete a saved search",
    )
    async def delete_search(request: Request, name: str) -> Response:
        """What was found by it stays in the log."""
        actor = _actor(request)
        await inquiry.delete_saved(actor, _caller(request).tenant, name)
        _receipt(request, actor)
        return Response(status_code=204)

    return router


def _let_in(request: Request) -> None:
    """A dependency of every path: name the operation, and refuse all but auditors."""
    exchange: Exchange = request.state.exchange
    exchange.operation = f"audit.{request.scope['route'].name}"
    caller = _caller(request)
    if caller.role not in AUDITORS:
        raise Forbidden(
            f"This needs a key with the role {', '.join(sorted(AUDITORS))}; this one has {caller.role}.",
            reason="role",
        )
    if Scope.AUDIT not in caller.scopes:
        raise Forbidden(f"This needs the scope {Scope.AUDIT}.", reason="scope")


def _caller(request: Request) -> Caller:
    exchange: Exchange = request.state.exchange
    return exchange.known_caller


def _actor(request: Request) -> Actor:
    return actor_of(request.state.exchange)


def _receipt(request: Request, actor: Actor) -> None:
    request.state.exchange.entry_id = actor.receipt


def _input(asked: EntrySearch) -> Input | None:
    if asked.input is None:
        return None
    if asked.input.image is not None:
        return Input(image=decode_image(asked.input.image, "input.image"))
    return Input(text=asked.input.text)


async def write_lines(exchange: Exchange, export: Export, form: Form) -> AsyncIterator[bytes]:
    """The file, a batch at a time. Breaks off where the caller's key or tenant is contained meanwhile."""
    yield form.head
    async for batch in export.batches:
        if exchange.halted:
            raise Contained(reason="contained")
        yield b"".join(map(form.line, batch))


def _tell_saved(saved: SavedSearch) -> dict[str, Any]:
    return {
        "object": "search",
        "name": saved.name,
        "filters": saved.filters,
        "saved_at": saved.saved_at,
        "saved_by": saved.saved_by or None,
    }


def _json(told: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    told_headers = {"Cache-Control": "no-store", **(headers or {})}
    return Response(encode(told), status, told_headers, media_type="application/json")
