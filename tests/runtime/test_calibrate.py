from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moon.bundle import Bundle
from moon.data.load import data_sha256
from moon.data.source import open_source
from moon.errors import BackendError, BundleError, CalibrationError, DataError, UsageError
from moon.onnxfile import read_scalar, read_vector
from moon.runtime.backend import open_backend
from moon.runtime.calibrate import calibrate
from moon.runtime.predictor import Predictor
from moon.scores import ebo, msp, unknown_probability
from tests.bundles import CLASSES, images, make_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "tiny", calibrated=False)


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "set.npz"
    pixels = images(400, seed=11)
    np.savez(path, val_images=pixels, val_labels=np.arange(400) % 3)
    return f"{path}#val"


def scores_of(bundle: Bundle, name: str = "ebo") -> np.ndarray:
    batch = bundle.preprocess.normalise(images(400, seed=11))
    return open_backend(bundle).run(batch)[f"score_{name}"]


def test_the_threshold_is_the_promised_rank_of_the_backends_scores(
    bundle: Bundle, arrays: str
) -> None:
    seen: list[tuple[int, int]] = []
    made = calibrate(bundle, arrays, progress=lambda done, total, _: seen.append((done, total)))
    gate = made.gate()
    assert gate is not None
    expected = np.sort(scores_of(made))[20 - 1]  # k = floor(.05 * 401) = 20
    assert (gate.method, gate.score, gate.n, gate.k) == ("conformal", "ebo", 400, 20)
    assert gate.threshold == expected == read_scalar(made.model_bytes(), "threshold")
    assert gate.data_sha256 == data_sha256(open_source(arrays))
    assert gate.backend == "onnxruntime"
    assert Bundle.open(bundle.path).gate() == gate
    assert seen[-1] == (400, 400)
    decisions = Predictor.open(made).decide(images(400, seed=11))
    assert sum(not one.accepted for one in decisions) == 19


def test_reason_quantiles_are_those_of_the_images(bundle: Bundle, arrays: str) -> None:
    made = calibrate(bundle, arrays)
    gate = made.gate()
    assert gate is not None
    logits = open_backend(made).run(bundle.preprocess.normalise(images(400, seed=11)))["logits"]
    assert gate.reason == pytest.approx(
        {
            "msp": np.quantile(msp(logits, 3), 0.05),
            "ebo": np.quantile(ebo(logits, 3), 0.05),
            "p_unknown": np.quantile(unknown_probability(logits, 3), 0.95),
        }
    )


@pytest.mark.parametrize("score", ["msp", "mls", "unknown"])
def test_another_score_changes_what_the_graph_gates_by(
    bundle: Bundle, arrays: str, score: str
) -> None:
    made = calibrate(bundle, arrays, score=score, reject=0.2)
    gate = made.gate()
    assert gate is not None and gate.score == made.gate_score == score
    assert gate.threshold == np.sort(scores_of(made, score))[80 - 1]
    outputs = open_backend(made).run(made.preprocess.normalise(images(50)))
    assert np.array_equal(outputs["score"], outputs[f"score_{score}"])
    again = calibrate(made, arrays).gate()
    assert again is not None and again.score == score  # kept unless another is named


def test_pac_is_stricter_than_conformal(bundle: Bundle, arrays: str) -> None:
    conformal, pac = (
        calibrate(bundle.path, arrays).gate(),
        calibrate(bundle.path, arrays, method="pac").gate(),
    )
    assert conformal is not None and pac is not None
    assert pac.k is not None and conformal.k is not None and pac.k < conformal.k
    assert (pac.method, pac.delta) == ("pac", 0.05)


def folder(path: Path, n: int, wrong: int) -> Path:
    """Images in folders named by the class the model predicts, ``wrong`` of them misfiled."""
    predictor = Predictor.open(make_bundle(path / "probe"))
    pixels = images(n, seed=12)
    labels = predictor.raw(pixels)["label"].copy()
    labels[:wrong] = (labels[:wrong] + 1) % 3
    for name in CLASSES:
        (path / "set" / name).mkdir(parents=True)
    for i, label in enumerate(labels):
        Image.fromarray(pixels[i].squeeze()).save(path / "set" / CLASSES[label] / f"{i:04}.png")
    return path / "set"


def test_risk_counts_the_models_own_errors(bundle: Bundle, tmp_path: Path) -> None:
    made = calibrate(bundle, str(folder(tmp_path, 200, 4)), method="risk", risk=0.1)
    gate = made.gate()
    assert gate is not None and gate.method == "risk" and gate.risk == 0.1
    assert 0 < gate.achieved["error"] < gate.achieved["error_bound"] <= 0.1


def test_risk_needs_labels(bundle: Bundle, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.fromarray(images(1)[0].squeeze()).save(flat / "a.png")
    with pytest.raises(DataError, match="has no labels, which the method risk needs"):
        calibrate(bundle, str(flat), method="risk", risk=0.1)


def test_a_limit_takes_a_fixed_random_choice(bundle: Bundle, arrays: str) -> None:
    one, other = (calibrate(bundle.path, arrays, limit=100).gate() for _ in range(2))
    assert one is not None and one == other and one.n == 100
    chosen = np.sort(np.random.default_rng(0).permutation(400)[:100])
    assert one.data_sha256 == data_sha256(open_source(arrays), chosen)
    assert set(one.scores) <= set(scores_of(Bundle.open(bundle.path)).tolist())


def test_a_backend_of_its_own_gets_a_gate_of_its_own(bundle: Bundle, arrays: str) -> None:
    with pytest.raises(BundleError, match="needs a default gate"):
        calibrate(bundle, arrays, backend="fake")
    made = calibrate(bundle, arrays)
    both = calibrate(made, arrays, backend="fake")
    assert both.gate() == made.gate() and both.gate("fake") != made.gate()
    fake = both.gate("fake")
    assert fake is not None and fake.backend == "fake"


def test_each_predicted_class_gets_the_rank_of_its_own_scores(
    bundle: Bundle, tmp_path: Path
) -> None:
    # Without labels: what is predicted is all that counts.
    np.savez(tmp_path / "set.npz", val_images=images(400, seed=11))
    made = calibrate(bundle, f"{tmp_path / 'set.npz'}#val", per_class=True)
    outputs = open_backend(made).run(made.preprocess.normalise(images(400, seed=11)))
    gate = made.gate()
    assert gate is not None and gate.per_class is not None and not gate.per_class.pooled
    for i, name in enumerate(CLASSES):
        part = np.sort(outputs["score"][outputs["label"] == i])
        found = gate.per_class.own[name]
        assert found.k == (len(part) + 1) // 20 and found.n == len(part)
        assert found.value == part[found.k - 1] == read_vector(made.model_bytes(), "thresholds")[i]
    assert np.array_equal(outputs["accept"], gate.accepts(outputs["score"], outputs["label"]))
    decisions = Predictor.open(made).decide(images(400, seed=11))
    rejected = sum(not one.accepted for one in decisions)
    assert rejected == sum(group.k - 1 for group in gate.per_class.groups if group.k)
    one = calibrate(made, f"{tmp_path / 'set.npz'}#val").gate()
    assert one is not None and one.per_class is None and one.threshold == gate.threshold


def test_a_class_never_predicted_is_pooled(bundle: Bundle, tmp_path: Path) -> None:
    pixels = images(400, seed=11)
    labels = Predictor.open(bundle, threshold=0, warn=lambda _: None).raw(pixels)["label"]
    np.savez(tmp_path / "set.npz", val_images=pixels[labels != 2])
    gate = calibrate(bundle, f"{tmp_path / 'set.npz'}#val", per_class=True, method="pac").gate()
    assert gate is not None and gate.per_class is not None
    assert gate.per_class.pooled == {"cat": int((labels == 0).sum()), "bird": 0}
    assert (gate.per_class.fewest, gate.method) == (59, "pac")


def test_by_class_needs_a_graph_that_can(tmp_path: Path, arrays: str) -> None:
    old = make_bundle(tmp_path / "old", by_class=False)
    with pytest.raises(BundleError, match=r"has one threshold.*Export it again"):
        calibrate(old, arrays, per_class=True)
    again = calibrate(old, arrays).gate()
    assert again is not None and again.n == 400


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"limit": 10}, CalibrationError, r"10 .* too few .*at least 19 held-out"),
        ({"limit": 50, "method": "pac"}, CalibrationError, r"at least 59 held-out"),
        ({"limit": 18, "per_class": True}, CalibrationError, r"18 .*at least 19 held-out"),
        ({"limit": 40, "per_class": True}, CalibrationError, r"takes 19 images predicted as it"),
        ({"per_class": True, "method": "risk", "risk": 0.1}, UsageError, "no thresholds by class"),
        ({"limit": 0}, UsageError, "limit must be 1 or more"),
        ({"reject": 0}, UsageError, "reject must lie between 0 and 1"),
        ({"delta": 1}, UsageError, "delta must lie between 0 and 1"),
        ({"method": "hope"}, UsageError, "no method is called hope"),
        ({"method": "risk"}, UsageError, "go together"),
        ({"risk": 0.1}, UsageError, "go together"),
        ({"ood": ["sklearn:photos"]}, UsageError, "only for choosing a score"),
        (
            {"score": "knn"},
            UsageError,
            "does not carry the score knn. Choose one of msp, .* or auto",
        ),
        ({"backend": "torch"}, BackendError, "not in this version"),
    ],
)
def test_wrong_use_leaves_the_bundle_as_it_was(
    bundle: Bundle, arrays: str, arguments: dict[str, object], error: type, message: str
) -> None:
    before = {p.name: p.read_bytes() for p in bundle.path.iterdir()}
    with pytest.raises(error, match=message):
        calibrate(bundle, arrays, **arguments)  # type: ignore[arg-type]
    assert {p.name: p.read_bytes() for p in bundle.path.iterdir()} == before


def test_a_uint8_bundle_is_calibrated_alike(tmp_path: Path, arrays: str) -> None:
    one = calibrate(make_bundle(tmp_path / "a", calibrated=False), arrays).gate()
    other = calibrate(make_bundle(tmp_path / "b", calibrated=False, dtype="uint8"), arrays).gate()
    assert one is not None and other is not None
    assert one.threshold == pytest.approx(other.threshold, abs=1e-5)


def test_a_source_of_the_wrong_shape_is_named(bundle: Bundle, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", val_images=images(30, 9))
    with pytest.raises(DataError, match="8"):
        calibrate(bundle, f"{tmp_path / 'x.npz'}#val")
    assert zipfile.is_zipfile(io.BytesIO((bundle.path / "golden.npz").read_bytes()))
