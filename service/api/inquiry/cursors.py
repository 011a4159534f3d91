"""Where the next page of entries begins: a cursor is good for the log and the filters that it was given for."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID

import orjson

from service.api.admin.entrance import read_cursor, sortable, write_cursor
from service.errors import BadRequest

if TYPE_CHECKING:
    from service.inquiry import Question, Reach
    from tenants.search import Found, Position

LISTING = "entries"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def write_position(question: Question, found: Found) -> str:
    """The cursor behind `found`."""
    at = sortable(found.recorded_at)
    return write_cursor(LISTING, _whose(question.reach), _filters(question), at, str(found.id))


def read_position(cursor: str | None, question: Question) -> Position | None:
    """The place that a cursor names. Raises `BadRequest` for one of another log, of other filters, or none of ours."""
    parts = read_cursor(cursor, LISTING, 4)
    if parts is None:
        return None
    whose, filters, at, entry_id = parts
    if whose != _whose(question.reach):
        raise BadRequest(
            "cursor is of another tenant's log; begin without one.", field="cursor", reason="tenant"
        )
    if filters != _filters(question):
        raise BadRequest(
            "cursor is of a query with other filters; send those again, or begin without one.",
            field="cursor",
            reason="filters",
        )
    try:
        return EPOCH + timedelta(microseconds=int(at)), UUID(entry_id)
    except (ValueError, OverflowError):
        raise BadRequest(
            "cursor is not one that this listing gave; begin without one.", field="cursor"
        ) from None


def _whose(reach: Reach) -> str:
    return _digest("all" if reach.everything else str(reach.tenants[0]))


def _filters(question: Question) -> str:
    return _digest(question.told)


def _digest(value: object) -> str:
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]
