"""The engine as a backend of bundles: the decisions of ONNX Runtime, whatever the bundle."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moon import __version__
from moon.bundle import Bundle
from moon.data.load import load_pixels
from moon.data.source import open_source
from moon.errors import BackendError
from moon.runtime import Predictor, backends, open_backend
from moon.runtime.bench import bench
from moon.runtime.calibrate import calibrate
from moon.runtime.sparse import opening
from moon.runtime.verify import verify
from tests.bundles import make_bundle, make_model

from .exported import export

Make = Callable[..., Bundle]

pytestmark = pytest.mark.usefixtures("small_pays")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Bundles by their options, each exported once; not to be changed."""
    kept: dict[str, Bundle] = {}

    def make(**options: Any) -> Bundle:
        key = str(options)
        if key not in kept:
            kept[key] = export(tmp_path_factory.mktemp("sparse"), **options)
        return kept[key]

    return make


@pytest.fixture(scope="module")
def pixels(made: Make) -> NDArray[np.uint8]:
    """Fifty images, none of which a threshold was set by."""
    source = open_source("sklearn:digits#train")
    return load_pixels(source, made().preprocess, np.arange(50))


KINDS = [
    {},
    {"weights": "coo"},
    {"weights": "dense"},
    {"values": "fp16"},
    {"input_dtype": "uint8"},
    {"carry": [], "features": False, "p_values": False, "score": "ebo"},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_decisions_are_those_of_onnx_runtime(
    made: Make, pixels: NDArray[np.uint8], options: dict[str, Any], threads: int
) -> None:
    bundle, told = made(**options), []
    batch = pixels if "input_dtype" in options else bundle.preprocess.normalise(pixels)
    backend = open_backend(bundle, "sparse", threads=threads, warn=told.append)
    assert [line for line in told if "ONNX Runtime" in line] == []
    layers = backend.info()["sparse_layers"]
    assert layers["picked"] == layers["eligible"] >= 4
    expected = open_backend(bundle).run(batch)
    found = backend.run(batch)
    assert list(found) == list(backend.outputs) == list(expected)
    for name, one in found.items():
        assert one.dtype == expected[name].dtype and one.shape == expected[name].shape, name
        if one.dtype.kind in "bi":
            assert np.array_equal(one, expected[name]), name
        else:  # a p-value is a share of the held-out images: some more or less are near
            near = 0.02 if name.startswith("p_") else 1e-3
            np.testing.assert_allclose(one, expected[name], rtol=1e-3, atol=near, err_msg=name)


def test_info(made: Make) -> None:
    info = open_backend(made(), "sparse", threads=1).info()
    assert info["name"] == "sparse" and info["version"] == __version__ and info["threads"] == 1
    assert info["precision"] == "fp32" and info["provider"] == f"moon, {info['isa']}"
    assert "the operator is not known" in info["handed_over"]


def test_a_given_threshold_replaces_the_graphs(made: Make, pixels: NDArray[np.uint8]) -> None:
    bundle = made()
    backend, batch = open_backend(bundle, "sparse"), bundle.preprocess.normalise(pixels)
    score = backend.run(batch)["score"]
    for bar in (float(np.median(score)), -1e30, 1e30):
        assert np.array_equal(backend.run(batch, bar)["accept"], score >= np.float32(bar))


@pytest.mark.parametrize("whole", [True, False])
def test_a_wrong_batch_is_named(made: Make, tmp_path: Path, whole: bool) -> None:
    backend = open_backend(make_bundle(tmp_path / "tiny") if whole else made(), "sparse")
    good = np.zeros((2, 1, 8, 8), np.float32)
    for wrong in (good[0], good[:, :, :4], good.astype(np.float64), good.astype(np.uint8)):
        with pytest.raises(BackendError, match=r"must be float32 \[N, 1, 8, 8\], not "):
            backend.run(wrong)
    good[1, 0, 3, 3] = np.nan
    with pytest.raises(BackendError, match="NaN or infinite"):
        backend.run(good)


def test_only_graphs_like_a_bundles(made: Make) -> None:
    model = make_model(classes=2)
    model.graph.input[0].type.tensor_type.elem_type = 11
    del model.graph.node[:]
    model.graph.node.add(op_type="Identity", input=["input"], output=["label"])
    del model.graph.output[1:]
    model.graph.output[0].type.tensor_type.elem_type = 11
    model.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(BackendError, match="one image input, float32 or uint8"):
        open_backend(model.SerializeToString(), "sparse")


def test_the_ways_to_use_a_bundle(made: Make, tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    bundle, told = export(tmp_path), []
    checks = {check.name: check for check in verify(bundle)}
    assert checks["sparse"].ok and "ONNX Runtime" not in checks["sparse"].detail
    own = calibrate(bundle, "sklearn:digits#test", backend="sparse", reject=0.2, warn=told.append)
    assert "p-values in the graph stay those of the default gate" in " ".join(told)
    predictor = Predictor.open(own, backend="sparse", warn=pytest.fail)
    gate = own.gate("sparse")
    assert gate is not None and gate != own.gate() and predictor.threshold == gate.threshold
    decisions = predictor.decide(pixels)
    assert 0 < sum(decision.accepted for decision in decisions) < len(decisions)


def test_it_is_measured_beside_onnx_runtime(made: Make) -> None:
    result = bench(made(), backends=["sparse"], baseline="onnxruntime", queries=40)
    assert result["backend"]["name"] == "sparse" and result["parity"]["within"]
    assert result["backend"]["sparse_layers"]["picked"] >= 4
    assert result["baseline"]["name"] == "onnxruntime" and result["speedup"]["ratio"] > 0


def test_several_callers_share_it(made: Make, pixels: NDArray[np.uint8]) -> None:
    bundle, wrong = made(), []
    backend, batch = open_backend(bundle, "sparse", threads=2), bundle.preprocess.normalise(pixels)
    expected = backend.run(batch)["logits"]

    def call(first: int) -> None:
        for count in range(1, 9):
            found = backend.run(batch[first : first + count])["logits"]
            if not np.allclose(found, expected[first : first + count], rtol=1e-5, atol=1e-5):
                wrong.append((first, count))

    callers = [threading.Thread(target=call, args=(8 * i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends()["sparse"].ok
    monkeypatch.setattr("moon.runtime.backend.find_spec", lambda name: None)
    missing = backends()["sparse"]
    assert not missing.ok and missing.install == "pip install 'moon-toolkit[engine]'"
    monkeypatch.setattr(opening.platform, "machine", lambda: "aarch64")
    elsewhere = backends()["sparse"]
    assert not elsewhere.ok and "not verified on Linux aarch64" in elsewhere.reason
