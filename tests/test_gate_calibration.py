from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from moon.errors import CalibrationError, UsageError
from moon.gate import STORED_SCORES
from moon.gate_calibration import calibrate_conformal, calibrate_pac, rate

# Few distinct values, so that ties are common.
TIED = st.lists(st.integers(0, 8).map(float), min_size=20, max_size=60)


@pytest.mark.parametrize(
    ("n", "alpha", "k"),
    [
        (19, 0.05, 1),
        (99, 0.29, 29),
        (99, "0.29", 29),
        (100, 0.05, 5),
        (9, 0.999, 9),
        (499, 0.1, 50),
    ],
)
def test_the_rank_is_computed_exactly(n: int, alpha: float | str, k: int) -> None:
    made = calibrate_conformal(np.arange(1, n + 1), alpha)
    assert (made.k, made.threshold) == (k, float(k))


def test_floats_alone_would_get_the_rank_wrong() -> None:
    assert int(0.29 * 100) == 28
    assert rate(0.29, "alpha") == Fraction(29, 100)


def test_order_does_not_matter() -> None:
    scores = np.random.default_rng(0).normal(size=200)
    assert calibrate_conformal(scores, 0.1) == calibrate_conformal(np.sort(scores), 0.1)


@pytest.mark.parametrize(("alpha", "smallest"), [(0.05, 19), (0.01, 99), (0.3, 3)])
def test_too_few_for_conformal_says_how_many(alpha: float, smallest: int) -> None:
    calibrate_conformal(np.zeros(smallest), alpha)
    with pytest.raises(CalibrationError, match=f"{smallest - 1} .*too few.*at least {smallest} "):
        calibrate_conformal(np.zeros(smallest - 1), alpha)


def test_too_few_for_pac_says_how_many() -> None:
    assert calibrate_pac(np.arange(59.0), 0.05, 0.05).k == 1
    with pytest.raises(CalibrationError, match=r"58 .*at least 59 held-out"):
        calibrate_pac(np.arange(58.0), 0.05, 0.05)


def test_pac_by_hand() -> None:
    made = calibrate_pac(np.arange(1.0, 501.0), 0.05, 0.05)
    assert (made.k, made.threshold, made.method) == (17, 17.0, "pac")
    assert made.achieved["reject"] == 16 / 500


@pytest.mark.parametrize("value", [0, 1, -0.1, 2, float("nan"), float("inf"), "x", None])
def test_a_rate_out_of_range_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="alpha must"):
        calibrate_conformal(np.arange(100), value)  # type: ignore[arg-type]


def test_wrong_shapes_and_no_scores_are_refused() -> None:
    with pytest.raises(UsageError, match=r"shape \[n\], not \[2, 2\]"):
        calibrate_conformal(np.zeros((2, 2)), 0.5)
    with pytest.raises(CalibrationError, match="there are no scores"):
        calibrate_conformal([], 0.5)
    with pytest.raises(CalibrationError, match="none of the calibration scores is finite"):
        calibrate_conformal([np.nan, np.inf], 0.5)


def test_scores_that_are_not_finite_hold_the_lowest_ranks() -> None:
    scores = [np.nan, np.inf, -np.inf, *range(96)]
    made = calibrate_conformal(scores, 0.05)  # k = floor(.05 * 100) = 5
    assert (made.nonfinite, made.threshold, made.achieved["reject"]) == (3, 1.0, 4 / 99)
    assert made.p_value(-5.0) == 4 / 100  # the three, and one for itself
    assert made.ranks[0] == 4


def test_more_scores_not_finite_than_may_be_rejected_are_refused() -> None:
    scores = [*[np.nan] * 5, *range(94)]
    with pytest.raises(CalibrationError, match=r"5 of 99 calibration scores are not finite.* 4 "):
        calibrate_conformal(scores, 0.05)


def test_the_interval_is_the_beta_distributions() -> None:
    made = calibrate_conformal(np.arange(999.0), 0.05)
    assert made.k == 50
    assert made.achieved["ci95"] == pytest.approx(stats.beta.ppf([0.025, 0.975], 50, 950))


@given(TIED, st.sampled_from([0.05, 0.1, 0.29, 0.5]), st.floats(-1, 9, width=32))
def test_accepting_is_p_above_alpha(scores: list[float], alpha: float, score: float) -> None:
    made = calibrate_conformal(scores, alpha)
    for value in (score, *scores):
        p = made.p_value(value)
        assert p is not None
        assert bool(made.accepts(value)) == (p > alpha)
        assert p == (1 + sum(other <= value for other in scores)) / (len(scores) + 1)


@given(TIED, st.floats(0.05, 0.9), st.floats(0.05, 0.9), st.lists(st.floats(-1, 9), min_size=1))
def test_a_larger_rate_never_covers_more(
    scores: list[float], one: float, other: float, tried: list[float]
) -> None:
    strict = calibrate_conformal(scores, max(one, other))
    loose = calibrate_conformal(scores, min(one, other))
    assert strict.threshold >= loose.threshold
    assert (strict.accepts(tried) <= loose.accepts(tried)).all()


@pytest.mark.parametrize("alpha", [0.05, 0.1234, 0.9])
@pytest.mark.parametrize("tied", [False, True])
def test_thinning_changes_no_decision_and_hardly_a_p_value(alpha: float, tied: bool) -> None:
    n = 25_000
    scores = np.random.default_rng(1).normal(size=n).astype(np.float32)
    if tied:
        scores = scores.round(2)
    made = calibrate_conformal(scores, alpha)
    assert len(made.scores) <= STORED_SCORES and made.k in made.ranks
    assert made.ranks[0] == 1 and made.ranks[-1] == n
    around = np.sort(scores)[made.k - 100 : made.k + 100]  # type: ignore[operator]
    tried = np.concatenate([np.random.default_rng(2).normal(size=200), around, [-9, 9]])
    for value in tried.astype(np.float32):
        p = made.p_value(float(value))
        assert p is not None
        assert bool(made.accepts(value)) == (p > alpha)
        exact = (1 + np.sum(scores <= value)) / (n + 1)
        assert exact <= p <= exact + 4 / n  # valid: never too small


def test_the_conformal_promise_holds_and_one_rank_more_would_break_it() -> None:
    # Uniform scores: the true reject rate of a threshold is the threshold itself.
    n, alpha, draws = 39, 0.05, 1500
    rng = np.random.default_rng(0)
    rates, next_rates = [], []
    for _ in range(draws):
        scores = rng.uniform(size=n)
        made = calibrate_conformal(scores, alpha)
        rates.append(made.threshold)
        next_rates.append(np.sort(scores)[made.k])  # type: ignore[index]
    slack = 4 * np.std(rates) / np.sqrt(draws)
    assert abs(np.mean(rates) - alpha) <= slack  # here k / (n + 1) is alpha itself
    assert np.mean(next_rates) > alpha + slack


def test_the_pac_promise_holds_and_one_rank_more_would_break_it() -> None:
    n, alpha, delta, draws = 40, 0.1, 0.1, 1500
    rng = np.random.default_rng(0)
    broken = next_broken = 0
    for _ in range(draws):
        scores = rng.uniform(size=n)
        made = calibrate_pac(scores, alpha, delta)
        broken += made.threshold > alpha
        next_broken += np.sort(scores)[made.k] > alpha  # type: ignore[index]
    slack = 4 * np.sqrt(delta * (1 - delta) / draws)
    assert broken / draws <= delta + slack
    assert next_broken / draws > delta + slack
