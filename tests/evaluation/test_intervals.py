"""Intervals: against the plain bootstrap, and by how often they hold the truth."""

from __future__ import annotations

import time
from statistics import NormalDist

import numpy as np
import pytest

from moon.evaluation.intervals import (
    auroc_ci,
    fpr95_ci,
    mean_auroc_ci,
    mean_fpr95_ci,
    mean_rate_ci,
)
from moon.evaluation.metrics import RocCurve, bootstrap_ci, rate_ci


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


def group(n, sizes, shift, seed, *, ties=False):
    """One ID set, and OOD sets each a little nearer to it."""
    rng = np.random.default_rng(seed)
    known = rng.normal(shift, 1, n)
    sets = [rng.normal(0.25 * i, 1 + 0.2 * i, m) for i, m in enumerate(sizes)]
    return (known.round(1), [s.round(1) for s in sets]) if ties else (known, sets)


def mean_of(name):
    def mean(known, *sets):
        return float(np.mean([getattr(RocCurve.of(known, one), name) for one in sets]))

    return mean


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("n", "sizes"), [(120, (2000, 3000, 2500)), (300, (60, 500)), (400, (90,))]
)
def test_the_interval_of_a_mean_is_the_joint_bootstraps(n, sizes, ties):
    known, sets = group(n, sizes, 1.2, 3, ties=ties)
    found = (mean_auroc_ci(known, sets), *mean_fpr95_ci(known, sets, resamples=20_000))
    names = ("auroc", "fpr95_id_pos", "fpr95_ood_pos")
    for name, quick in zip(names, found, strict=True):
        plain = bootstrap_ci(mean_of(name), known, *sets, resamples=1000, seed=4)
        width = plain[1] - plain[0]
        assert quick == pytest.approx(plain, abs=0.12 * width + 1.01 / min(n, *sizes)), name


def test_one_set_has_the_mean_of_one():
    known, (only,) = group(200, (150,), 1.0, 6, ties=True)
    assert mean_auroc_ci(known, [only]) == pytest.approx(auroc_ci(RocCurve.of(known, only)))
    for mean, plain in zip(
        mean_fpr95_ci(known, [only], resamples=40_000),
        fpr95_ci(known, only, resamples=40_000),
        strict=True,
    ):
        assert mean == pytest.approx(plain, abs=0.01)


def test_what_the_sets_share_does_not_average_out():
    """Few ID images and many sets: as unsure as one set, not as ten independent ones."""
    known, sets = group(60, (4000,) * 10, 1.0, 7)
    sets = [np.random.default_rng(i).permutation(sets[0]) + 1e-9 * i for i in range(10)]
    low, high = mean_auroc_ci(known, sets)
    one_low, one_high = auroc_ci(RocCurve.of(known, sets[0]))
    assert high - low == pytest.approx(one_high - one_low, rel=0.05)
    _, shared = mean_fpr95_ci(known, sets)
    _, alone = fpr95_ci(known, sets[0])
    assert shared[1] - shared[0] > 0.8 * (alone[1] - alone[0])


def test_the_interval_of_a_mean_holds_the_truth_about_as_often_as_it_says():
    normal, held, shift = NormalDist(), np.zeros(3), 1.5
    areas = [normal.cdf((shift - 0.25 * i) / (1 + (1 + 0.2 * i) ** 2) ** 0.5) for i in range(3)]
    bar = shift + normal.inv_cdf(0.05)
    passing = [1 - normal.cdf((bar - 0.25 * i) / (1 + 0.2 * i)) for i in range(3)]
    own = [0.25 * i + (1 + 0.2 * i) * normal.inv_cdf(0.95) for i in range(3)]
    rejected = [normal.cdf(t - shift) for t in own]
    truth = [np.mean(values) for values in (areas, passing, rejected)]
    for seed in range(300):
        known, sets = group(250, (200, 300, 150), shift, seed + 50)
        intervals = (mean_auroc_ci(known, sets), *mean_fpr95_ci(known, sets, seed=seed))
        held += [low <= t <= high for (low, high), t in zip(intervals, truth, strict=True)]
    assert (held / 300 > 0.91).all(), held


def test_a_mean_of_complete_separations_is_not_certain():
    low, high = mean_auroc_ci(np.full(500, 2.0), [np.full(10, 1.0), np.full(40, 1.0)])
    assert (low, high) == (pytest.approx(rate_ci(32, 32)[0]), 1.0)
    one, other = mean_fpr95_ci(np.full(500, 2.0), [np.full(10, 1.0), np.full(40, 1.0)])
    assert one == (0.0, pytest.approx(rate_ci(0, 32)[1]))
    assert other == (0.0, pytest.approx(rate_ci(0, 500)[1]))
    low, high = mean_auroc_ci(np.array([1.0]), [np.array([0.0]), np.array([2.0])])
    assert low < 0.5 < high


def test_a_set_told_apart_completely_keeps_its_doubt_in_the_mean():
    rng = np.random.default_rng(4)
    known, mixed = rng.normal(3, 1, 50), rng.normal(0, 1, 1500)
    apart = np.full(50, -20.0)
    low, high = mean_auroc_ci(known, [mixed, apart])
    alone = RocCurve.of(known, mixed)
    mean = (alone.auroc + 1) / 2
    # At its lowest the second set alone takes the mean down by half of what it may lack.
    assert low < mean - (1 - rate_ci(50, 50)[0]) / 2
    assert low > mean - (1 - rate_ci(50, 50)[0]) / 2 - (mean - auroc_ci(alone)[0])
    assert mean < high <= 1
    many = mean_auroc_ci(known, [mixed, rng.normal(0.5, 1, 50)])
    assert many[1] < 1, "sets that overlap are left as they were"


def test_a_set_of_which_none_passes_keeps_its_doubt_in_the_mean_of_fpr():
    rng = np.random.default_rng(5)
    known, mixed = rng.normal(2, 1, 4000), rng.normal(0, 1, 4000)
    apart = np.full(40, -20.0)
    (low, high), (own_low, own_high) = mean_fpr95_ci(known, [mixed, apart], resamples=20_000)
    (one_low, one_high), (other_low, other_high) = fpr95_ci(known, mixed, resamples=20_000)
    rate = RocCurve.of(known, mixed).fpr95_id_pos
    doubt = rate_ci(0, 40)[1] / 2
    # Distances to the limits add up as standard deviations do; below 0 there is no doubt.
    assert high - rate / 2 == pytest.approx(np.hypot((one_high - rate) / 2, doubt), abs=0.002)
    assert low == pytest.approx(one_low / 2, abs=0.002)
    assert high > one_high / 2 + 0.02
    # Of 4,000 known images none rejected is nearly certain.
    assert own_high == pytest.approx(other_high / 2, abs=0.002)
    assert own_low == pytest.approx(other_low / 2, abs=0.002)


def test_doubt_of_the_same_known_images_adds_up():
    rng = np.random.default_rng(6)
    known, mixed = rng.normal(2, 1, 60), rng.normal(0, 1, 3000)
    none = [np.full(3000, -20.0 - i) for i in range(3)]
    _, (_, high) = mean_fpr95_ci(known, [mixed, *none], resamples=20_000)
    _, (_, alone) = fpr95_ci(known, mixed, resamples=20_000)
    rate = RocCurve.of(known, mixed).fpr95_ood_pos
    expected = rate / 4 + np.hypot((alone - rate) / 4, 3 * rate_ci(0, 60)[1] / 4)
    assert high == pytest.approx(expected, abs=0.01)
    _, (_, both) = mean_fpr95_ci(known, none, resamples=1000)
    assert both == pytest.approx(rate_ci(0, 60)[1])


def test_the_interval_of_a_mean_with_a_perfect_set_holds_the_truth():
    """A set of which one image in 100 passes, and so none in one draw of three."""
    normal, held, shift = NormalDist(), 0, 3.0
    bar = shift + normal.inv_cdf(0.05)
    rare = bar - normal.inv_cdf(1 - 0.01)
    truth = (1 - normal.cdf(bar) + 0.01) / 2
    for seed in range(200):
        rng = np.random.default_rng(seed + 9)
        known = rng.normal(shift, 1, 20_000)
        sets = [rng.normal(0, 1, 20_000), rng.normal(rare, 1, 100)]
        (low, high), _ = mean_fpr95_ci(known, sets, seed=seed)
        held += low <= truth <= high
    assert held / 200 > 0.92


def test_the_mean_of_rates_by_hand_and_against_simulation():
    one = rate_ci(30, 100)
    assert mean_rate_ci([0.3], [one]) == pytest.approx(one)
    rng = np.random.default_rng(0)
    rates, sizes = (0.02, 0.4, 0.97), (80, 300, 120)
    held, means = 0, []
    for _ in range(2000):
        hits = [int(rng.binomial(m, p)) for p, m in zip(rates, sizes, strict=True)]
        shares = [k / m for k, m in zip(hits, sizes, strict=True)]
        low, high = mean_rate_ci(shares, [rate_ci(k, m) for k, m in zip(hits, sizes, strict=True)])
        means.append((low, high))
        held += low <= np.mean(rates) <= high
    assert 0.935 < held / 2000 < 0.97
    low, high = mean_rate_ci([0.0, 0.0], [rate_ci(0, 50), rate_ci(0, 50)])
    assert low == 0.0
    assert 0 < high < rate_ci(0, 50)[1]
