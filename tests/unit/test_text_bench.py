"""The arithmetic of the classifier's bench: ranks, rising sequences, and shares of weight."""

from __future__ import annotations

import numpy as np
import pytest

from bench.text_classifier import HATEFUL_SHARE, auc, isotonic, weigh
from bench.text_corpora import Labelled


def test_auc_counts_pairs_in_order_and_ties_half() -> None:
    hateful = np.array([True, False, True, False])
    assert auc(hateful, np.array([0.9, 0.1, 0.8, 0.2])) == 1.0
    assert auc(hateful, np.array([0.1, 0.9, 0.2, 0.8])) == 0.0
    assert auc(hateful, np.array([0.5, 0.5, 0.9, 0.1])) == pytest.approx(0.875)


def test_isotonic_pools_what_falls_and_keeps_what_rises() -> None:
    values, weights = np.array([0.0, 1.0, 0.0, 1.0, 1.0]), np.array([1.0, 1.0, 3.0, 1.0, 1.0])
    assert isotonic(values, weights) == pytest.approx([0.0, 0.25, 0.25, 1.0, 1.0])


def test_weights_have_the_stated_share_of_hate_and_as_many_documents_as_posts() -> None:
    posts = [Labelled("c", "en", "a", hateful, "dev") for hateful in (1, 1, 1, 0)]
    documents = [Labelled("d", "en", "b", 0, "dev")] * 7
    hateful, weight = weigh(posts, documents)
    assert weight @ hateful == pytest.approx(HATEFUL_SHARE)
    assert weight[3] == pytest.approx(weight[4:].sum())
    assert weight.sum() == pytest.approx(1)
