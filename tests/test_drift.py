"""The drift test keeps what it promises: by enumeration, by simulation, and by another route."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from moon.class_calibration import calibrate_per_class
from moon.drift import DELTA, DETECTOR_ALARM, E_VALUE_ALARM, NOTHING, TILTS_G, DriftTest
from moon.errors import UsageError
from moon.gate_calibration import Promise, calibrate_conformal, calibrate_pac
from moon.risk_calibration import calibrate_risk

BOUND = 0.06


@pytest.fixture
def test() -> DriftTest:
    return DriftTest({0.0: BOUND})


def by_hand(rejected: list[bool], bound: float) -> tuple[float, float]:
    """E-value and detector as their definitions say: a sum over every start."""
    odds = TILTS_G * bound / (1 - bound)
    q_G = odds / (1 + odds)
    e_value, detector, kept = 0.0, 0.0, 1.0
    for start in range(len(rejected)):
        product_G = np.ones(len(q_G))
        for x in rejected[start:]:
            product_G *= q_G / bound if x else (1 - q_G) / (1 - bound)
        left = math.log(2) / math.log(start + 3)
        e_value += (kept - left) * float(product_G.mean())
        detector += float(product_G.mean())
        kept = left
    return e_value + kept, detector


def test_nothing_seen_is_no_evidence() -> None:
    assert NOTHING.e_value == 1
    assert NOTHING.detector == 0


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.floats(0.001, 0.9))
@settings(max_examples=50)
def test_recursion_is_the_sum_over_starts(rejected: list[bool], bound: float) -> None:
    watched = DriftTest({0.0: bound}).watch(rejected, 0.0)
    e_value, detector = by_hand(rejected, bound)
    assert watched.e_value == pytest.approx(e_value, rel=1e-9)
    assert watched.detector == pytest.approx(detector, rel=1e-9)
    assert (watched.images, watched.rejected) == (len(rejected), sum(rejected))


def mean(test: DriftTest, length: int, rate: float) -> tuple[float, float]:
    """The exact means of both over all sequences at a reject rate."""
    e_value = detector = 0.0
    for sequence in itertools.product([False, True], repeat=length):
        chance = math.prod(rate if x else 1 - rate for x in sequence)
        watched = test.watch(sequence, 0.0)
        e_value += chance * watched.e_value
        detector += chance * watched.detector
    return e_value, detector


@pytest.mark.parametrize("length", [1, 2, 8])
def test_no_bet_is_in_its_favour(test: DriftTest, length: int) -> None:
    """The mean of the e-value is 1, of the detector t: at the bound, and less below it."""
    assert mean(test, length, BOUND) == pytest.approx((1, length))
    for rate in (0.0, BOUND / 2):
        e_value, detector = mean(test, length, rate)
        assert e_value < 1
        assert detector < length
    e_value, detector = mean(test, length, 1.2 * BOUND)
    assert e_value > 1
    assert detector > length


@given(st.lists(st.booleans(), min_size=2, max_size=3000), st.integers(1, 2999))
@settings(max_examples=25, deadline=None)
def test_parts_are_as_the_whole(rejected: list[bool], cut: int) -> None:
    test = DriftTest({0.0: BOUND})
    whole = test.watch(rejected, 0.0)
    parts = test.watch(rejected[cut:], 0.0, test.watch(rejected[:cut], 0.0))
    e_values, detectors = test.path(rejected, 0.0)
    assert len(e_values) == len(rejected)
    for watched in (parts, whole):
        assert watched.images == len(rejected)
        assert watched.log_e_value == pytest.approx(float(e_values[-1]), abs=1e-8)
        assert watched.log_detector == pytest.approx(float(detectors[-1]), abs=1e-8)


@given(st.lists(st.booleans(), min_size=1, max_size=50), st.data())
@settings(max_examples=25)
def test_a_reject_more_is_evidence_more(rejected: list[bool], data: st.DataObject) -> None:
    test = DriftTest({0.0: BOUND})
    at = data.draw(st.integers(0, len(rejected) - 1))
    fewer, more = ([*rejected[:at], x, *rejected[at + 1 :]] for x in (False, True))
    assert test.watch(more, 0.0).e_value > test.watch(fewer, 0.0).e_value
    assert test.watch(more, 0.0).detector > test.watch(fewer, 0.0).detector


def test_numbers_beyond_float64(test: DriftTest) -> None:
    surely = test.watch(np.ones(10_000, bool), 0.0)
    assert surely.e_value == surely.detector == math.inf
    assert math.isfinite(surely.log_e_value)
    # A long quiet time takes nearly all that was staked, and never makes a NaN.
    quiet = test.watch(np.zeros(100_000, bool), 0.0)
    assert 0 < quiet.e_value < 1
    # Rid of its evidence by honest traffic, however much there was.
    after = test.watch(np.zeros(20_000, bool), 0.0, test.watch(np.ones(100, bool), 0.0))
    assert after.detector < DETECTOR_ALARM


def test_the_bound_is_the_quantile_of_the_true_rate() -> None:
    rng = np.random.default_rng(0)
    scores = rng.uniform(size=500)
    for gate in (calibrate_conformal(scores, 0.05), calibrate_pac(scores, 0.05)):
        assert gate.k is not None
        expected = stats.beta.ppf(1 - DELTA, gate.k, 501 - gate.k)
        assert DriftTest.of(gate).bounds == {gate.threshold: pytest.approx(expected)}


def test_the_bound_of_a_threshold_by_risk() -> None:
    rng = np.random.default_rng(0)
    scores = rng.uniform(size=1000)
    gate = calibrate_risk(scores, rng.uniform(size=1000) > 0.35 * (1 - scores), 0.15, 0.1)
    (bound,) = DriftTest.of(gate).bounds.values()
    slack = bound - gate.achieved["reject"]
    # The same bound by the one-sided Kolmogorov statistic's exact distribution, a bit tighter.
    assert stats.ksone.ppf(1 - DELTA, 1000) == pytest.approx(slack, rel=0.02)
    assert stats.ksone.ppf(1 - DELTA, 1000) <= slack


def test_classes_have_bounds_of_their_own() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), (400, 100, 6))
    gate = calibrate_per_class(
        rng.uniform(size=506) + labels, labels, ("a", "b", "rare"), Promise.of(0.05)
    )
    assert gate.per_class is not None
    test = DriftTest.of(gate)
    assert len(test.bounds) == len(gate.per_class.groups)
    for group in gate.per_class.groups:
        assert group.k is not None
        share = 1 - DELTA / len(gate.per_class.groups)
        expected = stats.beta.ppf(share, group.k, group.n - group.k + 1)
        assert test.bounds[group.value] == pytest.approx(expected)
    common, rare = (gate.per_class.of(i).value for i in (0, 1))
    # The same reject says less where more of them are allowed.
    assert test.watch([True], common).e_value > test.watch([True], rare).e_value
    mixed = test.watch([True, False], [rare, common])
    assert mixed.e_value == test.watch([False], common, test.watch([True], rare)).e_value


@pytest.mark.parametrize("given", [0.5, np.nan, [0.0, -1.0]])
def test_decisions_of_another_gate_are_refused(test: DriftTest, given: object) -> None:
    with pytest.raises(UsageError, match="not a threshold of the gate"):
        test.watch([True, False], given)  # type: ignore[arg-type]


@pytest.mark.parametrize("bounds", [{}, {0.0: 0.0}, {0.0: 1.1}, {0.0: math.nan}])
def test_bounds_must_be_rates(bounds: dict[float, float]) -> None:
    with pytest.raises(UsageError, match="bounds"):
        DriftTest(bounds)


@pytest.mark.parametrize("delta", [0.0, 0.5, math.nan])
def test_delta_must_be_small(delta: float) -> None:
    with pytest.raises(UsageError, match="delta"):
        DriftTest.of(calibrate_conformal(np.arange(100.0), 0.05), delta)


def alarms(bound: float | None, level: float, *, n: int = 59, reps: int = 200) -> float:
    """How often in-distribution traffic alarms a freshly calibrated gate, in 1,000 images."""
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(reps):
        scores = rng.uniform(size=n)
        gate = calibrate_conformal(scores, 0.05)
        test = DriftTest.of(gate) if bound is None else DriftTest({gate.threshold: bound})
        rejected = ~gate.accepts(rng.uniform(size=1000))
        found += bool((test.path(rejected, gate.threshold)[0] >= math.log(level)).any())
    return found / reps


def test_honest_traffic_alarms_as_rarely_as_promised() -> None:
    level = 20.0
    allowed = 1 / level + DELTA
    assert alarms(None, level) <= allowed
    # As it would not if what was asked for were taken for what the threshold does.
    assert alarms(0.05, level) > allowed + 4 * math.sqrt(allowed / 200)


def test_the_worst_allowed_traffic_too(test: DriftTest) -> None:
    level, reps = 5.0, 100
    rng = np.random.default_rng(1)
    found = sum(
        bool((test.path(rng.random(1500) < BOUND, 0.0)[0] >= math.log(level)).any())
        for _ in range(reps)
    )
    assert found / reps <= 1 / level
    assert found / reps > 0.02  # it does bet


def first(path: NDArray[np.float64], level: float) -> float:
    reached = np.flatnonzero(path >= math.log(level))
    return float(reached[0] + 1) if len(reached) else math.inf


def test_average_run_of_the_detector(test: DriftTest) -> None:
    level, reps = 30.0, 100
    rng = np.random.default_rng(2)
    runs = [first(test.path(rng.random(1000) < BOUND, 0.0)[1], level) for _ in range(reps)]
    # Runs that were cut off count as short ones.
    assert float(np.mean(np.minimum(runs, 1000))) >= level


@pytest.mark.parametrize("quiet", [0, 20_000])
def test_one_unknown_in_ten_is_found_soon(quiet: int) -> None:
    rng = np.random.default_rng(3)
    gate = calibrate_conformal(rng.uniform(size=2000), 0.05)
    test = DriftTest.of(gate)
    delays = []
    for _ in range(9):
        before = test.watch(~gate.accepts(rng.uniform(size=quiet)), gate.threshold)
        assert before.e_value < E_VALUE_ALARM
        assert before.detector < DETECTOR_ALARM
        # Nine in ten of the unknown are rejected.
        rejected = rng.random(2000) < 0.9 * 0.05 + 0.1 * 0.9
        paths = test.path(rejected, gate.threshold, before)
        delays.append((first(paths[0], E_VALUE_ALARM), first(paths[1], DETECTOR_ALARM)))
    e_value, detector = np.median(delays, axis=0)
    assert e_value < 1000
    assert detector < 600
    # Long after the start the detector is the sooner one.
    assert (detector < e_value) == (quiet > 0)
