from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moon.errors import BundleError
from moon.gate import Decision, Gate, explain
from moon.gate_calibration import calibrate_conformal, calibrate_pac
from moon.risk_calibration import calibrate_risk


def gate(n: int = 99, alpha: float = 0.05) -> Gate:
    """Scores 1 .. n."""
    return calibrate_conformal(
        np.arange(1, n + 1), alpha, score="ebo", evidence={"reason": {"msp": 0.25, "ebo": 3.0}}
    )


def test_accepting_by_hand() -> None:
    made = gate()
    assert made.threshold == 5.0  # the 5th of 99 at alpha = .05
    scores = [4.999, 5.0, 5.001, -np.inf, np.inf, np.nan, 1e39]
    assert made.accepts(scores).tolist() == [False, True, True, False, False, False, False]


def test_p_values_by_hand() -> None:
    made = gate()
    assert made.p_value(0.5) == 1 / 100
    assert made.p_value(4.9) == 5 / 100
    assert made.p_value(5.0) == 6 / 100
    assert made.p_value(1000.0) == 1.0
    assert made.p_value(float("nan")) is None
    assert made.p_value(float("inf")) is None


@pytest.mark.parametrize(
    "made",
    [
        gate(),
        calibrate_pac(np.arange(200.0), 0.1, 0.1, score="msp"),
        calibrate_risk(np.linspace(0, 1, 500), np.ones(500), 0.05, 0.1, score="mls"),
        calibrate_conformal(np.append(np.arange(50.0), np.nan), 0.1, score="unknown"),
    ],
    ids=lambda made: made.method,
)
def test_json_and_back(made: Gate) -> None:
    text = json.dumps(made.to_json(), allow_nan=False)
    assert Gate.from_json(json.loads(text)) == made


def test_the_json_has_the_promised_fields() -> None:
    plain = gate().to_json()
    promised = "score threshold method alpha delta risk n k per_class achieved data_sha256 scores"
    assert set(promised.split()) <= set(plain)
    assert set(plain["achieved"]) >= {"reject", "ci95"}
    assert plain["scores"] == sorted(plain["scores"])


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_a_float32_threshold_survives_json_bit_for_bit(value: float) -> None:
    made = calibrate_conformal(np.full(20, value, np.float32), 0.05, score="ebo")
    back = Gate.from_json(json.loads(json.dumps(made.to_json())))
    assert np.float32(back.threshold).tobytes() == np.float32(value).tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 5.5}, "threshold is not the calibration score of rank 5"),
        ({"threshold": 0.1}, "not a finite float32"),
        ({"threshold": "5"}, "threshold in a gate must be a number, not '5'"),
        ({"threshold": True}, "threshold in a gate must be a number"),
        ({"k": 6}, "not the calibration score of rank 6"),
        ({"k": None}, "not the calibration score of rank None"),
        ({"method": "guess"}, "method guess is unknown"),
        ({"alpha": 1.5}, "alpha must lie between 0 and 1"),
        ({"alpha": None}, "lacks its promised rate"),
        ({"method": "pac"}, "lacks its promised rate or delta"),
        ({"n": 0}, "contradict"),
        ({"n": 100}, "ranks must grow"),
        ({"nonfinite": 2}, "ranks must grow"),
        ({"scores": [3.0, 1.0], "ranks": [1, 99]}, "finite and sorted"),
        ({"scores": [1.0]}, "one length"),
        ({"scores": [], "ranks": []}, "one length"),
        ({"reason": {"other": 1.0}}, "unknown field other"),
        ({"reason": {"msp": "x"}}, "msp in reason must be a number"),
        ({"per_class": {}}, "per_class has no field fewest"),
        ({"achieved": {"reject": 0.1}}, "achieved has no field ci95"),
        ({"achieved": {"reject": 0.1, "ci95": [0.1]}}, "two numbers"),
        ({"extra": 1}, "unknown field extra"),
    ],
)
def test_a_contradictory_gate_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Gate.from_json({**gate().to_json(), **change})


def test_a_gate_that_is_no_object_is_refused() -> None:
    with pytest.raises(BundleError, match="must be a JSON object"):
        Gate.from_json([])
    with pytest.raises(BundleError, match="has no field score"):
        Gate.from_json({})


def test_a_decision_has_exactly_the_promised_json() -> None:
    made = Decision(
        accepted=False,
        label=None,
        reason="ood",
        top=(("cat", 0.5), ("dog", 0.25)),
        score_name="ebo",
        score=None,
        threshold=5.0,
        p_value=None,
        input="a.png",
    )
    assert made.to_json() == {
        "input": "a.png",
        "decision": "abstain",
        "label": None,
        "reason": "ood",
        "top": [{"label": "cat", "p": 0.5}, {"label": "dog", "p": 0.25}],
        "score": {
            "name": "ebo",
            "value": None,
            "threshold": 5.0,
            "direction": "higher_is_in_distribution",
        },
        "p_value": None,
    }
    accepted = replace(made, accepted=True, label="cat", reason=None, score=6.0, p_value=0.5)
    assert accepted.to_json()["decision"] == "accept"
    assert accepted.to_json()["label"] == "cat"


QUANTILES = {"p_unknown": 0.3, "msp": 0.4, "ebo": 2.0}


@pytest.mark.parametrize(
    ("quantiles", "p_unknown", "msp", "ebo", "reason"),
    [
        (QUANTILES, 0.31, 0.9, 9.0, "unknown"),
        (QUANTILES, 0.30, 0.39, 2.0, "low_confidence"),
        (QUANTILES, 0.30, 0.39, 1.9, "ood"),  # low, but the energy looks strange too
        (QUANTILES, 0.30, 0.41, 9.0, "ood"),  # confident, yet rejected
        ({"msp": 0.4, "ebo": 2.0}, None, 0.1, 3.0, "low_confidence"),
        ({}, 0.6, 0.2, 9.0, "unknown"),
        ({}, 0.2, 0.6, 9.0, "ood"),
        ({}, None, 0.1, 9.0, "ood"),
        (QUANTILES, float("nan"), float("nan"), float("nan"), "ood"),
    ],
)
def test_reasons(
    quantiles: dict[str, float], p_unknown: float | None, msp: float, ebo: float, reason: str
) -> None:
    assert explain(quantiles, p_unknown=p_unknown, msp=msp, ebo=ebo) == reason
