from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from moon.bundle import Bundle
from moon.errors import BackendError, BundleError, ImageError, UsageError
from moon.gate import Decision
from moon.gate_calibration import calibrate_conformal
from moon.runtime.backend import open_backend
from moon.runtime.calibrate import calibrate
from moon.runtime.predictor import Predictor
from moon.scores import known_probabilities
from tests.bundles import images, make_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("b") / "tiny")


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, "PNG")
    return buffer.getvalue()


def test_decisions_follow_the_gate_and_nothing_else(bundle: Bundle) -> None:
    predictor = Predictor.open(bundle)
    pixels = images(400, seed=9)
    outputs, decisions = predictor.raw(pixels), predictor.decide(pixels)
    gate = bundle.gate()
    assert gate is not None
    accepted = gate.accepts(outputs["score"])
    assert 0 < accepted.sum() < 400
    known = known_probabilities(outputs["logits"], 3)
    for i, made in enumerate(decisions):
        assert made.accepted == accepted[i] == outputs["accept"][i]
        assert made.score == outputs["score"][i] and made.threshold == gate.threshold
        assert made.p_value == gate.p_value(float(outputs["score"][i]))
        assert made.accepted == (made.p_value > 0.05)
        label = bundle.classes[outputs["label"][i]]
        assert made.label == (label if made.accepted else None)
        assert (made.reason is None) == made.accepted
        assert made.top[0][0] == label
        assert [p for _, p in made.top] == sorted(known[i], reverse=True)


@pytest.fixture(scope="module")
def by_class(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("c")
    pixels = images(600, seed=11)
    np.savez(root / "set.npz", val_images=pixels)
    made = make_bundle(root / "tiny", calibrated=False)
    return calibrate(made, f"{root / 'set.npz'}#val", reject=0.1, per_class=True)


def test_decisions_by_class_follow_the_gate_and_nothing_else(by_class: Bundle) -> None:
    predictor, gate = Predictor.open(by_class), by_class.gate()
    assert gate is not None and gate.per_class is not None
    assert len(set(gate.per_class.values.tolist())) == 3
    pixels = images(400, seed=9)
    outputs, decisions = predictor.raw(pixels), predictor.decide(pixels)
    accepted = gate.accepts(outputs["score"], outputs["label"])
    assert not np.array_equal(accepted, outputs["score"] >= np.float32(gate.threshold))
    for i, made in enumerate(decisions):
        label = int(outputs["label"][i])
        assert made.accepted == accepted[i] == outputs["accept"][i]
        assert made.threshold == gate.per_class.values[label]
        assert made.p_value == gate.p_value(float(outputs["score"][i]), label)
        assert made.accepted == (made.p_value > 0.1)


def test_a_given_threshold_overrides_those_by_class(by_class: Bundle) -> None:
    gate = by_class.gate()
    assert gate is not None
    pixels = images(400, seed=9)
    # The one over all classes too: fed, it is one for all.
    for value in (0.5, gate.threshold):
        predictor = Predictor.open(by_class, threshold=value, warn=lambda _: None)
        outputs, decisions = predictor.raw(pixels), predictor.decide(pixels)
        expected = (outputs["score"] >= np.float32(value)).tolist()
        assert outputs["accept"].tolist() == [made.accepted for made in decisions] == expected
        assert {made.threshold for made in decisions} == {float(np.float32(value))}


def test_a_backends_own_gate_by_class_decides(by_class: Bundle, tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", val_images=images(600, seed=12))
    made = Bundle.open(shutil.copytree(by_class.path, tmp_path / "tiny"))
    default = made.gate()
    made = calibrate(made, f"{tmp_path / 'set.npz'}#val", backend="fake", per_class=True)
    own = made.gate("fake")
    assert own is not None and own.per_class is not None and made.gate() == default
    predictor = Predictor.open(made, backend="fake")
    outputs = predictor.raw(images(100, seed=13))
    expected = own.accepts(outputs["score"], outputs["label"])
    assert 0 < expected.sum() < 100 and np.array_equal(outputs["accept"], expected)
    decided = predictor.decide(images(100, seed=13))
    assert [one.accepted for one in decided] == expected.tolist()
    # And where the graph cannot hold it, because it holds the default one.
    stand_in = Predictor(made.with_gate(own, "onnxruntime"), open_backend(made))
    outputs = stand_in.raw(images(100, seed=13))
    expected = own.accepts(outputs["score"], outputs["label"])
    assert np.array_equal(outputs["accept"], expected)


def test_the_top_is_at_most_five_known_classes(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "b", classes=[f"c{i}" for i in range(9)])
    decision = Predictor.open(made).predict([images(1)[0]])[0]
    assert len(decision.top) == 5
    assert [p for _, p in decision.top] == sorted((p for _, p in decision.top), reverse=True)


def test_paths_bytes_images_and_arrays_give_one_answer(bundle: Bundle, tmp_path: Path) -> None:
    pixels = images(1, seed=3)[0]
    (tmp_path / "a.png").write_bytes(png(pixels))
    items = [tmp_path / "a.png", str(tmp_path / "a.png"), png(pixels), pixels,
             Image.fromarray(pixels.squeeze())]  # fmt: skip
    decisions = Predictor.open(bundle.path).predict(items)
    assert [made.input for made in decisions] == [*[str(tmp_path / "a.png")] * 2, 2, 3, 4]
    assert len({made.score for made in decisions}) == 1


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_batch_size_does_not_change_decisions(bundle: Bundle, batch_size: int) -> None:
    pixels = list(images(20, seed=4))
    predictor = Predictor.open(bundle)
    decisions = predictor.predict(pixels, batch_size=batch_size)
    expected = predictor.predict(pixels)
    assert [(d.accepted, d.label, d.input) for d in decisions] == [
        (d.accepted, d.label, d.input) for d in expected
    ]
    assert [d.score for d in decisions] == pytest.approx([d.score for d in expected], abs=1e-5)


def test_a_bad_item_does_not_spoil_the_others(bundle: Bundle) -> None:
    good = images(3, seed=5)
    items = [good[0], b"junk", png(good[1])[:60], good[1], np.zeros((9, 9, 1), np.uint8), good[2]]
    predictor = Predictor.open(bundle)
    for batch_size in (1, 2, 64):
        found = predictor.predict_each(items, batch_size=batch_size)
        assert [isinstance(one, ImageError) for one in found] == [
            False, True, True, False, True, False,
        ]  # fmt: skip
        rest = [one for one in found if isinstance(one, Decision)]
        assert [one.input for one in rest] == [0, 3, 5]
        expected = predictor.predict(list(good))
        assert [one.score for one in rest] == pytest.approx([e.score for e in expected], abs=1e-5)
    with pytest.raises(ImageError):
        predictor.predict(items)
    assert all(isinstance(one, ImageError) for one in predictor.predict_each([b"a", b"b"]))
    assert predictor.predict([]) == [] and predictor.predict_each([]) == []
    with pytest.raises(UsageError, match="batch_size"):
        predictor.predict(items, batch_size=0)


def test_an_uncalibrated_bundle_is_refused_naming_calibrate(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "b", calibrated=False)
    with pytest.raises(BundleError, match=r"not calibrated.*moon calibrate .*--threshold X"):
        Predictor.open(made)


def test_a_given_threshold_overrides_with_a_warning(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "b", calibrated=False)
    warned: list[str] = []
    predictor = Predictor.open(made, threshold=0.1, warn=warned.append)
    assert len(warned) == 1 and "no guarantee" in warned[0]
    pixels = images(60, seed=6)
    decisions = predictor.decide(pixels)
    score = predictor.raw(pixels)["score"]
    assert [d.accepted for d in decisions] == (score >= np.float32(0.1)).tolist()
    assert all(d.threshold == np.float32(0.1) and d.p_value is None for d in decisions)
    with pytest.warns(UserWarning, match="no guarantee"):
        Predictor.open(made, threshold=0.1)


@pytest.mark.parametrize("threshold", [np.nan, np.inf, -np.inf, 1e300])
def test_a_threshold_that_is_not_finite_is_refused(bundle: Bundle, threshold: float) -> None:
    with pytest.raises(UsageError, match="must be a finite number"):
        Predictor.open(bundle, threshold=threshold)


def test_backend_errors_come_through(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="not in this version"):
        Predictor.open(bundle, backend="torch")


def test_a_gate_of_the_backends_own_is_used(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "b")
    own = calibrate_conformal(np.full(40, 1e6), 0.1, score="ebo")
    made = made.with_gate(own, "onnxruntime")
    predictor = Predictor.open(made)
    assert predictor.threshold == 1e6
    pixels = images(20)
    assert not predictor.raw(pixels)["accept"].any()
    assert not any(one.accepted for one in predictor.decide(pixels))


def test_a_uint8_bundle_decides_like_a_float_one(tmp_path: Path) -> None:
    one = Predictor.open(make_bundle(tmp_path / "a"))
    other = Predictor.open(make_bundle(tmp_path / "b", dtype="uint8"))
    pixels = images(50)
    assert [d.label for d in one.decide(pixels)] == [d.label for d in other.decide(pixels)]


@pytest.mark.parametrize("channels", [1, 3])
def test_no_unknown_class_is_needed(tmp_path: Path, channels: int) -> None:
    made = make_bundle(tmp_path / "b", unknown=False, channels=channels, size=16)
    decisions = Predictor.open(made).decide(images(300, 16, channels, seed=7))
    reasons = {d.reason for d in decisions}
    assert None in reasons and reasons <= {None, "ood", "low_confidence"}
    assert sum(p for _, p in decisions[0].top) == pytest.approx(1)


class Odd:
    """A backend with one plain row, and rows of NaN and +inf."""

    name = "odd"
    outputs = ("label", "accept", "score", "logits")

    def run(self, batch: NDArray[Any], threshold: float | None = None) -> dict[str, NDArray[Any]]:
        logits = np.array([[3, 1, 0, 0], [np.nan, 1, 0, 0], [np.inf, 1, 0, 0]], np.float32)
        score = np.array([3, np.nan, np.inf], np.float32)
        return {
            "label": np.array([0, 1, 0]),
            "accept": np.array([True, True, True]),  # a graph that gets it wrong
            "score": score,
            "logits": logits,
        }

    def info(self) -> dict[str, Any]:
        return {"name": self.name}


def test_scores_that_are_not_finite_abstain_and_stay_out_of_json(bundle: Bundle) -> None:
    good, nan, infinite = Predictor(bundle, Odd()).decide(images(3))
    assert good.accepted and good.label == "cat"
    for made in (nan, infinite):
        assert not made.accepted and made.label is None and made.reason == "ood"
        assert made.score is None and made.p_value is None and made.top == ()
        json.dumps(made.to_json(), allow_nan=False)


def test_it_is_safe_to_use_from_threads(bundle: Bundle) -> None:
    predictor = Predictor.open(bundle)
    sets = [list(images(8, seed=i)) for i in range(24)]
    expected = [predictor.predict(one) for one in sets]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(predictor.predict, sets)) == expected


HEAVY = ("torch", "bentoml", "sklearn", "onnx", "matplotlib", "pyarrow")


def test_a_prediction_loads_no_training_or_service_library(bundle: Bundle) -> None:
    script = f"""
        import sys
        import moon.runtime
        assert not set({HEAVY!r}) & set(sys.modules), "import alone"
        assert "onnxruntime" not in sys.modules and "numpy" not in sys.modules
        from moon.runtime import Predictor
        import numpy as np
        made = Predictor.open({str(bundle.path)!r}).predict([np.full((8, 8, 1), 99, np.uint8)])
        assert len(made) == 1 and made[0].score is not None
        made = Predictor.open({str(bundle.path)!r}, backend="sparse", warn=lambda text: None)
        assert len(made.predict([np.full((8, 8, 1), 99, np.uint8)])) == 1
        print(sorted(set({HEAVY!r}) & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]" and done.stderr == ""


def test_the_engine_is_there_without_what_it_compiles_with(bundle: Bundle) -> None:
    script = f"""
        import sys
        sys.modules["llvmlite"] = None
        from moon.errors import MissingExtraError
        from moon.runtime import SparseEngine, backends
        from moon.runtime.sparse.backend import SparseBackend
        assert not set({HEAVY!r}) & set(sys.modules)
        try:
            SparseEngine({str(bundle.path / "model.onnx")!r})
        except MissingExtraError as error:
            print(error.remedy)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "pip install 'moon-toolkit[engine]'" in done.stdout and done.stderr == ""


def test_every_decision_is_json(bundle: Bundle) -> None:
    for made in Predictor.open(bundle).decide(images(30)):
        assert json.loads(json.dumps(made.to_json(), allow_nan=False)) == made.to_json()
