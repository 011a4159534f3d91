"""Places are given to tenants in turn, and none is lost, whoever gives up waiting."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from hypothesis import given, settings
from hypothesis import strategies as st

from service.screening.turns import Turns


async def test_tenants_take_turns_and_each_ones_oldest_comes_first() -> None:
    turns: Turns[int] = Turns()
    order: list[str] = []

    async def use(name: str) -> None:
        async with turns.turn(name[0]):
            order.append(name)
            await asyncio.sleep(0)

    waiting = [asyncio.create_task(use(name)) for name in ("a1", "a2", "a3", "a4", "b1", "b2", "c1")]
    await asyncio.sleep(0)
    turns.give(7)
    await asyncio.gather(*waiting)
    assert order == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]
    assert len(turns) == 1


@settings(max_examples=25, deadline=None)
@given(
    places=st.integers(1, 3),
    users=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4), st.integers(0, 8)), max_size=20),
)
def test_no_place_is_lost_or_shared(places: int, users: list[tuple[str, int, int]]) -> None:
    """Each holds its place for some steps of the loop, and some are cancelled after some others."""

    async def run() -> None:
        turns: Turns[int] = Turns()
        for place in range(places):
            turns.give(place)
        held: set[int] = set()

        async def use(tenant: str, steps: int) -> None:
            async with turns.turn(tenant) as place:
                assert place not in held
                held.add(place)
                try:
                    for _ in range(steps):
                        await asyncio.sleep(0)
                finally:
                    held.remove(place)

        async def use_for_a_while(tenant: str, steps: int, patience: int) -> None:
            task = asyncio.create_task(use(tenant, steps))
            for _ in range(patience):
                await asyncio.sleep(0)
            if patience % 2:
                task.cancel()
            with suppress(asyncio.CancelledError):
                await task

        await asyncio.gather(*(use_for_a_while(*user) for user in users))
        assert len(turns) == places and not held

    asyncio.run(run())
