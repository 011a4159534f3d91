"""Entries are found by what they say, each tenant's by itself, and the index says of each what its body says."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from dataclasses import replace
from datetime import timedelta
from typing import Any

import orjson
import pytest
from sqlalchemy import text

from service.deeds import Actor
from service.inquiry import Inquiry, Reach
from tenants.access import INSTALLATION, TenantId
from tenants.audit import Audit, Decision, Entry, Fingerprints
from tenants.database import Database, migrate
from tenants.errors import EntryNotFound
from tenants.search import Filter, Found, Page, Search, print_of
from tests.integration.conftest import MakeCaller, go_back


@pytest.fixture
def search(database: Database) -> Search:
    return Search(database)


@pytest.fixture
async def tenant(make_caller: MakeCaller) -> TenantId:
    return (await make_caller()).tenant


PRINTS = Fingerprints(bytes(32))


def entry_for(tenant: TenantId, **changes: object) -> Entry:
    plain = Entry(
        request_id=str(uuid.uuid4()),
        tenant=tenant,
        key_id="k" * 12,
        role="search",
        operation="rerank",
        decision=Decision.ANSWERED,
        code="ok",
        status=200,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def screened(action: str, **risks: dict[str, int]) -> dict[str, object]:
    measured = {
        mode: {category: [score, 600_000] for category, score in each.items()} for mode, each in risks.items()
    }
    return {"screening": {"action": action, "risks": measured}}


async def ids(search: Search, tenant: TenantId, **asked: Any) -> list[uuid.UUID]:
    page = await search.page(tenant, Filter(**asked), most=1000)
    assert not page.more
    return [each.id for each in page.found]


async def test_each_filter_finds_what_holds_and_nothing_else(
    search: Search, audit: Audit, tenant: TenantId
) -> None:
    request_id = str(uuid.uuid4())
    plain = await audit.record(entry_for(tenant, request_id=request_id))
    other_key = await audit.record(entry_for(tenant, key_id="jwt:corp"))
    refused = await audit.record(entry_for(tenant, decision=Decision.REFUSED, status=429))
    session = await audit.record(entry_for(tenant, operation="session_open", session="ses_1"))
    masked = await audit.record(entry_for(tenant, details=screened("mask", text={"hate": 900_000})))
    everything = [masked, session, refused, other_key, plain]
    assert await ids(search, tenant) == everything
    assert await ids(search, tenant, key_id="jwt:corp") == [other_key]
    assert await ids(search, tenant, operation="session_open") == [session]
    assert await ids(search, tenant, decision="refused") == [refused]
    assert await ids(search, tenant, decision="answered") == [masked, session, other_key, plain]
    assert await ids(search, tenant, session="ses_1") == [session]
    assert await ids(search, tenant, action="mask") == [masked]
    assert await ids(search, tenant, request_id=uuid.UUID(request_id)) == [plain]
    assert await ids(search, tenant, request_id=uuid.uuid4()) == []
    assert await ids(search, tenant, operation="rerank", decision="refused", key_id="k" * 12) == [refused]
    assert await ids(search, tenant, request_id=uuid.UUID(request_id), decision="refused") == []
    assert await ids(search, tenant, request_id=uuid.UUID(request_id), operation="rerank") == [plain]


async def test_risks_are_found_above_a_score_by_category_or_of_any(
    search: Search, audit: Audit, tenant: TenantId
) -> None:
    scores = (99_999, 100_000, 350_000, 399_999, 400_000, 999_999, 1_000_000)
    recorded = [
        await audit.record(
            entry_for(tenant, details=screened("allow", text={"hate": score}, image={"gore": 1}))
        )
        for score in scores
    ]
    drugs = await audit.record(
        entry_for(tenant, details=screened("mask", text={"drugs": 200_000}, image={"drugs": 700_000}))
    )
    assert await ids(search, tenant, category="hate") == recorded[:0:-1], "from 0.1 on"
    assert await ids(search, tenant, category="hate", risk_above=0.35) == recorded[:2:-1]
    assert await ids(search, tenant, category="hate", risk_above=0.4) == recorded[:4:-1]
    assert await ids(search, tenant, category="hate", risk_above=0.999999) == [recorded[-1]]
    assert await ids(search, tenant, category="gore") == []
    assert await ids(search, tenant, category="drugs", risk_above=0.69) == [drugs], "of two modes the higher"
    assert await ids(search, tenant, risk_above=0.5) == [drugs, *recorded[:4:-1]]
    assert await ids(search, tenant, risk_above=0.5, action="mask") == [drugs]
    assert await ids(search, tenant, category="hate", key_id="other") == []


async def test_inputs_are_found_wherever_the_entry_tells_of_them(
    search: Search, audit: Audit, tenant: TenantId
) -> None:
    one, two, image = PRINTS.item("one", None), PRINTS.item("two", None), PRINTS.item("three", b"image")
    as_query = await audit.record(entry_for(tenant, query=one, documents=(two, two, image)))
    as_document = await audit.record(
        entry_for(tenant, documents=(one,), details=screened("flag", text={"hate": 500_000}))
    )
    in_pairs = await audit.record(
        entry_for(tenant, documents=(two,), details={"queries": [{"text": one.text, "chars": 3}]})
    )
    assert await ids(search, tenant, fingerprint=one.text) == [in_pairs, as_document, as_query]
    assert await ids(search, tenant, fingerprint=two.text) == [in_pairs, as_query], "once, not twice"
    assert await ids(search, tenant, fingerprint=image.image) == [as_query]
    assert await ids(search, tenant, fingerprint=image.text) == [as_query]
    assert await ids(search, tenant, fingerprint=PRINTS.text("four")) == []
    altered = one.text[:-2] + ("AA" if one.text[-2:] != "AA" else "BB")
    assert await ids(search, tenant, fingerprint=altered) == [], "all of it counts, not its beginning"
    assert await ids(search, tenant, fingerprint=one.text, category="hate") == [as_document]
    assert await ids(search, tenant, fingerprint=one.text, category="hate", risk_above=0.5) == []
    request_id = uuid.UUID(orjson.loads((await search.find(tenant, as_query)).body)["request_id"])
    assert await ids(search, tenant, fingerprint=one.text, request_id=request_id) == [as_query]
    assert await ids(search, tenant, fingerprint=PRINTS.text("4"), request_id=request_id) == []


async def test_a_moment_belongs_to_the_range_that_begins_with_it(
    search: Search, audit: Audit, tenant: TenantId
) -> None:
    recorded = [await audit.record(entry_for(tenant)) for _ in range(4)]
    times = [(await search.find(tenant, each)).recorded_at for each in recorded]
    assert await ids(search, tenant, since=times[1], until=times[3]) == [recorded[2], recorded[1]]
    assert await ids(search, tenant, since=times[3]) == [recorded[3]]
    assert await ids(search, tenant, until=times[0]) == []
    tick = timedelta(microseconds=1)
    assert await ids(search, tenant, since=times[1] + tick, until=times[2] + tick) == [recorded[2]]


async def test_pages_hold_every_entry_once_while_more_are_appended(
    search: Search, audit: Audit, tenant: TenantId
) -> None:
    everything: tuple[dict[str, Any], ...] = ({}, {"operation": "rerank"}, {"category": "hate"})
    for filters in everything:
        details = screened("allow", text={"hate": 200_000})
        for number in range(25):
            mixed = screened("allow", text={"hate": 100_000 + number * 30_000})
            await audit.record(entry_for(tenant, details=mixed))
        listed = await ids(search, tenant, **filters)
        stop = asyncio.Event()

        async def append(stop: asyncio.Event = stop, details: dict[str, object] = details) -> None:
            while not stop.is_set():
                await audit.record(entry_for(tenant, details=details))

        appending = asyncio.create_task(append())
        seen: list[Found] = []
        more = True
        while more:
            page = await search.page(
                tenant, Filter(**filters), most=7, before=seen[-1].position if seen else None
            )
            seen += page.found
            more = page.more
        stop.set()
        await appending
        walked = [each.id for each in seen]
        assert [each for each in walked if each in set(listed)] == listed
        assert len(walked) == len(set(walked))
        assert [each.position for each in seen] == sorted((each.position for each in seen), reverse=True)


async def test_a_page_is_bounded_in_bytes_and_says_that_there_is_more(
    search: Search, audit: Audit, tenant: TenantId, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = tuple(PRINTS.item(str(number), None) for number in range(100))
    recorded = [await audit.record(entry_for(tenant, documents=documents)) for _ in range(5)][::-1]
    monkeypatch.setattr("tenants.search.MOST_BYTES", len((await search.find(tenant, recorded[0])).body) + 1)
    first = await search.page(tenant, Filter(), most=10)
    assert ([each.id for each in first.found], first.more) == (recorded[:2], True)
    last = await search.page(
        tenant, Filter(), most=10, before=(await search.find(tenant, recorded[3])).position
    )
    assert ([each.id for each in last.found], last.more) == (recorded[4:], False)
    inquiry = Inquiry(search=search, searches=None, audit=audit, lifecycle=None, deeds=None)  # type: ignore[arg-type]
    question = await inquiry.question(Reach((tenant,), tenant), Filter(operation="rerank"))
    page = await inquiry.page(Actor("operator"), question, most=2)
    assert ([each.id for each in page.found], page.more) == (recorded[:2], True)
    export = await inquiry.export(Actor("operator"), question, form="csv")
    exported = [each.id async for batch in export.batches for each in batch]
    assert (export.count, exported) == (5, recorded)


async def test_entries_of_many_tenants_come_in_one_order(
    search: Search, audit: Audit, make_caller: MakeCaller
) -> None:
    one, two, three = [(await make_caller()).tenant for _ in range(3)]
    told = [one] * 40 + [two] * 5 + [one] * 30 + [three, one] * 10 + [two] * 25
    recorded = [await audit.record(entry_for(tenant)) for tenant in told][::-1]
    inquiry = Inquiry(search=search, searches=None, audit=audit, lifecycle=None, deeds=None)  # type: ignore[arg-type]
    reach = Reach((one, two, three), INSTALLATION, everything=True)
    question = await inquiry.question(reach, Filter(operation="rerank"))
    walked: list[Found] = []
    page = Page((), more=True)
    while page.more:
        before = walked[-1].position if walked else None
        page = await inquiry.page(Actor("operator"), question, most=12, before=before)
        walked += page.found
        assert len(page.found) == min(12, len(recorded) - len(walked) + len(page.found))
    assert [each.id for each in walked] == recorded
    assert sum(each.count for each in await inquiry.count(Actor("operator"), question)) == len(recorded)


async def test_counts_add_up_to_what_is_found(search: Search, audit: Audit, tenant: TenantId) -> None:
    for decision in (Decision.ANSWERED, Decision.ANSWERED, Decision.DENIED):
        await audit.record(entry_for(tenant, decision=decision, query=PRINTS.item("x", None)))
    await audit.record(
        entry_for(tenant, operation="clean_image", details=screened("flag", image={"gore": 350_000}))
    )

    async def told(**asked: Any) -> dict[tuple[str, str], int]:
        counts = await search.count(tenant, Filter(**asked))
        today = (await search.page(tenant, Filter(), most=1)).found[0].recorded_at.date().isoformat()
        assert {each.day for each in counts} <= {today}
        return {(each.operation, each.decision): each.count for each in counts}

    assert await told() == {
        ("rerank", "answered"): 2,
        ("rerank", "denied"): 1,
        ("clean_image", "answered"): 1,
    }
    assert await told(fingerprint=PRINTS.text("x")) == {("rerank", "answered"): 2, ("rerank", "denied"): 1}
    assert await told(risk_above=0.3) == {("clean_image", "answered"): 1}
    assert await told(decision="denied", fingerprint=PRINTS.text("x")) == {("rerank", "denied"): 1}


async def test_another_tenants_entries_are_found_by_no_filter(
    search: Search, audit: Audit, tenant: TenantId, make_caller: MakeCaller
) -> None:
    other = (await make_caller()).tenant
    request_id = str(uuid.uuid4())
    theirs = await audit.record(
        entry_for(
            other,
            request_id=request_id,
            session="ses_1",
            query=PRINTS.item("x", None),
            details=screened("mask", text={"hate": 900_000}),
        )
    )
    questions: tuple[dict[str, Any], ...] = (
        {},
        {"key_id": "k" * 12},
        {"operation": "rerank"},
        {"session": "ses_1"},
        {"action": "mask"},
        {"request_id": uuid.UUID(request_id)},
        {"category": "hate"},
        {"risk_above": 0.2},
        {"fingerprint": PRINTS.text("x")},
    )
    for asked in questions:
        assert await ids(search, other, **asked) == [theirs], asked
        assert await ids(search, tenant, **asked) == [], asked
        assert await search.count(tenant, Filter(**asked)) == (), asked
    with pytest.raises(EntryNotFound):
        await search.find(tenant, theirs)


async def test_row_security_hides_index_rows_whatever_is_asked(
    database: Database, audit: Audit, tenant: TenantId, make_caller: MakeCaller
) -> None:
    other = (await make_caller()).tenant
    await audit.record(
        entry_for(other, query=PRINTS.item("x", None), details=screened("mask", text={"hate": 900_000}))
    )
    for table in ("audit_search", "audit_input", "audit_risk"):
        count = text(f"select count(*) from pericarp.{table} where tenant_id = :other")
        async with database.transaction(tenant) as connection:
            assert await connection.scalar(count, {"other": other}) == 0
        async with database.transaction(other) as connection:
            assert (await connection.scalar(count, {"other": other}) or 0) > 0


async def test_a_nul_in_an_entry_costs_it_nothing(search: Search, audit: Audit, tenant: TenantId) -> None:
    """JSON may hold one, and no text of Postgres can."""
    details: dict[str, object] = {
        "reason": "a\0\0b \\u0000 c\\\0",
        **screened("mask", text={"hate": 500_000}),
    }
    receipt = await audit.record(entry_for(tenant, session="ses\0x", details=details))
    (found,) = (await search.page(tenant, Filter(session="sesx", category="hate"), most=2)).found
    assert (found.id, orjson.loads(found.body)["details"]["reason"]) == (receipt, details["reason"])


async def test_entries_from_before_the_index_are_indexed_by_the_migration(
    search: Search, audit: Audit, tenant: TenantId, database: Database, owner_url: str, superuser_url: str
) -> None:
    details = screened("mask", text={"hate": 900_000})
    before = await audit.record(entry_for(tenant, query=PRINTS.item("old", None), details=details))
    await go_back(owner_url, "0014")
    old = await audit.record(entry_for(tenant, query=PRINTS.item("old", None), details=details))
    await migrate(owner_url)
    assert await ids(search, tenant, fingerprint=PRINTS.text("old"), category="hate") == [old, before]
    assert await ids(search, tenant, action="mask") == [old, before]


def test_a_print_is_the_beginning_of_the_fingerprint() -> None:
    fingerprint = PRINTS.text(secrets.token_hex())
    assert -(2**63) <= print_of(fingerprint) < 2**63
    assert print_of("A" * 43) == 0
    assert print_of("_" * 43) == -1
