"""Intervals: against the plain bootstrap, and by how often they hold the truth."""

from __future__ import annotations

import time
from statistics import NormalDist

import numpy as np
import pytest

from moon.evaluation.intervals import auroc_ci, fpr95_ci
from moon.evaluation.metrics import RocCurve, bootstrap_ci


def scores(n, m, shift, seed, *, ties=False):
    rng = np.random.default_rng(seed)
    known, unknown = rng.normal(shift, 1, n), rng.normal(0, 1, m)
    return (known.round(1), unknown.round(1)) if ties else (known, unknown)


@pytest.mark.parametrize("ties", [False, True])
def test_delong_agrees_with_the_plain_bootstrap(ties):
    known, unknown = scores(400, 250, 1.0, 0, ties=ties)
    found = auroc_ci(RocCurve.of(known, unknown))
    plain = bootstrap_ci(
        lambda a, b: RocCurve.of(a, b).auroc, known, unknown, resamples=2000, seed=1
    )
    assert found == pytest.approx(plain, abs=0.006)


def test_delong_by_hand():
    """ID 1, 3; OOD 0, 2: wins 1/2 and 1 of ID, 1 and 1/2 of OOD; variance 1/16 + 1/16."""
    low, high = auroc_ci(RocCurve.of([1, 3], [0, 2]))
    spread = 1.959964 * (1 / 8) ** 0.5 / (0.75 * 0.25)
    assert low == pytest.approx(1 / (1 + np.exp(-(np.log(3) - spread))))
    assert high == pytest.approx(1 / (1 + np.exp(-(np.log(3) + spread))))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("n", "m"), [(200, 300), (37, 20), (1000, 50)])
def test_the_quick_bootstrap_of_fpr_is_the_plain_one(n, m, ties):
    known, unknown = scores(n, m, 1.5, 2, ties=ties)
    found = fpr95_ci(known, unknown, resamples=20_000)
    for name, quick in zip(("fpr95_id_pos", "fpr95_ood_pos"), found, strict=True):
        plain = bootstrap_ci(
            lambda a, b, name=name: getattr(RocCurve.of(a, b), name),
            known, unknown, resamples=2000, seed=3,
        )  # fmt: skip
        step = 1 / min(n, m)  # a rate moves by whole images
        assert quick == pytest.approx(plain, abs=0.02 + 1.01 * step)


def test_the_intervals_hold_the_truth_about_as_often_as_they_say():
    shift, held = 1.5, np.zeros(3)
    normal = NormalDist()
    area = normal.cdf(shift / 2**0.5)
    rate = normal.cdf(normal.inv_cdf(0.95) - shift)
    for seed in range(300):
        known, unknown = scores(300, 300, shift, seed + 100)
        intervals = (auroc_ci(RocCurve.of(known, unknown)), *fpr95_ci(known, unknown, seed=seed))
        truth = (area, rate, rate)
        held += [low <= t <= high for (low, high), t in zip(intervals, truth, strict=True)]
    assert (held / 300 > 0.91).all(), held


def test_complete_separation_is_not_certainty():
    low, high = auroc_ci(RocCurve.of([2.0] * 50, [1.0] * 20))
    assert (low, high) == (pytest.approx(0.839, abs=0.002), 1.0)
    low, high = auroc_ci(RocCurve.of([1.0] * 50, [2.0] * 20))
    assert (low, high) == (0.0, pytest.approx(0.161, abs=0.002))
    low, high = auroc_ci(RocCurve.of([1.0], [1.0]))
    assert low < 0.5 < high


def test_none_beyond_the_threshold_is_not_never():
    one, other = fpr95_ci(np.full(50, 2.0), np.full(20, 1.0))
    assert one == (0.0, pytest.approx(0.161, abs=0.002))
    assert other == (0.0, pytest.approx(0.071, abs=0.002))


def test_infinite_scores_rank_as_everywhere():
    known, unknown = np.array([-np.inf, 1.0, 2.0, 3.0] * 20), np.array([-np.inf, 0.0] * 20)
    low, high = auroc_ci(RocCurve.of(known, unknown))
    assert 0 < low < RocCurve.of(known, unknown).auroc < high < 1
    (one, other), _ = fpr95_ci(known, unknown)
    assert 0 <= one <= other <= 1


def test_a_million_images_take_no_longer_than_sorting_them():
    known, unknown = scores(1_000_000, 1_000_000, 1.0, 5)
    curve = RocCurve.of(known, unknown)
    began = time.process_time()
    low, high = auroc_ci(curve)
    fpr95_ci(known, unknown)
    assert time.process_time() - began < 5
    assert high - low < 0.002
    assert low < curve.auroc < high
