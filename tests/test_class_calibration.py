from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moon.class_calibration import calibrate_per_class
from moon.errors import BundleError, CalibrationError, UsageError
from moon.gate import STORED_SCORES, Gate
from moon.gate_calibration import Promise, calibrate_conformal, calibrate_pac
from moon.per_class import PerClass

NAMES = ("cat", "dog", "bird")
FIVE = Promise.of(0.05)


def made(counts: tuple[int, ...], promise: Promise = FIVE) -> Gate:
    """Class i has the scores 100 i + 1 .. 100 i + n."""
    labels = np.repeat(np.arange(len(counts)), counts)
    scores = np.concatenate([100 * i + np.arange(1, n + 1) for i, n in enumerate(counts)])
    return calibrate_per_class(scores, labels, NAMES, promise, score="ebo")


def by_class(gate: Gate) -> PerClass:
    assert gate.per_class is not None
    return gate.per_class


def test_every_class_by_hand() -> None:
    gate = made((19, 39, 99))
    found = by_class(gate)
    assert found.pool is None and not found.pooled and found.fewest == 19
    assert [(found.own[c].value, found.own[c].n, found.own[c].k) for c in NAMES] == [
        (1.0, 19, 1),
        (102.0, 39, 2),
        (205.0, 99, 5),
    ]
    assert found.own["bird"].achieved["reject"] == 4 / 99
    assert found.values.tolist() == [1.0, 102.0, 205.0]
    assert (gate.n, gate.k, gate.threshold) == (157, 7, 7.0)  # over all classes


def test_each_class_is_calibrated_as_if_alone() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 3, 900), rng.normal(size=900)
    for promise in (Promise.of("0.07"), Promise.of("0.07", "0.1")):
        found = by_class(calibrate_per_class(scores, labels, NAMES, promise))
        for i, name in enumerate(NAMES):
            part = scores[labels == i]
            alone = (
                calibrate_conformal(part, 0.07)
                if promise.delta is None
                else calibrate_pac(part, 0.07, 0.1)
            )
            assert found.own[name] == alone.overall


def test_decisions_and_p_values_are_by_predicted_class() -> None:
    gate = made((19, 39, 99))
    scores, labels = [1.0, 0.5, 150.0, 150.0, np.nan, np.inf], [0, 0, 1, 2, 0, 2]
    assert gate.accepts(scores, labels).tolist() == [True, False, True, False, False, False]
    assert gate.p_value(0.5, 0) == 1 / 20 and gate.p_value(1.0, 0) == 2 / 20
    assert gate.p_value(150.0, 2) == 1 / 100
    assert gate.p_value(float("nan"), 2) is None


def test_without_the_predicted_class_it_refuses_to_decide() -> None:
    gate = made((19, 39, 99))
    with pytest.raises(ValueError, match="needs the predicted class"):
        gate.accepts([1.0])
    with pytest.raises(ValueError, match="needs the predicted class"):
        gate.p_value(1.0)


@given(
    st.lists(st.tuples(st.integers(0, 8).map(float), st.integers(0, 2)), min_size=20, max_size=120),
    st.sampled_from([0.05, 0.1, 0.29, 0.5]),
)
def test_accepting_is_p_above_alpha_in_every_class(
    pairs: list[tuple[float, int]], alpha: float
) -> None:
    scores, labels = zip(*pairs, strict=True)
    enough = np.bincount(labels, minlength=3) >= Promise.of(alpha).fewest
    assume(enough.sum() >= 2)
    gate = calibrate_per_class(scores, labels, NAMES, Promise.of(alpha))
    for score in (-1.0, *range(9), 9.5):
        for label in range(3):
            p = gate.p_value(score, label)
            assert p is not None
            assert bool(gate.accepts([score], [label])[0]) == (p > alpha)


def test_classes_with_too_few_share_a_threshold() -> None:
    found = by_class(made((10, 99, 12)))
    assert found.pooled == {"cat": 10, "bird": 12} and set(found.own) == {"dog"}
    assert found.pool is not None
    assert (found.pool.n, found.pool.k, found.pool.value) == (22, 1, 1.0)
    assert found.values.tolist() == [1.0, 105.0, 1.0]


def test_a_pool_with_too_few_takes_in_the_least_of_the_others() -> None:
    assert by_class(made((0, 99, 50))).pooled == {"cat": 0, "bird": 50}
    assert by_class(made((3, 30, 29))).pooled == {"cat": 3, "bird": 29}
    assert by_class(made((10, 9, 99))).pooled == {"cat": 10, "dog": 9}  # 19 are enough


@pytest.mark.parametrize("counts", [(10, 11, 12), (99, 0, 0), (99, 18, 0), (0, 9, 99)])
def test_where_no_class_gets_one_of_its_own_it_is_refused(counts: tuple[int, ...]) -> None:
    with pytest.raises(
        CalibrationError, match=r"no predicted class.*takes 19 .*most were .* 1\d|99"
    ):
        made(counts)


@pytest.mark.parametrize(
    ("promise", "n", "fewest"),
    [(FIVE, 18, 19), (Promise.of(0.05, 0.05), 58, 59), (Promise.of("0.01"), 98, 99)],
)
def test_too_few_in_all_says_how_many(promise: Promise, n: int, fewest: int) -> None:
    with pytest.raises(CalibrationError, match=f"{n} .*too few.*at least {fewest} held-out"):
        calibrate_per_class(np.arange(n), np.arange(n) % 3, NAMES, promise)
    enough = 2 * fewest  # for two classes; the third, never predicted, joins one of them
    with pytest.raises(CalibrationError, match=f"takes {fewest} images predicted as it"):
        calibrate_per_class(np.arange(enough - 1), np.arange(enough - 1) % 2, NAMES, promise)
    gate = calibrate_per_class(np.arange(enough), np.arange(enough) % 2, NAMES, promise)
    assert by_class(gate).fewest == fewest and by_class(gate).pooled == {"cat": fewest, "bird": 0}


def test_scores_that_are_not_finite_count_in_their_class() -> None:
    labels = np.repeat(np.arange(3), 99)
    scores = np.tile(np.arange(99.0), 3)
    scores[[0, 1, 100]] = [np.nan, np.inf, -np.inf]
    gate = calibrate_per_class(scores, labels, NAMES, FIVE)
    assert gate.nonfinite == 3
    assert [by_class(gate).own[name].nonfinite for name in NAMES] == [2, 1, 0]
    scores[:5] = np.nan
    with pytest.raises(CalibrationError, match=r"predicted as cat: 5 of 99 .*more than the 4 "):
        calibrate_per_class(scores, labels, NAMES, FIVE)
    scores[:99] = np.nan
    with pytest.raises(CalibrationError, match=r"predicted as cat: none of .* is finite"):
        calibrate_per_class(scores, labels, NAMES, FIVE)


def test_wrong_shapes_and_labels_are_refused() -> None:
    with pytest.raises(UsageError, match=r"not \[3\] and \[2\]"):
        calibrate_per_class([1, 2, 3], [0, 1], NAMES, FIVE)
    for wrong in (3, -1):
        with pytest.raises(UsageError, match=r"must lie in 0 .. 2"):
            calibrate_per_class(np.arange(30), np.full(30, wrong), NAMES, FIVE)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("classes", [3, 700])
def test_thinning_keeps_to_its_limit_and_changes_no_decision(tied: bool, classes: int) -> None:
    rng = np.random.default_rng(0)
    n = 60_000
    labels = np.sort(rng.integers(0, classes, n) ** 2 // classes)
    scores = rng.normal(size=n).astype(np.float32)
    if tied:
        scores = scores.round(2)
    names = [str(i) for i in range(classes)]
    gate = calibrate_per_class(scores, labels, names, Promise.of(0.1))
    found = by_class(gate)
    assert sum(len(g.scores) for g in found.groups) + len(gate.scores) <= STORED_SCORES
    assert Gate.from_json(json.loads(json.dumps(gate.to_json()))) == gate
    for label in (0, 1, classes - 1):
        part = scores[labels == label]
        group = found.of(label)
        if names[label] in found.own:
            assert group.value == np.sort(part)[group.k - 1]  # type: ignore[operator]
        for score in np.append(part[:50], [group.value, np.nextafter(group.value, -9)]):
            p = gate.p_value(float(score), label)
            assert p is not None and bool(gate.accepts([score], [label])[0]) == (p > 0.1)


def test_json_and_back() -> None:
    for gate in (made((19, 39, 99)), made((10, 99, 12))):
        plain = json.loads(json.dumps(gate.to_json(), allow_nan=False))
        assert Gate.from_json(plain) == gate
        found = plain["per_class"]
        assert tuple(found["classes"]) == NAMES
        for name, entry in found["classes"].items():
            assert {"threshold", "n", "k", "achieved"} <= set(entry)
            assert (name in found["pooled"]) == (entry["k"] is None)


def test_the_stored_scores_can_be_left_out() -> None:
    text = json.dumps(made((10, 99, 12)).to_json(stored=False))
    assert '"scores"' not in text and '"ranks"' not in text and '"threshold"' in text


def test_contradictions_are_refused() -> None:
    def refused(message: str, *path: str, value: object) -> None:
        plain = made((10, 99, 12)).to_json()
        place = plain["per_class"]
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        with pytest.raises(BundleError, match=message):
            Gate.from_json(json.loads(json.dumps(plain)))

    refused("the threshold of the pooled class cat", "classes", "cat", "threshold", value=2.0)
    refused("dog: the threshold is not the calibration score", "classes", "dog", "k", value=6)
    refused("dog: the threshold 0.1 is not", "classes", "dog", "threshold", value=0.1)
    refused("dog: the ranks must grow", "classes", "dog", "n", value=98)
    refused("pool: the threshold is not the", "pool", "k", value=2)
    refused("the pooled classes' n are not", "classes", "cat", "n", value=11)
    refused("pooled, so it has no k", "classes", "cat", "k", value=1)
    refused("the class bird has no field nonfinite", "pooled", value=["cat"])
    refused("pooled must name some of classes", "pooled", value=["cat", "eel"])
    refused("must have a pool", "pool", value=None)
    refused("fewest in per_class must be a whole number", "fewest", value="19")
    refused("pooled must name", "fewest", value=0)
    refused("the class dog must be a JSON object", "classes", "dog", value=3)
    refused("unknown field more", "more", value=3)

    plain = made((19, 39, 99)).to_json()
    del plain["per_class"]["classes"]["dog"]
    with pytest.raises(BundleError, match="the classes' n are not the gate's"):
        Gate.from_json(plain)
    plain = made((19, 39, 99)).to_json()
    plain.update(method="risk", risk=0.1, delta=0.1)
    with pytest.raises(BundleError, match="risk has no thresholds by class"):
        Gate.from_json(plain)
