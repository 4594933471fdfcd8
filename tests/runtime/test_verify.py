from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from moon.bundle import Bundle, golden_bytes, write_bundle
from moon.runtime.calibrate import calibrate
from moon.runtime.verify import parity, tolerance, verify
from tests.bundles import images, make_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "tiny")


def test_a_good_bundle_passes_every_check(bundle: Bundle) -> None:
    checks = verify(bundle.path)
    assert [check.name for check in checks] == ["files", "gate", "onnxruntime", "sparse"]
    assert all(check.ok for check in checks)
    assert "4 files" in checks[0].detail and "ebo >=" in checks[1].detail
    assert "labels 100.0%" in checks[2].detail


def test_an_uncalibrated_bundle_passes_and_says_so(tmp_path: Path) -> None:
    checks = verify(make_bundle(tmp_path / "b", calibrated=False))
    assert all(check.ok for check in checks)
    assert "not calibrated" in checks[1].detail


def test_damage_after_opening_is_found(bundle: Bundle) -> None:
    data = bytearray((bundle.path / "model.onnx").read_bytes())
    data[50] ^= 1
    (bundle.path / "model.onnx").write_bytes(bytes(data))
    checks = verify(bundle)
    assert len(checks) == 1 and not checks[0].ok and "model.onnx is damaged" in checks[0].detail
    shutil.rmtree(bundle.path)
    assert not verify(bundle)[0].ok


@pytest.mark.parametrize("name", ["logits", "label", "accept"])
def test_golden_outputs_that_the_model_does_not_give_are_found(bundle: Bundle, name: str) -> None:
    golden = bundle.golden()
    if name == "logits":
        golden["logits"] = golden["logits"] + np.float32(2e-4)
    elif name == "label":
        golden["label"] = (golden["label"] + 1) % 3
    else:
        golden["score"] = golden["score"] - np.float32(100)
    plain = bundle.manifest.to_json()
    fields = {key: plain[key] for key in plain if key not in ("version", "sha256", "files")}
    files = {key: (bundle.path / key).read_bytes() for key in bundle.manifest.files}
    files["golden.npz"] = golden_bytes(golden.pop("pixels"), golden)
    made = write_bundle(bundle.path, manifest_fields=fields, files=files, force=True)
    checks = verify(made)
    assert [check.ok for check in checks] == [True, True, False, False]


def test_a_gate_by_class_is_verified(bundle: Bundle, tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", val_images=images(300, seed=11))
    made = calibrate(bundle, f"{tmp_path / 'set.npz'}#val", per_class=True)
    checks = verify(made)
    assert all(check.ok for check in checks)
    assert "by class in gate.json and graph alike" in checks[1].detail
    # A score moved past its class's threshold, and not past the one over all classes.
    gate, golden = made.gate(), made.golden()
    assert gate is not None
    bars = gate.bars(golden["label"])
    outputs = dict(golden)
    outputs["score"] = np.where(golden["accept"], bars - 1, bars + 1).astype(np.float32)
    found = parity(golden, outputs, precision="fp32", threshold=bars)
    assert found.gate_agreement == 0 and not found.within


def test_a_graph_that_does_not_gate_as_it_says_is_found(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "b")
    model = onnx.load_model_from_string(made.model_bytes())
    for node in model.graph.node:
        if node.op_type == "GreaterOrEqual":
            node.op_type = "LessOrEqual"
    plain = made.manifest.to_json()
    fields = {key: plain[key] for key in plain if key not in ("version", "sha256", "files")}
    files = {key: (made.path / key).read_bytes() for key in made.manifest.files}
    files["model.onnx"] = model.SerializeToString()
    made = write_bundle(made.path, manifest_fields=fields, files=files, force=True)
    check = verify(made)[2]
    assert not check.ok and "accept is not what its own score and gate.json give" in check.detail


def test_a_bundle_of_an_earlier_release_is_verified(tmp_path: Path) -> None:
    assert all(check.ok for check in verify(make_bundle(tmp_path / "b", by_class=False)))


def test_parity_by_hand() -> None:
    logits = np.array([[1.0, 2.0], [5.0, 0.0], [0.0, 0.0]], np.float32)
    golden = {
        "logits": logits,
        "label": np.array([1, 0, 0]),
        "score": np.array([2, 5, 0.00005], np.float32),
    }
    near = {
        "logits": logits + np.float32(5e-5),
        "label": np.array([1, 0, 0]),
        "score": np.array([2, 5, -0.00005], np.float32),
    }
    found = parity(golden, near, precision="fp32", threshold=0.0)
    # The third score crosses the threshold within the tolerance, so it is not counted.
    assert found.max_abs == pytest.approx(5e-5, rel=0.01) and found.gate_agreement == 1
    assert found.within
    far = {**near, "score": np.array([2, 5, -0.5], np.float32)}
    assert parity(golden, far, precision="fp32", threshold=0.0).gate_agreement == 1
    assert parity(golden, far, precision="fp32", threshold=-0.2).gate_agreement == 2 / 3
    assert not parity(golden, far, precision="fp32", threshold=-0.2).within
    other = {**near, "label": np.array([1, 1, 0])}
    assert parity(golden, other, precision="fp32", threshold=None).top1_agreement == 2 / 3
    nan = {**near, "logits": logits * np.float32(np.nan)}
    found = parity(golden, nan, precision="fp32", threshold=None)
    assert found.max_abs == np.inf and not found.within and found.to_json()["max_abs"] is None


def test_the_tolerance_grows_with_large_logits_only() -> None:
    assert tolerance(np.array([[3.0, -10.0]]), "fp32") == 1e-4
    assert tolerance(np.array([[3.0, -50.0]]), "fp32") == pytest.approx(5e-4)
    assert tolerance(np.array([[3.0]]), "fp16") == 2e-2
    assert tolerance(np.array([[-100.0]]), "fp16") == pytest.approx(0.2)
    assert tolerance(np.empty((0, 3)), "fp32") == 1e-4
