from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moon.runtime.agreement import Agreement, Budget, agreement, precision_of, tolerance


def outputs(
    scores: Any, flipped: int = 0, *, peak: float = 0.01, gap: float = 0.0
) -> dict[str, NDArray[Any]]:
    """Logits of three classes, the first ahead but for the ``flipped`` first images."""
    values = np.asarray(scores, np.float32)
    logits = np.tile(np.array([peak, 0, 0], np.float32), (len(values), 1))
    logits[:flipped] = [0, peak, 0]
    return {"logits": logits + np.float32(gap), "label": logits.argmax(axis=1), "score": values}


def found(
    wide: Any, narrow: Any, bars: float | None = 5.0, precision: str = "fp16", **known: Any
) -> Agreement:
    return agreement(
        outputs(wide), outputs(narrow, **known), precision=precision, score="ebo", bars=bars
    )


def test_the_class_must_be_the_same() -> None:
    scores = np.zeros(1000)
    assert Budget().excess(found(scores, scores, None, flipped=1), "fp16") == ""
    two = found(scores, scores, None, flipped=2)
    assert Budget().excess(two, "fp16") == (
        "gives another class for 2 of 1,000 images, 2 of them within the tolerance of a tie, and "
        "the same for less than 99.9%"
    )
    assert Budget(2).excess(two, "fp16") == ""
    far = agreement(
        outputs(scores, peak=1.0),
        outputs(scores, flipped=1, peak=1.0),
        precision="fp16",
        score="ebo",
        bars=None,
    )
    assert (far.labels_differ, far.labels_differ_within) == (1, 0)


def test_decisions_count_away_from_the_threshold() -> None:
    wide = np.linspace(0, 10, 1000)
    near = np.abs(wide - 5.0) < 2e-2
    assert 1 < near.sum() < 10
    # All those near the threshold decide otherwise, and do not count.
    close = found(wide, np.where(near, 10.0 - wide, wide))
    assert (close.gate_agreement, close.flips, close.flips_within) == (1.0, 0, near.sum())
    assert close.gate_images == 1000 - near.sum()
    far = wide.copy()
    far[:6] = 9
    six = found(wide, far)
    assert six.flips == 6 and six.gate_agreement == 1 - 6 / 996
    # Half a percent of 996 is four.
    assert "decides otherwise for 6 of 996 images, more than the 4" in Budget().excess(six, "fp16")
    assert Budget(6).excess(six, "fp16") == ""
    assert "more than the 5 allowed" in Budget(5).excess(six, "fp16")
    far[4:6] = wide[4:6]
    assert Budget().excess(found(wide, far), "fp16") == ""


def test_in_fp32_no_decision_may_flip() -> None:
    wide = np.linspace(0, 10, 1000)
    one = wide.copy()
    one[0] = 9
    said = Budget().excess(found(wide, one, precision="fp32"), "fp32")
    assert "decides otherwise for 1 of 1,000 images, more than the 0 allowed" in said
    assert Budget(1).excess(found(wide, one, precision="fp32"), "fp32") == ""


def test_logits_must_be_close_whatever_the_flips_allowed() -> None:
    scores = np.zeros(10)
    far = found(scores, scores, precision="fp32", gap=2e-4)
    assert "differ by 0.0002, more than 0.0001, over 10 images" in Budget(10).excess(far, "fp32")
    assert Budget().excess(found(scores, scores, gap=2e-4), "fp16") == ""


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    one = outputs(np.zeros(3))
    other = outputs(np.zeros(3))
    other["logits"][1, 2] = bad
    for pair in ((one, other), (other, one)):
        given = agreement(*pair, precision="fp16", score="ebo", bars=5.0)
        assert given.not_finite == 1 and given.max_abs == np.inf
        assert given.to_json()["max_abs"] is None
        assert "NaN or infinite logits for 1 of 3 images" in Budget(3).excess(given, "fp16")


def test_large_logits_move_the_score_further() -> None:
    scores = np.full(1000, 5.1)
    for peak, counted in ((1.0, 1000), (100.0, 0)):
        wide = outputs(scores, peak=peak)
        given = agreement(wide, wide, precision="fp16", score="ebo", bars=5.0)
        assert given.gate_images == counted
        assert given.gate_agreement == (1.0 if counted else None)


@pytest.mark.parametrize(("score", "sign"), [("unknown", -1.0), ("msp", 1.0)])
def test_small_probabilities_count_too(score: str, sign: float) -> None:
    """p(unknown) is about 1e-5 on known images: far from the threshold at a distance of 1e-4."""
    p = np.full(1000, 1e-5)
    bar = sign * (2e-4 if score == "unknown" else 1e-6)
    wide = outputs(sign * p)
    given = agreement(wide, wide, precision="fp16", score=score, bars=bar)
    assert (given.gate_agreement, given.gate_images) == (1.0, 1000)
    moved = outputs(sign * p)
    moved["score"][:6] = bar - 1e-3
    given = agreement(wide, moved, precision="fp16", score=score, bars=bar)
    assert given.flips == 6


def test_a_backend_may_decide_by_a_threshold_of_its_own() -> None:
    wide = np.linspace(0, 10, 1000)
    shifted = outputs(wide + 1)
    same = {"precision": "fp16", "score": "ebo"}
    by_one = agreement(outputs(wide), shifted, bars=5.0, **same)
    by_own = agreement(outputs(wide), shifted, bars=5.0, own=6.0, **same)
    assert by_one.flips > 90 and by_own.flips == 0


def test_by_hand() -> None:
    reference = {
        "logits": np.array([[1.0, 2.0], [5.0, 0.0], [0.0, 0.0]], np.float32),
        "label": np.array([1, 0, 0]),
        "score": np.array([2, 5, 0.00005], np.float32),
    }
    other = {
        "logits": reference["logits"] + np.float32(5e-5),
        "label": np.array([1, 1, 0]),
        "score": np.array([2, -5, -0.00005], np.float32),
    }
    given = agreement(reference, other, precision="fp32", score="mls", bars=0.0)
    assert given.max_abs == pytest.approx(5e-5, rel=0.01) and given.top1_agreement == 2 / 3
    assert (given.gate_images, given.flips, given.flips_within) == (2, 1, 1)
    assert "decisions 50.00% of 2 (1 flips; 1 within the tolerance)" in str(given)


def test_a_provider_may_compute_in_less_than_the_graph_says() -> None:
    assert precision_of("fp32", "onnxruntime") == precision_of("fp32", "onnxruntime:cpu") == "fp32"
    assert precision_of("fp32", "onnxruntime:cuda,device_id=1") == "fp16"
    assert precision_of("fp16", "sparse") == "fp16"
    assert tolerance(np.array([[-100.0]]), "fp16") == pytest.approx(0.2)
