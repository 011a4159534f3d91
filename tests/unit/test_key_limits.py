"""A key's own limits: read and written whole, refused with every fault, never above the tenant's."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenants.errors import InvalidKeyLimits
from tenants.key_limits import KeyLimits
from tenants.policy import BURSTS, OPTIONAL_RANGES, RANGES, Policy

NAMES = [field.name for field in fields(KeyLimits)]


@pytest.mark.parametrize("name", NAMES)
def test_every_limit_has_the_policys_bounds(name: str) -> None:
    least, most = RANGES[name] if name in RANGES else (1, OPTIONAL_RANGES[name])
    rate = {BURSTS[name][0]: 1} if name in BURSTS else {}
    for value in (least, most):
        KeyLimits(**{**rate, name: value})
    for value in (least - 1, most + 1):
        with pytest.raises(InvalidKeyLimits, match=f"{name}: must be a whole number"):
            KeyLimits(**{**rate, name: value})


@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.integers(1, 1_000_000)
            for name in NAMES
            if "burst" not in name and name != "concurrent_requests"
        },
    )
)
def test_limits_read_back_equal(given_limits: dict[str, int]) -> None:
    limits = KeyLimits(**given_limits)
    assert KeyLimits.from_json(limits.to_json()) == limits


def test_nothing_set_is_an_empty_object() -> None:
    assert KeyLimits().to_json() == "{}"
    assert KeyLimits.from_json("{}") == KeyLimits()


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(InvalidKeyLimits) as caught:
        KeyLimits(requests_per_minute=0, concurrent_requests=True, image_burst=3)
    message = str(caught.value)
    assert "requests_per_minute" in message
    assert "concurrent_requests" in message
    assert "image_burst: needs images_per_minute" in message


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"unknown": 1}', '{"requests_per_minute": "5"}', '{"tokens_per_month": 1.5}']
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(InvalidKeyLimits):
        KeyLimits.from_json(text)


def test_a_limit_above_the_tenants_is_refused_with_both_numbers() -> None:
    policy = Policy(requests_per_minute=100, concurrent_requests=5)
    KeyLimits(requests_per_minute=100, concurrent_requests=5).refuse_above(policy)
    with pytest.raises(InvalidKeyLimits) as caught:
        KeyLimits(requests_per_minute=101, concurrent_requests=6).refuse_above(policy)
    assert str(caught.value) == (
        "requests_per_minute: is 101, the tenant's is 100; concurrent_requests: is 6, the tenant's is 5"
    )


def test_a_burst_is_measured_by_the_tenants_burst_or_its_rate() -> None:
    limits = KeyLimits(requests_per_minute=10, request_burst=50)
    limits.refuse_above(Policy(requests_per_minute=100))
    with pytest.raises(InvalidKeyLimits, match="request_burst: is 50"):
        limits.refuse_above(Policy(requests_per_minute=100, request_burst=49))
