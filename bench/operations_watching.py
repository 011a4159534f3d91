"""What watching costs: metrics and the service's own log, by request and by scrape.

A gateway with every check on, before a worker that computes nothing, answers one request after another, in short windows with
and without: in those without, everything that counts, observes or logs does nothing. The two alternate, and which of a pair
comes first alternates too, so that what the machine does otherwise meets both. What is told is the median over the pairs.

    cpu     CPU time of the gateway's process, all its threads together (schedstat): what watching takes of the cores
    wall    from the first byte sent to the last one received, the window's median: what a caller waits

And of one scrape: how long the exposition is, and how long writing it takes, when 20 tenants have asked, and when 1,000 have.

    python bench/operations_watching.py [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.report import circumstances, close  # noqa: E402
from bench.request import own_service  # noqa: E402
from bench.traffic import Connection, Target  # noqa: E402

AIM_MS = 0.3
PAIRS, WINDOW = 200, 10
QUICK_PAIRS, QUICK_WINDOW = 50, 6
TENANTS = (20, 1_000)
RENDERS, CALLS = 20, 2_000
PID_FILE, LOG_FILE = "BENCH_PID_FILE", "BENCH_LOG_FILE"
SWITCH = {True: signal.SIGUSR1, False: signal.SIGUSR2}
BODY = json.dumps({"query": "red fruit", "documents": [f"document {number}" for number in range(8)]}).encode()


class Silence:
    """A log that says nothing, and a function that does nothing."""

    def __getattr__(self, _name: str) -> Silence:
        return self

    def __call__(self, *_arguments: object, **_named: object) -> Silence:
        return self


class Watch:
    """All that watches requests in this process, to be switched off and on again."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        from service.watch import metrics

        silence = Silence()
        places: list[tuple[Any, str]] = [
            (metrics, name) for name in vars(metrics) if name.startswith("note_")
        ]
        places += [(kind, name) for kind in (Counter, Gauge, Histogram) for name in ("inc", "set", "observe")]
        places += [
            (module, "log")
            for name, module in sorted(sys.modules.items())
            if name.startswith("service.") and hasattr(module, "log")
        ]
        self._places = [
            (where, name, getattr(where, name), silence) for where, name in places if hasattr(where, name)
        ]

    def switch(self, *, on: bool) -> None:
        """Restore what watches, or put silence in its place."""
        for where, name, watching, silence in self._places:
            setattr(where, name, watching if on else silence)


def serve() -> None:
    """The gateway that is measured: `bench.echo`'s, which two signals switch."""
    os.dup2(os.open(os.environ[LOG_FILE], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    from bench import echo
    from service import serving

    assert serving  # loaded now: `Watch` looks at what is
    watch = Watch()
    for on, number in SWITCH.items():
        signal.signal(number, lambda *_, on=on: watch.switch(on=on))
    Path(os.environ[PID_FILE]).write_text(str(os.getpid()))
    echo.serve([])


def cpu_ns(pid: int) -> int:
    """CPU time of a process's threads so far (proc(5), `schedstat`: its first number)."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads)


async def window(connection: Connection, pid: int, requests: int, *, on: bool) -> tuple[float, float]:
    """CPU and median wall time of a request, in milliseconds, with or without a watch."""
    os.kill(pid, SWITCH[on])
    await connection.post(BODY)  # the switch is thrown before it is answered
    before = cpu_ns(pid)
    walls = [(await connection.post(BODY)).wall_ms for _ in range(requests)]
    return (cpu_ns(pid) - before) / 1e6 / requests, statistics.median(walls)


async def compare(target: Target, pid: int, pairs: int, requests: int) -> dict[str, Any]:
    """The windows' medians, and those of the differences within pairs."""
    connection = Connection(target)
    await connection.open()
    for _ in range(requests):
        await connection.post(BODY)
    told: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for pair in range(pairs):
        for on in (True, False) if pair % 2 else (False, True):
            told[on].append(await window(connection, pid, requests, on=on))
    await connection.close()
    figures: dict[str, Any] = {"pairs": pairs, "requests_per_window": requests}
    for place, name in enumerate(("cpu_ms", "wall_ms")):
        with_, without = ([each[place] for each in told[on]] for on in (True, False))
        added = sorted(one - other for one, other in zip(with_, without, strict=True))
        figures[name] = {
            "watched": round(statistics.median(with_), 3),
            "unwatched": round(statistics.median(without), 3),
            "added": round(statistics.median(added), 3),
            "added_quartiles": [round(added[len(added) // 4], 3), round(added[3 * len(added) // 4], 3)],
        }
    return figures


def scrapes() -> list[dict[str, Any]]:
    """How long the exposition is, and how long it takes to be written, by how many tenants have asked."""
    from service.watch import metrics

    figures, asked = [], 0
    for tenants in TENANTS:
        for number in range(asked, tenants):
            for status in (200, 429, 503):
                metrics.note_request("/v1/rerank", status, 0.02, f"tenant-{number}", searches=True)
            metrics.note_images(f"tenant-{number}", 1)
            metrics.note_tokens(f"tenant-{number}", charged=100, images=50, computed=60)
        asked = tenants
        took_ms = []
        for _ in range(RENDERS):
            began_s = time.thread_time()
            text = metrics.render()
            took_ms.append((time.thread_time() - began_s) * 1000)
        figures.append(
            {
                "tenants": tenants,
                "lines": len(text.splitlines()),
                "bytes": len(text),
                "render_ms": round(statistics.median(took_ms), 2),
            }
        )
    return figures


def calls_us() -> float:
    """What the calls take that count one rerank request, without a log line, in microseconds."""
    from service.watch import metrics

    stages_ms = dict.fromkeys(
        ("parse", "hold", "clean", "score", "settle", "queue", "worker", "session"), 1.5
    )
    began_s = time.thread_time()
    for _ in range(CALLS):
        metrics.note_kept("text_findings", hits=1, misses=8)
        metrics.note_stages(stages_ms)
        metrics.DOCUMENTS.inc(8)
        metrics.note_images("tenant-0", 1)
        metrics.note_tokens("tenant-0", charged=100, images=50, computed=60)
        metrics.WORKER_RETRIES.inc(0)
        metrics.note_request("/v1/rerank", 200, 0.02, "tenant-0", searches=True)
    return round((time.thread_time() - began_s) / CALLS * 1e6, 1)


@contextlib.contextmanager
def watched_service() -> Iterator[tuple[Target, int, Path]]:
    """A service whose watch can be switched, the pid of its gateway, and its log."""
    with tempfile.TemporaryDirectory(prefix="pericarp-bench-watching-") as folder:
        pid_file = Path(folder) / "pid"
        settings = {
            "PERICARP_LOG_LEVEL": "info",
            PID_FILE: str(pid_file),
            LOG_FILE: str(Path(folder) / "log"),
        }
        with own_service("-m", "bench.operations_watching", settings=settings) as target:
            yield target, int(pid_file.read_text()), Path(folder) / "log"


def measure(quick: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures and aims."""
    pairs, requests = (QUICK_PAIRS, QUICK_WINDOW) if quick else (PAIRS, WINDOW)
    with watched_service() as (target, pid, log):
        request = asyncio.run(compare(target, pid, pairs, requests))
        told = log.read_text().count('"action": "request"')
    windows = pairs * requests
    if not windows <= told <= windows + requests + 3 * pairs:
        raise SystemExit(f"the watch was not switched: {told} lines of {windows} watched requests")
    few, many = scrape = scrapes()
    added = request["cpu_ms"]["added"]
    aims = [
        {
            "what": "metrics and log: CPU time of the gateway that they add to a request, median of pairs",
            "aim": f"<= {AIM_MS:g} ms",
            "measured": added,
            "ok": added <= AIM_MS,
        },
        {
            "what": "metrics: lines of the exposition when 1,000 tenants have asked, by those when 20 have",
            "aim": "<= 1.1",
            "measured": round(many["lines"] / few["lines"], 3),
            "ok": many["lines"] <= 1.1 * few["lines"],
        },
    ]
    return {"request": request, "metrics_calls_us": calls_us(), "scrape": scrape}, aims


def main() -> int:
    if sys.argv[1:] == ["serve"]:  # by `own_service`
        serve()
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer and shorter windows")
    options = parser.parse_args()
    load_before = round(os.getloadavg()[0], 2)
    figures, aims = measure(options.quick)
    head = circumstances(
        "operations_watching",
        ("prometheus-client", "structlog", "uvicorn"),
        quick=options.quick,
        load_before=load_before,
    )
    return close({**head, "figures": figures, "aims": aims}, None)


if __name__ == "__main__":
    raise SystemExit(main())
