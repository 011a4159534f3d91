"""Tenants in metrics: few have a label of their own, and nothing is counted twice or lost, whoever has one."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import generate_latest

from service.watch import metrics
from service.watch.tenants import COUNTERS, OTHER, RANK_EVERY_S, TopTenants


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_first_tenants_have_a_label_at_once_and_the_rest_are_one(clock: Clock) -> None:
    top = TopTenants(2, clock=clock)
    assert [top.count(tenant) for tenant in ("a", "b", "c", "a")] == ["a", "b", OTHER, "a"]


def test_who_clearly_has_more_requests_takes_the_label_of_who_has_fewest(clock: Clock) -> None:
    dropped: list[str] = []
    top = TopTenants(2, dropped=dropped.append, clock=clock)
    for tenant, requests in (("small", 5), ("large", 50), ("late", 30)):
        for _ in range(requests):
            top.count(tenant)
    assert top.label("late") == OTHER
    clock.now_s = RANK_EVERY_S
    top.count("large")
    assert dropped == ["small"]
    assert top.named == {"large", "late"}


def test_those_who_are_about_even_do_not_take_turns(clock: Clock) -> None:
    dropped: list[str] = []
    top = TopTenants(1, dropped=dropped.append, clock=clock)
    for turn in range(1, 9):
        for _ in range(10):
            top.count("first")
        for _ in range(15):
            top.count("second")
        clock.now_s = turn * RANK_EVERY_S
        top.count("first")
    assert dropped == []


def test_what_a_tenant_did_long_ago_gives_it_no_label_now(clock: Clock) -> None:
    top = TopTenants(1, clock=clock)
    for _ in range(1000):
        top.count("once")
    for turn in range(1, 12):
        clock.now_s = turn * RANK_EVERY_S
        for _ in range(10):
            top.count("now")
    assert top.named == {"now"}


def test_without_labels_all_are_one(clock: Clock) -> None:
    top = TopTenants(0, clock=clock)
    assert {top.count(f"tenant-{number}") for number in range(10)} == {OTHER}
    assert len(top) == 0


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 60), max_size=400),
    st.integers(1, 4),
    st.integers(1, 50),
)
def test_labels_are_bounded_and_every_request_is_counted_once(
    requests: list[int], most: int, ranked_every: int
) -> None:
    clock = Clock()
    counted: Counter[str] = Counter()
    lost: Counter[str] = Counter()

    def drop(tenant: str) -> None:
        lost[tenant] += counted.pop(tenant, 0)

    top = TopTenants(most, dropped=drop, clock=clock)
    for number, tenant in enumerate(requests, 1):
        if number % ranked_every == 0:
            clock.now_s += RANK_EVERY_S
        counted[top.count(f"t{tenant}")] += 1
        assert len(counted.keys() - {OTHER}) <= most
        assert len(top) <= COUNTERS * most
    assert counted.total() + lost.total() == len(requests)


def test_who_has_most_of_all_requests_is_found_among_any_number_of_tenants(clock: Clock) -> None:
    """More than a share of 1 in `COUNTERS * most` is never lost sight of: Space-Saving's promise."""
    top = TopTenants(2, clock=clock)
    for number in range(2_000):
        top.count(f"passer-by-{number}")
        if number % 5 == 0:
            top.count("regular")
    clock.now_s = RANK_EVERY_S
    top.count("regular")
    assert "regular" in top.named
    assert len(top) <= COUNTERS * 2


def tenant_series() -> dict[str, float]:
    """Every series that has a tenant, as `/metrics` writes it."""
    lines = generate_latest(metrics.REGISTRY).decode().splitlines()
    return {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("pericarp_tenant_")
    }


def total(name: str, series: dict[str, float]) -> float:
    return sum(value for each, value in series.items() if each.startswith(f"{name}{{"))


def test_a_thousand_tenants_make_the_exposition_no_longer_than_a_few() -> None:
    metrics.name_tenants(5)
    before = tenant_series()
    lengths = []
    try:
        for number in range(1_000):
            tenant = f"tenant-{number:04}"
            metrics.note_images(tenant, 1)
            metrics.note_tokens(tenant, charged=10, images=1, computed=5)
            for status in (200, 429, 503):
                metrics.note_request("/v1/rerank", status, 0.2, tenant, searches=True)
            if number in (5, 500, 999):
                lengths.append(len(tenant_series()))
        after = tenant_series()
    finally:
        metrics.name_tenants(metrics.DEFAULT_TENANTS)
    assert lengths[0] == lengths[1] == lengths[2]
    labels = {each.split('tenant="')[1].split('"')[0] for each in after}
    assert labels == {OTHER, *(f"tenant-{number:04}" for number in range(5))}
    for name, counted in (
        ("pericarp_tenant_requests_total", 3_000),
        ("pericarp_tenant_input_tokens_total", 10_000),
        ("pericarp_tenant_images_total", 1_000),
    ):
        assert total(name, after) - total(name, before) == counted
    assert [each for each in tenant_series() if OTHER not in each] == [], "and are gone with their labels"
