"""The log as auditors ask it over HTTP: each tenant's by itself, by what was sent as well, page by page and as a file."""

from __future__ import annotations

import asyncio
import base64
import csv
import hashlib
import io
import secrets
import threading
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx
import orjson
import pytest

from service import inquiry
from service.inquiry import Input
from tenants.access import INSTALLATION
from tenants.audit import decode
from tenants.search import Filter
from tests.assets.images import encode, photo
from tests.integration.administrators import House, build_house, faults, make_key, problem
from tests.integration.conftest import run_as_superuser
from tests.integration.served import Served

ENTRIES = "/audit/v1/entries"
SEARCH = f"{ENTRIES}/search"
FROM = "2026-01-01T00:00:00Z"
PICTURE = encode(photo(8, 8), "PNG")


@pytest.fixture(scope="module")
def judges_images() -> bool:
    return True


@dataclass(frozen=True)
class Audited:
    """A tenant with an auditor of its own."""

    house: House
    auditor: httpx.Client
    service: Served

    def rerank(self, query: object, *documents: object) -> str:
        """The receipt of a rerank."""
        answer = self.service.rerank({"query": query, "documents": list(documents)}, self.house.search)
        assert answer.status_code == 200, answer.text
        return answer.headers["Pericarp-Receipt"]


@pytest.fixture(scope="module")
def platform(service: Served) -> Iterator[httpx.Client]:
    with service.client() as client:
        yield client


@pytest.fixture(scope="module")
def overseer(service: Served, platform: httpx.Client) -> Iterator[httpx.Client]:
    """The platform's auditor: a platform administrator's key, of a tenant of its own, with the one scope."""
    house = build_house(service, platform)
    key = make_key(platform, house.id, role="platform_admin", scopes=["audit"])
    service.issued.append(key["key"])
    with service.client(key["key"]) as client:
        yield client


@pytest.fixture
def audited(service: Served, platform: httpx.Client) -> Iterator[Audited]:
    yield from audit(service, platform)


@pytest.fixture
def neighbour(service: Served, platform: httpx.Client) -> Iterator[Audited]:
    yield from audit(service, platform)


def audit(service: Served, platform: httpx.Client) -> Iterator[Audited]:
    house = build_house(service, platform, requests_per_minute=100_000, concurrent_requests=50)
    key = make_key(platform, house.id, role="auditor")["key"]
    service.issued.append(key)
    with service.client(key) as client:
        yield Audited(house, client, service)


def ids(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [entry["id"] for entry in answer.json()["data"]]


def walk(client: httpx.Client, **query: Any) -> list[dict[str, Any]]:
    """Every entry of every page."""
    listed: list[dict[str, Any]] = []
    cursor: dict[str, Any] = {}
    while True:
        told = client.get(ENTRIES, params={**query, **cursor}).json()
        listed += told["data"]
        if not told["has_more"]:
            assert told["next_cursor"] is None
            return listed
        cursor = {"cursor": told["next_cursor"]}


# -- entries ----------------------------------------------------------------------------------------------------


def test_an_auditor_reads_what_was_decided_and_of_whom(audited: Audited) -> None:
    receipt = audited.rerank("q", "a", "b")
    answer = audited.auditor.get(ENTRIES, params={"operation": "rerank"})
    (entry,) = answer.json()["data"]
    assert (entry["object"], entry["id"], entry["tenant"]) == ("entry", receipt, audited.house.id)
    assert (entry["body"]["key_id"], entry["body"]["document_count"]) == (audited.house.search_id, 2)
    assert audited.auditor.get(f"{ENTRIES}/{receipt}").json() == entry
    assert answer.headers["Cache-Control"] == "no-store"
    (kept,) = [each for each in audited.service.entries(audited.house.name) if each["id"] == receipt]
    assert kept["request_id"] == entry["body"]["request_id"]


def test_every_query_is_an_entry_of_who_asked_what_and_how_much_came(audited: Audited) -> None:
    audited.rerank("q", "a")
    before = len(audited.service.entries(audited.house.name))
    asked = (
        audited.auditor.get(ENTRIES, params={"operation": "rerank", "from": "2026-01-01T00:00:00+01:00"}),
        audited.auditor.get(f"{ENTRIES}/{audited.rerank('q', 'b')}"),
        audited.auditor.get("/audit/v1/counts", params={"risk_above": 0.5}),
        audited.auditor.get("/audit/v1/export", params={"operation": "rerank", "format": "csv"}),
        audited.auditor.post(SEARCH, json={"input": {"text": "q"}}),
    )
    assert [each.status_code for each in asked] == [200] * 5
    told = {each["id"]: each for each in audited.service.entries(audited.house.name)}
    assert len(told) == before + len(asked) + 1
    query, read, counts, export, search = (told[each.headers["Pericarp-Receipt"]] for each in asked)
    assert (query["operation"], query["decision"], query["role"]) == ("audit.query", "answered", "auditor")
    filters = {"operation": "rerank", "from": "2025-12-31T23:00:00+00:00"}
    assert query["details"] == {"filters": filters, "count": 1}
    assert query["client"] and query["request_id"] == asked[0].headers["X-Request-Id"]
    assert (read["operation"], read["details"]["count"]) == ("audit.read", 1)
    assert counts["details"] == {"filters": {"risk_above": 500_000}, "count": 0}
    assert (export["operation"], export["details"]["format"], export["details"]["count"]) == (
        *("audit.export", "csv"),
        2,
    )
    assert search["details"]["filters"] == {
        "input": "text",
        "fingerprint": asked[4].json()["fingerprint"],
    }


def test_a_refused_query_is_an_entry_too(audited: Audited) -> None:
    refused = audited.auditor.get(ENTRIES, params={"limit": 0})
    problem(refused, 422, "invalid_request")
    newest = audited.service.entries(audited.house.name)[0]
    assert newest["id"] == refused.headers["Pericarp-Receipt"]
    assert (newest["operation"], newest["decision"], newest["status"]) == ("audit.query", "refused", 422)


def test_what_cannot_be_told_is_not_answered(audited: Audited, superuser_url: str) -> None:
    change = "{} execute on function pericarp.append_entry(uuid, uuid, integer, bytea) {} pericarp_quota"
    asyncio.run(run_as_superuser(superuser_url, change.format("revoke", "from")))
    try:
        answers = [audited.auditor.get(path) for path in (ENTRIES, "/audit/v1/counts", "/audit/v1/export")]
    finally:
        asyncio.run(run_as_superuser(superuser_url, change.format("grant", "to")))
    assert [each.status_code for each in answers] == [503] * 3
    assert all("data" not in each.text for each in answers)


# -- whose ------------------------------------------------------------------------------------------------------


def test_an_auditor_never_sees_another_tenants_entries(audited: Audited, neighbour: Audited) -> None:
    receipt = audited.rerank("shared words", "a")
    neighbour.rerank("shared words", "b")
    request_id = audited.auditor.get(f"{ENTRIES}/{receipt}").json()["body"]["request_id"]
    theirs = neighbour.auditor
    assert {each["tenant"] for each in walk(theirs, limit=2)} == {neighbour.house.id}
    for filters in (
        {"request_id": request_id},
        {"actor": audited.house.search_id},
        {"fingerprint": fingerprint_of(audited, receipt)},
    ):
        assert ids(theirs.get(ENTRIES, params=filters)) == [], filters
    problem(theirs.get(f"{ENTRIES}/{receipt}"), 404, "entry_not_found")
    problem(theirs.get(f"{ENTRIES}/{secrets.token_hex(16)}"), 404, "entry_not_found")
    problem(theirs.get(f"{ENTRIES}/no-id"), 404, "entry_not_found")
    for path in (ENTRIES, "/audit/v1/counts", "/audit/v1/export", f"{ENTRIES}/{receipt}"):
        problem(theirs.get(path, params={"tenant": audited.house.id}), 404, "tenant_not_found")
    assert theirs.get(ENTRIES, params={"tenant": neighbour.house.id}).status_code == 200
    for form in ("jsonl", "csv", "ocsf"):
        export = theirs.get("/audit/v1/export", params={"format": form})
        assert receipt not in export.text and audited.house.id not in export.text
    shared = theirs.post(SEARCH, json={"input": {"text": "shared words"}})
    assert {each["tenant"] for each in shared.json()["data"]} == {neighbour.house.id}


def fingerprint_of(audited: Audited, receipt: str) -> str:
    body = audited.auditor.get(f"{ENTRIES}/{receipt}").json()["body"]
    fingerprint: str = body["query"]["text"]
    return fingerprint


def test_the_platforms_auditor_sees_every_tenant_and_that_is_told(
    audited: Audited, neighbour: Audited, overseer: httpx.Client, platform: httpx.Client
) -> None:
    receipts = {audited.rerank("seen by all", "a"), neighbour.rerank("seen by all", "b")}
    for client in (overseer, platform):
        found = client.post(SEARCH, json={"input": {"text": "seen by all"}, "limit": 1000})
        assert set(ids(found)) == receipts
        assert found.json()["fingerprint"] is None
    one = overseer.get(ENTRIES, params={"tenant": audited.house.id, "operation": "rerank"})
    assert len(ids(one)) == 1
    told = audited.service.entries(audited.house.name)[0]
    assert (told["id"], told["role"]) == (one.headers["Pericarp-Receipt"], "platform_admin")
    everyone = walk(overseer, limit=50, operation="rerank")
    assert receipts <= {each["id"] for each in everyone}
    at = [(each["recorded_at"], each["id"]) for each in everyone]
    assert at == sorted(at, reverse=True) and len(at) == len(set(at))
    assert overseer.get(f"{ENTRIES}/{min(receipts)}").status_code == 200
    problem(overseer.get(ENTRIES, params={"tenant": secrets.token_hex(16)}), 404, "tenant_not_found")
    total = overseer.get("/audit/v1/counts", params={"operation": "rerank"}).json()["total"]
    assert total == len(everyone)


def test_a_purged_tenants_log_is_still_there_for_the_platform(
    audited: Audited, overseer: httpx.Client, platform: httpx.Client
) -> None:
    receipt = audited.rerank("gone", "a")
    platform.delete(audited.house.path, params={"grace_days": 0})
    audited.service.wait(audited.service.desk.administration.purge_due())
    found = overseer.get(ENTRIES, params={"tenant": audited.house.id, "operation": "rerank"})
    assert ids(found) == [receipt]
    # Another gateway, which has not read the tenant's key while it was there.
    ask, platform_role = audited.service.desk.inquiry, "platform_admin"
    reach = audited.service.wait(ask.reach(platform_role, INSTALLATION, UUID(audited.house.id)))
    question = audited.service.wait(ask.question(reach, Filter(), Input(text="gone")))
    assert question.filters == [], "nothing ties an entry to a text any more"


def test_who_is_no_auditor_is_refused(service: Served, audited: Audited, platform: httpx.Client) -> None:
    with service.client(audited.house.admin) as admin:
        assert problem(admin.get(ENTRIES), 403, "forbidden")["reason"] == "role"
    with service.client(audited.house.search) as search:
        problem(search.get(ENTRIES), 401, "unauthenticated")
    narrow = make_key(platform, audited.house.id, role="auditor", scopes=["usage"])["key"]
    service.issued.append(narrow)
    with service.client(narrow) as client:
        for path in (ENTRIES, "/audit/v1/counts", "/audit/v1/export"):
            assert problem(client.get(path), 403, "forbidden")["reason"] == "scope"
    with service.client("") as stranger:
        problem(stranger.get(ENTRIES), 401, "unauthenticated")


def test_the_platforms_auditor_changes_nothing(overseer: httpx.Client, audited: Audited) -> None:
    for method, path, body in (
        ("POST", "/admin/v1/tenants", {"name": "unmade"}),
        ("GET", audited.house.path, None),
        ("GET", f"{audited.house.path}/keys", None),
        ("POST", f"{audited.house.path}/contain", {}),
        ("DELETE", audited.house.path, None),
    ):
        assert problem(overseer.request(method, path, json=body), 403, "forbidden")["reason"] == "scope", path
    with audited.service.client(audited.house.admin) as admin:
        keys = f"{audited.house.path}/keys"
        for handed_on in (
            {"role": "platform_admin", "scopes": ["audit"]},
            {"role": "auditor", "scopes": ["audit"]},
        ):
            assert admin.post(keys, json=handed_on).status_code == 422, handed_on


# -- inputs -----------------------------------------------------------------------------------------------------


def test_a_text_is_found_by_what_was_sent_and_by_nothing_near_it(audited: Audited) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Crème brûlée №1") for form in ("NFC", "NFD"))
    assert composed != decomposed
    first = audited.rerank(composed, "other")
    second = audited.rerank("x", "other", decomposed)
    audited.rerank("Crème brûlée", composed.upper(), composed + " ")

    def find(text: str) -> list[str]:
        return ids(audited.auditor.post(SEARCH, json={"input": {"text": text}}))

    assert find(composed) == find(decomposed) == [second, first]
    assert find("other") == [second, first]
    for near in (
        "crème brûlée №1",
        composed + "\n",
        "",
        "Creme brulee №1",
        unicodedata.normalize("NFKC", composed),
    ):
        assert find(near) == [], near


def test_an_image_is_found_by_its_bytes(audited: Audited) -> None:
    image = base64.b64encode(PICTURE).decode()
    receipt = audited.rerank("x", {"image": f"data:image/png;base64,{image}"}, "y")
    for form in (image, f"data:image/png;base64,{image}", f"data:image/jpeg;base64,{image}"):
        assert ids(audited.auditor.post(SEARCH, json={"input": {"image": form}})) == [receipt]
    other = base64.b64encode(PICTURE + b"\0").decode()
    assert ids(audited.auditor.post(SEARCH, json={"input": {"image": other}})) == []
    refused = audited.auditor.post(SEARCH, json={"input": {"image": "no base64!"}})
    assert problem(refused, 422, "invalid_request")["field"] == "input.image"


def test_an_input_leads_on_by_its_fingerprint(audited: Audited) -> None:
    receipts = [audited.rerank("again", "a"), audited.rerank("b", "again")]
    found = audited.auditor.post(SEARCH, json={"input": {"text": "again"}}).json()
    by_print = {"fingerprint": found["fingerprint"]}
    assert ids(audited.auditor.get(ENTRIES, params=by_print)) == receipts[::-1]
    assert audited.auditor.get("/audit/v1/counts", params=by_print).json()["total"] == 2
    assert audited.auditor.get("/audit/v1/export", params=by_print).headers["Pericarp-Count"] == "2"


def test_no_input_is_in_the_log_of_the_service_or_in_any_entry(
    audited: Audited, capfd: pytest.CaptureFixture[str]
) -> None:
    words = f"secret-{secrets.token_hex(8)}"
    audited.auditor.post(SEARCH, json={"input": {"text": words}})
    audited.auditor.post(SEARCH, json={"input": {"text": words}, "limit": words})
    audited.auditor.post(SEARCH, json={"input": words})
    assert words not in str(audited.service.entries(audited.house.name))
    captured = capfd.readouterr()
    assert words not in captured.out + captured.err


# -- filters ----------------------------------------------------------------------------------------------------


def test_a_moment_belongs_to_the_range_that_begins_with_it(audited: Audited) -> None:
    for number in range(3):
        audited.rerank("x", str(number))
    newest, middle, oldest = walk(audited.auditor, operation="rerank")
    query = {"operation": "rerank", "from": middle["recorded_at"]}
    assert ids(audited.auditor.get(ENTRIES, params=query)) == [newest["id"], middle["id"]]
    query = {"operation": "rerank", "to": middle["recorded_at"]}
    assert ids(audited.auditor.get(ENTRIES, params=query)) == [oldest["id"]]
    query = {"operation": "rerank", "from": middle["recorded_at"], "to": newest["recorded_at"]}
    assert ids(audited.auditor.get(ENTRIES, params=query)) == [middle["id"]]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"color": "red"}, "color"),
        ({"input": "a text"}, "input"),
        ({"from": "2026-02-02T00:00:00Z", "to": "2026-02-02T00:00:00Z"}, "to"),
        ({"from": "2026-02-03T00:00:00Z", "to": "2026-02-02T00:00:00Z"}, "to"),
        ({"from": "2026-02-02T00:00:00"}, "from"),
        ({"from": "yesterday"}, "from"),
        ({"from": "0001-01-01T00:00:00+14:00"}, "from"),
        ({"to": "9999-12-31T23:59:59-14:00"}, "to"),
        ({"decision": "perhaps"}, "decision"),
        ({"action": "delete"}, "action"),
        ({"category": "spam"}, "category"),
        ({"risk_above": "1"}, "risk_above"),
        ({"risk_above": "0.05"}, "risk_above"),
        ({"risk_above": "nan"}, "risk_above"),
        ({"request_id": "7"}, "request_id"),
        ({"tenant": "acme"}, "tenant"),
        ({"fingerprint": "short"}, "fingerprint"),
        ({"operation": "a\0b"}, "operation"),
        ({"session": ""}, "session"),
        ({"limit": "1001"}, "limit"),
        ({"cursor": "nonsense"}, "cursor"),
    ],
    ids=lambda each: str(each)[:24] if isinstance(each, str) else None,
)
def test_a_wrong_filter_is_named(audited: Audited, query: dict[str, str], field: str) -> None:
    assert problem(audited.auditor.get(ENTRIES, params=query), 422, "invalid_request")["field"] == field
    if field not in ("input",):
        body: dict[str, object] = {**query}
        assert problem(audited.auditor.post(SEARCH, json=body), 422, "invalid_request")["field"] == field


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"input": {}}, "input"),
        ({"input": {"text": "a", "image": "b"}}, "input"),
        ({"input": {"text": 7}}, "input.text"),
        ({"input": {"text": "a"}, "fingerprint": "A" * 43}, "input"),
        ({"query": "a"}, "query"),
    ],
    ids=["empty", "both", "number", "twice", "unknown"],
)
def test_a_wrong_search_is_named(audited: Audited, body: dict[str, object], field: str) -> None:
    assert field in faults_of(audited.auditor.post(SEARCH, json=body))


def faults_of(answer: httpx.Response) -> dict[str, str]:
    return faults(problem(answer, 422, "invalid_request"))


def test_the_last_days_are_those_before_now(audited: Audited) -> None:
    receipt = audited.rerank("x", "y")
    assert ids(audited.auditor.get(ENTRIES, params={"operation": "rerank", "last_days": 1})) == [receipt]
    long_ago: dict[str, Any] = {"operation": "rerank", "last_days": 1, "to": "2026-01-01T00:00:00Z"}
    assert ids(audited.auditor.get(ENTRIES, params=long_ago)) == []


def test_a_saved_search_stands_for_its_filters(audited: Audited, neighbour: Audited) -> None:
    receipt = audited.rerank("x", "y")
    auditor = audited.auditor
    saved = {"name": "reranks", "filters": {"operation": "rerank", "risk_above": 0.5, "last_days": 30}}
    made = auditor.post("/audit/v1/searches", json=saved)
    assert (made.status_code, made.headers["Location"]) == (201, "/audit/v1/searches/reranks")
    assert (made.json()["name"], made.json()["filters"]) == ("reranks", saved["filters"])
    assert auditor.get(made.headers["Location"]).json() == made.json()
    assert auditor.get("/audit/v1/searches").json()["data"] == [made.json()]
    told = audited.service.entries(audited.house.name)[0]
    assert (told["id"], told["operation"]) == (made.headers["Pericarp-Receipt"], "admin.search_save")
    assert told["details"]["filters"] == {"operation": "rerank", "risk_above": 500_000, "last_days": 30}
    assert ids(auditor.get(ENTRIES, params={"search": "reranks"})) == []
    problem(auditor.post("/audit/v1/searches", json=saved), 409, "search_exists")

    auditor.post("/audit/v1/searches", json={"name": "all", "filters": {"operation": "rerank", "from": FROM}})
    assert ids(auditor.get(ENTRIES, params={"search": "all"})) == [receipt]
    assert auditor.get("/audit/v1/counts", params={"search": "all"}).json()["total"] == 1
    assert auditor.get("/audit/v1/export", params={"search": "all"}).headers["Pericarp-Count"] == "1"
    assert ids(auditor.post(SEARCH, json={"search": "all", "input": {"text": "x"}})) == [receipt]
    assert ids(auditor.get(ENTRIES, params={"search": "all", "operation": "none"})) == []
    never = auditor.get(ENTRIES, params={"search": "all", "to": FROM})
    assert problem(never, 422, "invalid_request")["field"] == "to"
    cursor = auditor.get(ENTRIES, params={"search": "all", "operation": "audit.query", "limit": 1}).json()
    again = {"operation": "audit.query", "from": FROM, "cursor": cursor["next_cursor"]}
    assert auditor.get(ENTRIES, params=again).status_code == 200, "the same filters, in other words"

    theirs = neighbour.auditor
    for answer in (
        theirs.get(ENTRIES, params={"search": "all"}),
        theirs.get("/audit/v1/searches/all"),
        theirs.delete("/audit/v1/searches/all"),
        auditor.get("/audit/v1/searches/a%00b"),
    ):
        problem(answer, 404, "search_not_found")
    assert theirs.get("/audit/v1/searches").json()["data"] == []
    assert auditor.delete("/audit/v1/searches/all").status_code == 204
    problem(auditor.get(ENTRIES, params={"search": "all"}), 404, "search_not_found")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"filters": {}}, "name"),
        ({"name": "Not Good", "filters": {}}, "name"),
        ({"name": "a", "filters": {"color": "red"}}, "filters.color"),
        ({"name": "a", "filters": {"search": "other"}}, "filters.search"),
        ({"name": "a", "filters": {"last_days": 0}}, "filters.last_days"),
        ({"name": "a", "filters": {"from": FROM, "to": FROM}}, "filters.to"),
    ],
    ids=["no-name", "name", "unknown", "nested", "days", "range"],
)
def test_a_search_that_is_wrong_is_not_saved(audited: Audited, body: dict[str, object], field: str) -> None:
    assert field in faults_of(audited.auditor.post("/audit/v1/searches", json=body))
    assert audited.auditor.get("/audit/v1/searches").json()["data"] == []


# -- pages ------------------------------------------------------------------------------------------------------


def test_all_pages_are_the_list_while_more_is_decided(audited: Audited) -> None:
    listed = [audited.rerank("x", str(number)) for number in range(12)][::-1]
    stop = threading.Event()

    def go_on() -> None:
        while not stop.is_set():
            audited.rerank("x", "more")

    deciding = threading.Thread(target=go_on)
    deciding.start()
    try:
        walked = [each["id"] for each in walk(audited.auditor, operation="rerank", limit=5)]
    finally:
        stop.set()
        deciding.join()
    assert walked[-12:] == listed
    assert len(walked) == len(set(walked))


def test_a_cursor_is_good_for_its_own_log_and_filters(
    audited: Audited, neighbour: Audited, overseer: httpx.Client
) -> None:
    for who in (audited, neighbour):
        for number in range(3):
            who.rerank("same", str(number))
    query: dict[str, Any] = {"operation": "rerank", "limit": 1}
    cursor = audited.auditor.get(ENTRIES, params=query).json()["next_cursor"]
    again = {**query, "cursor": cursor}
    assert len(ids(audited.auditor.get(ENTRIES, params=again))) == 1
    assert len(ids(audited.auditor.get(ENTRIES, params={**again, "limit": 2}))) == 2, "a page may be longer"

    def reason(client: httpx.Client, **more: Any) -> str:
        told = problem(client.get(ENTRIES, params={**again, **more}), 422, "invalid_request")
        assert told["field"] == "cursor"
        return str(told["reason"])

    assert reason(neighbour.auditor) == "tenant"
    assert reason(overseer) == "tenant"
    assert reason(audited.auditor, operation="audit.query") == "filters"
    assert reason(audited.auditor, decision="answered") == "filters"
    search = {"input": {"text": "same"}, "limit": 1}
    found = audited.auditor.post(SEARCH, json=search).json()["next_cursor"]
    assert len(ids(audited.auditor.post(SEARCH, json={**search, "cursor": found}))) == 1
    other = audited.auditor.post(SEARCH, json={"input": {"text": "0"}, "cursor": found})
    assert problem(other, 422, "invalid_request")["reason"] == "filters"
    foreign = neighbour.auditor.post(SEARCH, json={**search, "cursor": found})
    assert problem(foreign, 422, "invalid_request")["reason"] == "tenant"


# -- exports ----------------------------------------------------------------------------------------------------


def test_json_lines_hold_the_bytes_of_the_log(audited: Audited) -> None:
    receipts = [audited.rerank("x", str(number)) for number in range(3)]
    export = audited.auditor.get("/audit/v1/export", params={"operation": "rerank"})
    assert (export.headers["Pericarp-Count"], export.headers["Content-Type"]) == ("3", "application/jsonl")
    lines = export.content.splitlines()
    assert [orjson.loads(line)["id"] for line in lines] == receipts[::-1]
    for line in lines:
        body = line[line.index(b'"body":') + 7 : -1]
        assert decode(body).operation == "rerank", "decode takes nothing but the very bytes"


def test_a_spreadsheet_computes_nothing_from_an_export(audited: Audited, platform: httpx.Client) -> None:
    audited.rerank("x", "y")
    export = audited.auditor.get("/audit/v1/export", params={"format": "csv"})
    rows = list(csv.DictReader(io.StringIO(export.text, newline="")))
    assert str(len(rows)) == export.headers["Pericarp-Count"]
    (row,) = [row for row in rows if row["operation"] == "rerank"]
    assert (row["decision"], row["status"], row["documents"]) == ("answered", "200", "1")
    for row in rows:
        assert not [cell for cell in row.values() if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]


def test_an_ocsf_event_has_a_fingerprint_that_can_be_checked(audited: Audited) -> None:
    receipt = audited.rerank("x", "y")
    audited.auditor.get(ENTRIES, params={"limit": 0})
    export = audited.auditor.get("/audit/v1/export", params={"format": "ocsf"})
    events = [orjson.loads(line) for line in export.content.splitlines()]
    assert len(events) == int(export.headers["Pericarp-Count"])
    for event in events:
        assert event["metadata"]["version"] == "1.9.0"
        assert (event["class_uid"], event["category_uid"]) == (6003, 6)
        assert event["type_uid"] == 600_300 + event["activity_id"]
        assert event["status_id"] == (1 if event["unmapped"]["body"]["decision"] == "answered" else 2)
        fingerprint = event["attestation_list"][0].pop("fingerprint")
        canonical = orjson.dumps(event, option=orjson.OPT_SORT_KEYS)
        assert fingerprint["value"] == hashlib.sha256(canonical).hexdigest()
    (event,) = [event for event in events if event["metadata"]["uid"] == receipt]
    assert event["api"]["operation"] == "rerank"
    assert event["metadata"]["tenant_uid"] == audited.house.id


def test_an_export_of_many_batches_holds_each_entry_once(audited: Audited) -> None:
    for _ in range(30):
        audited.auditor.get(ENTRIES, params={"limit": 0})
    batch, inquiry.BATCH = inquiry.BATCH, 7
    try:
        export = audited.auditor.get("/audit/v1/export", params={"operation": "audit.query"})
    finally:
        inquiry.BATCH = batch
    exported = [orjson.loads(line)["id"] for line in export.content.splitlines()]
    assert exported == [each["id"] for each in walk(audited.auditor, operation="audit.query")][-30:]


@pytest.mark.parametrize("form", ["parquet", "xml"])
def test_a_format_that_is_not_written_is_refused(audited: Audited, form: str) -> None:
    refused = audited.auditor.get("/audit/v1/export", params={"format": form})
    assert problem(refused, 422, "invalid_request")["field"] == "format"
