"""Traffic that is made to move a threshold is seen; ordinary days are not held against a tenant."""

from __future__ import annotations

import random
from datetime import date, timedelta

from hypothesis import given
from hypothesis import strategies as st

from tenants.traffic import BINS, Alarm, Day, bin_of, has_baseline, look, stability

TODAY = date(2026, 11, 27)
rng = random.Random(6)


def make_day(ago: int, *, items: int = 2000, stopped: float = 0.08, high: float = 0.08) -> Day:
    """A day of traffic of which a share scores high and a share is stopped, by chance."""
    histogram = [0] * BINS
    for _ in range(items):
        histogram[bin_of(rng.betavariate(6, 3) if rng.random() < high else rng.betavariate(1, 9))] += 1
    return Day(
        TODAY - timedelta(days=ago),
        items,
        sum(rng.random() < stopped for _ in range(items)),
        tuple(histogram),
    )


ORDINARY = [make_day(ago) for ago in range(30, 1, -1)]
EVEN = [{20: 100}]


def test_ordinary_days_raise_no_alarm() -> None:
    assert has_baseline(ORDINARY, TODAY)
    alarms = [look([*ORDINARY, make_day(1), make_day(0, items=500)], EVEN, TODAY) for _ in range(20)]
    assert alarms.count(None) >= 18, "three sigmas leave one in four hundred"


def test_a_jump_of_what_is_stopped_is_an_alarm_in_both_directions() -> None:
    for share in (0.2, 0.01):
        assert look([*ORDINARY, make_day(0, stopped=share)], EVEN, TODAY) is Alarm.BLOCK_RATE
        assert look([*ORDINARY, make_day(1, stopped=share)], EVEN, TODAY) is Alarm.BLOCK_RATE
    assert look([*ORDINARY, make_day(0, items=99, stopped=0.5)], EVEN, TODAY) is None, "too few to say"


def test_scores_that_lie_elsewhere_are_an_alarm() -> None:
    assert look([*ORDINARY, make_day(0, high=0.4)], EVEN, TODAY) is Alarm.SCORES


def test_few_users_who_send_much_are_an_alarm() -> None:
    assert look([], [{10: 301, 1500: 1}], TODAY) is Alarm.FEW_USERS
    assert look([], [{10: 400}, {10: 301, 500: 2, 501: 1}], TODAY) is Alarm.FEW_USERS
    assert look([], [{10: 300, 100: 2}], TODAY) is None
    assert look([], [{10: 20, 1000: 1}], TODAY) is None, "one of 21 is not one in a hundred"
    assert look([], [{}, {}], TODAY) is None


def test_a_week_is_needed_to_know_what_is_ordinary() -> None:
    week = [make_day(ago) for ago in range(8, 1, -1)]
    assert has_baseline(week, TODAY) and not has_baseline(week[1:], TODAY)
    assert not has_baseline([make_day(1), make_day(0)] * 4, TODAY), "today and yesterday are what is tested"
    assert not has_baseline([make_day(ago, items=50) for ago in range(20, 1, -1)], TODAY)
    assert look([*week[1:], make_day(0, stopped=0.9)], EVEN, TODAY) is None


@given(st.lists(st.integers(0, 10_000), min_size=BINS, max_size=BINS), st.integers(1, 50))
def test_the_index_of_a_distribution_with_itself_is_nothing(histogram: list[int], times: int) -> None:
    assert stability(histogram, histogram) == 0
    assert stability(histogram, [count * times for count in histogram]) < 0.25 or sum(histogram) < 500
    assert stability(histogram, histogram[::-1]) >= 0


def test_the_index_is_the_one_of_the_books() -> None:
    before, now = [100_000, 200_000, 700_000], [200_000, 200_000, 600_000]
    assert abs(stability(before, now) - (0.1 * 0.693147 + 0.1 * 0.154151)) < 1e-4
