"""p-values inside the graph: filled by calibration, checked on opening, golden with the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from moon.bundle import Bundle, golden_bytes, write_bundle
from moon.errors import BundleError
from moon.onnxfile import patch_matrix, patch_scalar, patch_vector, read_matrix
from moon.p_table import PTable
from moon.rewrite import carries_p_values, with_gate
from moon.runtime.calibrate import calibrate
from moon.runtime.onnxruntime import OnnxRuntime
from moon.runtime.verify import verify
from tests.bundles import images, make_bundle
from tests.test_bundle import reseal


def with_p_values(path: Path) -> Bundle:
    """A bundle whose graph looks p-values up, by nodes put together here."""
    plain = make_bundle(path.parent / "plain", calibrated=False, force=True)
    names = plain.manifest.scores
    model = onnx.load_model_from_string(plain.model_bytes())
    graph = model.graph
    blank = PTable.blank(len(names))
    for name, value in (
        ("p_scores", blank.scores),
        ("p_levels", blank.levels),
        ("p_last", np.array([2])),
    ):
        graph.initializer.append(numpy_helper.from_array(value, name))
    # [S, 1, 1024] against [S, N, 1]
    graph.node.extend(
        [
            helper.make_node("Transpose", ["stacked"], ["p_by_score"], perm=[1, 0]),
            helper.make_node("Unsqueeze", ["p_by_score", "p_last"], ["p_column"]),
            helper.make_node("Unsqueeze", ["p_scores", "one"], ["p_row"]),
            helper.make_node("LessOrEqual", ["p_row", "p_column"], ["p_below"]),
            helper.make_node("Cast", ["p_below"], ["p_ones"], to=TensorProto.INT64),
            helper.make_node("ReduceSum", ["p_ones", "p_last"], ["p_count"], keepdims=0),
            helper.make_node("GatherElements", ["p_levels", "p_count"], ["p_all"], axis=1),
        ]
    )
    for i, name in enumerate(names):
        graph.initializer.append(numpy_helper.from_array(np.array(i), f"p_at_{name}"))
        graph.node.append(helper.make_node("Gather", ["p_all", f"p_at_{name}"], [f"p_{name}"]))
        graph.output.append(helper.make_tensor_value_info(f"p_{name}", TensorProto.FLOAT, ["N"]))
    data = model.SerializeToString()
    fields = plain.manifest.to_json()
    fields = {k: v for k, v in fields.items() if k not in ("version", "sha256", "files")}
    fields["outputs"] = [*fields["outputs"], *(f"p_{name}" for name in names)]
    pixels = plain.golden()["pixels"]
    outputs = OnnxRuntime(data).run(plain.preprocess.normalise(pixels))
    files = {"model.onnx": data, "golden.npz": golden_bytes(pixels, outputs)}
    return write_bundle(path, manifest_fields=fields, files=files, force=True)


def source(path: Path, n: int) -> str:
    np.savez(path / f"set{n}.npz", v_images=images(n, seed=11))
    return f"{path / f'set{n}.npz'}#v"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return with_p_values(tmp_path / "p")


def test_before_calibration_they_are_nan(bundle: Bundle) -> None:
    assert carries_p_values(bundle)
    found = OnnxRuntime(bundle.model_bytes()).run(bundle.preprocess.normalise(images(5)))
    assert all(np.isnan(found[f"p_{name}"]).all() for name in bundle.manifest.scores)


@pytest.mark.parametrize("n", [300, 3000])
@pytest.mark.parametrize("score", ["ebo", "auto"])
def test_calibration_fills_every_scores_row(
    bundle: Bundle, tmp_path: Path, n: int, score: str
) -> None:
    made = calibrate(bundle, source(tmp_path, n), score=score)
    gate = made.gate()
    assert gate is not None
    backend = OnnxRuntime(made.model_bytes())
    asked = backend.run(made.preprocess.normalise(images(200, seed=3)))
    if score == "ebo":
        known = backend.run(made.preprocess.normalise(images(n, seed=11)))
        for name in made.manifest.scores:
            ranked = np.sort(known[f"score_{name}"])
            truth = (1 + np.searchsorted(ranked, asked[f"score_{name}"], side="right")) / (n + 1)
            p = asked[f"p_{name}"].astype(np.float64)
            # Never too small, but for rounding to float32.
            assert (p >= truth * (1 - 2e-7)).all()
            assert p == pytest.approx(truth, rel=2e-7 if n <= 1024 else 0.025)
    # Accepting is p > alpha, in the graph as well; and gate.json's p is the same or smaller.
    assert np.array_equal(asked["accept"], asked[f"p_{gate.score}"] > 0.05)
    own = np.array([gate.p_value(float(one)) for one in asked["score"]])
    assert (asked[f"p_{gate.score}"] >= own * (1 - 2e-7)).all()
    assert asked[f"p_{gate.score}"] == pytest.approx(own, rel=0.025 if n > 1024 else 2e-7)


def test_golden_p_values_follow(bundle: Bundle, tmp_path: Path) -> None:
    made = calibrate(bundle, source(tmp_path, 300))
    golden = made.golden()
    outputs = OnnxRuntime(made.model_bytes()).run(made.preprocess.normalise(golden["pixels"]))
    for name, value in outputs.items():
        assert np.array_equal(golden[name], value), name
    assert all(check.ok for check in verify(made))
    assert Bundle.open(made.path).gate() == made.gate()


def test_another_calibration_replaces_them_and_a_bare_gate_resets_them(
    bundle: Bundle, tmp_path: Path
) -> None:
    one = calibrate(bundle, source(tmp_path, 300))
    gate, before = one.gate(), read_matrix(one.model_bytes(), "p_levels")
    assert gate is not None
    other = calibrate(one, source(tmp_path, 150), score="msp")
    assert not np.array_equal(before, read_matrix(other.model_bytes(), "p_levels"))
    bare = with_gate(other, gate)
    assert np.isnan(read_matrix(bare.model_bytes(), "p_levels")).all()
    assert np.isnan(bare.golden()["p_ebo"]).all()


def test_another_backends_gate_leaves_them_and_says_so(bundle: Bundle, tmp_path: Path) -> None:
    one = calibrate(bundle, source(tmp_path, 300))
    before = one.model_bytes()
    said: list[str] = []
    made = calibrate(one, source(tmp_path, 150), backend="fake", warn=said.append)
    assert said == ["p-values in the graph stay those of the default gate, not of fake's own"]
    assert made.model_bytes() == before


def test_by_class_or_by_risk_they_stay_marginal(bundle: Bundle, tmp_path: Path) -> None:
    made = calibrate(bundle, source(tmp_path, 300), per_class=True)
    gate = made.gate()
    assert gate is not None
    asked = OnnxRuntime(made.model_bytes()).run(made.preprocess.normalise(images(50)))
    own = [gate.overall.p_value(float(one)) for one in asked["score"]]
    assert asked["p_ebo"] == pytest.approx(own, rel=2e-7)


def rewritten(bundle: Bundle, change: Callable[[bytes], bytes]) -> None:
    reseal(bundle.path, **{"model.onnx": change(bundle.model_bytes())})


def table(model: bytes, which: str, change: Callable[[np.ndarray], None]) -> bytes:
    values = read_matrix(model, which)
    change(values)
    return patch_matrix(model, which, values)


def raised(values: np.ndarray) -> None:
    values[1, :200] += 0.02
    values[:] = np.maximum.accumulate(np.minimum(values, 1), axis=1)


def lowered(values: np.ndarray) -> None:
    values[1, :200] *= 0.9


def shifted(values: np.ndarray) -> None:
    values[1] += 1


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        ("p_levels", raised, "p-values of model.onnx by ebo are not those of gate.json"),
        ("p_levels", lowered, "p-values of model.onnx by ebo are not those of gate.json"),
        ("p_scores", shifted, "p-values of model.onnx leave out the threshold"),
        ("p_scores", lambda v: v[1].__setitem__(0, 99), "p_scores is not ascending"),
        ("p_levels", lambda v: v[3].__setitem__(0, np.nan), "what is no p-value"),
        ("p_levels", lambda v: v[0].__setitem__(-1, 0.5), "p_levels falls"),
    ],
)
def test_p_values_that_contradict_the_gate_are_refused(
    bundle: Bundle,
    tmp_path: Path,
    which: str,
    change: Callable[[np.ndarray], None],
    message: str,
) -> None:
    made = calibrate(bundle, source(tmp_path, 300))
    rewritten(made, lambda model: table(model, which, change))
    with pytest.raises(BundleError, match=message):
        Bundle.open(made.path)


def test_a_thinned_tables_changed_level_is_noticed(bundle: Bundle, tmp_path: Path) -> None:
    made = calibrate(bundle, source(tmp_path, 3000))
    rewritten(made, lambda model: table(model, "p_levels", raised))
    with pytest.raises(BundleError, match=r"are not those of gate\.json"):
        Bundle.open(made.path)


def test_p_values_without_a_gate_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    made = calibrate(bundle, source(tmp_path, 300))

    def uncalibrated(model: bytes) -> bytes:
        model = patch_scalar(model, "threshold", np.inf)
        return patch_vector(model, "thresholds", np.full(3, np.inf, np.float32))

    rewritten(made, uncalibrated)
    reseal(made.path, **{"gate.json": None})
    (made.path / "gate.json").unlink()
    with pytest.raises(BundleError, match=r"has p-values, but there is no gate\.json"):
        Bundle.open(made.path)


def test_tables_of_the_wrong_shape_are_refused(bundle: Bundle) -> None:
    def cut(model: bytes) -> bytes:
        found = onnx.load_model_from_string(model)
        for tensor in found.graph.initializer:
            if tensor.name == "p_levels":
                values = numpy_helper.to_array(tensor)[:, :-1]
                tensor.CopyFrom(numpy_helper.from_array(values.copy(), "p_levels"))
        return found.SerializeToString()

    rewritten(bundle, cut)
    with pytest.raises(BundleError, match="p_levels has the wrong type or shape"):
        Bundle.open(bundle.path)


def test_one_table_without_the_other_is_refused(bundle: Bundle) -> None:
    def half(model: bytes) -> bytes:
        found = onnx.load_model_from_string(model)
        for tensor in found.graph.initializer:
            if tensor.name == "p_levels":
                tensor.name = "elsewhere"
        return found.SerializeToString()

    rewritten(bundle, half)
    with pytest.raises(BundleError, match="no initializer called p_levels"):
        Bundle.open(bundle.path)
