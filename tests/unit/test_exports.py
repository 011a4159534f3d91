"""Entries as lines of a file: the bytes of the log, cells that compute nothing, events that can be checked."""

from __future__ import annotations

import csv
import hashlib
import io
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime

import orjson
import pytest

from service.api.inquiry.router import write_lines
from service.asks import Exchange
from service.errors import Contained
from service.exports import COLUMNS, FORMS, ocsf, summary
from service.inquiry import Export
from tenants.access import INSTALLATION
from tenants.audit import Decision, Entry, ItemPrint, encode
from tenants.search import Found

AT = datetime(2026, 11, 27, 16, 59, 39, 23_546, tzinfo=UTC)
PLAIN = Entry(
    request_id=str(uuid.UUID(int=1)),
    tenant=INSTALLATION,
    key_id="k" * 12,
    role="search",
    operation="rerank",
    decision=Decision.ANSWERED,
    code="ok",
    status=200,
    at_us=1_795_798_779_021_634,
)


def found(**changes: object) -> Found:
    entry = replace(PLAIN, **changes)  # type: ignore[arg-type]
    return Found(INSTALLATION, uuid.UUID(int=2), AT, 1, encode(entry))


def row(entry: Found) -> dict[str, str]:
    text = (FORMS["csv"].head + FORMS["csv"].line(entry)).decode()
    (told,) = csv.DictReader(io.StringIO(text, newline=""))
    return told


@pytest.mark.parametrize("beginning", ["=", "+", "-", "@", "\t", "\r", "\n"])
def test_no_cell_begins_a_formula(beginning: str) -> None:
    harmful = f'{beginning}HYPERLINK("https://example.org","x")'
    told = row(
        found(key_id=harmful, operation=harmful, code=harmful, session=harmful, model=harmful, client=harmful)
    )
    for name in ("key_id", "operation", "code", "session", "model", "client"):
        assert told[name] == f"'{harmful}", name
    assert list(told) == list(COLUMNS)


def test_a_cell_holds_commas_quotes_and_line_ends_as_they_are() -> None:
    assert row(found(code='a,"b"\r\nc'))["code"] == 'a,"b"\r\nc'


def test_a_row_tells_the_highest_risk_and_the_query() -> None:
    risks = {"text": {"hate": [350_000, 600_000], "drugs": [120_000, 1]}, "image": {"gore": [900_000, 1]}}
    entry = found(
        query=ItemPrint("q" * 43, 1), details={"screening": {"action": "mask", "risks": risks}}, status=403
    )
    told = row(entry)
    assert (told["action"], told["category"], told["risk"]) == ("mask", "gore", "0.900000")
    assert (told["query_text"], told["query_image"], told["status"]) == ("q" * 43, "", "403")
    assert (told["recorded_at"], told["at"]) == (
        "2026-11-27T16:59:39.023546Z",
        "2026-11-27T16:59:39.021634Z",
    )
    assert summary(entry)["action"] == "mask"


def test_a_line_of_json_holds_the_very_bytes() -> None:
    entry = found(code="ü\n")
    line = FORMS["jsonl"].line(entry)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert entry.body in line
    assert orjson.loads(line)["body"] == orjson.loads(entry.body)


@pytest.mark.parametrize(
    ("operation", "activity"),
    [
        ("rerank", 99),
        ("session_open", 1),
        ("session_close", 4),
        ("admin.key_create", 1),
        ("admin.key_revoke", 4),
        ("admin.tenant_purge", 4),
        ("admin.policy_change", 3),
        ("admin.contain", 3),
        ("audit.query", 2),
        ("session_list", 2),
    ],
)
def test_an_event_says_what_kind_of_call_it_was(operation: str, activity: int) -> None:
    event = ocsf(found(operation=operation))
    assert (event["activity_id"], event["type_uid"]) == (activity, 600_300 + activity)
    assert event["api"]["operation"] == operation


def test_an_event_has_what_ocsf_requires_and_is_bound_to_its_entry() -> None:
    entry = found(decision=Decision.DENIED, code="content_refused", status=403, key_id="", role="operator")
    event = orjson.loads(FORMS["ocsf"].line(entry))
    required = {"activity_id", "actor", "api", "category_uid", "class_uid", "metadata", "severity_id"}
    assert required | {"src_endpoint", "time", "type_uid"} <= set(event)
    assert event["actor"]["user"]["uid"] == "operator"
    assert (event["status_id"], event["status_code"]) == (2, "content_refused")
    assert (event["time"], event["metadata"]["logged_time"]) == (1_795_798_779_021, 1_795_798_779_024)
    assert event["unmapped"]["body_sha256"] == hashlib.sha256(entry.body).hexdigest()
    (attestation,) = event["attestation_list"]
    told = attestation.pop("fingerprint")
    again = hashlib.sha256(orjson.dumps(event, option=orjson.OPT_SORT_KEYS)).hexdigest()
    assert (told["algorithm_id"], told["serialization_id"], told["value"]) == (3, 2, again)
    event["status_code"] = "ok"
    assert hashlib.sha256(orjson.dumps(event, option=orjson.OPT_SORT_KEYS)).hexdigest() != told["value"]


async def test_an_export_breaks_off_where_its_key_is_contained() -> None:
    exchange = Exchange(str(uuid.UUID(int=3)), "", "audit.export")

    async def batches() -> AsyncIterator[tuple[Found, ...]]:
        yield (found(),)
        exchange.halt()
        yield (found(),)

    lines = write_lines(exchange, Export(2, batches()), FORMS["csv"])
    assert await anext(lines) == FORMS["csv"].head
    assert await anext(lines) == FORMS["csv"].line(found())
    with pytest.raises(Contained):
        await anext(lines)
