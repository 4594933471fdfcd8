from __future__ import annotations

import dataclasses
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moon.bundle import Bundle
from moon.data.items import Source
from moon.data.load import load_pixels
from moon.data.source import open_source
from moon.errors import CalibrationError, DataError, ExportError, UsageError
from moon.export import from_onnx, to_bundle
from moon.export.fit_images import FitImages
from moon.export.session import Session
from moon.export.trt.request import EngineRequest
from moon.runtime.calibrate import calibrate
from moon.runtime.predictor import Predictor
from moon.runtime.unpack import weights
from moon.runtime.verify import verify
from moon.scores import SCORE_TABLE, SCORES, Training, fit_score
from moon.trainer.checkpoint import Checkpoint, Validation

from .conftest import CLASSES, PREPROCESS, TEST, TRAIN, MakeForeign, from_digits

OWN: dict[str, Any] = {"classes": ["a", "b", "c", "d", "e"], "mean": [0.5], "std": [0.25]}


def outputs(bundle: Bundle, pixels: Any) -> dict[str, Any]:
    uint8 = bundle.manifest.input.dtype == "uint8"
    feed = pixels if uint8 else bundle.preprocess.normalise(pixels)
    return Session(bundle.model_bytes()).run({"input": feed})


@pytest.fixture(scope="module")
def bundle(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return to_bundle(run_folder, tmp_path_factory.mktemp("bundle") / "digits")


def test_a_run_becomes_a_calibrated_bundle(bundle: Bundle, checkpoint: Checkpoint) -> None:
    manifest = bundle.manifest
    assert (manifest.name, manifest.classes, manifest.unknown_index) == ("digits-test", CLASSES, 10)
    assert manifest.scores == ("msp", "ebo", "mls", "unknown")
    assert manifest.sparsity.share == pytest.approx(0.9, abs=1e-3)
    assert manifest.sparsity.pattern == "unstructured"
    for layer in checkpoint.layers:
        found = manifest.sparsity.layers[layer.name]
        assert (found.shape, found.nonzeros) == (layer.shape, layer.nonzeros)
        assert found.flops == layer.dense_flops
    gate = bundle.gate()
    assert gate is not None
    assert (gate.score, gate.method, gate.alpha, gate.n) == ("ebo", "conformal", 0.05, 539)
    assert gate.achieved["reject"] <= 0.05
    assert manifest.provenance["recipe_sha256"] == checkpoint.recipe.hash
    export = manifest.provenance["export"]
    assert export["bytes"] < 0.15 * export["dense_fp32_bytes"]


def test_it_answers_like_the_model_and_the_numpy_scores(
    bundle: Bundle, checkpoint: Checkpoint
) -> None:
    import torch

    pixels = load_pixels(open_source(TEST), bundle.preprocess, range(100))
    out = outputs(bundle, pixels)
    images = torch.from_numpy(bundle.preprocess.normalise(pixels))
    with torch.no_grad():
        expected = checkpoint.model()(images).numpy()
    np.testing.assert_allclose(out["logits"], expected, atol=1e-4)
    for name in bundle.manifest.scores:
        np.testing.assert_allclose(out[f"score_{name}"], SCORES[name](expected, 10), atol=1e-4)
    gate = bundle.gate()
    assert gate is not None
    np.testing.assert_array_equal(out["accept"], gate.accepts(out["score_ebo"]))
    assert 0.8 < out["accept"].mean() < 1


def test_it_predicts(bundle: Bundle) -> None:
    source = open_source(TEST)
    decisions = Predictor.open(bundle).predict([source.item(i) for i in range(50)])
    assert source.labels is not None
    right = [
        d.label == CLASSES[label] for d, label in zip(decisions, source.labels[:50], strict=True)
    ]
    assert sum(right) > 40


def test_golden_outputs_are_those_of_the_graph(bundle: Bundle) -> None:
    golden = bundle.golden()
    assert len(golden["pixels"]) == 16
    for name, expected in outputs(bundle, golden["pixels"]).items():
        np.testing.assert_array_equal(golden[name], expected, err_msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "dense"},
        {"weights": "coo", "values": "fp16"},
        {"input_dtype": "uint8", "features": True},
        {"score": "msp", "reject": 0.1},
    ],
)
def test_options_change_the_file_and_not_the_answers(
    digits_onnx: Path, bundle: Bundle, tmp_path: Path, options: dict[str, Any]
) -> None:
    other = from_digits(digits_onnx, tmp_path / "out", **options)
    pixels = load_pixels(open_source(TEST), bundle.preprocess, range(20))
    one, two = outputs(bundle, pixels), outputs(other, pixels)
    exact = options.get("values") is None
    np.testing.assert_allclose(two["logits"], one["logits"], atol=1e-5 if exact else 2e-2)
    assert ("features" in two) == options.get("features", False)
    gate = other.gate()
    assert gate is not None
    assert gate.score == options.get("score", "ebo")
    assert gate.alpha == options.get("reject", 0.05)


def test_a_graph_carries_every_score(full: Bundle, checkpoint: Checkpoint) -> None:
    """Against numpy, from features that PyTorch computes."""
    import torch

    model = checkpoint.model()
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    seen: list[torch.Tensor] = []
    last.register_forward_pre_hook(lambda _, given: seen.append(given[0]))

    def answers(spec: str) -> tuple[Any, Any, Any]:
        source = open_source(spec)
        pixels = load_pixels(source, PREPROCESS)
        seen.clear()
        with torch.no_grad():
            logits = model(torch.from_numpy(PREPROCESS.normalise(pixels))).numpy()
        return pixels, seen[0].numpy(), logits

    _, features, logits = answers(TRAIN)
    training = Training(
        features=features,
        logits=logits,
        labels=open_source(TRAIN).labels,
        weight=last.weight.detach().numpy(),
        bias=None if last.bias is None else last.bias.detach().numpy(),
        unknown_index=10,
    )
    pixels, features, logits = answers(TEST)
    out = outputs(full, pixels)
    fitted = full.manifest.provenance["export"]["fitted"]
    assert full.manifest.scores == ("msp", "ebo", "mls", "unknown", *fitted)
    assert set(full.manifest.scores) == set(SCORE_TABLE)
    for name, facts in fitted.items():
        if name == "temperature":  # fitted to other images
            continue
        options = {"dtype": "float32"} if name == "nnguide" else facts["options"]
        expected = fit_score(name, training, **options).score(features=features, logits=logits)
        scale = np.maximum(1, np.abs(expected))
        error = np.abs(out[f"score_{name}"] - expected) / scale
        # A neighbour as near as another may be taken for it after rounding.
        assert np.quantile(error, 0.99) < 1e-4, name
        assert error.max() < 1e-3, name
    np.testing.assert_allclose(out["features"], features, atol=1e-4)
    np.testing.assert_array_equal(out["score"], out["score_vim"])


def test_p_values_in_the_graph_are_the_gates(full: Bundle) -> None:
    gate = full.gate()
    assert gate is not None
    assert (gate.score, gate.n) == ("vim", 270)
    out = outputs(full, load_pixels(open_source(TEST), full.preprocess))
    expected = [gate.p_value(score) for score in out["score_vim"]]
    np.testing.assert_allclose(out["p_vim"], expected, rtol=1e-6)
    np.testing.assert_array_equal(out["p_vim"] > gate.alpha, out["accept"])
    for name in full.manifest.scores:
        assert 0 < out[f"p_{name}"].min() <= out[f"p_{name}"].max() <= 1


def left_by_a_temperature(held_out: Source) -> Source:
    rest = FitImages(None, held_out).rest(["temperature"])
    assert rest is not None
    return rest


def test_a_graph_can_gate_by_each_score_it_carries(full: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(full.path, copy)
    half = left_by_a_temperature(open_source(TEST))
    for name in ("knn", "rmds", "temperature"):
        again = calibrate(copy, half, score=name)
        gate = again.gate()
        assert gate is not None
        decisions = Predictor.open(again).predict([open_source(TEST).item(i) for i in range(40)])
        scores = [decision.score for decision in decisions]
        assert [d.accepted for d in decisions] == [score >= gate.threshold for score in scores]
        assert all(check.ok for check in verify(again))


def test_weights_and_constants_are_told_apart(full: Bundle, bundle: Bundle) -> None:
    assert weights(full.model_bytes()).keys() == weights(bundle.model_bytes()).keys()
    export = full.manifest.provenance["export"]
    plain = bundle.manifest.provenance["export"]
    assert plain["score_bytes"] == 0
    assert export["score_bytes"] > 1000 * 64
    assert full.manifest.sparsity.layers == bundle.manifest.sparsity.layers


def test_the_same_run_gives_the_same_version(
    bundle: Bundle, run_folder: Path, tmp_path: Path
) -> None:
    again = to_bundle(run_folder, tmp_path / "again")
    assert again.manifest.version == bundle.manifest.version
    assert again.model_bytes() == bundle.model_bytes()


def test_fp16_is_checked_over_a_thousand_images(digits_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"at least 1,000 images, and .*has 539"):
        from_digits(digits_onnx, tmp_path / "few", precision="fp16")
    made = from_digits(digits_onnx, tmp_path / "many", precision="fp16", data=TRAIN)
    figures = made.manifest.provenance["export"]["parity"]["backends"]
    assert {"onnxruntime", "sparse"} <= set(figures)
    for found in figures.values():
        assert found["images"] == 1000
        assert found["top1_agreement"] >= 0.999
        assert found["gate_agreement"] >= 0.995
    assert list(tmp_path.iterdir()) == [tmp_path / "many"]


def test_too_few_images_name_the_smallest_number_and_leave_nothing(
    digits_onnx: Path, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match="19"):
        from_digits(digits_onnx, tmp_path / "out", data=f"{TEST}[0:10]")
    assert not list(tmp_path.iterdir())


def test_a_bundle_that_is_there_is_kept_or_replaced(digits_onnx: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    from_digits(digits_onnx, out)
    with pytest.raises(UsageError, match="--force"):
        from_digits(digits_onnx, out)
    with pytest.raises(CalibrationError):
        from_digits(digits_onnx, out, data=f"{TEST}[0:10]", force=True)
    assert Bundle.open(out).gate("default") is not None
    replaced = from_digits(digits_onnx, out, score="mls", force=True)
    assert Bundle.open(out).gate_score == replaced.gate_score == "mls"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not a bundle"):
        from_digits(digits_onnx, tmp_path / "mine", force=True)


def test_changed_validation_images_are_noticed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    changed = Validation(source=TEST, indices=(0, 1), sha256="0" * 64)
    with pytest.raises(DataError, match=r"have changed since training.*--data"):
        to_bundle(dataclasses.replace(checkpoint, validation=changed), tmp_path / "out")
    gone = Validation(source=str(tmp_path / "gone"), indices=None, sha256="0" * 64)
    with pytest.raises(DataError, match=r"cannot be read.*--data"):
        to_bundle(dataclasses.replace(checkpoint, validation=gone), tmp_path / "out")


def test_wrong_options_are_named(checkpoint: Checkpoint, digits_onnx: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="no version of TensorRT builds for sm_61"):
        to_bundle(checkpoint, out, trt=EngineRequest(targets=(61,)))
    with pytest.raises(UsageError, match="values must be fp32 or fp16, not 'int8'"):
        to_bundle(checkpoint, out, values="int8")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"knn is fitted to the training images.*--fit"):
        from_digits(digits_onnx, out, score="knn")
    with pytest.raises(UsageError, match="no score is fitted to any"):
        to_bundle(checkpoint, out, fit="nowhere.npz")
    assert not out.exists()


def test_a_model_without_an_unknown_class(foreign: MakeForeign, tmp_path: Path) -> None:
    made = from_onnx(foreign(), tmp_path / "out", **OWN)
    assert made.manifest.scores == ("msp", "ebo", "mls")
    assert made.manifest.unknown_index is None
    assert made.gate() is None
    out = outputs(made, made.golden()["pixels"])
    assert not out["accept"].any()
    assert made.manifest.provenance["source"]["file"] == "own.onnx"
    assert made.preprocess.mean == (0.5, 0.5, 0.5)
    with pytest.raises(UsageError, match="unknown needs a model with an unknown class"):
        from_onnx(foreign(), tmp_path / "other", score="unknown", **OWN)


def photos(count: int) -> Source:
    rng = np.random.default_rng(0)
    return Source(spec="photos", items=list(rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)))


def test_an_own_model_is_calibrated_on_data(foreign: MakeForeign, tmp_path: Path) -> None:
    given = {**OWN, "unknown_index": 1}
    made = from_onnx(foreign(), tmp_path / "out", data=photos(100), name="mine", **given)
    gate = made.gate()
    assert gate is not None
    assert (gate.n, made.classes, made.manifest.name) == (100, ("a", "c", "d", "e"), "mine")
    assert math.isfinite(gate.threshold)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"classes": ["a", "b"]}, "5 outputs and no unknown class, so it needs 5 class names"),
        ({"classes": ["a", "b", "c"], "unknown_index": 0}, "needs 4 class names, and got 3"),
        ({"unknown_index": 5}, "unknown index 5 is outside the 5 outputs"),
        ({"classes": ["a", "a", "c", "d", "e"]}, "class name a is there twice"),
        ({"mean": [0.1, 0.2]}, "mean has 2 values, and the model's images 3"),
    ],
)
def test_a_wrong_description_of_an_own_model_is_named(
    foreign: MakeForeign, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        from_onnx(foreign(), tmp_path / "out", **{**OWN, **change})
    assert not (tmp_path / "out").exists()


def test_an_own_model_needs_no_torch(foreign: MakeForeign, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from moon.export import from_onnx\n"
        f"from_onnx({str(foreign())!r}, {str(tmp_path / 'out')!r}, classes=list('abcde'),"
        " mean=[0.5], std=[0.5])"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert Bundle.open(tmp_path / "out").gate() is None


def test_training_images_are_known_again_though_the_run_recorded_none(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    old = dataclasses.replace(checkpoint, training=None)
    made = to_bundle(old, tmp_path / "out")
    assert made.training is not None
    with pytest.raises(CalibrationError, match="were trained on"):
        calibrate(made, TRAIN)
    recipe = dataclasses.replace(
        checkpoint.recipe, data=dataclasses.replace(checkpoint.recipe.data, train="gone.npz#train")
    )
    gone = dataclasses.replace(old, recipe=recipe)
    assert to_bundle(gone, tmp_path / "gone").training is None
