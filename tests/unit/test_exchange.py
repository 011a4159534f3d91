"""Work that is broken off when its caller hangs up, and only then."""

from __future__ import annotations

import asyncio

import pytest

from service.asks import Exchange
from service.errors import ClientClosed


def exchange() -> tuple[Exchange, asyncio.Event]:
    """One request, and the event by which its caller hangs up."""
    gone = asyncio.Event()
    made = Exchange("id", "address", "rerank")

    async def hung_up() -> None:
        await gone.wait()

    made.hung_up = hung_up
    return made, gone


async def test_work_ends_where_it_stands_when_the_caller_hangs_up() -> None:
    request, gone = exchange()
    asyncio.get_running_loop().call_later(0.01, gone.set)
    reached = []
    with pytest.raises(ClientClosed):
        async with request.while_connected():
            reached.append("began")
            await asyncio.sleep(30)
            reached.append("ended")
    assert reached == ["began"]


async def test_a_caller_who_was_gone_before_stops_the_work_at_its_first_pause() -> None:
    request, gone = exchange()
    gone.set()
    with pytest.raises(ClientClosed):
        async with request.while_connected():
            await asyncio.sleep(30)


async def test_what_follows_the_work_is_not_broken_off() -> None:
    """The caller hangs up in the very moment in which the work ends."""
    request, gone = exchange()
    async with request.while_connected():
        await asyncio.sleep(0)
        gone.set()
    for _ in range(5):
        await asyncio.sleep(0)


async def test_without_a_connection_to_watch_the_work_is_done() -> None:
    async with Exchange("id", "address", "rerank").while_connected():
        await asyncio.sleep(0)


async def test_errors_cancellation_and_deadlines_of_the_work_stay_what_they_are() -> None:
    request, _ = exchange()
    with pytest.raises(KeyError):
        async with request.while_connected():
            raise KeyError
    with pytest.raises(TimeoutError):
        async with request.while_connected(), asyncio.timeout(0.01):
            await asyncio.sleep(30)

    async def work() -> None:
        async with request.while_connected():
            await asyncio.sleep(30)

    task = asyncio.create_task(work())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_whatever_happens_at_the_same_time_the_task_is_not_left_cancelled_and_nobody_watches() -> None:
    request, gone = exchange()
    gone.set()
    with pytest.raises((ClientClosed, TimeoutError)):
        async with request.while_connected(), asyncio.timeout(0):
            await asyncio.sleep(30)
    task = asyncio.current_task()
    assert task is not None and task.cancelling() == 0
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {task}
