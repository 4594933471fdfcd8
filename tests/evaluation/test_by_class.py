"""A gate by class, judged class by class: the test itself, how often it errs, and its words."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from moon import gate_calibration
from moon.class_calibration import calibrate_per_class
from moon.evaluation.by_class import (
    beyond_chance,
    by_class_figures,
    chance_of_as_many,
    holm,
    judged_by_class,
)
from moon.evaluation.caveats import set_warnings
from moon.evaluation.findings import findings, rejects_more
from moon.evaluation.measure import gate_figures
from moon.evaluation.observe import Observed
from moon.gate_calibration import Promise, calibrate_conformal
from tests.bundles import make_bundle
from tests.evaluation.test_checks import arrays, open_sets

ALPHA = 0.05
GROUPS = {"near": {}, "far": {}}


def observed(gate, scores, predicted):
    accepted = gate.accepts(scores, predicted)
    return Observed({"ebo": scores}, {}, accepted, predicted, np.full(len(scores), 0.9))


def gated(counts, seed=0, delta=None):
    """A gate by class whose scores are uniform in every class."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    names = tuple(f"c{i}" for i in range(len(counts)))
    promise = Promise.of(ALPHA, delta)
    return calibrate_per_class(rng.uniform(size=len(labels)), labels, names, promise, score="ebo")


@pytest.mark.parametrize(("k", "n", "m"), [(1, 19, 30), (39, 1000, 250), (2, 59, 1)])
def test_the_chance_is_the_beta_binomials(k, n, m):
    other = stats.betabinom(m, k, n + 1 - k)
    for rejected in {0, 1, m // 3, m}:
        found = chance_of_as_many(rejected, m, k, n)
        assert found == pytest.approx(float(other.sf(rejected - 1)), abs=1e-10)


def test_the_chance_by_hand_and_of_millions():
    """One calibration score, k = 1: its rate is uniform, and so is the number rejected."""
    assert chance_of_as_many(2, 3, 1, 1) == pytest.approx(2 / 4)
    assert chance_of_as_many(51_000, 1_000_000, 50_000, 1_000_000) < 0.01
    assert chance_of_as_many(50_000, 1_000_000, 50_000, 1_000_000) == pytest.approx(0.5, abs=0.01)


def test_holm_by_hand():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_one_class_in_many_is_not_blamed_for_chance_but_for_its_fault_it_is(monkeypatch):
    """Forty classes of uniform scores: the promise holds, and in the second round not for one."""
    # Only recorded, and most of a small calibration's time.
    monkeypatch.setattr(gate_calibration, "beta_interval", lambda a, b: (0.0, 1.0))
    rng = np.random.default_rng(1)
    classes, m, draws = 40, 60, 300
    predicted = np.repeat(np.arange(classes), m)
    blamed, unadjusted, caught = 0, 0, 0
    for seed in range(draws):
        gate = gated([59] * classes, seed)
        scores = rng.uniform(size=len(predicted))
        figures = by_class_figures(gate, observed(gate, scores, predicted))
        blamed += bool(beyond_chance(figures, ALPHA))
        unadjusted += any(one["chance"] <= ALPHA for one in figures)
        scores[predicted == 7] *= 0.1
        worse = beyond_chance(by_class_figures(gate, observed(gate, scores, predicted)), ALPHA)
        caught += any(one["classes"] == ["c7"] for one in worse)
    assert blamed / draws <= ALPHA + 4 * np.sqrt(ALPHA * (1 - ALPHA) / draws)
    assert unadjusted / draws > 0.6, "without the adjustment most reports would blame a class"
    assert caught / draws > 0.6


def test_a_bad_class_is_not_hidden_by_the_others():
    gate = gated([400, 400, 400, 400])
    rng = np.random.default_rng(2)
    predicted = np.repeat(np.arange(4), [2000, 2000, 2000, 100])
    scores = rng.uniform(0.02, 1, size=len(predicted))
    scores[predicted == 3] = rng.uniform(0, 0.2, size=100)
    figures = gate_figures(gate, observed(gate, scores, predicted), GROUPS, None)
    assert 1 - figures["id"]["accept"] < ALPHA, "the rate over all classes sees nothing"
    (said,) = findings(figures, {"ebo": {"near": None, "far": None}}, None)
    worst = figures["by_class"][3]
    assert said["state"] == "bad"
    assert said["text"] == (
        "The promise does not hold on this data for 1 of 4 predicted classes: at most 5% rejected "
        f"was promised of each; worst is the class c3 ({worst['reject']:.1%} of 100 images). "
        "(Beta-binomial tests at 5%, by Holm over all 4 thresholds.)"
    )
    assert worst["n"] == 100
    assert worst["threshold"] == gate.per_class.own["c3"].value
    assert worst["reject_ci95"][0] < worst["reject"] < worst["reject_ci95"][1]
    assert worst["chance"] < worst["chance_holm"] < 0.05
    assert rejects_more(figures)


def test_the_warning_names_the_class(tmp_path):
    gate = gated([400, 400, 400])
    predicted = np.repeat(np.arange(3), 200)
    scores = np.random.default_rng(3).uniform(size=600)
    scores[predicted == 1] *= 0.1
    known = observed(gate, scores, predicted)
    figures = gate_figures(gate, known, GROUPS, None)
    bundle, sets = make_bundle(tmp_path / "b"), open_sets(arrays(1, 600), {}, {}, None)
    said = list(set_warnings(bundle, sets, {sets[0].key: known}, figures, None))
    assert any(
        w.endswith("of the known inputs predicted as c1, more than its calibration makes likely: "
                   "they may not be like the images it was calibrated on.") for w in said
    )  # fmt: skip


def one(names, n, reject, chance=0.5):
    return {
        "classes": names, "threshold": 0.0, "n": n, "reject": reject, "reject_ci95": None,
        "chance": chance, "chance_holm": chance,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("groups", "state", "text"),
    [
        (
            [one(["a"], 100, 0.03), one(["b"], 100, 0.05)],
            "good",
            "The promise holds here for each of 2 predicted classes: at most 5% rejected was "
            "promised of each; the most rejected is the class b (5.0% of 100 images), and of all "
            "4.0%.",
        ),
        (
            [one(["a"], 100, 0.07), one(["b", "c"], 9, 0.0)],
            "fair",
            "The promise is not contradicted for any of 3 predicted classes (2 share a threshold): "
            "at most 5% rejected was promised of each, exceeded for 1, most for the class a (7.0% "
            "of 100 images), but chance allows as much. (Beta-binomial tests at 5%, by Holm over "
            "all 2 thresholds.) Of 2 there are too few images here to tell.",
        ),
        (
            [one(["a"], 19, 0.2), one(["b"], 0, None, None)],
            "none",
            "There are too few known images of each of 1 predicted class to check what was "
            "promised, at most 5% of those predicted as it rejected.",
        ),
        (
            [one(["a", "b", "c", "d"], 19, 1.0, 1e-9)],
            "bad",
            "for 4 of 4 predicted classes (4 share a threshold): at most 5% rejected was promised "
            "of each; worst is the classes a, b, c, ... (100% of 19 images). (Beta-binomial tests "
            "at 5%.)",
        ),
    ],
)
def test_the_words(groups, state, text):
    found = judged_by_class(groups, ALPHA, 0.04)
    assert found[0] == state
    assert text in found[1]


def test_classes_that_share_a_threshold_are_judged_together():
    gate = gated([100, 12, 10])
    assert set(gate.per_class.pooled) == {"c1", "c2"}
    predicted = np.array([1] * 30 + [2] * 70)
    scores = np.zeros(100)
    unseen, shared = by_class_figures(gate, observed(gate, scores, predicted))
    assert (unseen["classes"], unseen["n"], unseen["chance_holm"]) == (["c0"], 0, None)
    assert (shared["classes"], shared["n"], shared["reject"]) == (["c1", "c2"], 100, 1.0)
    assert shared["chance_holm"] == shared["chance"] < 1e-6


def test_one_threshold_for_all_is_not_judged_by_class():
    gate = calibrate_conformal(np.linspace(0, 1, 100), ALPHA, score="ebo")
    known = observed(gate, np.linspace(0, 1, 50), np.zeros(50, np.int64))
    figures = gate_figures(gate, known, GROUPS, None)
    assert figures["by_class"] is None
    (said,) = findings(figures, {"ebo": {"near": None, "far": None}}, None)
    assert "class" not in said["text"]
