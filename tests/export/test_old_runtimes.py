"""Packed models in ONNX Runtimes of earlier years, each installed for the test."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from moon.export.checks import check_onnx
from moon.export.graph import IR_VERSION
from moon.export.head import add_head
from moon.export.pack import pack, round_values
from moon.export.session import run
from moon.export.trace import trace
from moon.trainer.models import build
from tests.export.test_pack import IMAGES, network

# The oldest that pyproject.toml allows, and one between it and now.
RELEASES = ("1.18.0", "1.20.0")
# There are no wheels of these for later Pythons.
PYTHONS = {"1.18.0": (3, 12), "1.20.0": (3, 13)}

CHILD = """
import json, sys
from collections import Counter
import numpy, onnxruntime as ort
images = numpy.load(sys.argv[1])
found = {"version": ort.__version__}
for path in sys.argv[2:]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = path + ".optimised"
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"input": images})
    found[path] = [value.tobytes().hex() for value in outputs]
print(json.dumps(found))
"""


def models(kind: str) -> Any:
    if kind == "layers":
        return network(), IMAGES
    net = build("cnn", outputs=11, channels=3, size=(16, 16))
    body = trace(net, channels=3, size=(16, 16))
    images = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)
    model = add_head(body, outputs=11, unknown_index=10)
    for tensor in model.graph.initializer:
        if tensor.name.endswith("weight"):
            values = onnx.numpy_helper.to_array(tensor) * 1
            values[np.random.default_rng(1).random(values.shape) > 0.1] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    return model, images


@pytest.fixture(scope="module", params=RELEASES)
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with that release and nothing else of ours."""
    release = request.param
    if sys.version_info[:2] > PYTHONS[release]:
        pytest.skip(f"onnxruntime {release} has no wheel for Python {platform.python_version()}")
    folder = tmp_path_factory.mktemp("runtime")
    venv.create(folder, with_pip=True)
    own = folder / "bin" / "python"
    words = [own, "-m", "pip", "install", "-q", f"onnxruntime=={release}", "numpy<2"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"onnxruntime {release} cannot be installed here: {done.stderr[-200:]}")
    return own


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["layers", "classifier"])
def test_packed_models_load_and_answer_as_plain_ones(
    python: Path, kind: str, tmp_path: Path
) -> None:
    model, images = models(kind)
    np.save(tmp_path / "images.npy", images)
    paths: dict[str, dict[str, Path]] = {}
    for values in ("fp32", "fp16"):
        forms = {"plain": round_values(model, values)}  # type: ignore[arg-type]
        for weights in ("dense", "compact", "coo"):
            forms[weights] = pack(model, weights=weights, values=values)  # type: ignore[arg-type]
        paths[values] = {}
        for form, packed in forms.items():
            assert packed.ir_version <= IR_VERSION
            check_onnx(packed, full=form != "coo")
            paths[values][form] = tmp_path / f"{values}-{form}.onnx"
            onnx.save(packed, paths[values][form])
    every = [str(path) for forms in paths.values() for path in forms.values()]
    words = [python, "-c", CHILD, tmp_path / "images.npy", *every]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for forms in paths.values():
        wanted = found[str(forms["plain"])]
        operators = _operators(forms["plain"])
        for form, path in forms.items():
            assert found[str(path)] == wanted, form
            # Folded while loading: what is left is the plain graph.
            assert _operators(path) == operators, form
        # And what this release computes is what today's does.
        today = run(onnx.load(forms["plain"]), {"input": images})
        for value, text in zip(today.values(), wanted, strict=True):
            then = np.frombuffer(bytes.fromhex(text), value.dtype).reshape(value.shape)
            np.testing.assert_allclose(then, value, rtol=1e-4, atol=1e-4)


def _operators(path: Path) -> list[str]:
    graph = onnx.load(f"{path}.optimised").graph
    return sorted(node.op_type for node in graph.node)
