"""What a gateway keeps of keys: never longer than its bound, counted from before it was read, and not past a change."""

from __future__ import annotations

import asyncio
from typing import Any

from tenants.kept import KEPT_S, Kept


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def reader(answers: list[Any], clock: Clock, takes_s: float = 0.0) -> Any:
    async def read() -> Any:
        clock.now += takes_s
        return answers.pop(0)

    return read


ASKED = ("key", "0123456789ab")


async def test_what_was_read_serves_until_its_age_is_the_bound_from_before_it_was_read() -> None:
    clock = Clock()
    kept: Kept[Any] = Kept(KEPT_S, clock)
    answers: list[Any] = [["first"], ["second"]]
    read = reader(answers, clock, takes_s=1.0)
    assert await kept.get(ASKED, read) == (["first"], 1.0)
    clock.now += 0.4
    rows, age_s = await kept.get(ASKED, read)
    assert rows == ["first"]
    assert 1.3 < age_s < KEPT_S < 2.0
    clock.now += 0.2
    assert (await kept.get(ASKED, read))[0] == ["second"]


async def test_unknown_ids_are_kept_like_known_ones() -> None:
    clock = Clock()
    kept: Kept[Any] = Kept(KEPT_S, clock)
    answers: list[Any] = [[], ["made meanwhile"]]
    read = reader(answers, clock)
    assert (await kept.get(ASKED, read))[0] == []
    assert (await kept.get(ASKED, read))[0] == []
    clock.now += KEPT_S
    assert (await kept.get(ASKED, read))[0] == ["made meanwhile"]


async def test_a_change_during_a_read_is_not_kept_over() -> None:
    clock = Clock()
    kept: Kept[Any] = Kept(KEPT_S, clock)
    reading, told = asyncio.Event(), asyncio.Event()

    async def slow() -> Any:
        reading.set()
        await told.wait()
        return ["before the change"]

    first = asyncio.create_task(kept.get(ASKED, slow))
    await reading.wait()
    kept.drop(lambda asked, _rows: asked == ASKED)
    told.set()
    assert (await first)[0] == ["before the change"]
    assert (await kept.get(ASKED, reader([["after it"]], clock)))[0] == ["after it"]


async def test_only_so_many_are_kept() -> None:
    clock = Clock()
    kept: Kept[Any] = Kept(KEPT_S, clock)
    for number in range(10_050):
        await kept.get(("key", str(number)), reader([[number]], clock))
    assert len(kept._found) == 10_000


async def test_without_a_time_nothing_is_kept() -> None:
    clock = Clock()
    kept: Kept[Any] = Kept(0.0, clock)
    read = reader([["first"], ["second"]], clock)
    assert (await kept.get(ASKED, read))[0] == ["first"]
    assert (await kept.get(ASKED, read))[0] == ["second"]
