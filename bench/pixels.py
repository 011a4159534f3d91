"""What it costs to take an image's pixels from a screening child: on the wire, or from the memory that it shares.

    chrt -i 0 python bench/pixels.py [--rounds N]

One child answers with the same pixels either way, in turn, on the loop that the gateway runs on. For each size: the median
time from question to pixels in the gateway's hands, and the time of its CPU, which other requests wait for.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import uvloop

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import Pixels  # noqa: E402
from service.processes.children import Launch, bare_environ, start_child  # noqa: E402
from service.processes.parent import Parent  # noqa: E402
from service.processes.shared_memory import Region, open_region  # noqa: E402
from service.processes.wire import COMMON, Hello, Vocabulary  # noqa: E402

SIDES = (224, 980)
"""A thumbnail's, and the largest square that a model is given."""


@dataclass(frozen=True, slots=True)
class Ask:
    id: int
    side: int
    shared: bool


@dataclass(frozen=True, slots=True)
class OnWire:
    id: int
    pixels: Pixels


@dataclass(frozen=True, slots=True)
class InMemory:
    id: int
    side: int


VOCABULARY = Vocabulary(*COMMON, Ask, OnWire, InMemory)


def be_child(arguments: list[str]) -> None:
    descriptor, parent_pid, shared = (int(argument) for argument in arguments)
    parent = Parent(descriptor, parent_pid, VOCABULARY, keep=[shared])
    region = open_region(shared)
    images = {side: Pixels(side, side, os.urandom(side * side * 3)) for side in SIDES}

    def answer(message: object) -> OnWire | InMemory:
        assert isinstance(message, Ask)
        pixels = images[message.side]
        if not message.shared:
            return OnWire(message.id, pixels)
        region[: len(pixels.data)] = pixels.data
        return InMemory(message.id, message.side)

    parent.send(Hello(os.getpid()))
    parent.serve(answer)


async def measure(rounds: int) -> None:
    region = Region(max(SIDES) ** 2 * 3)
    argv = (sys.executable, str(Path(__file__).resolve()), "--child", "{fd}", "{parent}", "{shared}")
    child = await start_child(Launch(argv, VOCABULARY, bare_environ(), shared=region.descriptor))

    async def from_wire(side: int) -> bytes:
        answer: OnWire = await child.ask(Ask(next(ids), side, False))
        return answer.pixels.data

    async def from_memory(side: int) -> bytes:
        answer: InMemory = await child.ask(Ask(next(ids), side, True))
        return region.take(answer.side**2 * 3)

    ids = iter(range(1, 10**9))
    for side in SIDES:
        assert await from_wire(side) == await from_memory(side)
        spent = [(await _spend(from_wire, side), await _spend(from_memory, side)) for _ in range(rounds)]
        wire_ms, memory_ms, wire_cpu_ms, memory_cpu_ms = (
            statistics.median(each[way][what] for each in spent) for what in (0, 1) for way in (0, 1)
        )
        print(
            f"{side}²: wire {wire_ms:.2f} ms, memory {memory_ms:.2f} ms, {wire_ms / memory_ms:.1f} times; of the gateway's"
            f" CPU {wire_cpu_ms:.2f} ms, {memory_cpu_ms:.2f} ms, {wire_cpu_ms / memory_cpu_ms:.1f} times"
        )
    await child.stop()
    region.close()


async def _spend(way: Callable[[int], Awaitable[bytes]], side: int) -> tuple[float, float]:
    """Milliseconds until the pixels are there, and of this process's CPU."""
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    await way(side)
    return (time.perf_counter() - start_s) * 1000, (time.process_time() - start_cpu_s) * 1000


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        be_child(sys.argv[2:])
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
        parser.add_argument("--rounds", type=int, default=300)
        uvloop.run(measure(parser.parse_args().rounds))
