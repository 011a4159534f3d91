"""The worker's scores of descriptions become signals: how far a risky one is ahead of the best harmless one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import ModelFailed, Pixels
from service.questions import ASKED, HARMLESS, RISKY, answers, question
from service.screening.calibration import load_calibration
from tenants.kinds import FilterMode

COUNT = len(RISKY) + len(HARMLESS)
MARGINS = st.lists(st.floats(-1e6, 1e6), min_size=COUNT, max_size=COUNT)


def test_the_image_is_the_query_and_every_description_a_candidate() -> None:
    image = Pixels(2, 2, bytes(12))
    job = question(image)
    assert job.query.image is image
    assert len(job.candidates) == COUNT
    assert all(candidate.text and candidate.image is None for candidate in job.candidates)


@given(MARGINS)
def test_every_category_gets_one_score_between_0_and_1(margins: list[float]) -> None:
    signals = answers(margins)
    assert [signal.category for signal in signals] == list(dict.fromkeys(name for name, _ in RISKY))
    assert all(0.0 <= signal.score <= 1.0 for signal in signals)


def test_what_is_no_more_like_a_risk_than_like_something_harmless_scores_a_half_at_most() -> None:
    assert all(signal.score == 0.5 for signal in answers([3.0] * COUNT))
    ahead = [0.0] * len(RISKY) + [5.0] * len(HARMLESS)
    assert all(signal.score < 0.01 for signal in answers(ahead))


def test_of_a_categorys_descriptions_the_best_one_counts() -> None:
    margins = [-9.0] * COUNT
    margins[1] = 4.0  # the second of weapons
    found = {signal.category: signal.score for signal in answers(margins)}
    assert found[RISKY[1][0]] > 0.99
    assert all(score <= 0.5 for category, score in found.items() if category is not RISKY[1][0])


def test_by_itself_the_model_never_reaches_the_moderate_threshold() -> None:
    tables = load_calibration()
    for category in ASKED:
        assert tables.table("model", category).calibrate(1.0) < FilterMode.MODERATE.threshold


@pytest.mark.parametrize("margins", [[], [0.0] * (COUNT - 1), [math.nan] * COUNT, [math.inf] * COUNT])
def test_a_score_that_is_none_is_a_failure_and_no_signal(margins: list[float]) -> None:
    with pytest.raises(ModelFailed):
        answers(margins)
