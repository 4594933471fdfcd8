"""p-values looked up in tables: exact where it matters, and never too small."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moon.gate_calibration import calibrate_conformal
from moon.p_table import DENSE, WIDTH, PTable, p_row


def exact(calibration: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(1 + #{calibration <= s}) / (n + 1), scores that are not finite counting as the lowest."""
    ranked = np.sort(np.where(np.isfinite(calibration), calibration, -np.inf))
    return (1 + np.searchsorted(ranked, scores, side="right")) / (len(ranked) + 1)


def table(calibration: np.ndarray, k: int | None = None) -> PTable:
    return PTable.of([calibration], [k])


def test_by_hand() -> None:
    found = table(np.float32([3, 1, 2, 2]))
    assert found.scores[0, :4].tolist() == [1, 2, 3, np.inf]
    p = found.p_values(0, np.float32([0, 1, 1.5, 2, 2.5, 3, 9]))
    assert p == pytest.approx([0.2, 0.4, 0.4, 0.8, 0.8, 1, 1])
    assert found.scores.shape == (1, WIDTH) and found.levels.shape == (1, WIDTH + 1)


scores = st.one_of(
    st.floats(-10, 10, width=32), st.integers(-3, 3).map(float), st.just(float("nan")),
    st.just(float("inf")), st.just(float("-inf")),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(scores, min_size=1, max_size=60), st.lists(st.floats(-11, 11, width=32)))
def test_exact_when_all_fit(calibration: list[float], asked: list[float]) -> None:
    values, given_ = np.float32(calibration), np.float32(asked)
    found = table(values)
    assert found.fault() is None
    p = found.p_values(0, given_).astype(np.float64)
    truth = exact(values, given_)
    assert (p <= truth).all()
    assert p == pytest.approx(truth, rel=2e-7)
    lowest = (1 + np.sum(~np.isfinite(values))) / (len(values) + 1)
    assert found.p_values(0, [np.nan]) == pytest.approx(lowest)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(900, 60_000),
    steps=st.sampled_from([None, 20, 1500, 20_000]),
    share=st.floats(0.001, 0.9),
    seed=st.integers(0, 9),
)
def test_thinned_is_never_too_small_and_hardly_too_large(
    n: int, steps: int | None, share: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(n).astype(np.float32)
    if steps is not None:  # ties
        values = np.round(values * steps / 6).astype(np.float32)
    k = max(1, int(share * (n + 1)))
    found = table(values, k)
    assert found.fault() is None
    asked = np.concatenate([values, rng.uniform(-6, 6, 500).astype(np.float32)])
    p, truth = found.p_values(0, asked).astype(np.float64), exact(values, asked)
    assert (p >= truth * (1 - 2e-7)).all()
    assert (p <= truth * 1.025).all()
    low = asked < np.unique(values)[: DENSE + 1][-1]
    assert p[low] == pytest.approx(truth[low], rel=2e-7)
    # On which side of the threshold a score is, p says exactly.
    bar = np.sort(values)[k - 1]
    assert np.array_equal(p > k / (n + 1), asked >= bar)
    assert found.p_values(0, [asked.max()]) == 1


def test_many_tied_scores_are_not_stepped_over() -> None:
    """A third of the scores saturate at one value among thousands of others."""
    rng = np.random.default_rng(4)
    for at in np.linspace(-2, 2, 9):
        values = np.append(rng.standard_normal(8000), np.full(4000, at)).astype(np.float32)
        found = table(values, 600)
        p, truth = found.p_values(0, values).astype(np.float64), exact(values, values)
        assert (p >= truth * (1 - 2e-7)).all() and (p <= truth * 1.01).all()


def test_a_million_scores_fit_as_well() -> None:
    values = np.arange(1_000_000, dtype=np.float32)
    found = table(values, 50_000)
    asked = np.arange(0, 1_000_000, 37, dtype=np.float32)
    p = found.p_values(0, asked).astype(np.float64)
    truth = exact(values, asked)
    assert (p >= truth * (1 - 2e-7)).all() and (p <= 1.025 * truth).all()


def test_rejecting_by_p_keeps_the_promise_at_every_level() -> None:
    """Of thinned tables too: the share of p-values at or below a is at most a."""
    values = np.random.default_rng(2).standard_normal(30_000).astype(np.float32)
    gate = calibrate_conformal(values, 0.05, score="ebo")
    found = table(values, gate.k)
    p = found.p_values(0, values)
    for alpha in (0.001, 0.01, 0.05, 0.0731, 0.2, 0.5, 0.9):
        assert np.mean(p <= alpha) <= alpha
    assert np.array_equal(p > 0.05, gate.accepts(values))


def test_nothing_finite_says_nothing() -> None:
    found = table(np.float32([np.nan, np.inf]))
    assert found.fault() is None
    assert (found.p_values(0, np.float32([-5, 0, np.nan])) == 1).all()


def test_blank_tables() -> None:
    blank = PTable.blank(3)
    assert blank.is_blank and blank.fault() is None
    assert np.isnan(blank.p_values(1, np.float32([0, 5]))).all()
    assert not table(np.float32([1])).is_blank


@pytest.mark.parametrize(
    ("which", "at", "value", "fault"),
    [
        ("scores", 1, np.nan, "holds NaN"),
        ("scores", 0, -np.inf, "holds NaN or -inf"),
        ("scores", 1, 0.5, "not ascending"),
        ("levels", 2, 1.5, "no p-value"),
        ("levels", 0, np.nan, "no p-value"),
        ("levels", 0, 0, "no p-value"),
        ("levels", 3, 0.01, "falls"),
    ],
)
def test_faults_are_named(which: str, at: int, value: float, fault: str) -> None:
    found = table(np.float32([1, 2, 3]))
    getattr(found, which)[0, at] = value
    assert fault in str(found.fault())


def test_a_row_is_of_any_float_type() -> None:
    one, other = p_row([1.0, 2.0]), p_row(np.float32([1, 2]))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
