"""The routes of `/audit/v1` that ask the log."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response, StreamingResponse

from service.api.admin.described import body_of, refusals
from service.api.admin.entrance import encode, page, parse
from service.api.complaints import refuse
from service.api.inquiry.cursors import read_position, write_position
from service.api.inquiry.shapes import (
    CountsAnswer,
    EntryAnswer,
    EntryPage,
    EntrySearch,
    FoundPage,
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

PREFIX = "/audit/v1"
AUDITORS = frozenset({Role.AUDITOR, Role.PLATFORM_ADMIN})
NO_PARQUET = "parquet is not written; export csv or jsonl, and convert it"


def build_inquiry_router(*, inquiry: Inquiry, deadline_s: float) -> APIRouter:
    """The auditors' routes. `deadline_s` is how long a body may take to arrive."""
    router = APIRouter(prefix=PREFIX, tags=["audit"], dependencies=[Depends(_let_in)])

    async def reach(request: Request, tenant: UUID | None) -> Reach:
        caller = _caller(request)
        return await inquiry.reach(caller.role, caller.tenant, tenant)

    async def answer_page(request: Request, question: Question, asked: WantedPage) -> dict[str, Any]:
        before = read_position(asked.cursor, question)
        actor = _actor(request)
        found = await inquiry.page(actor, question, most=asked.limit, before=before)
        _receipt(request, actor)
        return page(list(map(tell, found)), asked.limit, lambda at: write_position(question, found[at]))

    @router.get(
        "/entries",
        name="query",
        response_model=EntryPage,
        responses=refusals(),
        summary="Entries of the log, newest first",
    )
    async def list_entries(request: Request, asked: Annotated[WantedPage, Query()]) -> Response:
        """All that is set in the query holds of each of them. What is appended meanwhile is on no later page."""
        question = await inquiry.question(await reach(request, asked.tenant), asked.filter())
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
        whose = await reach(request, asked.tenant)
        question = await inquiry.question(whose, asked.filter(), _input(asked))
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
        question = await inquiry.question(await reach(request, asked.tenant), asked.filter())
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
        question = await inquiry.question(await reach(request, asked.tenant), asked.filter())
        export = await inquiry.export(actor, question, form=asked.format)
        _receipt(request, actor)
        headers = {
            "Pericarp-Count": str(export.count),
            "Content-Disposition": f'attachment; filename="entries.{form.suffix}"',
            "Cache-Control": "no-store",
        }
        lines = _lines(request.state.exchange, export, form)
        return StreamingResponse(lines, headers=headers, media_type=form.media_type)

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


async def _lines(exchange: Exchange, export: Export, form: Form) -> AsyncIterator[bytes]:
    """The file, a batch at a time. Breaks off where the caller's key or tenant is contained meanwhile."""
    yield form.head
    async for batch in export.batches:
        if exchange.halted:
            raise Contained(reason="contained")
        yield b"".join(map(form.line, batch))


def _json(told: object) -> Response:
    return Response(encode(told), media_type="application/json", headers={"Cache-Control": "no-store"})
