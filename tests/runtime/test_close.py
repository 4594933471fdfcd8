"""Decisions do not depend on how many images were in the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moon.bundle import Bundle
from moon.runtime.close import close_calls
from moon.runtime.predictor import Predictor
from tests.bundles import images, make_bundle


class Wavering:
    """A backend whose last places depend on the size of the batch, and on the place in it."""

    name = "onnxruntime"
    outputs = ("label", "accept", "score", "logits")

    def __init__(self, logits_NL: np.ndarray[Any, Any]) -> None:
        self.logits = logits_NL
        self.sizes: list[int] = []

    def run(
        self, batch: np.ndarray[Any, Any], threshold: float | None = None
    ) -> dict[str, np.ndarray[Any, Any]]:
        self.sizes.append(len(batch))
        # The first pixel of an image says which it is.
        rows = np.rint((batch[:, 0, 0, 0] * 0.25 + 0.5) * 255).astype(int)
        off = 1e-6 * (len(batch) - 1) * (-1.0) ** np.arange(len(batch))
        logits = (self.logits[rows] + off[:, None] * [[1, -1, 1, 0]]).astype(np.float32)
        score = logits[:, :3].max(axis=1)
        assert threshold is not None
        return {
            "label": logits[:, :3].argmax(axis=1),
            "accept": score >= np.float32(threshold),
            "score": score,
            "logits": logits,
        }

    def info(self) -> dict[str, Any]:
        return {"name": self.name, "largest_batch": 7}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("b") / "tiny")


@pytest.mark.parametrize("size", [2, 3, 7, 64])
def test_close_calls_are_decided_alone(bundle: Bundle, size: int) -> None:
    rng = np.random.default_rng(0)
    gate = bundle.gate()
    assert gate is not None
    logits = rng.uniform(-3, 3, (64, 4))
    logits[::3, 0] = gate.threshold  # exactly at the threshold, as a calibration image is
    logits[::3, 1:3] -= 10
    logits[1::3, 1] = logits[1::3, 0] = 4.0  # two classes alike
    backend = Wavering(logits)
    predictor = Predictor(bundle, backend)
    pixels = np.zeros((64, 8, 8, 1), np.uint8)
    pixels[:, 0, 0, 0] = np.arange(64)
    alone = [predictor.decide(pixels[i : i + 1])[0] for i in range(64)]
    parts = [predictor.decide(pixels[i : i + size]) for i in range(0, 64, size)]
    together = [decision for part in parts for decision in part]
    for one, many in zip(alone, together, strict=True):
        assert (one.accepted, one.label) == (many.accepted, many.label)
        assert many.score == pytest.approx(one.score, abs=1e-3)
    outputs = predictor.raw(pixels)
    assert [bool(one) for one in outputs["accept"]] == [one.accepted for one in alone]
    # Without it they do differ.
    wavering = backend.run(predictor.bundle.preprocess.normalise(pixels), predictor.threshold)
    assert [bool(one) for one in wavering["accept"]] != [one.accepted for one in alone]


def test_clear_calls_are_not(bundle: Bundle) -> None:
    gate = bundle.gate()
    assert gate is not None
    logits = np.tile([gate.threshold + 1, -5.0, -7.0, 0.0], (64, 1))
    backend = Wavering(logits)
    Predictor(bundle, backend).decide(np.zeros((64, 8, 8, 1), np.uint8))
    assert backend.sizes == [64]
    assert Predictor(bundle, backend).largest_batch == 7


def test_which_calls_are_close() -> None:
    logits = np.array(
        [
            [2, 0, -1],
            [2, 0, -1],
            [2, 2 - 1e-4, -1],
            [2, 2 - 1e-4, 9],
            [np.nan, 0, 0],
            [np.inf, 0, 0],
        ]
    )
    score = np.array([1.0, 1.5, 5.0, 5.0, np.nan, 1.0], np.float32)
    bars = np.full(6, 1.00005, np.float32)
    outputs = {"logits": logits, "score": score}
    assert close_calls(outputs, bars, unknown_index=2, precision="fp32").tolist() == [0, 2, 3]
    # The unknown class is no rival of the label.
    rival = {"logits": np.array([[2.0, 0, 2.0]]), "score": np.array([5.0], np.float32)}
    assert not len(close_calls(rival, bars[:1], unknown_index=2, precision="fp32"))
    assert len(close_calls(rival, bars[:1], unknown_index=None, precision="fp32"))


def test_real_images_at_the_threshold(tmp_path: Path) -> None:
    # The threshold is one of these images' own score, found in a batch of them all.
    bundle = make_bundle(tmp_path / "b", size=16, channels=3, reject=0.3)
    predictor = Predictor.open(bundle)
    pixels = images(96, 16, 3, seed=5)
    scores = predictor.raw(pixels)["score"]
    for bar in scores[:8]:
        strict = Predictor.open(bundle, threshold=float(bar), warn=lambda _: None)
        alone = [strict.decide(pixels[i : i + 1])[0] for i in range(96)]
        for size in (2, 5, 16, 96):
            parts = [strict.decide(pixels[i : i + size]) for i in range(0, 96, size)]
            found = [decision for part in parts for decision in part]
            assert [one.label for one in found] == [one.label for one in alone]
