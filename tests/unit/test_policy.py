"""A Policy is valid or it does not exist."""

from __future__ import annotations

import dataclasses
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenants.errors import InvalidPolicy
from tenants.kinds import AskModel, FilterMode, ImageText, Kind, MissingDetectors
from tenants.policy import SHADOWS, Isolation, Policy
from tenants.risk import Action, Category
from tenants.risk_fields import MOST_WORDS


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
        tokens_per_minute=st.integers(1, 60_000_000),
        tokens_per_month=st.none() | st.integers(1, 10**12),
        shadow=st.lists(st.sampled_from(SHADOWS[:4]), unique=True).map(tuple),
        kind=st.sampled_from(Kind),
        filter_mode=st.none() | st.sampled_from(FilterMode),
        risk_thresholds=st.dictionaries(st.sampled_from(Category), st.floats(0, 1)).map(
            lambda thresholds: tuple(thresholds.items())
        ),
        risk_actions=st.dictionaries(st.sampled_from(Category), st.sampled_from(Action)).map(
            lambda actions: tuple(actions.items())
        ),
        missing_detectors=st.sampled_from(MissingDetectors),
        image_text=st.sampled_from(ImageText),
        ask_model=st.sampled_from(AskModel),
        lexicons=st.dictionaries(
            st.sampled_from(Category),
            st.lists(st.sampled_from(["buy now", "某词", "zzz"]), unique=True).map(tuple),
        ).map(lambda lexicons: tuple(lexicons.items())),
        retention_days=st.integers(1, 36_500),
        remote_image_hosts=st.lists(st.sampled_from(["a.example", "b.example"]), unique=True).map(tuple),
        console_origins=st.lists(
            st.sampled_from(["https://a.example", "https://b.example:8443"]), unique=True
        ).map(tuple),
        allowed_models=st.lists(st.sampled_from(["a", "b/c", "模型"]), unique=True).map(tuple),
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
        {"allowed_models": ("a", "a")},
        {"tokens_per_minute": 0},
        {"tokens_per_minute": 60_000_001},
        {"token_burst": 0},
        {"requests_per_month": 0},
        {"tokens_per_month": 10**12 + 1},
        {"shadow": ("documents",)},
        {"shadow": ("requests_month",)},  # there is no such limit to shadow
        {"group": "acme"},  # a group without pooled
        {"isolation": Isolation.DEDICATED, "group": "acme"},
        {"isolation": Isolation.POOLED},
        {"isolation": Isolation.POOLED, "group": "Not A Label"},
        {"kind": "default"},
        {"filter_mode": "strict"},
        {"risk_thresholds": ((Category.SEXUAL, 1.1),)},
        {"risk_thresholds": ((Category.SEXUAL, float("nan")),)},
        {"risk_thresholds": ((Category.SEXUAL, True),)},
        {"risk_thresholds": (("adult", 0.5),)},
        {"risk_thresholds": ((Category.SEXUAL, 0.5), (Category.SEXUAL, 0.6))},
        {"risk_thresholds": {"sexual": 0.5}},
        {"risk_actions": ((Category.SEXUAL, "mask"),)},
        {"risk_actions": (("adult", Action.MASK),)},
        {"risk_actions": {"sexual": "mask"}},
        {"missing_detectors": "refuse"},
        {"image_text": "gated"},
        {"ask_model": "off"},
        {"lexicons": ((Category.DRUGS, ("x",)),)},
        {"lexicons": ((Category.DRUGS, ("x!?",)),)},
        {"lexicons": ((Category.DRUGS, ("x" * 65,)),)},
        {"lexicons": ((Category.DRUGS, ("two\nlines",)),)},
        {"lexicons": ((Category.DRUGS, (" padded",)),)},
        {"lexicons": ((Category.DRUGS, ("twice", "twice")),)},
        {"lexicons": ((Category.DRUGS, "a word"),)},
        {"lexicons": ((Category.DRUGS, tuple(map(str, range(10, MOST_WORDS + 11)))),)},
        {"retention_days": 0},
        {"remote_images": True},  # from nowhere
        {"remote_images": True, "remote_image_hosts": ("a.example",), "images_per_request": 0},
        {"remote_image_hosts": ("127.0.0.1",)},
        {"remote_image_hosts": ("localhost",)},
        {"remote_image_hosts": ("A.example",)},
        {"remote_image_hosts": ("a.example/x",)},
        {"remote_image_hosts": ("a." * 127 + "example",)},
        {"console_origins": ("http://a.example",)},
        {"console_origins": ("https://a.example/",)},
        {"console_origins": ("https://user@a.example",)},
        {"console_origins": ("*",)},
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


def test_every_fault_is_told_and_not_the_first_one_alone() -> None:
    text = b'{"requests_per_minute": 0, "kind": "other", "nonsense": 1, "keep_warm": "yes", "shadow": ["x"]}'
    with pytest.raises(InvalidPolicy) as caught:
        Policy.from_json(text)
    fields = [fault.field for fault in caught.value.faults]
    assert sorted(fields) == ["keep_warm", "kind", "nonsense", "requests_per_minute", "shadow"]
    assert all(str(fault) in str(caught.value) for fault in caught.value.faults)


def test_every_contradiction_is_told() -> None:
    with pytest.raises(InvalidPolicy) as caught:
        Policy(images_per_minute=1, isolation=Isolation.POOLED, remote_images=True, shadow=("tokens_month",))
    assert [fault.field for fault in caught.value.faults] == [
        "images_per_request",
        "group",
        "remote_image_hosts",
        "shadow",
    ]


def test_a_shadowed_limit_contradicts_nothing() -> None:
    assert Policy(images_per_minute=1, shadow=("images",)).images_per_request == 20


@pytest.mark.parametrize(
    ("kind", "mode", "threshold"),
    [
        ("enterprise", FilterMode.STRICT, 0.3),
        ("education", FilterMode.MODERATE, 0.6),
        ("research", FilterMode.LENIENT, 0.8),
        ("default", FilterMode.MODERATE, 0.6),
    ],
)
def test_the_kind_recommends_a_mode_and_the_policy_decides(
    kind: str, mode: FilterMode, threshold: float
) -> None:
    policy = Policy.from_json(orjson.dumps({"kind": kind}))
    assert policy.mode is mode
    assert policy.threshold(Category.SEXUAL) == threshold
    own = dataclasses.replace(
        policy, filter_mode=FilterMode.STRICT, risk_thresholds=((Category.SEXUAL, 0.45),)
    )
    assert own.mode is FilterMode.STRICT
    assert (own.threshold(Category.SEXUAL), own.threshold(Category.HATE)) == (0.45, 0.3)


def test_what_is_by_category_is_an_object_in_json_and_in_order_inside() -> None:
    sent = {
        "risk_thresholds": {"sexual": 1, "hate": 0.2},
        "risk_actions": {"hate": "refuse", "drugs": "allow"},
        "lexicons": {"drugs": ["blue sugar", "冰糖"]},
    }
    policy = Policy.from_json(orjson.dumps(sent))
    assert policy.risk_thresholds == ((Category.HATE, 0.2), (Category.SEXUAL, 1.0))
    assert policy.risk_actions == ((Category.DRUGS, Action.ALLOW), (Category.HATE, Action.REFUSE))
    assert policy.lexicons == ((Category.DRUGS, ("blue sugar", "冰糖")),)
    told = orjson.loads(policy.to_json())
    assert {name: told[name] for name in sent} == sent
    assert hash(policy) == hash(Policy.from_json(policy.to_json()))


@pytest.mark.parametrize("name", ["risk_thresholds", "risk_actions", "lexicons"])
@pytest.mark.parametrize(
    "value", [{"adult": 0.5}, {"sexual": "off"}, [], 1, {"sexual": [1]}, {"sexual": None}]
)
def test_an_object_of_another_form_is_told_by_its_field(name: str, value: object) -> None:
    with pytest.raises(InvalidPolicy) as caught:
        Policy.from_json(orjson.dumps({name: value}))
    assert [fault.field for fault in caught.value.faults] == [name]
    assert "sexual" in str(caught.value), "it says which categories there are"


def test_an_action_is_the_tenants_or_the_default() -> None:
    policy = Policy(risk_actions=((Category.HATE, Action.REFUSE),))
    assert policy.action(Category.HATE) is Action.REFUSE
    assert policy.action(Category.DRUGS) is Action.MASK
    assert policy.action(Category.INJECTION) is policy.action(Category.CODE) is Action.FLAG
