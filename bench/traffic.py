"""Traffic for the benches: clients that keep their connection and send one rerank after another, on this machine.

As little of HTTP/1.1 as that needs: on two cores, whatever a load generator costs is taken from the service.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

STAGES = ("parse", "hold", "clean", "score", "settle")
LEAST_REQUESTS = 5
"""So many count, whatever the time."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One answered request, in milliseconds."""

    wall_ms: float
    stages_ms: dict[str, float]

    @property
    def worker_ms(self) -> float:
        return self.stages_ms["worker"]

    @property
    def outside_ms(self) -> float:
        return self.wall_ms - self.worker_ms

    @property
    def unqueued_ms(self) -> float:
        return self.outside_ms - self.stages_ms["queue"]

    @property
    def gateway_ms(self) -> float:
        """What the gateway says that it took itself; authentication and transfer are not in it."""
        return (
            sum(self.stages_ms.get(stage, 0.0) for stage in STAGES) - self.stages_ms["queue"] - self.worker_ms
        )


@dataclass(frozen=True, slots=True)
class Target:
    """A service, and a search key of a generous tenant; or a peer's server, which is told a key as well.

    `neighbour` is a key of a second tenant, where one was asked for.
    """

    host: str
    port: int
    key: str
    neighbour: str | None = None


class Connection:
    """One client's connection. A refusal ends the bench with what the service said."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._head = (
            f"POST /v1/rerank HTTP/1.1\r\nHost: {target.host}:{target.port}\r\n"
            f"Authorization: Bearer {target.key}\r\nContent-Type: application/json\r\nContent-Length: "
        ).encode()

    async def open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(
            self._target.host, self._target.port, limit=1 << 20
        )

    async def post(self, body: bytes) -> Sample:
        message = b"%s%d\r\n\r\n%s" % (self._head, len(body), body)
        began = time.perf_counter()
        self._writer.write(message)
        await self._writer.drain()
        first, *lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        answer = await self._reader.readexactly(int(headers["content-length"]))
        wall_ms = (time.perf_counter() - began) * 1000
        status = first.split(" ")[1]
        if status != "200":
            raise SystemExit(f"{self._target.host}:{self._target.port} answered {status}: {_reason(answer)}")
        # Ours names its stages; a peer may say nothing.
        stages = (stage.strip().partition(";dur=") for stage in headers.get("server-timing", "").split(","))
        return Sample(wall_ms, {name: float(ms) for name, _, ms in stages if name})

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


def _reason(answer: bytes) -> str:
    """What a refusal says: of ours its code and detail, of a peer's the beginning."""
    try:
        problem = json.loads(answer)
        return f"{problem['code']}: {problem['detail']}"
    except (ValueError, KeyError, TypeError):
        return answer[:500].decode("utf-8", "replace")


async def load(
    target: Target,
    bodies: Sequence[bytes] | Iterator[bytes],
    *,
    clients: int,
    requests: int,
    until_s: float,
    told: Callable[[], object],
) -> tuple[list[Sample], float]:
    """Samples of at most `requests` requests, none begun after `until_s`, and the seconds that they took.

    `until_s` is on the clock of `time.monotonic`; `told` is called after each sample.

    A sequence of bodies is sent over and over. An iterator's are sent once each, and the bench ends where they run
    out: nothing that a server keeps of a body it has seen is measured then.

    Each client begins with a request that does not count, and goes on without a pause: the service closes idle
    connections. Counting starts once all have done so.
    """
    supply = bodies if isinstance(bodies, Iterator) else itertools.cycle(bodies)
    connections = [Connection(target) for _ in range(clients)]
    samples: list[Sample] = []
    cold = clients
    left = requests
    counted_s = time.perf_counter()

    def another() -> bytes:
        body = next(supply, None)
        if body is None:
            raise SystemExit(f"too few bodies for {requests} requests by {clients} clients")
        return body

    async def client(connection: Connection) -> None:
        nonlocal cold, left, counted_s
        await connection.post(another())
        cold -= 1
        if cold == 0:
            counted_s = time.perf_counter()
        while left and (time.monotonic() < until_s or len(samples) < LEAST_REQUESTS):
            counts = cold == 0
            left -= counts
            sample = await connection.post(another())
            if counts:
                samples.append(sample)
                told()

    try:
        for connection in connections:
            await connection.open()
        await asyncio.gather(*map(client, connections))
        return samples, time.perf_counter() - counted_s
    finally:
        for connection in connections:
            await connection.close()
