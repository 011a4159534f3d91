"""A threshold moves by audited votes alone, and never further than was promised, whatever the votes say."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenants.adaptation import (
    BAND,
    FEWEST_VOTES,
    LEAST,
    MARGIN,
    MOST,
    NOTHING,
    Adapted,
    Aim,
    Learnt,
    Reason,
    Situation,
    State,
    Vote,
    aim,
    begin,
    bounds,
    effective,
    is_for_review,
    recall,
    step,
)
from tenants.policy import Policy
from tenants.risk import Category, Mode

TODAY = date(2026, 11, 27)
HATE = (Category.HATE, Mode.TEXT)
LOW_MISSES = [Vote(0.35, True)] * 200
HIGH_ALARMS = [Vote(0.9, False)] * 400

scores = st.integers(0, 1000).map(lambda thousandths: thousandths / 1000)
anchors = scores
votes = st.builds(
    Vote,
    score=scores,
    harmful=st.booleans(),
    weight=st.sampled_from([0.25, 1.0, 10.0, 20.0]),
    age_days=st.floats(0, 90),
)
many_votes = st.lists(st.tuples(votes, st.integers(1, 60)), min_size=1, max_size=12).map(
    lambda groups: [vote for vote, times in groups for _ in range(times)]
)
places = st.tuples(st.sampled_from(Category), st.sampled_from(Mode))


def situation(given_votes: list[Vote], *, anchor: float = 0.6, **more: object) -> Situation:
    fields: dict[str, object] = {
        "anchor": anchor,
        "limits": bounds(anchor, *HATE),
        "detectors": "a",
        "votes": given_votes,
        "has_baseline": True,
        "canaries": (0.95,) * 100,
    }
    return Situation(**{**fields, **more})  # type: ignore[arg-type]


def run(state: State, now: Situation, days: int) -> list[State]:
    states = [state]
    for ahead in range(1, days + 1):
        states.append(step(states[-1], now, TODAY + timedelta(days=ahead)).state)
    return states


# -- the bounds -------------------------------------------------------------------------------------------------


@given(anchors, places, scores)
def test_bounds_lie_within_all_that_is_promised(
    anchor: float, place: tuple[Category, Mode], most: float
) -> None:
    limits = bounds(anchor, *place, most=most)
    if limits is None:
        assert place == (Category.WEAPONS, Mode.TEXT) or not LEAST <= anchor <= MOST
        return
    low, high = limits
    assert low <= high <= min(anchor + MARGIN, MOST, most) + 1e-9
    assert low >= min(max(anchor - MARGIN, LEAST), high) - 1e-9
    if place[0] in (Category.SEXUAL, Category.WEAPONS):
        assert high <= max(anchor, 0.8), "what is clear is stopped wherever the policy stops it"


@given(anchors, places, scores, scores, scores)
def test_no_stored_number_takes_a_threshold_out_of_its_bounds(
    anchor: float, place: tuple[Category, Mode], stored: float, learnt_from: float, most: float
) -> None:
    policy = Policy(risk_thresholds=((place[0], anchor),))
    adapted = Adapted({place: Learnt(stored, learnt_from, "a")}, most)
    threshold = effective(policy, adapted, *place)
    limits = bounds(anchor, *place, most=most)
    assert threshold == anchor or (limits is not None and limits[0] <= threshold <= limits[1])


def test_what_was_learnt_holds_for_its_own_anchor_mode_and_detectors_alone() -> None:
    policy = Policy()
    adapted = Adapted({HATE: Learnt(0.55, 0.6, "a")})
    assert effective(policy, adapted, *HATE) == effective(policy, adapted, *HATE, detectors="a") == 0.55
    assert effective(policy, adapted, *HATE, detectors="b") == 0.6
    assert effective(policy, adapted, Category.HATE, Mode.IMAGE) == 0.6
    assert effective(policy, NOTHING, *HATE) == 0.6
    assert effective(replace(policy, adaptive_thresholds=False), adapted, *HATE) == 0.6
    assert effective(replace(policy, risk_thresholds=((Category.HATE, 0.7),)), adapted, *HATE) == 0.7


def test_what_a_callers_row_says_is_read_as_it_was_learnt() -> None:
    told = '{"most": 0.65, "learnt": [["hate", "text", 0.68, 0.6, "a"]]}'
    adapted = Adapted.from_json(told)
    assert adapted == Adapted({HATE: Learnt(0.68, 0.6, "a")}, 0.65)
    assert effective(Policy(), adapted, *HATE) == 0.65, "the ceiling's"
    assert Adapted.from_json(None) == NOTHING
    with pytest.raises(ValueError, match="politics"):
        Adapted.from_json('{"most": null, "learnt": [["politics", "text", 0.5, 0.6, ""]]}')


def test_the_band_is_for_a_reviewer_where_the_tenant_wants_it() -> None:
    inside, outside = 0.6 - BAND / 2, 0.6 + BAND * 2
    assert is_for_review(Policy(review_band=True), 0.6, inside)
    assert not is_for_review(Policy(review_band=True), 0.6, outside)
    assert not is_for_review(Policy(), 0.6, inside)


# -- the aim ----------------------------------------------------------------------------------------------------


def test_too_few_votes_say_nothing() -> None:
    assert aim([Vote(0.3, True)] * (FEWEST_VOTES - 1), 0.6) == Aim(None, 49, 49)
    assert aim([Vote(0.3, True)] * FEWEST_VOTES, 0.6).threshold is not None


def test_votes_pull_by_how_many_they_are() -> None:
    aims = [aim([Vote(0.3, True)] * count, 0.6).threshold for count in (50, 200, 2000)]
    assert aims == [0.54, 0.45, round(0.6 - 0.3 * 2000 / 2200, 3)]


def test_old_votes_pull_less() -> None:
    new, old = (aim([Vote(0.3, True, age_days=age)] * 200, 0.6).threshold for age in (0, 60))
    assert new is not None and old is not None
    assert new < old < 0.6


def test_one_end_users_flood_weighs_as_one_item() -> None:
    """A thousand harmless items of one user, each 1/1000, against sixty users' misses."""
    flood = [Vote(0.9, False, weight=0.001)] * 1000
    misses = [Vote(0.4, True)] * 60
    wanted = aim(flood + misses, 0.6).threshold
    assert wanted is not None and wanted < 0.6
    even = aim([replace(vote, weight=1.0) for vote in flood] + misses, 0.6).threshold
    assert even is not None and even > 0.6, "that is what the weights are there for"


@given(many_votes, anchors, scores, st.booleans(), st.floats(0, 60))
def test_a_harmful_vote_never_loosens_and_a_harmless_one_never_tightens(
    before: list[Vote], anchor: float, score: float, harmful: bool, age: float
) -> None:
    first = aim(before, anchor).threshold
    second = aim([*before, Vote(score, harmful, age_days=age)], anchor).threshold
    if first is None or second is None:
        return
    assert second <= first if harmful else second >= first


# -- the steps --------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            many_votes, st.booleans(), st.booleans(), st.sampled_from(["", "scores"]), st.integers(0, 3)
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(200, 850).map(lambda thousandths: thousandths / 1000),
    places,
)
def test_no_day_moves_it_further_than_its_way(
    turns: list[tuple[list[Vote], bool, bool, str, int]], anchor: float, place: tuple[Category, Mode]
) -> None:
    limits = bounds(anchor, *place)
    state, today = begin(anchor, TODAY, "a"), TODAY
    mornings = {TODAY: anchor}
    for turn_votes, tighten_only, has_baseline, alarm, days in turns:
        today += timedelta(days=days)
        mornings.setdefault(today, state.threshold)
        now = situation(turn_votes, anchor=anchor, limits=limits, alarm=alarm, has_baseline=has_baseline)
        moved = step(state, now, today, tighten_only=tighten_only).state
        assert mornings[today] - 0.01 - 1e-9 <= moved.threshold <= mornings[today] + 0.005 + 1e-9
        if alarm or limits is None:
            assert moved.threshold == state.threshold
        else:
            assert limits[0] <= moved.threshold <= limits[1]
        if tighten_only or not has_baseline:
            assert moved.threshold <= state.threshold
        state = moved


def test_it_gets_stricter_by_a_hundredth_a_day_down_to_its_bound() -> None:
    states = run(begin(0.6, TODAY, "a"), situation(LOW_MISSES), 15)
    assert [state.threshold for state in states[:4]] == [0.6, 0.59, 0.58, 0.57]
    assert states[-1].threshold == 0.5


def test_it_gets_looser_half_as_fast_up_to_its_bound() -> None:
    states = run(begin(0.6, TODAY, "a"), situation(HIGH_ALARMS), 30)
    assert [state.threshold for state in states[:3]] == [0.6, 0.605, 0.61]
    assert states[-1].threshold == 0.7


def test_a_day_of_many_steps_goes_no_further_than_one() -> None:
    state = begin(0.6, TODAY, "a")
    for _ in range(5):
        state = step(state, situation(LOW_MISSES), TODAY).state
    assert state.threshold == 0.59
    assert step(state, situation(LOW_MISSES), TODAY).reason is Reason.SPENT


def test_a_vote_tightens_at_once_and_loosens_only_with_the_daily_step() -> None:
    state = begin(0.6, TODAY, "a")
    assert step(state, situation(LOW_MISSES), TODAY, tighten_only=True).state.threshold == 0.59
    assert step(state, situation(HIGH_ALARMS), TODAY, tighten_only=True).state.threshold == 0.6


def test_it_stands_still_while_the_traffic_looks_wrong_and_goes_on_afterwards() -> None:
    alarmed = step(begin(0.6, TODAY, "a"), situation(LOW_MISSES, alarm="few_users"), TODAY)
    assert (alarmed.state.threshold, alarmed.state.frozen, alarmed.reason) == (
        0.6,
        "few_users",
        Reason.FROZEN,
    )
    after = step(alarmed.state, situation(LOW_MISSES), TODAY)
    assert (after.state.threshold, after.state.frozen, after.reason) == (0.59, "", Reason.TIGHTER)
    quiet = step(alarmed.state, situation([]), TODAY)
    assert (quiet.state.frozen, quiet.reason) == ("", Reason.THAWED)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"detectors": "b"}, Reason.NEW_DETECTORS),
        ({"anchor": 0.7, "limits": (0.6, 0.8)}, Reason.NEW_ANCHOR),
        ({"limits": None}, Reason.FIXED),
    ],
)
def test_what_it_was_learnt_under_changes_and_it_is_the_anchor_again(
    change: dict[str, object], reason: Reason
) -> None:
    learnt = State(0.52, 0.6, TODAY, 0.53, "a")
    moved = step(learnt, situation(LOW_MISSES, **change), TODAY)  # type: ignore[arg-type]
    assert moved.reason is reason
    assert moved.state.threshold == moved.state.anchor == change.get("anchor", 0.6)


def test_the_first_detectors_are_no_change() -> None:
    moved = step(begin(0.6, TODAY), situation(LOW_MISSES), TODAY)
    assert (moved.reason, moved.state.detectors) == (Reason.TIGHTER, "a")


def test_a_lower_ceiling_takes_it_along_at_once() -> None:
    moved = step(State(0.68, 0.6, TODAY, 0.68, "a"), situation([], limits=(0.5, 0.62)), TODAY)
    assert (moved.state.threshold, moved.reason) == (0.62, Reason.NEW_BOUNDS)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"has_baseline": False}, Reason.NO_BASELINE),
        ({"canaries": ()}, Reason.CANARIES),
        ({"canaries": (0.95,) * 98 + (0.603,) * 2}, Reason.CANARIES),
        ({"canaries": (0.95,) * 99 + (0.603,)}, Reason.LOOSER),
        ({"canaries": (0.95,) * 50 + (0.3,) * 50}, Reason.LOOSER),
    ],
)
def test_it_gets_looser_only_where_the_canaries_are_still_stopped(
    change: dict[str, object], reason: Reason
) -> None:
    moved = step(begin(0.6, TODAY, "a"), situation(HIGH_ALARMS, **change), TODAY)  # type: ignore[arg-type]
    assert moved.reason is reason
    assert moved.state.threshold == (0.605 if reason is Reason.LOOSER else 0.6)


@given(st.lists(scores, min_size=1), scores, scores)
def test_a_looser_threshold_never_stops_more_canaries(
    canaries: list[float], one: float, other: float
) -> None:
    assert recall(canaries, max(one, other)) <= recall(canaries, min(one, other))
