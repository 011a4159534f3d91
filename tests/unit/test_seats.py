"""The rules by which workers get jobs and give up their seats, over plain state."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from models import Item, Job, Pixels, Scores, Work
from service.errors import Contained, Overloaded
from service.fleet.messages import ScoreReply
from service.fleet.router import Party, Ticket
from service.fleet.seats import Rules, Seat, Seating, Stay
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


def ticket(
    tenant: str, number: int = 1, *, arrived_s: float = 0.0, pixel_bytes: int = 0, party: Party | None = None
) -> Ticket:
    image = Pixels(pixel_bytes // 3, 1, bytes(pixel_bytes)) if pixel_bytes else None
    answer = asyncio.get_running_loop().create_future()
    made = Ticket(
        number, tenant, party or Party(tenant), Job(Item("q"), (Item("c", image),)), 60.0, None, answer
    )
    made.arrived_s = arrived_s
    return made


def seat(of: str | Party | None = None, *, own_weights: bool = False) -> Seat:
    """A live worker, as far as the rules look at it."""
    party = Party(of, own_weights=own_weights) if isinstance(of, str) else of
    return Seat(cast(Child, SimpleNamespace(alive=True, pid=1)), party, own_weights)


def tenant_of(seat: Seat) -> str:
    assert seat.party is not None and seat.party.tenant is not None
    return seat.party.tenant


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
    rows.line(Party("acme")).rejoin([first, second])
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
        holder.take(ticket(tenant_of(holder), number), 100.0 + number)
    rows.join(ticket("d", arrived_s=100.0))

    def called(now: float) -> set[str]:
        """Who still gets jobs; everybody asks for more, and later than d."""
        for holder in seats:
            rows.join(ticket(tenant_of(holder), arrived_s=now))
        return {tenant_of(holder) for holder, _ in rows.call(now)}

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
    rows = seating(old, warm, seat(), max_workers=2, keep_warm=(Party("warm"),))
    rows.join(ticket("old", arrived_s=1.0))
    rows.join(ticket("d", arrived_s=2.0))
    rows.join(ticket("warm", arrived_s=3.0))
    assert {tenant_of(holder) for holder, _ in rows.call(60.0)} == {"old", "warm"}


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


POOL = Party(group="pool")


async def test_the_tenants_of_a_group_take_turns_and_none_fills_the_line_for_the_others() -> None:
    pool = seat(POOL)
    rows = seating(pool, jobs_at_once=1)
    eager = [ticket("eager", number, party=POOL) for number in range(5)]
    modest = [ticket("modest", number, party=POOL) for number in range(2)]
    for each in (*eager, *modest):
        rows.join(each)
    with pytest.raises(Overloaded):
        eager[4].answer.result()
    served = []
    for now in range(6):
        ((_, called),) = rows.call(float(now))
        served.append(called)
        pool.finish(called, now)
    assert served == [eager[0], modest[0], eager[1], modest[1], eager[2], eager[3]]
    assert {each.tenant: each.jobs for each in pool.state(9.0).tenants} == {"eager": 4, "modest": 2}


async def test_what_a_dead_worker_had_goes_first_and_then_the_turns_go_on() -> None:
    rows = seating(pool := seat(POOL), jobs_at_once=1)
    had = [ticket("b", 1, party=POOL), ticket("a", 2, party=POOL)]
    waiting = [ticket("a", 3, party=POOL), ticket("b", 4, party=POOL), ticket("c", 5, party=POOL)]
    for each in waiting:
        rows.join(each)
    rows.line(POOL).rejoin(had)
    assert len(rows.line(POOL)) == 5
    served = []
    for now in range(5):
        ((_, called),) = rows.call(float(now))
        served.append(called)
        pool.finish(called, now)
    assert served == [had[0], had[1], waiting[2], waiting[1], waiting[0]]


async def test_a_party_with_weights_of_its_own_never_gets_a_seat_that_maps_the_shared_ones() -> None:
    own = Party("acme", own_weights=True)
    shared, apart = seat(), seat(own_weights=True)
    rows = seating(shared, apart)
    rows.join(ticket("acme", party=own))
    assert rows.missing() == [own]
    assert (rows.spares(), rows.spares(own_weights=True)) == ([shared], [apart])
    assert rows.outdated(apart.used_s + 901.0) == [apart], "nobody keeps spares of that kind"


async def test_who_waits_for_weights_of_its_own_makes_room_although_nothing_is_loaded_yet() -> None:
    idle = seat("idle")
    rows = seating(idle, max_workers=1)
    rows.join(ticket("acme", party=Party("acme", own_weights=True)))
    assert rows.oldest_idle(9.0) is idle
    rows.failing.add(True)
    assert rows.oldest_idle(9.0) is None, "it could not be loaded anyway"


async def test_a_shared_worker_forgets_who_was_long_away_or_moved_but_never_who_has_work_there() -> None:
    pool, alone = seat(POOL), seat("moved")
    rows = seating(pool, alone, idle_s=100.0)
    for number, tenant in enumerate(("away", "moved", "busy", "fresh")):
        job = ticket(tenant, number, party=POOL)
        pool.take(job, 90.0 if tenant == "fresh" else 1.0)
        if tenant != "busy":
            pool.finish(job, 95.0 if tenant == "fresh" else 2.0)
    moved = ticket("moved", 9)
    alone.take(moved, 50.0)
    alone.finish(moved, 51.0)
    assert rows.leaving(60.0) == [(pool, "moved")]
    assert rows.leaving(150.0) == [(pool, "away"), (pool, "moved")]
    rows.join(ticket("away", 10, party=POOL))
    assert rows.leaving(150.0) == [(pool, "moved")]
    assert rows.homes("moved") == [pool, alone]


async def test_a_tenants_own_worker_goes_at_once_when_the_tenant_has_moved() -> None:
    own, pool = seat("acme"), seat(POOL)
    rows = seating(own, pool)
    for holder, party, now in ((own, None, 1.0), (pool, POOL, 5.0)):
        job = ticket("acme", party=party)
        holder.take(job, now)
        holder.finish(job, now + 1)
    assert rows.outdated(10.0) == [own]


async def test_an_expelled_tenant_has_no_worker_kept_warm_until_it_asks_again() -> None:
    acme, pool = Party("acme"), Party(group="pool")
    own, shared, other = seat(acme), seat(pool), seat("beta")
    shared.tenants = {
        "acme": Stay(0.0, 0.0),
        "gamma": Stay(0.0, 0.0),
    }  # it was pooled before it had a worker of its own
    rows = seating(own, shared, other, keep_warm=(acme, pool))
    mine, theirs = ticket("acme"), ticket("gamma", party=pool)
    rows.join(mine)
    rows.join(theirs)
    rows.call(0.0)
    assert rows.expel("acme") == [own, shared]
    assert isinstance(mine.answer.exception(), Contained)
    assert theirs.waits, "who only shares a worker goes on in another"
    rows.seats = [other]
    rows.forget_gone()
    assert rows.missing() == [pool]
    rows.join(ticket("acme", 2))
    assert set(rows.missing()) == {acme, pool}


def test_what_a_worker_did_is_counted_once_though_its_replies_overtake_each_other() -> None:
    acme = seat("acme")
    states = (Work(packs=1, images_seen=2), Work(packs=3, images_seen=5), Work(packs=2, images_seen=2))
    replies = [ScoreReply(number, Scores((), 0, 0, 0), 1.0, work=work) for number, work in enumerate(states)]
    grown = [acme.note(reply) for reply in (*replies, "not a reply")]
    assert grown == [states[0], Work(packs=2, images_seen=3), Work(), Work()]


def test_a_worker_cannot_take_back_what_it_did() -> None:
    acme = seat("acme")
    reply = ScoreReply(1, Scores((), 0, 0, 0), 1.0, work=Work(packs=-5, packed_tokens=7))
    assert acme.note(reply) == Work(packed_tokens=7)


async def test_the_longest_wait_is_that_of_whoever_came_first() -> None:
    rows = seating()
    assert rows.longest_wait_s(9.0) == 0.0
    for tenant, arrived_s in (("acme", 4.0), ("acme", 6.0), ("beta", 5.0)):
        rows.join(ticket(tenant, arrived_s=arrived_s))
    assert rows.longest_wait_s(9.0) == 5.0
