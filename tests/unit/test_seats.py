"""The rules by which workers get jobs and give up their seats, over plain state."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from models import Item, Job, Pixels
from service.errors import Overloaded
from service.fleet.router import Ticket
from service.fleet.seats import Rules, Seat, Seating
from service.processes.children import Child

RULES = Rules(
    max_workers=3,
    spare_workers=1,
    idle_s=900.0,
    patience_s=5.0,
    queue_limit=4,
    keep_warm=(),
    jobs_at_once=3,
    pixel_bytes_at_once=3000,
)


def ticket(tenant: str, number: int = 1, *, arrived_s: float = 0.0, pixel_bytes: int = 0) -> Ticket:
    image = Pixels(pixel_bytes // 3, 1, bytes(pixel_bytes)) if pixel_bytes else None
    answer = asyncio.get_running_loop().create_future()
    made = Ticket(number, tenant, Job(Item("q"), (Item("c", image),)), 60.0, None, answer)
    made.arrived_s = arrived_s
    return made


def seat(tenant: str | None = None) -> Seat:
    """A live worker, as far as the rules look at it."""
    return Seat(cast(Child, SimpleNamespace(alive=True, pid=1)), tenant)


def seating(*seats: Seat, **changes: Any) -> Seating:
    made = Seating(replace(RULES, **changes))
    made.seats = list(seats)
    return made


async def test_a_worker_gets_jobs_in_the_order_of_their_line_until_it_has_no_room() -> None:
    acme = seat("acme")
    rows = seating(acme)
    waiting = [ticket("acme", number) for number in range(4)]
    for each in waiting:
        rows.join(each)
    assert rows.call(0.0) == [(acme, each) for each in waiting[:3]]
    assert rows.call(1.0) == []
    assert acme.finish(waiting[1], 2.0)
    assert rows.call(2.0) == [(acme, waiting[3])]
    assert acme.state(3.0).running == 3


async def test_pixels_at_one_worker_are_bounded_but_a_large_job_alone_is_not() -> None:
    acme = seat("acme")
    rows = seating(acme)
    large, small, smaller = (
        ticket("acme", number, pixel_bytes=size) for number, size in enumerate((9000, 1500, 1500))
    )
    for each in (large, small, smaller):
        rows.join(each)
    assert rows.call(0.0) == [(acme, large)]
    acme.finish(large, 1.0)
    assert rows.call(1.0) == [(acme, small), (acme, smaller)]
    rows.join(ticket("acme", pixel_bytes=3))
    assert rows.call(2.0) == []


async def test_a_job_whose_worker_died_is_alone_at_the_next_one() -> None:
    acme = seat("acme")
    rows = seating(acme)
    first, second, fresh = (ticket("acme", number) for number in range(3))
    rows.join(fresh)
    for each in (first, second):
        each.attempts = 1
    rows.line("acme").rejoin([first, second])
    for now, each in enumerate((first, second, fresh)):
        assert rows.call(now) == [(acme, each)]
        assert rows.call(now) == []
        acme.finish(each, now)


@pytest.mark.parametrize(("paces_s", "retry_after_s"), [((), 1), ((0.01,), 1), ((3.0,), 12), ((90.0,), 60)])
async def test_a_full_line_says_when_it_will_be_worked_off(
    paces_s: tuple[float, ...], retry_after_s: int
) -> None:
    acme = seat("acme")
    rows = seating(acme, jobs_at_once=1)
    for pace_s in paces_s:
        done = ticket("acme")
        acme.take(done, 100.0)
        acme.finish(done, 100.0 + pace_s)
    for number in range(5):
        rows.join(refused := ticket("acme", number))
    with pytest.raises(Overloaded) as told:
        refused.answer.result()
    assert (told.value.reason, told.value.retry_after_s) == ("queue_full", retry_after_s)


async def test_the_pace_counts_time_with_work_alone() -> None:
    acme = seat("acme")
    first, second, late = (ticket("acme", number) for number in range(3))
    acme.take(first, 0.0)
    acme.take(second, 0.5)
    acme.finish(first, 1.0)
    acme.finish(second, 2.0)
    assert acme.pace_s == pytest.approx(1.0)
    acme.take(late, 500.0)
    acme.finish(late, 501.0)
    assert acme.pace_s == pytest.approx(1.0)


async def test_who_waits_for_a_seat_empties_one_worker_and_after_as_long_again_a_second() -> None:
    seats = [seat(name) for name in "abc"]
    rows = seating(*seats, seat())
    for number, holder in enumerate(seats):
        holder.take(ticket(str(holder.tenant), number), 100.0 + number)
    rows.join(ticket("d", arrived_s=100.0))

    def called(now: float) -> set[str | None]:
        """Who still gets jobs; everybody asks for more, and later than d."""
        for holder in seats:
            rows.join(ticket(str(holder.tenant), arrived_s=now))
        return {holder.tenant for holder, _ in rows.call(now)}

    assert called(104.0) == {"a", "b", "c"}
    assert called(105.5) == {"b", "c"}, "nothing was sent to a for longest"
    assert rows.oldest_idle(106.0) is None, "but it has work yet"
    for each in list(seats[0].tickets):
        seats[0].finish(each, 106.0)
    assert rows.oldest_idle(106.0) is seats[0]
    seats[0].take(ticket("a"), 106.0)
    for holder in seats[1:]:
        holder.finish(holder.tickets[0], 106.0)
    assert len(called(110.5)) == 1


async def test_a_line_that_has_waited_longer_is_served_first_and_a_warm_worker_stays() -> None:
    old, warm = seat("old"), seat("warm")
    rows = seating(old, warm, seat(), max_workers=2, keep_warm=("warm",))
    rows.join(ticket("old", arrived_s=1.0))
    rows.join(ticket("d", arrived_s=2.0))
    rows.join(ticket("warm", arrived_s=3.0))
    assert {holder.tenant for holder, _ in rows.call(60.0)} == {"old", "warm"}


async def test_nobody_is_made_to_go_where_no_worker_could_take_the_seat() -> None:
    acme = seat("acme")
    rows = seating(acme, max_workers=1)  # its spare is yet to come
    rows.join(ticket("d", arrived_s=0.0))
    rows.join(ticket("acme", arrived_s=1.0))
    assert rows.oldest_idle(60.0) is None
    assert [holder for holder, _ in rows.call(60.0)] == [acme]


async def test_what_nobody_waits_for_is_dropped_but_not_by_a_worker_that_owes_an_answer_for_long() -> None:
    acme = seat("acme")
    first, second, third = (ticket("acme", number) for number in range(3))
    acme.take(first, 0.0)
    assert acme.drop(first, 10.0, doubt_s=30.0)
    assert not acme.drop(first, 10.0, doubt_s=30.0), "it is gone"
    acme.take(second, 31.0)
    assert not acme.drop(second, 32.0, doubt_s=30.0), "the worker has said nothing since 0.0"
    acme.finish(second, 33.0)
    acme.take(third, 100.0)
    assert acme.drop(third, 101.0, doubt_s=30.0)
    assert not acme.finish(third, 102.0), "its answer was on the way"
    assert acme.jobs == 1
