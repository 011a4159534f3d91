"""What is to be done about an item: monotone in every signal, never milder for a failure, and by the tenant's own rules."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.screening.calibration import (
    MOST_UNKNOWN,
    CalibrationInvalid,
    Role,
    load_calibration,
    read_calibration,
)
from service.screening.judge import (
    MISSING,
    ONE_WITNESS,
    ORDER,
    TOTAL,
    WITHOUT_ONE,
    Rules,
    Side,
    Verdict,
    judge,
    measure,
    total_of,
)
from service.screening.signals import Findings, Signal
from tenants.kinds import FilterMode, MissingDetectors
from tenants.policy import Policy
from tenants.risk import Action, Category, Mode

TABLES = load_calibration()
DETECTORS = [*sorted({detector for detector, _ in TABLES.tables}), "plugin"]
SIGNALS = st.builds(
    Signal,
    st.sampled_from(DETECTORS),
    st.sampled_from(Category),
    st.floats(0, 1),
    st.sampled_from(["", "lexicon.weapons"]),
    st.booleans(),
)
FINDINGS = st.builds(
    Findings,
    st.lists(SIGNALS, max_size=8).map(tuple),
    st.lists(st.sampled_from(DETECTORS), max_size=2, unique=True).map(tuple),
)
POLICIES = st.builds(
    Policy,
    filter_mode=st.sampled_from(FilterMode),
    risk_thresholds=st.dictionaries(st.sampled_from(Category), st.floats(0.01, 1)).map(
        lambda each: tuple(each.items())
    ),
    risk_actions=st.dictionaries(st.sampled_from(Category), st.sampled_from(Action)).map(
        lambda each: tuple(each.items())
    ),
    missing_detectors=st.sampled_from(MissingDetectors),
)
SIDES = st.sampled_from(Side)
MODES = st.sampled_from(Mode)


def decide(
    findings: Findings, policy: Policy | None = None, *, mode: Mode = Mode.TEXT, side: Side = Side.DOCUMENT
) -> Verdict:
    rules = Rules.of(policy or Policy())
    return judge(findings, rules, TABLES, where="documents[0]", mode=mode, side=side)


def found(*signals: Signal, failed: tuple[str, ...] = ()) -> Findings:
    return Findings(signals, failed)


def nets(open_nsfw: float, image_safety: float) -> Findings:
    return found(
        Signal("open_nsfw", Category.SEXUAL, open_nsfw), Signal("image_safety", Category.SEXUAL, image_safety)
    )


def score(findings: Findings, category: Category = Category.SEXUAL) -> float:
    return {risk.category: risk.score for risk in measure(findings, TABLES)}.get(category, 0.0)


@given(FINDINGS, POLICIES, MODES, SIDES, st.data())
def test_a_stronger_signal_never_makes_anything_milder(
    findings: Findings, policy: Policy, mode: Mode, side: Side, data: st.DataObject
) -> None:
    if not findings.signals:
        return
    place = data.draw(st.integers(0, len(findings.signals) - 1))
    signal = findings.signals[place]
    stronger = dataclasses.replace(
        signal,
        score=data.draw(st.floats(signal.score, 1)),
        certain=signal.certain or data.draw(st.booleans()),
    )
    more = dataclasses.replace(
        findings, signals=(*findings.signals[:place], stronger, *findings.signals[place + 1 :])
    )
    before = decide(findings, policy, mode=mode, side=side)
    after = decide(more, policy, mode=mode, side=side)
    assert ORDER.index(after.action) >= ORDER.index(before.action)
    assert after.total >= before.total - 1e-12
    scores = {risk.category: risk.score for risk in after.risks}
    assert all(scores[risk.category] >= risk.score - 1e-12 for risk in before.risks)


@given(FINDINGS, POLICIES, MODES, SIDES)
def test_scores_stay_within_0_and_1_and_the_total_is_no_less_than_any(
    findings: Findings, policy: Policy, mode: Mode, side: Side
) -> None:
    verdict = decide(findings, policy, mode=mode, side=side)
    assert all(0.0 <= risk.score <= 1.0 for risk in verdict.risks)
    assert 0.0 <= verdict.total <= 1.0
    assert all(verdict.total >= risk.score for risk in verdict.risks)
    assert {risk.category for risk in verdict.risks} == {signal.category for signal in findings.signals}


@given(FINDINGS, POLICIES, MODES, SIDES, st.sampled_from(DETECTORS))
def test_what_a_detector_failed_on_is_never_allowed(
    findings: Findings, policy: Policy, mode: Mode, side: Side, detector: str
) -> None:
    verdict = decide(dataclasses.replace(findings, failed=(detector,)), policy, mode=mode, side=side)
    assert verdict.action is not Action.ALLOW
    assert any(reason.rule == MISSING for reason in verdict.reasons)
    if policy.refuses_missing_detectors:
        assert verdict.action is Action.REFUSE


@given(FINDINGS, POLICIES, MODES)
def test_a_query_is_allowed_flagged_or_refused_and_nothing_else(
    findings: Findings, policy: Policy, mode: Mode
) -> None:
    verdict = decide(findings, policy, mode=mode, side=Side.QUERY)
    assert verdict.action in (Action.ALLOW, Action.FLAG, Action.REFUSE)


@given(FINDINGS, MODES, SIDES, POLICIES)
def test_every_touch_has_a_reason_and_no_touch_none(
    findings: Findings, mode: Mode, side: Side, policy: Policy
) -> None:
    verdict = decide(findings, policy, mode=mode, side=side)
    assert (verdict.action is Action.ALLOW) == (not verdict.reasons)
    for reason in verdict.reasons:
        assert reason.category is None or reason.score >= reason.threshold
        assert reason.action is not Action.ALLOW


@given(FINDINGS, MODES, SIDES)
def test_a_stricter_mode_never_decides_milder(findings: Findings, mode: Mode, side: Side) -> None:
    strict, moderate, lenient = (
        decide(findings, Policy(filter_mode=each), mode=mode, side=side).action
        for each in (FilterMode.STRICT, FilterMode.MODERATE, FilterMode.LENIENT)
    )
    assert ORDER.index(strict) >= ORDER.index(moderate) >= ORDER.index(lenient)


@example(
    (Signal("code", Category.SEXUAL, 1.0), Signal("homophone", Category.SEXUAL, 0.0)),
    Signal("injection", Category.SEXUAL, 0.0),
)
@given(st.lists(SIGNALS.filter(lambda signal: not signal.certain), max_size=8).map(tuple), SIGNALS)
def test_a_finder_or_confirmer_more_never_lowers_a_score(signals: tuple[Signal, ...], more: Signal) -> None:
    table = TABLES.table(more.detector, more.category)
    if table.role not in (Role.FINDS, Role.CONFIRMS):
        return
    spoke = {
        TABLES.table(each.detector, each.category).role for each in signals if each.category is more.category
    }
    if spoke == {Role.FALLBACK}:
        return  # which is not heard beside others
    before = score(Findings(signals), more.category)
    assert score(Findings((*signals, more)), more.category) >= before - 1e-12


def test_two_nets_are_fused_by_their_geometric_mean_and_not_by_noisy_or() -> None:
    low, high = (TABLES.table(name, Category.SEXUAL) for name in ("open_nsfw", "image_safety"))
    expected = math.sqrt(low.calibrate(0.6) * high.calibrate(0.9))
    assert score(nets(0.6, 0.9)) == pytest.approx(expected)
    assert score(nets(0.6, 0.9)) < max(low.calibrate(0.6), high.calibrate(0.9))


def test_clear_needs_two_detectors_that_agree_or_one_that_is_certain() -> None:
    word = Signal("lexicon", Category.DRUGS, 0.95)
    assert score(found(word), Category.DRUGS) == ONE_WITNESS
    again = Signal("lexicon", Category.DRUGS, 0.95, "another")
    assert score(found(word, again), Category.DRUGS) == ONE_WITNESS, "one detector twice is one witness"
    assert score(found(word, Signal("homophone", Category.DRUGS, 0.9)), Category.DRUGS) >= 0.8
    assert score(found(dataclasses.replace(word, certain=True)), Category.DRUGS) == 0.95
    assert score(nets(0.97, 0.97)) >= 0.8


def test_bare_skin_in_everyday_pictures_is_below_every_default_threshold() -> None:
    """Raw scores of plain dark skin colour, and of a beach."""
    assert score(nets(0.27, 0.24)) < FilterMode.STRICT.threshold
    assert score(nets(0.02, 0.455)) < FilterMode.STRICT.threshold


def test_skin_is_heard_only_where_the_nets_are_not_and_stops_nothing_at_moderate() -> None:
    skin = Signal("skin", Category.SEXUAL, 1.0)
    assert score(found(*nets(0.1, 0.1).signals, skin)) == score(nets(0.1, 0.1))
    assert score(found(skin)) < FilterMode.MODERATE.threshold
    grey = Signal("skin", Category.SEXUAL, 0.0)
    assert score(found(*nets(0.97, 0.97).signals, grey)) == score(nets(0.97, 0.97))


def test_a_failed_net_caps_what_is_left_of_its_categories_and_no_other() -> None:
    findings = found(
        Signal("image_safety", Category.SEXUAL, 1.0),
        Signal("lexicon", Category.DRUGS, 0.75),
        failed=("open_nsfw",),
    )
    assert score(findings) == WITHOUT_ONE
    assert score(findings, Category.DRUGS) == 0.75


def test_a_detector_that_nobody_knows_raises_suspicion_and_no_more() -> None:
    assert score(found(Signal("plugin", Category.WEAPONS, 1.0)), Category.WEAPONS) == MOST_UNKNOWN
    assert score(found(Signal("lexicon", Category.DRUGS, 0.7), failed=("plugin",)), Category.DRUGS) == (
        WITHOUT_ONE
    )


def test_a_classifiers_low_score_takes_no_exact_hit_back() -> None:
    word = Signal("lexicon", Category.HATE, 0.7)
    assert score(found(word, Signal("linear", Category.HATE, 0.0)), Category.HATE) == 0.7


def test_several_mild_risks_together_are_flagged_and_never_masked() -> None:
    mild = [
        Signal("lexicon", category, 0.55)
        for category in (Category.DRUGS, Category.WEAPONS, Category.VIOLENCE, Category.ILLEGAL)
    ]
    verdict = decide(found(*mild))
    assert verdict.total >= FilterMode.MODERATE.threshold
    assert [(reason.rule, reason.action) for reason in verdict.reasons] == [(TOTAL, Action.FLAG)]
    assert decide(found(mild[0])).action is Action.ALLOW


def test_what_a_tenant_allows_is_not_told_and_not_counted() -> None:
    signals = [Signal("lexicon", category, 0.79) for category in (Category.DRUGS, Category.WEAPONS)]
    policy = Policy(
        risk_actions=((Category.DRUGS, Action.ALLOW), (Category.WEAPONS, Action.ALLOW)),
    )
    verdict = decide(found(*signals), policy)
    assert (verdict.action, verdict.reasons) == (Action.ALLOW, ())
    assert verdict.total == 0.79


def test_code_never_reaches_the_moderate_threshold_whatever_its_detector_says() -> None:
    assert decide(found(Signal("code", Category.CODE, 1.0))).action is Action.ALLOW


def test_by_default_a_documents_risk_masks_it_a_querys_refuses_and_injection_is_flagged() -> None:
    word = found(Signal("lexicon", Category.DRUGS, 0.7))
    told = found(Signal("injection", Category.INJECTION, 0.7))
    assert decide(word).action is Action.MASK
    assert decide(word, side=Side.QUERY).action is Action.REFUSE
    assert decide(told).action is decide(told, side=Side.QUERY).action is Action.FLAG


def test_a_category_has_its_own_threshold_and_action_where_the_tenant_says_so() -> None:
    word = found(Signal("lexicon", Category.DRUGS, 0.5))
    strict = Policy(risk_thresholds=((Category.DRUGS, 0.4),), risk_actions=((Category.DRUGS, Action.DEMOTE),))
    (reason,) = decide(word, strict).reasons
    assert (reason.category, reason.score, reason.threshold) == (Category.DRUGS, 0.5, 0.4)
    assert (reason.rule, reason.action) == ("lexicon", Action.DEMOTE)


def test_thresholds_that_were_adapted_are_used_by_category_and_mode() -> None:
    rules = Rules.of(Policy(), lambda category, mode: 0.5 if mode is Mode.IMAGE else 0.7)
    word = found(Signal("lexicon", Category.DRUGS, 0.6))
    verdicts = [
        judge(word, rules, TABLES, where="query", mode=mode, side=Side.QUERY).action
        for mode in (Mode.TEXT, Mode.IMAGE)
    ]
    assert verdicts == [Action.ALLOW, Action.REFUSE]


@pytest.mark.parametrize("raw", [-0.1, 1.1, math.nan, math.inf])
def test_a_score_that_is_none_is_an_error_and_no_verdict(raw: float) -> None:
    with pytest.raises(ValueError, match="open_nsfw"):
        decide(found(Signal("open_nsfw", Category.SEXUAL, raw)))


def test_the_total_of_nothing_is_nothing() -> None:
    assert total_of((), TABLES) == 0.0
    assert decide(Findings()) == Verdict(Action.ALLOW, (), 0.0, ())


@given(st.sampled_from(sorted(TABLES.tables)), st.floats(0, 1), st.floats(0, 1))
def test_every_table_rises(name: tuple[str, Category], one: float, other: float) -> None:
    table = TABLES.tables[name]
    low, high = sorted((one, other))
    assert 0.0 <= table.calibrate(low) <= table.calibrate(high) <= 1.0


def test_every_table_says_what_it_rests_on() -> None:
    assert all(len(table.basis) > 20 for table in TABLES.tables.values())


def _spoilt() -> list[Any]:
    def with_table(**changes: object) -> dict[str, Any]:
        raw: dict[str, Any] = json.loads((files("service.screening") / "calibration.json").read_bytes())
        raw["detectors"]["code"]["code"] |= changes
        return raw

    whole = with_table()
    return [
        with_table(points=[[0, 0], [0.5, 0.6], [1, 0.5]]),
        with_table(points=[[0, 0], [0.5, 0.6], [0.5, 0.7], [1, 1]]),
        with_table(points=[[0, 0], [1, 1.1]]),
        with_table(points=[[0.1, 0], [1, 1]]),
        with_table(points=[[0, 0], [0.9, 1]]),
        with_table(points=[[0, 0]]),
        with_table(points=[[0, "x"], [1, 1]]),
        with_table(weight=0),
        with_table(role="rules"),
        with_table(basis=""),
        {**whole, "version": 2},
        {**whole, "weights": {**whole["weights"], "code": 2}},
        {**whole, "weights": dict(itertools.islice(whole["weights"].items(), 3))},
        {},
        [],
    ]


@pytest.mark.parametrize("raw", _spoilt())
def test_a_wrong_table_is_refused_at_the_start(raw: object) -> None:
    with pytest.raises(CalibrationInvalid):
        read_calibration(json.dumps(raw).encode())
