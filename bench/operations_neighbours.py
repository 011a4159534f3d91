"""How much one tenant slows another: the second one's latency beside a noisy neighbour, over HTTP, with every check on.

The quiet tenant sends 8 new texts of 30 words every 50 ms or, where that takes longer, one request after another. It is
measured alone and beside each noise in turn, in short windows, alone first, so that what the machine does otherwise meets
both; a round's ratio is that of its two windows' 95th percentiles, and what is told is the median over the rounds. `nothing` is
the control: how far the ratio is from 1 without any noise. The noises come from a process of its own on the same machine,
whose share of the cores is theirs too; the neighbour's limits are far above its share.

    texts        12 clients of 64 documents of 100 words, without a pause
    images       12 clients of 4 new JPEGs of 1,024 x 1,024 pixels
    huge_images  4 clients of a new JPEG of 36 million pixels
    long_bodies  4 clients of 12 MB of text in 1,000 documents
    slow_bodies  300 connections that send a byte of their body a second
    headers      300 connections that never end their headers
    sessions     8 clients that open a session, ask in it and leave it open
    refused      12 clients that ask for more than their rate allows, without a pause

    python bench/operations_neighbours.py [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.report import circumstances, close  # noqa: E402
from bench.request import ENGLISH, console, own_service, spread  # noqa: E402
from bench.traffic import Connection, Target  # noqa: E402

AIM = 1.2
GAP_S = 0.05
ROUNDS, WINDOW_S = 5, 5.0
QUICK_ROUNDS, QUICK_WINDOW_S = 1, 1.6
CALM_S = 0.7
"""What a noise may leave behind, before the next window."""
FLOWING_S = 0.5
LIMITS: dict[str, object] = {
    "requests_per_minute": 1_000_000,
    "images_per_minute": 1_000_000,
    "tokens_per_minute": 60_000_000,
    "concurrent_requests": 64,
    "images_per_request": 100,
    "text_length": 20_000,
    "sessions": 1_000,
}
WORDS = ENGLISH.split()


def texts(count: int, words: int) -> Iterator[bytes]:
    """Bodies of `count` documents that were never sent before."""
    rng = random.Random()
    while True:
        documents = [" ".join(rng.choices(WORDS, k=words)) for _ in range(count)]
        yield json.dumps({"query": " ".join(rng.choices(WORDS, k=6)), "documents": documents}).encode()


def pictures(count: int, side: int) -> Iterator[bytes]:
    """Bodies of `count` JPEGs of equal size: one picture each, made new by a comment's bytes in its first scan line."""
    rng = np.random.default_rng()
    coarse = rng.integers(0, 255, (side // 64, side // 64, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((side, side))
    while True:
        documents = []
        for _ in range(count):
            image.paste(tuple(int(each) for each in rng.integers(0, 255, 3)), (0, 0, 64, 64))
            encoded = io.BytesIO()
            image.save(encoded, "JPEG", quality=70)
            documents.append({"image": base64.b64encode(encoded.getvalue()).decode()})
        yield json.dumps({"query": "what is shown", "documents": documents}).encode()


class Asking:
    """A connection that takes every answer, refusals too."""

    def __init__(self, target: Target) -> None:
        self._target = target

    async def open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(
            self._target.host, self._target.port, limit=1 << 24
        )

    async def send(self, path: str, body: bytes) -> bytes:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self._target.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode() + body)
        await self._writer.drain()
        answer = await self._reader.readuntil(b"\r\n\r\n")
        lines = answer.decode("latin-1").lower().split("\r\n")
        length = next(int(line[15:]) for line in lines if line.startswith("content-length:"))
        return await self._reader.readexactly(length)


def clients(count: int, bodies: Callable[[], Iterator[bytes]]) -> Callable[[Target], Awaitable[None]]:
    """A noise of so many clients. They share a hundred bodies at most, for making them would cost the cores."""

    async def ask(target: Target, supply: Iterator[bytes]) -> None:
        while True:
            asking = Asking(target)
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await asking.open()
                while True:
                    await asking.send("/v1/rerank", next(supply))
            await asyncio.sleep(0.01)  # it was turned away

    async def make(target: Target) -> None:
        made = itertools.islice(bodies(), 100)
        first = next(made)
        kept = [first, *itertools.islice(made, 99 if len(first) < 100_000 else 7)]
        await asyncio.gather(*(ask(target, itertools.cycle(kept)) for _ in range(count)))

    return make


async def hold_open(target: Target, beginning: str) -> None:
    """300 connections with that beginning of a request, and a byte a second; one that is closed is opened again."""

    async def one(delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(target.host, target.port)
                writer.write(beginning.encode())
                while not writer.is_closing():
                    await asyncio.sleep(1.0)
                    writer.write(b"x")
                    await writer.drain()
            await asyncio.sleep(0.05)

    await asyncio.gather(*(one(place / 600) for place in range(300)))


async def send_slowly(target: Target) -> None:
    head = f"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {target.key}\r\n"
    await hold_open(target, head + "Content-Type: application/json\r\nContent-Length: 1000000\r\n\r\n{")


async def never_end_headers(target: Target) -> None:
    await hold_open(target, f"POST /v1/rerank HTTP/1.1\r\nAuthorization: Bearer {target.key}\r\nX-A: b")


async def open_sessions(target: Target) -> None:
    supply = texts(8, 60)

    async def one() -> None:
        asking = Asking(target)
        await asking.open()
        while True:
            session = json.loads(await asking.send("/v1/sessions", b"{}"))["id"]
            body = json.loads(next(supply)) | {"session_id": session}
            await asking.send("/v1/rerank", json.dumps(body).encode())

    await asyncio.gather(*(one() for _ in range(8)))


async def nothing(_target: Target) -> None:
    await asyncio.sleep(3600)


NOISES: dict[str, Callable[[Target], Awaitable[None]]] = {
    "nothing": nothing,
    "texts": clients(12, lambda: texts(64, 100)),
    "images": clients(12, lambda: pictures(4, 1024)),
    "huge_images": clients(4, lambda: pictures(1, 6016)),
    "long_bodies": clients(4, lambda: texts(1000, 2_000)),
    "slow_bodies": send_slowly,
    "headers": never_end_headers,
    "sessions": open_sessions,
    "refused": clients(12, lambda: texts(1, 4)),
}


@contextmanager
def noise(name: str, target: Target) -> Iterator[None]:
    """That noise, from a process of its own."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--noise", name, str(target.host), str(target.port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(f"{target.neighbour}\n")  # not where every process could read it
        process.stdin.flush()
        if process.stdout.readline() != "loud\n":
            raise SystemExit(f"the noise {name} did not begin")
        yield
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


async def be_loud(name: str, target: Target) -> None:
    running = asyncio.ensure_future(NOISES[name](target))
    await asyncio.wait({running}, timeout=FLOWING_S)
    print("loud", flush=True)
    await running


async def window(target: Target, bodies: Iterator[bytes], seconds: float) -> list[float]:
    """Milliseconds of the quiet tenant's requests, of so many seconds, ten requests at the least."""
    connection = Connection(target)
    await connection.open()
    try:
        walls: list[float] = []
        await connection.post(next(bodies))
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s or len(walls) < 10:
            sample = await connection.post(next(bodies))
            walls.append(sample.wall_ms)
            await asyncio.sleep(max(0.0, GAP_S - sample.wall_ms / 1000))
        return walls
    finally:
        await connection.close()


def p95(walls: list[float]) -> float:
    return sorted(walls)[math.ceil(0.95 * len(walls)) - 1]


def compare(target: Target, *, quick: bool, names: tuple[str, ...] = tuple(NOISES)) -> dict[str, Any]:
    """For each noise: the quiet tenant's latencies alone and beside it, and the median ratio of the p95s."""
    rounds, seconds = (QUICK_ROUNDS, QUICK_WINDOW_S) if quick else (ROUNDS, WINDOW_S)
    bodies = texts(8, 30)
    alone: dict[str, list[list[float]]] = {name: [] for name in names}
    beside: dict[str, list[list[float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            alone[name].append(asyncio.run(window(target, bodies, seconds)))
            with noise(name, target):
                beside[name].append(asyncio.run(window(target, bodies, seconds)))
            time.sleep(CALM_S)
            console.print(f"{name}: {p95(alone[name][-1]):.0f} -> {p95(beside[name][-1]):.0f} ms")
    return {
        name: {
            "p95_ratio": round(
                statistics.median(
                    p95(loud) / p95(still) for still, loud in zip(alone[name], beside[name], strict=True)
                ),
                2,
            ),
            "alone_ms": spread([*itertools.chain(*alone[name])]),
            "beside_ms": spread([*itertools.chain(*beside[name])]),
            "requests": sum(map(len, beside[name])),
        }
        for name in names
    }


def warm_up(target: Target) -> None:
    """Both tenants have their worker, and the spare behind them is ready."""
    assert target.neighbour is not None
    for key in (target.key, target.neighbour):
        asyncio.run(window(Target(target.host, target.port, key), texts(8, 30), 1.0))
    time.sleep(1.0)
    end_s = time.monotonic() + 120
    while os.getloadavg()[0] > 3 * len(os.sched_getaffinity(0)) and time.monotonic() < end_s:
        time.sleep(1.0)


def measure(quick: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The table, and whether each neighbour slows another by at most a fifth at the 95th percentile."""
    return _measure(quick, tuple(NOISES), {})


def _measure(
    quick: bool, names: tuple[str, ...], settings: dict[str, str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    with own_service(neighbour=LIMITS, settings={"PERICARP_SPARE_WORKERS": "0", **settings}) as target:
        warm_up(target)
        table = compare(target, quick=quick, names=names)
    aims = [
        {
            "what": f"a quiet tenant's p95 beside a neighbour's {name}, over its p95 alone, median of rounds",
            "aim": f"<= {AIM:g}",
            "measured": row["p95_ratio"],
            "ok": row["p95_ratio"] <= AIM,
        }
        for name, row in table.items()
        if name != "nothing"
    ]
    return {"neighbours": table}, aims


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one short round of each")
    parser.add_argument("--only", action="append", choices=NOISES, help="only this noise; may be repeated")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting")
    parser.add_argument("--noise", nargs=3, metavar=("NAME", "HOST", "PORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.noise:
        name, host, port = options.noise
        asyncio.run(be_loud(name, Target(host, int(port), sys.stdin.readline().strip())))
        return 0
    load_before = round(os.getloadavg()[0], 2)
    settings = dict(each.split("=", 1) for each in options.set)
    figures, aims = _measure(options.quick, tuple(options.only or NOISES), settings)
    report = {
        **circumstances("operations_neighbours", quick=options.quick, load_before=load_before),
        **figures,
        "aims": aims,
    }
    return close(report, None)


if __name__ == "__main__":
    raise SystemExit(main())
