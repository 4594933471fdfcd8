from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from moon.errors import CalibrationError, UsageError
from moon.gate_calibration import rate
from moon.risk_calibration import _chance_without_errors, calibrate_risk, fewest_for_risk


def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Uniform scores, right with probability equal to the score: error above t is (1 - t) / 2."""
    scores = rng.uniform(size=n)
    return scores, rng.uniform(size=n) < scores


def test_the_risk_promise_holds_and_is_not_bought_by_rejecting_everything() -> None:
    risk, delta, draws = 0.2, 0.1, 250
    rng = np.random.default_rng(0)
    thresholds = []
    for seed in range(draws):
        scores, correct = draw(rng, 1500)
        thresholds.append(calibrate_risk(scores, correct, risk, delta, seed=seed).threshold)
    broken = np.mean((1 - np.array(thresholds)) / 2 > risk)
    assert broken <= delta + 4 * np.sqrt(delta * (1 - delta) / draws)
    assert np.mean(thresholds) < 0.72  # 0.6 would be the truth


def test_a_perfect_model_accepts_all_but_what_placing_missed() -> None:
    made = calibrate_risk(np.linspace(0, 1, 2000), np.ones(2000), 0.01, 0.05)
    assert made.threshold < 0.02
    assert made.achieved["error"] == 0
    accepted = round(1600 * (1 - made.threshold))
    assert made.achieved["error_bound"] == pytest.approx(1 - 0.05 ** (1 / accepted), rel=0.02)


def test_the_recorded_bound_is_clopper_and_pearsons() -> None:
    scores, correct = draw(np.random.default_rng(3), 2000)
    made = calibrate_risk(scores, correct, 0.2, 0.05)
    testing = np.random.default_rng(0).permutation(2000)[400:]
    accepted = scores[testing].astype(np.float32) >= made.threshold
    errors = int((~correct[testing][accepted]).sum())
    bound = stats.beta.ppf(0.95, errors + 1, accepted.sum() - errors)
    assert made.achieved["error_bound"] == pytest.approx(bound)
    assert made.achieved["error_bound"] <= 0.2


def test_the_walk_stops_at_the_first_failure() -> None:
    # A bad stretch in the middle: below it the error is low again, but that is never reached.
    scores = np.linspace(0, 1, 5000)
    correct = ~((scores > 0.5) & (scores < 0.7))
    made = calibrate_risk(scores, correct, 0.05, 0.05)
    assert made.threshold > 0.6


def test_labels_of_one_score_decide_together() -> None:
    # All scores tie: the only threshold accepts all, and a third of those are wrong.
    scores, correct = np.zeros(600), np.arange(600) % 3 > 0
    with pytest.raises(CalibrationError, match=r"no threshold keeps the error at most 0.2"):
        calibrate_risk(scores, correct, 0.2)
    assert calibrate_risk(scores, correct, 0.5).threshold == 0


def test_scores_that_are_not_finite_are_never_accepted() -> None:
    scores = np.append(np.linspace(0, 1, 1000), [np.nan] * 200)
    correct = np.append(np.ones(1000), np.zeros(200))
    made = calibrate_risk(scores, correct, 0.05)
    assert made.nonfinite == 200
    assert made.achieved["error"] == 0
    assert made.achieved["reject"] >= 200 / 1200


def test_too_few_says_how_many() -> None:
    # 59 must remain after a fifth placed the thresholds: 73 - 14. And where scores differ, some
    # of the 59 are below that threshold.
    calibrate_risk(np.zeros(73), np.ones(73), 0.05, 0.05)
    with pytest.raises(CalibrationError, match=r"72 .*at least 96 held-out"):
        calibrate_risk(np.zeros(72), np.ones(72), 0.05, 0.05)


@pytest.mark.parametrize(("risk", "least"), [(0.01, 373), (0.05, 73), (0.1, 36), (0.5, 6)])
def test_the_number_that_is_named_is_enough_where_nothing_is_wrong(risk: float, least: int) -> None:
    named = fewest_for_risk(rate(risk, "risk"), Fraction(1, 20))
    assert named <= 1.1 * least + 20  # not bought by asking for many

    def made(n: int, draws: int) -> float:
        rng = np.random.default_rng(n)
        count = 0
        for seed in range(draws):
            try:
                gate = calibrate_risk(rng.normal(size=n), np.ones(n), risk, seed=seed)
            except CalibrationError as error:
                assert n >= named or f"at least {named} held-out" in str(error)
                continue
            assert gate.achieved["error_bound"] <= risk
            count += 1
        return count / draws

    assert made(named, 400) > 0.97
    assert made(least, 100) < 0.4
    assert made(least - 1, 3) == 0


def test_the_chance_of_enough_is_that_of_a_draw() -> None:
    """Of 7 scores 1 is placed; 5 of the other 6 reach it when it is the lowest or the next."""
    assert _chance_without_errors(7, 5) == pytest.approx(2 / 7)
    assert _chance_without_errors(7, 6) == pytest.approx(1 / 7)
    assert _chance_without_errors(7, 7) == 0
    assert _chance_without_errors(4, 2) == 0  # none is placed


def test_a_hopeless_model_is_refused_with_its_figures() -> None:
    with pytest.raises(CalibrationError, match=r"accepts [0-9]+ images with [0-9]+ errors"):
        calibrate_risk(np.arange(500.0), np.zeros(500), 0.05)


def test_shapes_must_agree() -> None:
    with pytest.raises(UsageError, match="differ in shape"):
        calibrate_risk(np.zeros(5), np.ones(4), 0.05)
