"""What N workers of the embedded model hold in memory, each serving a tenant of its own that has scored a few jobs.

    sealed       as the fleet starts them: one copy of the weights, mapped by all (models/sealing.py)
    alone        each for itself: the weights' file mapped where it holds the dtype asked for, else a converted copy
    weightless   the same process and work without weights: the runtime's own footprint (bench/weightless.py)

Figures are sums of PSS over the workers, from /proc/PID/smaps: a page that k processes map counts 1/k for each, so
that the sum is what the workers hold together. `code` is what other files are mapped for, libraries above all: who
else on the machine uses the same ones changes it. Needs root where the workers are to be seen: they may not be dumped.

    python bench/memory.py [--quick] [--save]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.report import circumstances, close  # noqa: E402
from models import DEMO, Item, Job, ModelCard, Pixels  # noqa: E402
from service.fleet.messages import Assign, ScoreReply, ScoreRequest  # noqa: E402
from service.fleet.starts import FIRST_UID, STARTS_AT_ONCE, Starts, worker_launch  # noqa: E402
from service.processes.children import Child, start_child  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "memory.json"
WORKERS = (1, 2, 4, 8)
JOBS = 3
MIB = 1 << 20
SHARE = 0.15
"""Of the weights' bytes: the most that a further worker may hold beyond the runtime's own footprint."""
BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    dtype: str

    @property
    def worker(self) -> str:
        return "bench.weightless" if self.name == "weightless" else "service.fleet.worker"


@dataclass(frozen=True, slots=True)
class Footprint:
    """Sums of PSS over `workers` processes, in MiB, by what is mapped."""

    workers: int
    total_mib: float
    weights_mib: float
    code_mib: float
    own_mib: float

    @classmethod
    def of(cls, pids: Sequence[int]) -> Footprint:
        sums = sum((read_pss(pid) for pid in pids), Counter[str]())
        mib = {kind: sums[kind] / MIB for kind in ("weights", "code", "own")}
        return cls(len(pids), sum(mib.values()), mib["weights"], mib["code"], mib["own"])


def read_pss(pid: int) -> Counter[str]:
    """Bytes of PSS of one process, by kind of mapping."""
    sums: Counter[str] = Counter()
    kind = "own"
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, *rest = line.split(maxsplit=5)
        if not name.endswith(":"):
            path = rest[4] if rest[4:] else ""
            if path.startswith("/memfd:weights") or path.endswith(".safetensors"):
                kind = "weights"
            else:
                kind = "code" if path.startswith("/") else "own"
        elif name == "Pss:":
            sums[kind] += int(rest[0]) * 1024
    return sums


def make_jobs() -> list[Job]:
    rng = random.Random(7)
    words = ("red", "shoe", "price", "wooden", "table", "鞋", "红色", "2024", "near", "water")

    def text(count: int) -> str:
        return " ".join(rng.choice(words) for _ in range(count))

    def image() -> Pixels:
        return Pixels(224, 168, rng.randbytes(224 * 168 * 3))

    return [
        Job(
            Item(text(12), image()),
            tuple(Item(text(rng.randint(10, 60)), image() if at < 4 else None) for at in range(16)),
        )
        for _ in range(JOBS)
    ]


@asynccontextmanager
async def workers(case: Case) -> AsyncIterator[Workers]:
    """None yet; those that `grow` started end with the block."""
    launch = worker_launch(
        worker=case.worker,
        model=DEMO,
        device="cpu",
        dtype=case.dtype,
        threads=1,
        offline=True,
        start_s=300.0,
        silence_s=60.0,
        told=lambda line: print(line, file=sys.stderr),
    )
    starts = Starts(launch, first_uid=FIRST_UID)
    if case.name != "alone":
        starts.share()
    group = Workers(starts)
    try:
        yield group
    finally:
        await asyncio.gather(*(child.stop() for child in group.children))
        starts.unshare()


class Workers:
    """One tenant each, and each has scored `make_jobs`."""

    def __init__(self, starts: Starts) -> None:
        self.children: list[Child] = []
        self._starts = starts
        self._at_once = asyncio.Semaphore(STARTS_AT_ONCE)

    @property
    def card(self) -> ModelCard:
        card = self.children[0].hello.card
        assert card is not None
        return card

    async def grow(self, count: int) -> Footprint:
        missing = range(len(self.children), count)
        await asyncio.gather(*(self._add(f"{number:08}-tenant") for number in missing))
        return Footprint.of([child.pid for child in self.children])

    async def _add(self, tenant: str) -> None:
        async with self._at_once:
            child = await start_child(self._starts.begin())
            self.children.append(child)
            await child.tell(Assign(tenant))
            for number, job in enumerate(make_jobs(), start=1):
                deadline_s = asyncio.get_running_loop().time() + 300
                reply = await child.ask(ScoreRequest(number, tenant, job, deadline_s))
                if not isinstance(reply, ScoreReply):
                    raise RuntimeError(f"a worker gave no scores: {reply}")


async def measure(case: Case, counts: Sequence[int]) -> tuple[dict[str, Any], ModelCard]:
    async with workers(case) as group:
        footprints = [await group.grow(count) for count in counts]
        card = group.card
    first, last = footprints[0], footprints[-1]
    weights_mib = card.parameters * BYTES[card.dtype] / MIB

    def growth(kind: str) -> float:
        """Per further worker, in MiB."""
        grown: float = getattr(last, kind) - getattr(first, kind)
        return round(grown / (last.workers - first.workers), 2)

    figure = {
        "case": case.name,
        "dtype": card.dtype,
        "weights_mib": round(weights_mib, 2),
        "pss": [
            {key: round(value, 1) if key != "workers" else value for key, value in asdict(each).items()}
            for each in footprints
        ],
        "growth_per_worker_mib": growth("total_mib"),
        "growth_per_worker_without_code_mib": round(growth("weights_mib") + growth("own_mib"), 2),
    }
    print(f"{card.dtype} {case.name}: {figure['growth_per_worker_mib']} MiB a worker", file=sys.stderr)
    return figure, card


def compare(figures: Sequence[dict[str, Any]]) -> None:
    """Add to each figure its growth beyond the runtime's own, as a share of the weights' bytes.

    Code is left out: it is the same on both sides, but for what else is running.
    """
    key = "growth_per_worker_without_code_mib"
    runtime_mib = {each["dtype"]: each[key] for each in figures if each["case"] == "weightless"}
    for figure in figures:
        beyond_mib = figure[key] - runtime_mib[figure["dtype"]]
        figure["growth_beyond_runtime_of_weights"] = round(beyond_mib / figure["weights_mib"], 3)


def aims_of(figures: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """On what the fleet starts."""
    return [
        {
            "what": f"growth per worker beyond the runtime's own, of the weights' bytes, "
            f"{figure['pss'][-1]['workers']} workers, {figure['dtype']}",
            "aim": f"< {SHARE}",
            "measured": figure["growth_beyond_runtime_of_weights"],
            "ok": figure["growth_beyond_runtime_of_weights"] < SHARE,
        }
        for figure in figures
        if figure["case"] == "sealed"
    ]


async def run(*, quick: bool) -> tuple[list[dict[str, Any]], ModelCard]:
    counts = (WORKERS[0], WORKERS[-1]) if quick else WORKERS
    cases = [
        Case(name, dtype)
        for dtype in (("auto",) if quick else BYTES)
        for name in (("weightless", "sealed") if quick else ("weightless", "sealed", "alone"))
    ]
    measured = [await measure(case, counts) for case in cases]
    return [figure for figure, _ in measured], measured[0][1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="the default dtype, one and eight workers, within 50 s"
    )
    parser.add_argument("--save", action="store_true", help="keep a full run in bench/results/memory.json")
    options = parser.parse_args()
    if options.quick and options.save:
        parser.error("only full runs are saved")
    if sys.platform != "linux" or os.geteuid() != 0:
        parser.error("needs Linux, and root to look into the workers")
    figures, card = asyncio.run(run(quick=options.quick))
    compare(figures)
    aims = aims_of(figures)
    report = {
        **circumstances(
            "memory", ("torch", "transformers", "safetensors"), quick=options.quick, kernel=platform.release()
        ),
        "model": {"name": card.name, "digest": card.digest, "parameters": card.parameters},
        "jobs_per_worker": JOBS,
        "figures": figures,
        "aims": aims,
    }
    return close(report, RESULTS if options.save else None)


if __name__ == "__main__":
    raise SystemExit(main())
