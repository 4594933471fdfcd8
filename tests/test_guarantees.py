"""Every promise of a calibration, kept over many draws; and one rank more would break it.

Scores are uniform, so that the true reject rate of a threshold is known exactly: it is the
threshold itself, or, where scores are rounded up to multiples of 1 / GRID so that they tie, the
threshold less one step.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from moon import gate_calibration, risk_calibration
from moon.class_calibration import calibrate_per_class
from moon.errors import CalibrationError
from moon.gate_calibration import Promise, calibrate_conformal, calibrate_pac
from moon.risk_calibration import calibrate_risk

GRID = 200
DRAWS = 1200
Floats = NDArray[np.float64]


@pytest.fixture(autouse=True)
def no_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    """The intervals that are only recorded take most of a small calibration's time."""
    monkeypatch.setattr(gate_calibration, "beta_interval", lambda a, b: (0.0, 1.0))
    monkeypatch.setattr(risk_calibration, "beta_quantile", lambda p, a, b: 0.5)


@pytest.fixture
def off_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make every calibration take another rank than the right one."""
    right = Promise.rank

    def wrong_by(ranks: int) -> None:
        monkeypatch.setattr(Promise, "rank", lambda self, n: right(self, n) + ranks)

    return wrong_by


def draw(rng: np.random.Generator, n: int, tied: bool) -> Floats:
    uniform = rng.uniform(size=n)
    return np.ceil(uniform * GRID) / GRID if tied else uniform


def rejected(threshold: float, tied: bool) -> float:
    """The share of all scores below the threshold."""
    return max(0.0, round(threshold * GRID - 1) / GRID) if tied else threshold


def slack(rates: list[float]) -> float:
    return float(4 * np.std(rates) / np.sqrt(len(rates)))


@pytest.mark.parametrize("tied", [False, True])
def test_marginal_conformal(tied: bool, off_by: Callable[[int], None]) -> None:
    alpha, n = 0.05, 39  # k / (n + 1) is alpha itself

    def rates() -> list[float]:
        rng = np.random.default_rng(0)
        gates = (calibrate_conformal(draw(rng, n, tied), alpha) for _ in range(DRAWS))
        return [rejected(gate.threshold, tied) for gate in gates]

    lost = tied / GRID
    right = rates()
    assert alpha - lost - slack(right) <= np.mean(right) <= alpha + slack(right)
    off_by(+1)
    assert np.mean(more := rates()) > alpha + slack(more)
    off_by(-1)
    assert np.mean(less := rates()) < alpha - lost - slack(less)


def failing(n: int, rank: int, alpha: float, tied: bool) -> float:
    """The chance that the score of that rank rejects more than alpha, by another route."""
    # More than alpha is rejected when fewer than `rank` scores lie at or below the last
    # threshold that keeps the promise.
    last = alpha + (1 / GRID if tied else 0)
    return float(stats.binom.cdf(rank - 1, n, last))


@pytest.mark.parametrize("tied", [False, True])
def test_pac(tied: bool, off_by: Callable[[int], None]) -> None:
    n, alpha, delta = 40, 0.1, 0.1
    allowed = 4 * np.sqrt(delta * (1 - delta) / DRAWS)

    def broken() -> float:
        rng = np.random.default_rng(0)
        gates = (calibrate_pac(draw(rng, n, tied), alpha, delta) for _ in range(DRAWS))
        return float(np.mean([rejected(gate.threshold, tied) > alpha for gate in gates]))

    assert failing(n, 2, alpha, False) <= delta < failing(n, 3, alpha, False)
    assert broken() <= delta
    assert broken() == pytest.approx(failing(n, 2, alpha, tied), abs=allowed)
    off_by(+1)
    assert broken() > delta + allowed
    off_by(-1)
    assert broken() < failing(n, 2, alpha, tied) - allowed


COUNTS = (39, 59, 79)  # of each predicted class: k / (n + 1) is alpha itself
LABELS = np.repeat(np.arange(3), COUNTS)
NAMES = ("a", "b", "c")


def by_class_rates(promise: Promise, draws: int, tied: bool) -> Floats:
    """The true reject rate of each class's threshold, [draws, 3]; scores of class c are c + U."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        scores = draw(rng, len(LABELS), tied) + LABELS
        order = rng.permutation(len(LABELS))
        gate = calibrate_per_class(scores[order], LABELS[order], NAMES, promise)
        assert gate.per_class is not None and not gate.per_class.pooled
        found.append([rejected(gate.per_class.values[c] - c, tied) for c in range(3)])
    return np.array(found)


@pytest.mark.parametrize("tied", [False, True])
def test_class_conditional_conformal(tied: bool, off_by: Callable[[int], None]) -> None:
    alpha, lost = 0.05, tied / GRID
    promise = Promise.of(alpha)

    def within(rates: Floats) -> tuple[bool, bool]:
        """Whether no class is rejected too often, and none too seldom."""
        allowed = 4 * rates.std(axis=0) / np.sqrt(len(rates))
        means = rates.mean(axis=0)
        # Scores near 2 are rounded to float32 by up to 1e-7.
        return bool((means <= alpha + allowed).all()), bool(
            (means >= alpha - lost - allowed - 1e-6).all()
        )

    assert within(by_class_rates(promise, 700, tied)) == (True, True)
    off_by(+1)
    assert not within(by_class_rates(promise, 700, tied))[0]
    off_by(-1)
    assert not within(by_class_rates(promise, 700, tied))[1]


def test_one_threshold_does_not_keep_the_promise_by_class() -> None:
    rng = np.random.default_rng(0)
    rates = [
        rejected(calibrate_conformal(draw(rng, len(LABELS), False) + LABELS, 0.05).threshold, False)
        for _ in range(200)
    ]
    assert np.mean(rates) > 0.2  # of class a, where all the low scores are


@pytest.mark.parametrize("tied", [False, True])
def test_class_conditional_pac(tied: bool, off_by: Callable[[int], None]) -> None:
    alpha, delta, draws = 0.1, 0.1, 700
    promise = Promise.of(alpha, delta)
    allowed = 4 * np.sqrt(delta * (1 - delta) / draws)

    def broken() -> Floats:
        share: Floats = (by_class_rates(promise, draws, tied) > alpha + 1e-6).mean(axis=0)
        return share

    assert (broken() <= delta + allowed).all()
    off_by(+1)
    assert (broken() > delta + allowed).any()


@pytest.mark.parametrize("tied", [False, True])
def test_pooled_classes_keep_the_promise_together(
    tied: bool, off_by: Callable[[int], None]
) -> None:
    # 19 of the two rare classes: k / (n + 1) = 1 / 20. Which of the two is by chance.
    alpha, draws = 0.05, 1200

    def rates() -> list[float]:
        rng = np.random.default_rng(0)
        found = []
        for _ in range(draws):
            rare = rng.integers(1, 3, 19)
            labels = np.append(np.zeros(39, int), rare)
            scores = draw(rng, 58, tied) + 0.5 * (labels == 2)
            gate = calibrate_per_class(scores, labels, NAMES, Promise.of(alpha))
            assert gate.per_class is not None and set(gate.per_class.pooled) == {"b", "c"}
            bar = gate.per_class.values[1]
            assert bar == gate.per_class.values[2]
            both = [rejected(min(max(bar - shift, 0), 1), tied) for shift in (0, 0.5)]
            found.append(float(np.mean(both)))
        return found

    right = rates()
    assert alpha - tied / GRID - slack(right) <= np.mean(right) <= alpha + slack(right)
    off_by(+1)
    assert np.mean(more := rates()) > alpha + slack(more)


def test_selective_risk_where_scores_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two scores: the high one is never wrong, and accepting the low one breaks the promise.

    The 160 that are not spent on placing allow 11 errors: P(Bin(160, .1) <= 11) = .114.
    """
    risk, delta, n, draws = 0.1, 0.12, 200, 1200
    right = risk_calibration.lower_tail_at_most
    over = risk + 0.0005

    def broken(more: int) -> float:
        """How often the low score is accepted, allowing so many errors more than is right."""
        monkeypatch.setattr(
            risk_calibration, "lower_tail_at_most", lambda e, m, p, b: right(e - more, m, p, b)
        )
        rng = np.random.default_rng(0)
        count = 0
        for seed in range(draws):
            scores = (rng.uniform(size=n) > 0.5).astype(float)
            wrong = (scores == 0) & (rng.uniform(size=n) < 2 * over)
            try:
                count += calibrate_risk(scores, ~wrong, risk, delta, seed=seed).threshold == 0
            except CalibrationError:
                continue  # 80 perfect images are not always enough for the first test
        return count / draws

    allowed = 4 * np.sqrt(delta * (1 - delta) / draws)
    assert stats.binom.cdf(11, 160, risk) <= delta < stats.binom.cdf(12, 160, risk)
    expected = stats.binom.cdf(11, 160, over)
    assert broken(0) == pytest.approx(expected, abs=allowed)
    assert broken(0) <= delta
    assert broken(+1) > delta + allowed
    assert broken(-1) < expected - allowed


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_selective_risk_by_another_route(tied: bool, seed: int) -> None:
    """The threshold is the last that Clopper and Pearson's bound passes, by scipy."""
    rng = np.random.default_rng(seed)
    scores = draw(rng, 1000, tied).astype(np.float32)
    correct = rng.uniform(size=1000) > 0.35 * (1 - scores)
    gate = calibrate_risk(scores, correct, 0.15, 0.1, seed=seed)
    testing = np.random.default_rng(seed).permutation(1000)[200:]
    placing = np.setdiff1d(scores, scores[testing]) if not tied else np.unique(scores)

    def passes(threshold: float) -> bool:
        accepted = scores[testing] >= np.float32(threshold)
        errors, m = int((accepted & ~correct[testing]).sum()), int(accepted.sum())
        return errors < m and bool(stats.beta.ppf(0.9, errors + 1, m - errors) <= 0.15)

    assert passes(gate.threshold)
    looser = placing[placing < gate.threshold]
    # The thresholds are quantiles of the placing part, one in a hundred: of 200 scores, no
    # more than two are left out between two of them.
    if len(looser):
        next_ones = np.sort(looser)[::-1][:3]
        assert tied or not all(passes(float(threshold)) for threshold in next_ones)
