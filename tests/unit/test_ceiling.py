"""A policy under a ceiling is valid, within it, and no higher than before."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenants.ceiling import Ceiling
from tenants.errors import InvalidPolicy
from tenants.kinds import FilterMode, ImageText, Kind, MissingDetectors
from tenants.policy import RANGES, Isolation, Policy
from tenants.risk import Action, Category


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


def names(*of: str) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(of), unique=True).map(tuple)


def valid(of: type[Any], /, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Values of `of` where the fields do not contradict each other."""

    def make(given: dict[str, Any]) -> Any:
        try:
            return of(**given)
        except InvalidPolicy:
            return None

    return st.fixed_dictionaries({}, optional=fields).map(make).filter(lambda made: made is not None)


COUNTS = {name: st.integers(least, min(most, 60)) for name, (least, most) in RANGES.items()}
OPTIONAL = {
    name: maybe(st.integers(1, 60))
    for name in ("request_burst", "image_burst", "token_burst", "requests_per_month", "tokens_per_month")
}
ACTIONS = st.dictionaries(st.sampled_from(Category), st.sampled_from(Action)).map(
    lambda actions: tuple(sorted(actions.items()))
)
CEILINGS = valid(
    Ceiling,
    **{name: maybe(counts) for name, counts in COUNTS.items()},
    **OPTIONAL,
    least_retention_days=maybe(st.integers(1, 60)),
    isolation=maybe(st.lists(st.sampled_from(Isolation), unique=True, min_size=1).map(tuple)),
    groups=maybe(names("a", "b")),
    keep_warm=maybe(st.booleans()),
    shadow=maybe(names("images", "requests_month", "tokens")),
    allowed_models=maybe(names("a", "b")),
    risk_threshold=maybe(st.floats(0.3, 1)),
    risk_actions=maybe(ACTIONS),
    missing_detectors=maybe(st.sampled_from(MissingDetectors)),
    image_text=maybe(st.sampled_from(ImageText)),
    remote_images=maybe(st.booleans()),
    remote_image_hosts=maybe(names("a.example", "b.example")),
)
POLICIES = valid(
    Policy,
    **COUNTS,
    **OPTIONAL,
    isolation=st.sampled_from(Isolation),
    group=maybe(st.sampled_from(["a", "c"])),
    keep_warm=st.booleans(),
    shadow=names("images", "requests_month", "tokens"),
    allowed_models=names("a", "c"),
    kind=st.sampled_from(Kind),
    filter_mode=maybe(st.sampled_from(FilterMode)),
    risk_thresholds=st.dictionaries(st.sampled_from(Category), st.floats(0, 1)).map(
        lambda thresholds: tuple(thresholds.items())
    ),
    risk_actions=ACTIONS,
    missing_detectors=st.sampled_from(MissingDetectors),
    image_text=st.sampled_from(ImageText),
    remote_images=st.booleans(),
    remote_image_hosts=names("a.example", "c.example"),
)


@given(CEILINGS, POLICIES)
def test_what_is_lowered_is_within_and_stays_so(ceiling: Ceiling, policy: Policy) -> None:
    try:
        lowered = ceiling.lower(policy)
    except InvalidPolicy as exc:
        assert [fault.field for fault in exc.faults] == ["allowed_models"]
        return
    assert ceiling.lower(lowered) == lowered
    assert ceiling.faults(lowered) == ()
    assert bool(ceiling.faults(policy)) == (lowered != policy)
    for name in RANGES:
        if name != "retention_days":
            assert getattr(lowered, name) <= getattr(policy, name)
            most = getattr(ceiling, name)
            assert most is None or getattr(lowered, name) <= most
    assert lowered.requests_at_once <= policy.requests_at_once
    assert all(lowered.threshold(name) <= policy.threshold(name) for name in Category)
    order = tuple(Action)
    assert all(order.index(lowered.action(name)) >= order.index(policy.action(name)) for name in Category)
    for name, least in ceiling.risk_actions or ():
        assert order.index(lowered.action(name)) >= order.index(least)
    if ceiling.missing_detectors is MissingDetectors.REFUSE:
        assert lowered.refuses_missing_detectors


@given(POLICIES)
def test_what_was_granted_is_within_what_was_granted(policy: Policy) -> None:
    assert Ceiling.granted(policy).faults(policy) == ()


@given(CEILINGS, POLICIES)
def test_a_ceiling_over_what_was_granted_below_it_is_one(ceiling: Ceiling, policy: Policy) -> None:
    try:
        lowered = ceiling.lower(policy)
    except InvalidPolicy:
        return
    assert ceiling.over(Ceiling.granted(lowered)).faults(lowered) == ()


@given(CEILINGS)
def test_every_ceiling_reads_back_equal(ceiling: Ceiling) -> None:
    assert Ceiling.from_json(ceiling.to_json()) == ceiling


@given(POLICIES)
def test_an_empty_ceiling_bounds_nothing(policy: Policy) -> None:
    assert Ceiling().lower(policy) == policy


def test_a_rate_without_a_burst_bounds_the_burst() -> None:
    faults = Ceiling(requests_per_minute=10).faults(Policy(requests_per_minute=10, request_burst=11))
    assert [str(fault) for fault in faults] == ["request_burst: may not be 11: the platform allows 10"]


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"nonsense": 1}',
        '{"sessions": -1}',
        '{"sessions": true}',
        '{"isolation": []}',
        '{"isolation": ["other"]}',
        '{"isolation": ["pooled"]}',
        '{"groups": ["Not A Label"]}',
        '{"shadow": ["documents"]}',
        '{"allowed_models": []}',
        '{"risk_threshold": 0.2}',
        '{"risk_threshold": true}',
        '{"risk_actions": {"hate": "off"}}',
        '{"risk_actions": ["hate"]}',
        '{"missing_detectors": "allow"}',
        '{"image_text": true}',
        '{"keep_warm": 1}',
        '{"retention_days": 3, "least_retention_days": 4}',
    ],
)
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(InvalidPolicy):
        Ceiling.from_json(text)


def test_every_fault_is_told() -> None:
    with pytest.raises(InvalidPolicy) as caught:
        Ceiling.from_json('{"sessions": -1, "nonsense": 1, "keep_warm": 1}')
    assert sorted(fault.field for fault in caught.value.faults) == ["keep_warm", "nonsense", "sessions"]
