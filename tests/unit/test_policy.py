"""A Policy is valid or it does not exist."""

from __future__ import annotations

import dataclasses
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenants.errors import InvalidPolicy
from tenants.policy import Isolation, Policy


def test_the_defaults_are_the_documented_ones() -> None:
    policy = Policy()
    assert (policy.requests_per_minute, policy.images_per_minute, policy.concurrent_requests) == (600, 20, 5)
    assert (policy.text_length, policy.documents_per_request, policy.images_per_request) == (
        10_000,
        1_000,
        20,
    )
    assert policy.isolation is Isolation.ISOLATED
    assert not policy.keep_warm
    assert policy.allows_model("anything")


def test_a_burst_is_a_minutes_worth_unless_it_is_set() -> None:
    assert Policy(requests_per_minute=3).requests_at_once == 3
    assert Policy(requests_per_minute=3, request_burst=1).requests_at_once == 1
    assert Policy(images_per_minute=30).images_at_once == 30
    assert Policy(images_per_minute=30, image_burst=40, images_per_request=40).images_at_once == 40


@given(
    st.builds(
        Policy,
        requests_per_minute=st.integers(1, 1_000_000),
        request_burst=st.none() | st.integers(1, 1_000_000),
        images_per_minute=st.integers(20, 1_000_000),
        concurrent_requests=st.integers(1, 1_000),
        text_length=st.integers(1, 1_000_000),
        documents_per_request=st.integers(1, 1_000),
        images_per_request=st.integers(0, 20),
        sessions=st.integers(0, 1_000),
        keep_warm=st.booleans(),
        allowed_models=st.lists(st.sampled_from(["a", "b/c", "模型"])).map(tuple),
    )
)
def test_every_policy_reads_back_equal(policy: Policy) -> None:
    assert Policy.from_json(policy.to_json()) == policy


def test_absent_fields_take_the_defaults() -> None:
    assert Policy.from_json("{}") == Policy()
    assert Policy.from_json('{"concurrent_requests": 2}') == Policy(concurrent_requests=2)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "1", "null", '{"unknown": 1}', '{"isolation": "none"}', '{"allowed_models": "all"}', "{"],
)
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(InvalidPolicy):
        Policy.from_json(text)


@pytest.mark.parametrize(
    "change",
    [
        {"requests_per_minute": 0},
        {"requests_per_minute": 1_000_001},
        {"requests_per_minute": True},
        {"requests_per_minute": 1.5},
        {"requests_per_minute": "600"},
        {"request_burst": 0},
        {"images_per_minute": 19},  # a request of 20 images could never pass
        {"image_burst": 19},
        {"images_per_request": 21},
        {"images_per_request": -1},
        {"concurrent_requests": 0},
        {"documents_per_request": 1_001},
        {"text_length": 0},
        {"sessions": -1},
        {"sessions": 1_001},
        {"keep_warm": 1},
        {"isolation": "isolated"},
        {"allowed_models": ["a"]},
        {"allowed_models": ("",)},
    ],
)
def test_a_contradictory_policy_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidPolicy):
        dataclasses.replace(Policy(), **change)


def test_stored_policies_carry_every_field() -> None:
    assert set(orjson.loads(Policy().to_json())) == {field.name for field in dataclasses.fields(Policy)}


def test_only_named_models_are_allowed_once_any_is_named() -> None:
    policy = Policy(allowed_models=("lychee",))
    assert policy.allows_model("lychee")
    assert not policy.allows_model("other")
