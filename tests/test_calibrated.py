from pathlib import Path

import numpy as np

from moon.calibrated import CALIBRATED, calibrated_values, model_hash
from moon.onnxfile import patch_scalar
from tests.bundles import make_bundle


def test_the_values_are_the_gates(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    found = calibrated_values(bundle.model_bytes())
    gate = bundle.gate()
    assert gate is not None
    assert found["threshold"].shape == () and found["threshold"].dtype == np.float32
    assert found["threshold"] == np.float32(gate.threshold)
    assert found["gate_score"].dtype == np.int64
    assert found["thresholds"].shape == (len(bundle.classes),)
    assert set(found) <= set(CALIBRATED)


def test_another_gate_is_the_same_model(tmp_path: Path) -> None:
    model = make_bundle(tmp_path / "b").model_bytes()
    assert model_hash(patch_scalar(model, "threshold", 3.0)) == model_hash(model)
    assert model_hash(make_bundle(tmp_path / "c", seed=1).model_bytes()) != model_hash(model)


def test_a_graph_without_a_gate_has_no_values() -> None:
    assert calibrated_values(b"") == {}
