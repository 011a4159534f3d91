"""Who takes turns in bench/peers.py, and at what."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from bench.traffic import Target, load

CLIENTS = (1, 8)
TURN_S = 180.0
STOP_S = 20.0


@dataclass(frozen=True, slots=True)
class Work:
    """One case with one number of clients. `turns` holds bodies enough for each round, no two alike."""

    case: str
    documents: int
    clients: int
    requests: int
    turns: tuple[tuple[bytes, ...], ...]

    @property
    def name(self) -> str:
        return f"{self.case}, {self.clients} client{'s' * (self.clients > 1)}"


@dataclass(frozen=True, slots=True)
class Way:
    """How sentence-transformers may score."""

    dtype: str
    batch: int
    threads: int

    def __str__(self) -> str:
        return f"{self.dtype}, batches of {self.batch}, {self.threads} thread{'s' * (self.threads > 1)}"


WAYS = tuple(
    Way(dtype, batch, threads) for dtype in ("fp32", "bf16") for batch in (8, 16, 32) for threads in (1, 2)
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One peer's turn at one work: its rate, each request's milliseconds, and what it took of the cores."""

    documents_per_s: float
    walls_ms: tuple[float, ...]
    cpu_ms_per_document: float


@dataclass(frozen=True, slots=True)
class Answer:
    """Scores in the order of the documents, sigmoids; `prompt_tokens` where the peer counts them."""

    scores: tuple[float, ...]
    prompt_tokens: int | None


class Peer(Protocol):
    name: str
    clients: tuple[int, ...]
    """How many at a time it can serve, of what is asked here."""

    def ask(self, body: bytes) -> Answer: ...

    def take_turn(self, work: Work, round_number: int, seconds: float = TURN_S) -> Turn:
        """Begins no request after `seconds`."""


class Server:
    """A peer that speaks HTTP."""

    clients: tuple[int, ...] = CLIENTS

    def __init__(self, name: str, target: Target) -> None:
        self.name, self._target = name, target

    def ask(self, body: bytes) -> Answer:
        connection = http.client.HTTPConnection(self._target.host, self._target.port, timeout=TURN_S)
        headers = {"Authorization": f"Bearer {self._target.key}", "Content-Type": "application/json"}
        connection.request("POST", "/v1/rerank", body, headers)
        response = connection.getresponse()
        text = response.read()
        connection.close()
        if response.status != http.client.OK:
            raise SystemExit(f"{self.name} answered {response.status}: {text[:500].decode()}")
        answer = json.loads(text)
        scores = {result["index"]: result["relevance_score"] for result in answer["results"]}
        return Answer(tuple(scores[index] for index in range(len(scores))), answer["usage"]["prompt_tokens"])

    def take_turn(self, work: Work, round_number: int, seconds: float = TURN_S) -> Turn:
        bodies = work.turns[round_number]
        supply = iter(bodies)
        cpu_s = children_cpu_s()
        samples, taken_s = asyncio.run(
            load(
                self._target,
                supply,
                clients=work.clients,
                requests=work.requests,
                until_s=time.monotonic() + seconds,
                told=lambda: None,
            )
        )
        cpu_s = children_cpu_s() - cpu_s
        sent = len(bodies) - len(list(supply))  # more than the samples: the clients' first ones do not count
        return Turn(
            len(samples) * work.documents / taken_s,
            tuple(sample.wall_ms for sample in samples),
            1000 * cpu_s / (sent * work.documents),
        )


class CrossEncoder:
    """sentence-transformers in a process of its own, driven line by line; see bench/cross_encoder.py."""

    name: str = "sentence_transformers"
    clients: tuple[int, ...] = (1,)

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._best: dict[str, Way] = {}

    def choose(self, case: str, bodies: Sequence[bytes]) -> dict[str, Any]:
        """Try every way on the same bodies, and keep the fastest for `case`."""
        tried = {way: statistics.median(self._score(body, way)["ms"] for body in bodies) for way in WAYS}
        best = self._best[case] = min(tried, key=lambda way: tried[way])
        return {"best": str(best), "tried_ms": {str(way): round(ms, 1) for way, ms in tried.items()}}

    def ask(self, body: bytes) -> Answer:
        """Always in fp32: so near to the reference comes no other answer here."""
        return Answer(tuple(self._score(body, WAYS[0])["scores"]), None)

    def take_turn(self, work: Work, round_number: int, seconds: float = TURN_S) -> Turn:
        way = self._best[work.case]
        taken_ms: list[float] = []
        cpu_s = children_cpu_s()
        until_s = time.monotonic() + seconds
        for body in work.turns[round_number][: work.requests]:
            if taken_ms and time.monotonic() > until_s:
                break
            taken_ms.append(self._score(body, way)["ms"])
        cpu_s = children_cpu_s() - cpu_s
        documents = len(taken_ms) * work.documents
        return Turn(1000 * documents / sum(taken_ms), tuple(taken_ms), 1000 * cpu_s / documents)

    def _score(self, body: bytes, way: Way) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        ask = json.dumps({**asdict(way), "body": body.decode()})
        try:
            print(ask, file=self._process.stdin, flush=True)
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, ValueError):
            raise SystemExit("sentence-transformers ended; what it said is above") from None
        return answer


@contextlib.contextmanager
def cross_encoder(python: Path, checkpoint: Path, template: Path) -> Iterator[CrossEncoder]:
    process = subprocess.Popen(
        [python, Path(__file__).with_name("cross_encoder.py"), checkpoint, template],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    )
    try:
        assert process.stdin is not None and process.stdout is not None
        if not process.stdout.readline():
            raise SystemExit("sentence-transformers did not load the checkpoint; what it said is above")
        yield CrossEncoder(process)
        process.stdin.close()
        process.wait(STOP_S)
    finally:
        process.kill()
        process.wait()


def children_cpu_s() -> float:
    """Seconds of processor time of all processes below this one that are alive (Linux)."""
    children: dict[int, list[int]] = defaultdict(list)
    ticks: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended while we looked
            fields = path.read_text().rpartition(")")[2].split()  # proc(5): state ppid … utime(14) stime(15)
            children[int(fields[1])].append(int(path.parent.name))
            ticks[int(path.parent.name)] = int(fields[11]) + int(fields[12])
    total, below = 0, [os.getpid()]
    while below:
        found = children[below.pop()]
        total += sum(ticks[each] for each in found)
        below += found
    return total / os.sysconf("SC_CLK_TCK")
