from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moon.bundle import Bundle
from moon.errors import BackendError
from moon.runtime.backend import NAMES, backends, open_backend
from moon.runtime.onnxruntime import OnnxRuntime
from moon.scores import SCORES
from tests.bundles import images, make_bundle, make_model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("b") / "tiny")


def test_every_name_tells_whether_it_can_run() -> None:
    found = backends()
    assert tuple(found) == NAMES
    assert found["onnxruntime"].ok and "onnxruntime" in found["onnxruntime"].reason
    assert found["sparse"].ok and "llvmlite" in found["sparse"].reason
    assert not found["torch"].ok and "not in this version" in found["torch"].reason


def test_backends_of_later_versions_say_so(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match=r"not in this version of moon.*--backend onnxruntime"):
        open_backend(bundle, "torch")


def test_an_unknown_backend_lists_those_there_are(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match=r"no backend is called gpu.*onnxruntime, sparse"):
        open_backend(bundle, "gpu")
    with pytest.raises(BackendError, match="threads must be 0 or more"):
        open_backend(bundle, threads=-1)


def test_outputs_follow_the_conventions_and_the_numpy_scores(bundle: Bundle) -> None:
    backend = open_backend(bundle)
    assert set(backend.outputs) == set(bundle.manifest.outputs)
    found = backend.run(bundle.preprocess.normalise(images(9)))
    assert found["label"].dtype == np.int64 and found["accept"].dtype == np.bool_
    assert found["logits"].shape == (9, 4)
    for name in bundle.manifest.scores:
        expected = SCORES[name](found["logits"], 3)
        assert found[f"score_{name}"] == pytest.approx(expected, abs=1e-6)
    assert np.array_equal(found["score"], found["score_ebo"])
    assert np.array_equal(found["label"], found["logits"][:, :3].argmax(axis=1))


def test_a_given_threshold_replaces_the_graphs(bundle: Bundle) -> None:
    backend = open_backend(bundle)
    batch = bundle.preprocess.normalise(images(50))
    score = backend.run(batch)["score"]
    for bar in (float(np.median(score)), float(score[0]), -1e30, 1e30):
        found = backend.run(batch, bar)
        assert np.array_equal(found["accept"], score >= np.float32(bar))
    assert not backend.run(batch, np.inf)["accept"].any()


@pytest.mark.parametrize("n", [1, 2, 7])
def test_the_batch_size_does_not_change_the_answers(bundle: Bundle, n: int) -> None:
    backend = open_backend(bundle)
    batch = bundle.preprocess.normalise(images(14))
    whole = backend.run(batch)["logits"]
    parts = [backend.run(batch[i : i + n])["logits"] for i in range(0, 14, n)]
    assert np.concatenate(parts) == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize(
    "batch",
    [
        np.zeros((1, 8, 8), np.float32),
        np.zeros((1, 1, 9, 8), np.float32),
        np.zeros((1, 3, 8, 8), np.float32),
        np.zeros((1, 1, 8, 8), np.float64),
        np.zeros((1, 8, 8, 1), np.uint8),
    ],
)
def test_a_wrong_batch_is_named(bundle: Bundle, batch: np.ndarray) -> None:
    with pytest.raises(BackendError, match=r"takes float32 \[N, 1, 8, 8\], not "):
        open_backend(bundle).run(batch)


def test_a_uint8_graph_takes_pixels(tmp_path: Path) -> None:
    pixels = images(6)
    whole = make_bundle(tmp_path / "a", dtype="float32")
    raw = make_bundle(tmp_path / "b", dtype="uint8")
    expected = open_backend(whole).run(whole.preprocess.normalise(pixels))
    found = open_backend(raw).run(pixels)
    assert found["logits"] == pytest.approx(expected["logits"], abs=1e-5)
    with pytest.raises(BackendError, match=r"takes uint8 \[N, 8, 8, 1\]"):
        open_backend(raw).run(pixels.astype(np.float32))


def test_info_names_what_runs(bundle: Bundle) -> None:
    import onnxruntime

    info = open_backend(bundle, threads=2).info()
    assert info == {
        "name": "onnxruntime",
        "version": onnxruntime.__version__,
        "provider": "CPUExecutionProvider",
        "precision": "fp32",
        "threads": 2,
    }


def test_a_model_that_does_not_load_is_a_backend_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BackendError, match="ONNX Runtime cannot load the model"):
        OnnxRuntime(b"nonsense")
    model = make_model(classes=2)
    model.graph.input[0].type.tensor_type.shape.dim.pop()
    del model.graph.node[:-1]
    with pytest.raises(BackendError):
        OnnxRuntime(model.SerializeToString())
    assert capfd.readouterr().err == ""


def test_the_fake_is_deterministic_and_consistent(bundle: Bundle) -> None:
    fake = open_backend(bundle, "fake")
    batch = bundle.preprocess.normalise(images(40))
    found, again = fake.run(batch), open_backend(bundle, "fake").run(batch)
    assert set(found) == set(bundle.manifest.outputs) == set(fake.outputs)
    for name, value in found.items():
        assert np.array_equal(value, again[name])
    bar = float(np.median(found["score"]))
    assert np.array_equal(fake.run(batch, bar)["accept"], found["score"] >= np.float32(bar))
    assert len(set(found["label"])) > 1
    with pytest.raises(BackendError, match="needs a bundle"):
        open_backend(b"", "fake")
