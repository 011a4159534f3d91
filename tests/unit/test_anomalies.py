"""What is ordinary is learnt, what is odd is told, and nothing of it grows without bound."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from ipaddress import ip_network
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.watch.anomalies import (
    DRIFT,
    HISTORY_S,
    HISTORY_USES,
    NETWORK,
    PROBING,
    RATE,
    REFUSALS,
    RISK,
    TOLD,
    Anomalies,
    Anomaly,
    Limits,
    Observation,
)
from service.watch.baselines import (
    BUCKET_S,
    LEARNING,
    MINUTE,
    MOST_NETWORKS,
    WINDOW,
    Drift,
    Finding,
    Networks,
    Rate,
    Shapes,
    sketch,
)
from tenants.access import TenantId

DAY = 8_640
"""Buckets."""
ACME = TenantId(UUID(int=1))
HERE, THERE = "198.51.100.7", "203.0.113.9"


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def anomalies(clock: Clock) -> Anomalies:
    return Anomalies(Limits(), clock=clock)


def of_key(**fields: object) -> Observation:
    seen = Observation(address=HERE, tenant="acme", tenant_id=ACME, key_id="k1")
    for name, value in fields.items():
        setattr(seen, name, value)
    return seen


def play(
    anomalies: Anomalies, clock: Clock, seconds: int, per_s: float, make: Callable[[int], Observation]
) -> list[Anomaly]:
    """Evenly spaced requests."""
    found = []
    for number in range(int(seconds * per_s)):
        found += anomalies.observe(make(number))
        clock.now_s += 1 / per_s
    return found


def names(found: list[Anomaly]) -> set[str]:
    return {each.name for each in found}


def replay(counts: np.ndarray, least: float = 1) -> list[tuple[int, Finding]]:
    """What a rate finds in buckets of so many events, once it has learnt."""
    rate, found = Rate(), []
    for bucket, count in enumerate(counts.tolist()):
        if not count:
            continue
        finding = rate.note(bucket * BUCKET_S, least, times=count)
        if finding and bucket >= LEARNING:
            found.append((bucket, finding))
    return found


# -- what is ordinary ---------------------------------------------------------------------------------------------


def traffic(kind: str, per_s: float, buckets: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mean = per_s * BUCKET_S * np.ones(buckets)
    if kind != "quiet":
        mean *= 1 + 0.8 * np.sin(2 * np.pi * np.arange(buckets) / DAY)
    if kind == "bursty":  # a negative binomial: its variance is its mean and half its square
        mean = mean * rng.gamma(2, 0.5, buckets)
    return rng.poisson(mean)


@pytest.mark.parametrize("per_s", [0.05, 0.5, 5.0])
@pytest.mark.parametrize("kind", ["quiet", "diurnal", "bursty"])
def test_ordinary_traffic_of_a_day_confirms_nothing(kind: str, per_s: float) -> None:
    found = replay(traffic(kind, per_s, DAY, seed=7))
    assert [each for each in found if each[1] is Finding.CONFIRMED] == []
    assert len(found) <= (12 if kind == "bursty" else 2)


@pytest.mark.parametrize(
    ("kind", "per_s"), [("quiet", 0.5), ("quiet", 5.0), ("diurnal", 2.0), ("bursty", 2.0)]
)
def test_five_times_as_much_is_found_and_confirmed(kind: str, per_s: float) -> None:
    counts = traffic(kind, per_s, 1_060, seed=3)
    counts[1_000:] *= 5
    found = [(bucket - 1_000, finding) for bucket, finding in replay(counts) if bucket >= 1_000]
    assert found[0][0] <= 3
    assert any(finding is Finding.CONFIRMED and bucket <= 8 for bucket, finding in found)


@settings(max_examples=15, deadline=None)
@given(
    per_bucket=st.floats(0.5, 60),
    seed=st.integers(0, 2**20),
    times=st.floats(8, 40),
)
def test_however_much_is_ordinary_many_times_more_of_it_is_odd(
    per_bucket: float, seed: int, times: float
) -> None:
    rng = np.random.default_rng(seed)
    before = rng.poisson(per_bucket, 300)
    during = rng.poisson(max(per_bucket * times, 12), 6)
    found = replay(np.concatenate([before, during]))
    assert any(bucket >= 300 for bucket, _ in found)


def test_an_attack_teaches_little() -> None:
    rate = Rate()
    for _ in range(200):
        rate.learn(10)
    ordinary = rate.most
    for _ in range(6):
        rate.learn(100_000)
    assert rate.most < 1.5 * ordinary


def test_who_sleeps_at_night_is_not_new_each_morning() -> None:
    day, night = np.full(300, 50), np.zeros(DAY // 2, dtype=int)
    assert replay(np.concatenate([day, night, day])) == []


def test_a_bucket_is_told_once_and_the_minute_counts() -> None:
    rate = Rate()
    found = [rate.note(number / 100, 100) for number in range(150)]  # 1.5 s
    assert [bool(each) for each in found].index(True) == 99
    assert sum(map(bool, found)) == 1
    assert rate.minute == 150
    rate.move(59.0)
    assert rate.minute == 150
    rate.move(60.0)
    assert rate.minute == 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 90), max_size=60))
def test_the_last_minute_is_what_a_list_of_times_says(gaps_s: list[float]) -> None:
    rate, now_s, times = Rate(), 0.0, []
    for gap_s in gaps_s:
        now_s += gap_s
        times.append(now_s)
        rate.note(now_s, 1)
        first = (now_s // BUCKET_S - MINUTE + 1) * BUCKET_S
        assert rate.minute == sum(time_s >= first for time_s in times)


def test_a_state_is_small() -> None:
    rate = Rate()
    for bucket in range(100):
        rate.note(bucket * BUCKET_S, 1)
    held = [getattr(rate, name) for name in Rate.__slots__]
    assert sys.getsizeof(rate) + sum(map(sys.getsizeof, held)) < 600


# -- each anomaly -------------------------------------------------------------------------------------------------


def test_a_new_key_is_odd_from_a_hundred_a_minute_and_not_below(anomalies: Anomalies, clock: Clock) -> None:
    assert play(anomalies, clock, 120, 1.5, lambda _: of_key()) == []
    found = play(anomalies, clock, 90, 20, lambda _: of_key())
    assert {(each.name, each.labels["scope"]) for each in found} == {(RATE, "key"), (RATE, "address")}
    of_the_key = [each for each in found if each.labels["scope"] == "key"]
    assert [each.confirmed for each in of_the_key] == [False], "once, and for no page, while it is not known"
    assert of_the_key[0].labels == {"tenant": "acme", "key": "k1", "scope": "key"}
    assert of_the_key[0].values["per_minute"] >= 100
    assert (of_the_key[0].tenant_id, of_the_key[0].key_id) == (ACME, "k1")


def test_a_key_that_always_asks_much_is_odd_only_where_it_asks_more(
    anomalies: Anomalies, clock: Clock
) -> None:
    assert len(play(anomalies, clock, 900, 5, lambda _: of_key())) == 2, "the key and its client, once"
    assert play(anomalies, clock, 300, 5, lambda _: of_key()) == []
    found = play(anomalies, clock, 20, 40, lambda _: of_key())
    assert [each.confirmed for each in found if each.labels["scope"] == "key"] == [False, True]


def test_a_policy_s_own_number_is_odd_however_ordinary(anomalies: Anomalies, clock: Clock) -> None:
    found = play(anomalies, clock, 900, 1, lambda _: of_key(most_per_minute=50))
    assert found and found[-1].confirmed
    assert play(anomalies, clock, 300, 1, lambda _: of_key(key_id="k2", most_per_minute=90)) == []


def test_ten_refusals_a_minute_of_one_address_are_odd_and_its_network_is_told(
    anomalies: Anomalies, clock: Clock
) -> None:
    def stranger(_: int) -> Observation:
        return Observation(address="2001:db8:1:2::77", status=401)

    assert play(anomalies, clock, 180, 0.1, stranger) == []
    found = play(anomalies, clock, 600, 2, stranger)
    assert found[-1].confirmed, "it is never ordinary"
    assert found[0].labels == {"scope": "stranger", "network": "2001:db8:1::/48"}
    assert "2::77" not in str(found)


@pytest.mark.parametrize("status", [200, 503])
def test_who_is_answered_without_a_key_or_meets_our_own_failure_is_no_stranger(
    anomalies: Anomalies, clock: Clock, status: int
) -> None:
    assert play(anomalies, clock, 60, 5, lambda _: Observation(address=HERE, status=status)) == []


def test_behind_one_address_sessions_users_and_agents_are_told_apart(
    anomalies: Anomalies, clock: Clock
) -> None:
    """Forty clients behind one address, each with 30 requests a minute; the key's own rate is allowed that much."""

    def one_of(field: str) -> list[Anomaly]:
        return play(anomalies, clock, 60, 20, lambda n: of_key(key_id=field, **{field: f"{field}-{n % 40}"}))

    for field in ("session", "end_user", "user_agent"):
        assert {each.labels["scope"] for each in one_of(field)} == {"key"}
    found = play(anomalies, clock, 20, 20, lambda n: of_key(key_id="nat", session="ses_1"))
    assert {each.labels.get("session") for each in found if each.labels["scope"] != "key"} == {"ses_1"}


def test_an_allowed_network_never_counts_by_address(clock: Clock) -> None:
    anomalies = Anomalies(Limits(allowed=(ip_network("198.51.100.0/24"),)), clock=clock)
    assert play(anomalies, clock, 60, 5, lambda _: Observation(address=HERE, status=401)) == []
    assert play(anomalies, clock, 60, 5, lambda _: Observation(address=f"::ffff:{HERE}", status=401)) == []
    assert names(play(anomalies, clock, 60, 5, lambda _: Observation(address=THERE, status=401))) == {RATE}


def test_a_risk_above_eight_tenths_is_told_with_its_category(anomalies: Anomalies) -> None:
    assert anomalies.observe(of_key(risk=0.8, category="hate")) == []
    (found,) = anomalies.observe(of_key(risk=0.93, category="hate"))
    assert (found.name, found.labels["category"], found.values["risk"]) == (RISK, "hate", 0.93)


def test_refusals_are_odd_where_they_are_many_and_much_of_all(anomalies: Anomalies, clock: Clock) -> None:
    assert REFUSALS not in names(play(anomalies, clock, 120, 1, lambda n: of_key(refused=n % 5 == 0)))
    play(anomalies, clock, 600, 1, lambda n: of_key(refused=n % 5 == 0))
    assert REFUSALS in names(play(anomalies, clock, 120, 1, lambda n: of_key(refused=n % 5 > 0)))


def test_a_network_is_new_only_to_a_key_with_a_history(anomalies: Anomalies, clock: Clock) -> None:
    assert anomalies.observe(of_key(key_id="young")) == []
    assert anomalies.observe(of_key(key_id="young", address=THERE)) == []
    for _ in range(HISTORY_USES):
        anomalies.observe(of_key())
        clock.now_s += HISTORY_S / HISTORY_USES
    assert anomalies.observe(of_key(address="198.51.100.200")) == [], "the same /24"
    (found,) = anomalies.observe(of_key(address=THERE))
    assert (found.name, found.labels["network"]) == (NETWORK, "203.0.113.0/24")
    assert anomalies.observe(of_key(address=THERE)) == []


def test_a_key_that_roams_is_left_alone() -> None:
    networks = Networks(0.0)
    assert all(networks.is_new(f"10.0.{number}.0/24") for number in range(MOST_NETWORKS))
    assert not networks.is_new("10.1.0.0/24")


def test_queries_that_are_nearly_the_same_are_probing_where_they_grow(
    anomalies: Anomalies, clock: Clock
) -> None:
    rng = random.Random(5)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(3, 9))) for _ in range(3_000)]

    def search(_: int) -> Observation:
        return of_key(query=" ".join(rng.choices(words, k=6)))

    def probe(_: int) -> Observation:
        text = list("how is a thing that nobody may do done at home")
        text[rng.randrange(len(text))] = rng.choice("xyz0")
        return of_key(query="".join(text))

    assert PROBING not in names(play(anomalies, clock, 600, 1.2, search))
    for _ in range(3):
        found = [each for each in play(anomalies, clock, 120, 1.2, probe) if each.name == PROBING]
        assert found and found[-1].confirmed, "the third time as the first"
        clock.now_s += 120  # the minute that it was in is over
        assert PROBING not in names(play(anomalies, clock, 1_800, 1.2, search))


def test_a_search_box_that_asks_with_each_letter_is_ordinary_in_the_end(
    anomalies: Anomalies, clock: Clock
) -> None:
    def typed(number: int) -> Observation:
        return of_key(query="a long query that is typed letter by letter"[: 10 + number % 30])

    play(anomalies, clock, 600, 1.5, typed)
    assert PROBING not in names(play(anomalies, clock, 600, 1.5, typed))


@settings(max_examples=20, deadline=None)
@given(st.text(max_size=80))
def test_any_text_has_a_sketch_that_is_like_its_own_without_case_and_spaces(text: str) -> None:
    made = sketch(text)
    assert 1 <= len(made) <= 4
    shapes = Shapes()
    assert not shapes.has_alike(made)
    assert shapes.has_alike(sketch(text))
    if text.isascii() and len(text) < 40:
        assert sketch(f" {text.upper()} ") == sketch(text)


def test_scores_that_lie_elsewhere_are_drift_and_those_that_stay_are_not(
    anomalies: Anomalies, clock: Clock
) -> None:
    rng = random.Random(11)

    def scored(low: float, high: float) -> Callable[[int], Observation]:
        return lambda _: of_key(score=rng.betavariate(low, high))

    assert DRIFT not in names(play(anomalies, clock, 8 * WINDOW, 1, scored(2, 5)))
    found = [each for each in play(anomalies, clock, 2 * WINDOW, 1, scored(5, 2)) if each.name == DRIFT]
    assert found and found[0].labels == {"tenant": "acme"} and found[0].values["stability_index"] > 0.25


def test_what_has_come_to_stay_is_drift_no_longer() -> None:
    rng, drift = random.Random(2), Drift()
    for _ in range(6 * WINDOW):
        drift.note(rng.betavariate(2, 5))
    later = [drift.note(rng.betavariate(5, 2)) for _ in range(80 * WINDOW)]
    assert any(later[: 2 * WINDOW]) and not any(later[-2 * WINDOW :])


# -- bounds -------------------------------------------------------------------------------------------------------


def test_states_are_bounded_and_who_was_not_seen_for_longest_is_forgotten(clock: Clock) -> None:
    anomalies = Anomalies(Limits(clients=100), clock=clock)
    for number in range(5_000):
        anomalies.observe(Observation(address=f"10.{number >> 8}.{number & 255}.1", status=401))
        anomalies.observe(of_key(tenant=str(number), key_id=str(number), session=f"ses_{number}", score=0.5))
    assert anomalies.states == 400


def test_whatever_is_told_was_announced_and_holds_no_address(clock: Clock) -> None:
    """Rules may name what `TOLD` lists, and nothing else ever comes."""
    anomalies, found = Anomalies(Limits(), clock=clock), []
    for number in range(3_000):
        found += anomalies.observe(
            of_key(
                address=HERE if number < 2_000 else THERE,
                risk=0.9,
                category="code",
                refused=True,
                score=0.1 if number < 2_200 else 0.9,
                query="the same again",
            )
        )
        found += anomalies.observe(Observation(address=THERE, status=401))
        clock.now_s += 0.05 if number % 1_000 else HISTORY_S
    assert names(found) == set(TOLD)
    for each in found:
        told = (set(each.labels) | set(each.values)) - {"tenant"}
        assert told <= TOLD[each.name], each
        assert HERE not in str(each) and THERE not in str(each)
