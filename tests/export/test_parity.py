"""The exported bundle against the model, on real images, by every backend that runs here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper

from moon.bundle import Bundle
from moon.errors import ParityError, UsageError
from moon.export.graph import array, copied, initializers, set_initializer, weight_names
from moon.export.half import to_half
from moon.export.overflow import largest_in_half, refuse_overflow
from moon.export.pack import round_values
from moon.export.parity import Comparing, Sample, check_backends, run_backends
from moon.runtime.sampled import Ran
from tests.export.conftest import TRAIN, from_digits

BACKENDS = {"onnxruntime", "sparse"}


def parity(bundle: Bundle) -> dict[str, Any]:
    found: dict[str, Any] = bundle.manifest.provenance["export"]["parity"]
    return found


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_every_backend_is_compared_with_the_model(
    digits_onnx: Path, tmp_path: Path, dtype: str
) -> None:
    found = parity(from_digits(digits_onnx, tmp_path / "out", input_dtype=dtype))
    assert found["sample"] == {
        "images": 539,
        "real": True,
        "reference": "the ONNX file in ONNX Runtime",
    }
    assert set(found["backends"]) >= BACKENDS and "rounding" not in found
    for one in found["backends"].values():
        assert one["images"] == 539 and one["within"] and one["max_abs"] <= one["tolerance"]
        assert one["top1_agreement"] == 1 and one["gate_agreement"] == 1
        assert one["gate_images"] + 5 > 539 and one["flips"] == 0
        assert 0 <= one["small_batches_max_abs"] <= one["tolerance"] and not one["own_gate"]


def test_rounding_is_reported_apart_from_the_backends(digits_onnx: Path, tmp_path: Path) -> None:
    found = parity(from_digits(digits_onnx, tmp_path / "out", values="fp16"))
    assert "rounded the same way" in found["sample"]["reference"]
    assert found["traced"]["images"] == 539 and found["traced"]["max_abs"] < 1e-4
    rounding = found["rounding"]
    assert rounding["images"] == 539 and rounding["gate_images"] > 500
    # Were backends compared with unrounded weights, they would differ by the rounding.
    assert rounding["max_abs"] > 1e-4
    for one in found["backends"].values():
        assert one["max_abs"] < 0.1 * rounding["max_abs"]


def test_a_run_is_compared_with_pytorch_by_a_score_of_features(full: Bundle) -> None:
    found = parity(full)
    assert found["sample"]["reference"] == "PyTorch"
    for one in found["backends"].values():
        assert one["gate_images"] >= 0.98 * one["images"] > 200 and one["flips"] == 0


def test_without_images_noise_is_compared_and_no_decisions(
    digits_onnx: Path, tmp_path: Path
) -> None:
    found = parity(from_digits(digits_onnx, tmp_path / "out", data=None))
    assert not found["sample"]["real"]
    assert all(one["gate_agreement"] is None for one in found["backends"].values())


def test_a_backend_that_computes_something_else_stops_the_export(
    digits_onnx: Path, tmp_path: Path
) -> None:
    comparing = Comparing(backends=["onnxruntime", "fake"])
    with pytest.raises(ParityError, match=r"the backend fake gives .* compared with the ONNX file"):
        from_digits(digits_onnx, tmp_path / "out", comparing=comparing)
    with pytest.raises(ParityError, match="the backend onnxruntime:xnnpack cannot be compared"):
        from_digits(
            digits_onnx, tmp_path / "out", comparing=Comparing(backends=["onnxruntime:xnnpack"])
        )
    assert not list(tmp_path.iterdir())


def flipped(bundle: Bundle, count: int) -> tuple[Sample, list[Ran]]:
    """A sample and what a backend gave for it, ``count`` images on the wrong side by far."""
    gate = bundle.gate()
    assert gate is not None
    golden = bundle.golden()
    rows = np.arange(200) % len(golden["label"])
    outputs = {key: golden[key][rows].copy() for key in ("logits", "label", "score")}
    sample = Sample(pixels=golden["pixels"][rows], real=True, origin="it", expected=outputs)
    moved = {key: value.copy() for key, value in outputs.items()}
    accepted = np.flatnonzero(outputs["score"] > gate.threshold + 0.1)[:count]
    moved["score"][accepted] = gate.threshold - 1
    return sample, [Ran("sparse", moved, info={"provider": "moon"})]


def test_flips_beyond_the_budget_name_the_backend_and_the_remedy(
    digits_onnx: Path, tmp_path: Path
) -> None:
    bundle = from_digits(digits_onnx, tmp_path / "out")
    sample, ran = flipped(bundle, 3)
    with pytest.raises(
        ParityError,
        match=r"the backend sparse decides otherwise for 3 of \d+ images, more than the 0 allowed, "
        r"compared with it\. Accept them with --parity-flips 3\. Give it a gate of its own: "
        r"moon calibrate mine --data SOURCE --backend sparse",
    ):
        check_backends(ran, bundle, sample, Comparing(), "mine")
    report = check_backends(ran, bundle, sample, Comparing(flips=3), "mine")
    assert report["backends"]["sparse"]["flips"] == 3
    with pytest.raises(UsageError, match="flips allowed must be 0 or more"):
        Comparing(flips=-1)
    with pytest.raises(UsageError, match="needs 1 image or more"):
        Comparing(images=0)


def test_small_batches_must_give_the_same(digits_onnx: Path, tmp_path: Path) -> None:
    bundle = from_digits(digits_onnx, tmp_path / "out")
    sample, ran = flipped(bundle, 0)
    off = [dataclasses.replace(ran[0], small=1.0)]
    with pytest.raises(ParityError, match="differ by 1 in batches of 1, 2, 7, more than"):
        check_backends(off, bundle, sample, Comparing(), "mine")
    real = run_backends(bundle, sample, Comparing(backends=["sparse", "onnxruntime"]))
    assert [one.name for one in real] == ["sparse", "onnxruntime"]
    assert all(0 <= one.small < 1e-3 for one in real)


def blown(body: ModelProto, times: float) -> tuple[ModelProto, str]:
    """The same answers by a first layer that is ``times`` larger, and divided again behind it."""
    made = copied(body)
    first = weight_names(made)[0]
    held = {name: array(initializers(made)[name]) for name in initializers(made)}
    at, node = next((i, n) for i, n in enumerate(made.graph.node) if first in n.input)
    for name in node.input[1:]:
        set_initializer(made, name, held[name] * np.float32(times))
    output, node.output[0] = node.output[0], "large"
    made.graph.initializer.append(numpy_helper.from_array(np.float32(1 / times), "small"))
    made.graph.node.insert(at + 1, helper.make_node("Mul", ["large", "small"], [output]))
    return made, first


def test_a_layer_that_outgrows_fp16_is_named(
    body: ModelProto, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made, first = blown(body, 1e5)
    path = tmp_path / "blown.onnx"
    onnx.save(made, path)
    layer = first.removesuffix(".weight")
    with pytest.raises(ParityError, match=rf"the layer .*{layer}.* reaches [\d,]+ over .*65,504"):
        from_digits(path, tmp_path / "out", precision="fp16", data=TRAIN)
    assert [one.name for one in tmp_path.iterdir()] == ["blown.onnx"]
    # The file's values alone are no matter: they are decoded to fp32.
    assert from_digits(path, tmp_path / "out", values="fp16").gate() is not None


def test_the_largest_number_in_fp16_is_found(body: ModelProto) -> None:
    wide = round_values(body, "fp16")
    items = np.random.default_rng(0).standard_normal((6, 1, 8, 8), dtype=np.float32)
    found = largest_in_half(wide, to_half(wide), [items[:2], items[2:]])
    assert found is not None and not found.first and 0 < found.value < 1000
    refuse_overflow(found, 6)
    halves = [largest_in_half(wide, to_half(wide), [part]) for part in (items[:2], items[2:])]
    assert found.value == max(one.value for one in halves if one is not None)
    nan = items.copy()
    nan[0] = np.nan
    found = largest_in_half(wide, to_half(wide), [nan])
    assert found is not None and found.first and np.isnan(found.value)
    assert largest_in_half(wide, wide, [items]) is None
