"""gate.json and the graph agree on thresholds by class, bit for bit, or the bundle is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moon.bundle import Bundle, gates_bytes
from moon.class_calibration import calibrate_per_class
from moon.errors import BundleError
from moon.gate import Gate
from moon.gate_calibration import Promise, calibrate_conformal
from moon.onnxfile import patch_scalar, patch_vector, read_scalar, read_vector
from moon.runtime.onnxruntime import OnnxRuntime
from tests.bundles import CLASSES, make_bundle
from tests.test_bundle import reseal


def by_class(bundle: Bundle, classes: tuple[str, ...] = CLASSES) -> Gate:
    """Thresholds 0.1, 0.6, 1.1: some of the golden scores are on either side."""
    labels = np.repeat(np.arange(len(classes)), 19)
    scores = (0.1 + 0.5 * labels + np.tile(np.arange(19), len(classes)) / 100).astype(np.float32)
    return calibrate_per_class(scores, labels, classes, Promise.of("0.05"), score="ebo")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    made = make_bundle(tmp_path / "tiny")
    return made.with_gate(by_class(made))


def test_gate_graph_and_golden_change_together(bundle: Bundle) -> None:
    gate, model = bundle.gate(), bundle.model_bytes()
    assert gate is not None and gate.per_class is not None
    assert read_vector(model, "thresholds").tobytes() == gate.per_class.values.tobytes()
    assert np.isnan(read_scalar(model, "threshold"))
    golden = bundle.golden()
    outputs = OnnxRuntime(model).run(bundle.preprocess.normalise(golden["pixels"]))
    for name, value in outputs.items():
        assert np.array_equal(golden[name], value), name
    assert np.array_equal(golden["accept"], gate.accepts(golden["score"], golden["label"]))
    assert not np.array_equal(golden["accept"], golden["score"] >= np.float32(gate.threshold))


def test_only_the_gates_bytes_of_the_graph_change(bundle: Bundle, tmp_path: Path) -> None:
    one = make_bundle(tmp_path / "one").model_bytes()
    other = bundle.model_bytes()
    assert len(one) == len(other)
    changed = sum(a != b for a, b in zip(one, other, strict=True))
    assert 0 < changed <= 12 + 4 * len(CLASSES)


def test_back_to_one_threshold(bundle: Bundle) -> None:
    before = make_bundle(bundle.path.parent / "before")
    gate = before.gate()
    assert gate is not None
    assert bundle.with_gate(gate).model_bytes() == before.model_bytes()


def test_another_threshold_of_a_class_is_refused_though_every_hash_fits(bundle: Bundle) -> None:
    bars = read_vector(bundle.model_bytes(), "thresholds")
    bars[1] = np.nextafter(bars[1], np.float32(9))
    reseal(bundle.path, **{"model.onnx": patch_vector(bundle.model_bytes(), "thresholds", bars)})
    with pytest.raises(BundleError, match=r"threshold of model.onnx for dog, 0.6.*not that of"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("value", [0.5, np.inf, -np.inf])
def test_a_scalar_that_overrides_the_classes_is_refused(bundle: Bundle, value: float) -> None:
    model = patch_scalar(bundle.model_bytes(), "threshold", value)
    reseal(bundle.path, **{"model.onnx": model})
    with pytest.raises(BundleError, match=r"overrides those by class in gate.json"):
        Bundle.open(bundle.path)


def test_one_threshold_must_stand_in_every_place(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "b")
    gate = made.gate()
    assert gate is not None
    bars = np.full(3, gate.threshold, np.float32)
    bars[2] = -np.inf
    reseal(made.path, **{"model.onnx": patch_vector(made.model_bytes(), "thresholds", bars)})
    with pytest.raises(BundleError, match=r"threshold of model.onnx for bird, -inf, is not that"):
        Bundle.open(made.path)


def test_a_graph_without_a_gate_must_accept_nothing_of_any_class(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "b", calibrated=False)
    bars = np.array([np.inf, 0, np.inf], np.float32)
    reseal(made.path, **{"model.onnx": patch_vector(made.model_bytes(), "thresholds", bars)})
    with pytest.raises(BundleError, match=r"threshold of model.onnx for dog, 0.0, is not that"):
        Bundle.open(made.path)


def test_the_classes_must_be_the_bundles(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "b")
    for classes in (("dog", "cat", "bird"), ("cat", "dog")):
        gate = by_class(made, classes)
        with pytest.raises(BundleError, match="classes of per_class are not the bundle's"):
            made.with_gate(gate)
    assert Bundle.open(made.path).gate() == made.gate()


def test_a_bundle_of_an_earlier_release_keeps_its_one_threshold(tmp_path: Path) -> None:
    old = make_bundle(tmp_path / "b", by_class=False)
    assert not old.by_class and Bundle.open(old.path).gate() == old.gate()
    with pytest.raises(BundleError, match=r"has one threshold.*Export it again.*--per-class"):
        old.with_gate(by_class(old))
    again = old.with_gate(calibrate_conformal(np.arange(50.0), 0.1, score="ebo"))
    assert read_scalar(again.model_bytes(), "threshold") == 4.0
    reseal(old.path, **{"gate.json": gates_bytes({"default": by_class(old)})})
    with pytest.raises(BundleError, match=r"has thresholds by class, but model.onnx has only one"):
        Bundle.open(old.path)


def test_a_backends_own_gate_may_be_by_class(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "b")
    both = made.with_gate(by_class(made), "fake")
    assert both.model_bytes() == made.model_bytes()
    assert both.gate() == made.gate() and both.gate("fake") == by_class(made)
