"""Accuracy, calibration and risk-coverage against hand-written figures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moon.errors import UsageError
from moon.evaluation import reliability as r

pairs = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.35, 0.5, 0.9, 1.0]), st.booleans()),
    min_size=1,
    max_size=40,
)


def test_ece_by_hand():
    # Two bins: [0, .5) holds .2 (wrong), .4 (right); [.5, 1] holds .9, 1.0 (right).
    found = r.reliability([0.2, 0.4, 0.9, 1.0], [0, 1, 1, 1], bins=2)
    assert found.counts.tolist() == [2, 2]
    assert found.accuracy.tolist() == [0.5, 1.0]
    assert found.confidence == pytest.approx([0.3, 0.95])
    assert found.ece == pytest.approx(0.2 / 2 + 0.05 / 2)


def test_a_confidence_of_exactly_one_counts_in_fifteen_bins():
    assert r.ece([1.0, 1.0], [0, 1]) == 0.5
    assert r.reliability([1.0], [1]).counts.tolist() == [0] * 14 + [1]


def test_an_edge_belongs_to_the_bin_above():
    assert r.reliability([0.5], [1], bins=2).counts.tolist() == [0, 1]
    assert r.reliability([0.0], [1], bins=2).counts.tolist() == [1, 0]


def test_perfectly_calibrated_answers_have_no_error():
    assert r.ece(np.full(10, 0.7), [1] * 7 + [0] * 3) == pytest.approx(0, abs=1e-12)


@given(pairs)
def test_ece_equals_a_plain_loop(drawn):
    confidence, correct = (np.array(side) for side in zip(*drawn, strict=True))
    expected = 0.0
    for b in range(15):
        inside = (confidence >= b / 15) & ((confidence < (b + 1) / 15) | (b == 14))
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            expected += inside.mean() * gap
    assert r.ece(confidence, correct) == pytest.approx(expected, abs=1e-12)


def test_accuracy():
    assert r.accuracy([1, 2, 3, 3], [1, 2, 0, 3]) == 0.75
    with pytest.raises(UsageError, match=r"\(2,\) and \(1,\)"):
        r.accuracy([1, 2], [1])


def test_risk_coverage_by_hand():
    coverage, risk = r.risk_coverage([4, 3, 2, 1], [1, 1, 0, 1])
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert risk == pytest.approx([0, 0, 1 / 3, 1 / 4])
    assert r.aurc([4, 3, 2, 1], [1, 1, 0, 1]) == pytest.approx((0 + 0 + 1 / 3 + 1 / 4) / 4)


def test_ties_are_accepted_together():
    coverage, risk = r.risk_coverage([2, 1, 1, 1], [1, 0, 1, 1])
    assert coverage.tolist() == [0.25, 1.0]
    assert risk == pytest.approx([0, 0.25])
    assert r.aurc([2, 1, 1, 1], [1, 0, 1, 1]) == pytest.approx((0 + 3 * 0.25) / 4)


@given(pairs)
def test_aurc_does_not_depend_on_the_order_of_inputs(drawn):
    values, correct = zip(*drawn, strict=True)
    assert r.aurc(values, correct) == pytest.approx(r.aurc(values[::-1], correct[::-1]), abs=1e-12)


def test_a_constant_score_has_the_error_rate_as_its_aurc():
    assert r.aurc([0.0] * 4, [1, 1, 0, 1]) == 0.25


def test_coverage_at_risk():
    values, correct = [4, 3, 2, 1], [1, 1, 0, 1]
    assert r.coverage_at_risk(values, correct, 0.0) == 0.5
    assert r.coverage_at_risk(values, correct, 0.25) == 1.0
    assert r.coverage_at_risk([1.0], [0], 0.5) == 0.0
    with pytest.raises(UsageError):
        r.coverage_at_risk(values, correct, 1.5)


def test_infinite_scores_rank_at_the_ends():
    assert r.aurc([-np.inf, np.inf, 0.0], [0, 1, 1]) == pytest.approx((0 + 0 + 1 / 3) / 3)


@pytest.mark.parametrize(
    ("confidence", "correct"), [([1.2], [1]), ([-0.1], [1]), ([0.5], [1, 0]), ([], [])]
)
def test_bad_confidences_are_refused(confidence, correct):
    with pytest.raises(UsageError):
        r.reliability(confidence, correct)
