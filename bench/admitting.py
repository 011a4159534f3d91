"""Gateways that only admit, as processes of their own, for `bench/admission.py`.

    python bench/admitting.py       the first line on stdin names the database and the tenants, each one after it a load

One line of JSON in, one out. The database's URL goes through a pipe, because it has a password in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tenants.access import Caller, Role, TenantId  # noqa: E402
from tenants.database import Database  # noqa: E402
from tenants.errors import DatabaseUnavailable  # noqa: E402
from tenants.policy import Policy  # noqa: E402
from tenants.quotas import Quotas  # noqa: E402

POLICY = Policy(
    requests_per_minute=1_000_000,
    images_per_minute=1_000_000,
    tokens_per_minute=60_000_000,
    requests_per_month=1_000_000_000,
    tokens_per_month=1_000_000_000_000,
    concurrent_requests=200,
)


@dataclass
class Gateway:
    """One process that admits."""

    process: subprocess.Popen[str]

    def begin(self, told: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(told) + "\n")
        self.process.stdin.flush()

    def end(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a gateway of the bench died")
        told: dict[str, Any] = json.loads(line)
        return told


@contextlib.contextmanager
def gateways(url: str, tenants: Sequence[str], count: int) -> Iterator[list[Gateway]]:
    started = [
        Gateway(
            subprocess.Popen(
                [sys.executable, str(Path(__file__))],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        for _ in range(count)
    ]
    try:
        for gateway in started:
            gateway.begin({"url": url, "tenants": list(tenants)})
        yield started
    finally:
        for gateway in started:
            gateway.process.terminate()
            gateway.process.wait()


def load(
    on: Sequence[Gateway], *, tenants: int, clients: int, seconds: float, most: int = 10**9
) -> tuple[list[float], int, float]:
    """Milliseconds of every hold, how many got no decision, and the seconds that all of it took."""
    share = clients // len(on)
    for gateway in on:
        gateway.begin(
            {"tenants": tenants, "clients": share, "seconds": seconds, "most": max(1, most // len(on))}
        )
    told = [gateway.end() for gateway in on]
    taken_ms = [ms for each in told for ms in each["taken_ms"]]
    return taken_ms, sum(each["failed"] for each in told), max(each["seconds"] for each in told)


async def decide_when_asked() -> None:
    """Be a gateway that only admits. The first line names the database, each one after it a load."""
    loop = asyncio.get_running_loop()
    first = json.loads(await loop.run_in_executor(None, sys.stdin.readline))
    database = Database(first["url"], call_pool_size=16)
    await database.open()
    quotas = Quotas(database)
    callers = [
        Caller(TenantId(uuid.UUID(tenant)), "bench", "bench", Role.SEARCH, POLICY)
        for tenant in first["tenants"]
    ]
    await quotas.extend_lease()
    beating = asyncio.create_task(_beat(quotas))
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await _decide(quotas, callers, **json.loads(line))), flush=True)
    beating.cancel()
    await database.close()


async def _beat(quotas: Quotas) -> None:
    while True:
        await quotas.extend_lease()
        await asyncio.sleep(quotas.beat_s)


async def _decide(
    quotas: Quotas, callers: Sequence[Caller], *, tenants: int, clients: int, seconds: float, most: int
) -> dict[str, Any]:
    """Hold and release for so long, and at most so often, as so many clients; milliseconds of each hold."""
    until_s = time.perf_counter() + seconds
    taken_ms: list[float] = []
    failed: list[Caller] = []
    began_s = time.perf_counter()

    async def client() -> None:
        while len(taken_ms) < most:
            caller = callers[0] if tenants == 1 else random.choice(callers[:tenants])
            asked_s = time.perf_counter()
            if asked_s >= until_s:
                return
            try:
                hold = await quotas.hold(caller, str(uuid.uuid4()), images=1, tokens=1_000)
                taken_ms.append((time.perf_counter() - asked_s) * 1000)
                await quotas.release(hold)
            except (
                DatabaseUnavailable
            ):  # a caller would get 503: the database was too slow for its own time limit
                failed.append(caller)

    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - began_s
    return {"taken_ms": [round(ms, 3) for ms in taken_ms], "failed": len(failed), "seconds": seconds}


if __name__ == "__main__":
    asyncio.run(decide_when_asked())
