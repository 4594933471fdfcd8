"""Metrics against hand-written figures, brute force and scikit-learn."""

from __future__ import annotations

import time
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moon.errors import UsageError
from moon.evaluation import metrics
from moon.evaluation.metrics import OOD_METRICS, RocCurve

INF = float("inf")
# Few distinct values, so that most draws hold ties within and across the two sets.
scores = st.lists(
    st.sampled_from([-INF, -2.0, -0.5, 0.0, 0.25, 1.0, 3.0, INF]), min_size=1, max_size=40
)


def by_sklearn(id_scores, ood_scores):
    from sklearn.metrics import auc, precision_recall_curve, roc_auc_score, roc_curve

    # scikit-learn refuses infinities; ranks order and tie the same way.
    pooled = np.concatenate([id_scores, ood_scores])
    ranks = np.unique(pooled, return_inverse=True)[1].astype(float)
    is_id = np.arange(len(pooled)) < len(id_scores)
    out = {"auroc": roc_auc_score(is_id, ranks)}
    for name, positive, sign in (("id_pos", is_id, 1), ("ood_pos", ~is_id, -1)):
        fpr, tpr, _ = roc_curve(positive, sign * ranks, drop_intermediate=False)
        out[f"fpr95_{name}"] = fpr[np.argmax(tpr >= 0.95)]
    for name, positive, sign in (("in", is_id, 1), ("out", ~is_id, -1)):
        precision, recall, _ = precision_recall_curve(positive, sign * ranks)
        out[f"aupr_{name}"] = auc(recall, precision)
    return out


def test_by_hand_without_ties():
    # Pairs (ID, OOD) won: 4 beats both, 3 beats 1, 2 beats 1, so 2 + 1 + 1 ... of 3 * 2.
    id_scores, ood_scores = [4.0, 3.0, 2.0], [3.5, 1.0]
    curve = RocCurve.of(id_scores, ood_scores)
    assert curve.auroc == 4 / 6
    # All three ID are in at threshold 2, where 3.5 is accepted too.
    assert curve.fpr95_id_pos == 1 / 2
    # Both OOD are caught once everything <= 3.5 is rejected: 2 of 3 ID.
    assert curve.fpr95_ood_pos == 2 / 3
    # Descending: ID OOD ID ID OOD. (recall, precision): (0,1) (1/3,1) (1/3,1/2) (2/3,2/3) (1,3/4)
    assert curve.aupr_in == pytest.approx(1 / 3 + (1 / 2 + 2 / 3) / 6 + (2 / 3 + 3 / 4) / 6)
    # Ascending: OOD ID ID OOD ID. (0,1) (1/2,1) (1/2,1/2) (1/2,1/3) (1,1/2)
    assert curve.aupr_out == pytest.approx(1 / 2 + (1 / 3 + 1 / 2) / 4)


def test_by_hand_with_ties():
    id_scores, ood_scores = [1.0, 1.0, 2.0], [1.0, 0.0]
    curve = RocCurve.of(id_scores, ood_scores)
    # Against 1: half, half, one; against 0: three.
    assert curve.auroc == (0.5 + 0.5 + 1 + 3) / 6
    assert curve.fpr95_id_pos == 1 / 2
    assert curve.fpr95_ood_pos == 2 / 3
    assert curve.thresholds.tolist() == [2.0, 1.0, 0.0]
    assert curve.id_kept.tolist() == [1, 3, 3]
    assert curve.ood_kept.tolist() == [0, 1, 2]


def test_perfect_inverted_and_constant_scores():
    assert RocCurve.of([2, 3], [0, 1]).metrics() == {
        "auroc": 1.0,
        "fpr95_id_pos": 0.0,
        "fpr95_ood_pos": 0.0,
        "aupr_in": 1.0,
        "aupr_out": 1.0,
    }
    assert metrics.auroc([0, 1], [2, 3]) == 0.0
    constant = RocCurve.of([5.0] * 3, [5.0] * 7).metrics()
    assert constant["auroc"] == 0.5
    assert constant["fpr95_id_pos"] == constant["fpr95_ood_pos"] == 1.0


def test_the_two_fpr_conventions_differ_and_use_the_first_point():
    id_scores = np.arange(100.0)
    ood_scores = np.concatenate([np.full(90, -1.0), np.full(10, 50.5)])
    curve = RocCurve.of(id_scores, ood_scores)
    # 95 of 100 ID are accepted at threshold 5 exactly (19/20 counts as 95%).
    assert curve.fpr95_id_pos == 0.10
    # 95% of OOD is caught only together with everything up to 50.5: 51 of 100 ID.
    assert curve.fpr95_ood_pos == 0.51


def test_infinities_rank_at_the_ends():
    curve = RocCurve.of([INF, 1.0, -INF], [-INF, INF])
    assert curve.auroc == ((0.5 + 1) + (0 + 1) + (0 + 0.5)) / 6
    assert np.isfinite(list(curve.metrics().values())).all()


def test_negative_zero_ties_with_zero():
    assert metrics.auroc([0.0], [-0.0]) == 0.5


@given(scores, scores)
def test_equals_scikit_learn(id_scores, ood_scores):
    ours = RocCurve.of(id_scores, ood_scores).metrics()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = by_sklearn(id_scores, ood_scores)
    assert ours == pytest.approx(theirs, abs=1e-12)


def test_equals_scikit_learn_on_a_large_continuous_sample():
    rng = np.random.default_rng(0)
    id_scores, ood_scores = rng.normal(1, 1, 20_000), rng.normal(0, 2, 15_000)
    ours = RocCurve.of(id_scores, ood_scores).metrics()
    assert ours == pytest.approx(by_sklearn(id_scores, ood_scores), abs=1e-12)


@given(scores, scores)
def test_auroc_equals_counting_pairs(id_scores, ood_scores):
    wins = sum((i > o) + 0.5 * (i == o) for i in id_scores for o in ood_scores)
    assert metrics.auroc(id_scores, ood_scores) == wins / (len(id_scores) * len(ood_scores))


@given(scores, scores)
def test_swapping_the_sets_swaps_the_metrics(id_scores, ood_scores):
    curve = RocCurve.of(id_scores, ood_scores)
    flipped = RocCurve.of(-np.array(ood_scores), -np.array(id_scores))
    assert curve.auroc == flipped.auroc
    assert curve.aupr_out == pytest.approx(flipped.aupr_in, abs=1e-12)
    assert curve.fpr95_ood_pos == flipped.fpr95_id_pos
    assert metrics.auroc(ood_scores, id_scores) == pytest.approx(1 - curve.auroc, abs=1e-12)


@given(scores, scores)
def test_only_the_order_matters(id_scores, ood_scores):
    squashed = [np.arctan(np.array(s)) for s in (id_scores, ood_scores)]
    assert RocCurve.of(*squashed).metrics() == RocCurve.of(id_scores, ood_scores).metrics()


def test_module_functions_are_the_curve_properties():
    id_scores, ood_scores = [1.0, 4.0, 2.0, 2.0], [2.0, 0.0, 1.5]
    expected = RocCurve.of(id_scores, ood_scores).metrics()
    assert {name: getattr(metrics, name)(id_scores, ood_scores) for name in OOD_METRICS} == expected


def test_no_ties_appear_that_float32_would_make():
    id_scores = 1 - np.array([1e-12, 2e-12])
    assert metrics.auroc(id_scores, 1 - np.array([3e-12])) == 1.0
    assert metrics.auroc(id_scores.astype(np.float32), [1.0]) == 0.5


@pytest.mark.slow
def test_ten_million_scores_in_seconds():
    rng = np.random.default_rng(0)
    id_scores, ood_scores = rng.normal(1, 1, 5_000_000), rng.normal(0, 1, 5_000_000)
    start = time.perf_counter()
    found = RocCurve.of(id_scores, ood_scores).metrics()
    assert time.perf_counter() - start < 20
    # P(N(1,1) > N(0,1)) = Phi(1/sqrt 2).
    assert found["auroc"] == pytest.approx(0.760250, abs=5e-4)


def test_large_counts_do_not_overflow():
    # 3e9 pairs is beyond int32; the products must not wrap.
    assert metrics.auroc(np.ones(60_000), np.zeros(50_000)) == 1.0


def test_points_run_from_corner_to_corner_and_never_go_back():
    rng = np.random.default_rng(1)
    curve = RocCurve.of(rng.normal(1, 1, 5000), rng.normal(0, 1, 3000))
    points = np.array(curve.points(100))
    assert points[0].tolist() == [0, 0]
    assert points[-1].tolist() == [1, 1]
    assert len(points) <= 100
    assert (np.diff(points, axis=0) >= 0).all()
    area = np.trapezoid(points[:, 1], points[:, 0]) if hasattr(np, "trapezoid") else None
    assert area is None or area == pytest.approx(curve.auroc, abs=2e-3)


@pytest.mark.parametrize(
    ("id_scores", "ood_scores", "message"),
    [
        ([], [1.0], "ID scores are empty"),
        ([1.0], [], "OOD scores are empty"),
        ([1.0, float("nan")], [1.0], "ID scores hold 1 NaN of 2"),
        ([[1.0]], [1.0], r"ID scores must be one-dimensional, got shape \(1, 1\)"),
    ],
)
def test_bad_scores_are_named(id_scores, ood_scores, message):
    with pytest.raises(UsageError, match=message):
        metrics.auroc(id_scores, ood_scores)


def test_bootstrap_interval_of_a_mean_is_the_normal_one():
    sample = np.random.default_rng(2).normal(10, 2, 400)
    low, high = metrics.bootstrap_ci(lambda x: float(x.mean()), sample, resamples=2000)
    half = 1.96 * sample.std() / 20
    assert low == pytest.approx(sample.mean() - half, abs=0.05)
    assert high == pytest.approx(sample.mean() + half, abs=0.05)


def test_bootstrap_is_repeatable_and_resamples_pairs_together():
    a = np.arange(50.0)
    again = [metrics.bootstrap_ci(metrics.auroc, a, a - 10, resamples=50) for _ in range(2)]
    assert again[0] == again[1]
    gap = metrics.bootstrap_ci(lambda x, y: float((x - y).mean()), a, a - 10, paired=True)
    assert gap == (10.0, 10.0)


def test_bootstrap_of_auroc_covers_the_point_estimate():
    rng = np.random.default_rng(3)
    id_scores, ood_scores = rng.normal(1, 1, 300), rng.normal(0, 1, 300)
    low, high = metrics.bootstrap_ci(metrics.auroc, id_scores, ood_scores, resamples=300)
    assert low < metrics.auroc(id_scores, ood_scores) < high
    # Hanley and McNeil's standard error at AUROC 0.76 and 300 each is about 0.020.
    assert 0.05 < high - low < 0.11


@pytest.mark.parametrize(
    ("samples", "options"),
    [
        ((), {}),
        (([],), {}),
        (([[1.0]],), {}),
        (([1.0], [1.0, 2.0]), {"paired": True}),
        (([1.0],), {"resamples": 0}),
        (([1.0],), {"level": 1.0}),
    ],
)
def test_bootstrap_refuses_nonsense(samples, options):
    with pytest.raises(UsageError):
        metrics.bootstrap_ci(lambda *x: 0.0, *samples, **options)


def test_wilson_interval_by_hand():
    # Wilson at 8 of 10, z = 1.96: the published example, (0.490, 0.943).
    assert metrics.rate_ci(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert metrics.rate_ci(0, 20)[0] == 0.0
    assert metrics.rate_ci(20, 20)[1] == 1.0
    assert metrics.rate_ci(0, 20)[1] == pytest.approx(0.1611, abs=1e-4)
    with pytest.raises(UsageError):
        metrics.rate_ci(3, 2)
