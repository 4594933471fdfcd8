"""On a real GPU, with whichever package fits it and is installed: built, run, compared.

These run only with ``-m gpu``, and build their engines themselves.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moon.bundle import Bundle
from moon.gate_calibration import calibrate_conformal
from moon.runtime.backend import backends, open_backend
from moon.runtime.calibrate import calibrate
from moon.runtime.predictor import Predictor
from moon.runtime.timed import Timed
from moon.runtime.trt.backend import Settings, TensorRT
from moon.runtime.trt.opening import open_tensorrt
from moon.runtime.trt.package import Name
from moon.runtime.verify import verify
from tests.bundles import images, make_bundle

pytestmark = pytest.mark.gpu

MOST = 8


@pytest.fixture(scope="module")
def package() -> Name:
    found: list[Name] = [n for n in ("tensorrt_rtx", "tensorrt") if backends()[n].ok]
    if not found:
        pytest.fail("; ".join(backends()[n].reason for n in ("tensorrt_rtx", "tensorrt")))
    return found[0]


def _built(path: Path, package: Name, *, precision: str = "fp32", dtype: str = "float32") -> Bundle:
    from moon.export.trt.engine import add_engine
    from moon.export.trt.request import EngineRequest
    from moon.runtime.trt.sidecar import Profile

    request = EngineRequest(
        package=package, precision=precision, profile=Profile(min=1, opt=4, max=MOST)
    )
    return add_engine(make_bundle(path, size=16, channels=3, dtype=dtype), request)[0]


@pytest.fixture(scope="module")
def bundle(package: Name, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return _built(tmp_path_factory.mktemp("gpu") / "bundle", package)


@pytest.fixture(params=[True, False], ids=["graph", "no graph"])
def backend(bundle: Bundle, package: Name, request: pytest.FixtureRequest) -> Iterator[TensorRT]:
    opened = open_tensorrt(bundle, package, Settings(graphs=request.param))
    yield opened
    opened.close()


def _batch(bundle: Bundle, n: int, seed: int = 5) -> np.ndarray:
    return bundle.preprocess.normalise(images(n, 16, 3, seed=seed))


def _close(
    found: dict[str, np.ndarray], expected: dict[str, np.ndarray], allowed: float = 1e-4
) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        if value.dtype == np.float32:
            np.testing.assert_allclose(found[name], value, rtol=allowed, atol=allowed, err_msg=name)
    np.testing.assert_array_equal(found["label"], expected["label"])


@pytest.mark.parametrize("n", [1, 3, MOST, MOST + 1, 5 * MOST + 2])
def test_as_onnx_runtime(bundle: Bundle, backend: TensorRT, n: int) -> None:
    expected = open_backend(bundle).run(_batch(bundle, n))
    for _ in range(4):  # plain, captured, launched twice
        _close(backend.run(_batch(bundle, n)), expected)


def test_sizes_that_change(bundle: Bundle, backend: TensorRT) -> None:
    ort = open_backend(bundle)
    for turn, n in enumerate([2, 2, 2, 8, 8, 8, 2, 1, 1, 1, 20, 20, 2]):
        batch = _batch(bundle, n, seed=turn)
        _close(backend.run(batch), ort.run(batch))


def test_threads(bundle: Bundle, backend: TensorRT) -> None:
    ort, wrong = open_backend(bundle), []

    def work(seed: int) -> None:
        try:
            for turn in range(30):
                batch = _batch(bundle, 1 + (seed + turn) % 11, seed=seed)
                _close(backend.run(batch), ort.run(batch))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert 1 <= backend.info()["contexts"]["made"] <= backend.info()["contexts"]["most"]


def test_timings(bundle: Bundle, backend: TensorRT) -> None:
    assert isinstance(backend, Timed)
    for _ in range(3):
        found, timings = backend.timed(_batch(bundle, MOST))
    _close(found, open_backend(bundle).run(_batch(bundle, MOST)))
    spans = (timings.host_to_device_ms, timings.compute_ms, timings.device_to_host_ms)
    assert all(0 < span < 1000 for span in spans)


def test_sleeping(bundle: Bundle, package: Name) -> None:
    backend = open_tensorrt(bundle, package, Settings(sleeping=True))
    _close(backend.run(_batch(bundle, 3)), open_backend(bundle).run(_batch(bundle, 3)))
    backend.close()


def test_pixels(package: Name, tmp_path: Path) -> None:
    raw = _built(tmp_path / "raw", package, dtype="uint8")
    pixels = images(10, 16, 3)
    _close(open_backend(raw, package).run(pixels), open_backend(raw).run(pixels))


def test_half_precision(package: Name, tmp_path: Path) -> None:
    half = _built(tmp_path / "half", package, precision="fp16")
    backend = open_backend(half, package)
    assert backend.info()["precision"] == "fp16"
    batch = _batch(half, 30)
    found, expected = backend.run(batch), open_backend(half).run(batch)
    np.testing.assert_allclose(found["logits"], expected["logits"], atol=2e-2)


def test_another_gate_without_another_engine(bundle: Bundle, package: Name, tmp_path: Path) -> None:
    fresh = _built(tmp_path / "gated", package)
    batch = _batch(fresh, 300)
    scores = open_backend(fresh).run(batch)["score_msp"]
    again = fresh.with_gate(calibrate_conformal(scores, 0.3, score="msp"))
    found = open_backend(again, package).run(batch)
    np.testing.assert_allclose(found["score"], scores, atol=1e-4)
    clear = np.abs(scores - again.gate().threshold) > 1e-4
    expected = open_backend(again).run(batch)["accept"]
    np.testing.assert_array_equal(found["accept"][clear], expected[clear])


def test_a_gate_of_its_own(package: Name, tmp_path: Path) -> None:
    from PIL import Image

    fresh = _built(tmp_path / "own", package)
    folder = tmp_path / "images"
    folder.mkdir()
    for i, pixels in enumerate(images(60, 16, 3, seed=8)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    calibrated = calibrate(fresh, str(folder), backend=package)
    assert package in calibrated.gates
    rejected = sum(
        not one.accepted
        for one in Predictor.open(calibrated, backend=package).predict(sorted(folder.iterdir()))
    )
    assert rejected <= 3


def test_verify(bundle: Bundle, package: Name) -> None:
    (check,) = [one for one in verify(bundle) if one.name == package]
    assert check.ok and check.detail.startswith("golden logits within")


def test_compiled_code_is_kept_between_processes(bundle: Bundle, package: Name) -> None:
    if package != "tensorrt_rtx":
        pytest.skip("only TensorRT-RTX compiles where it runs")
    script = (
        "import json, sys\n"
        "from moon.bundle import Bundle\n"
        "from moon.runtime.backend import open_backend\n"
        "bundle = Bundle.open(sys.argv[1])\n"
        "backend = open_backend(bundle, 'tensorrt_rtx')\n"
        "backend.run(bundle.preprocess.normalise(bundle.golden()['pixels']))\n"
        "print(json.dumps(backend.info()))\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", script, str(bundle.path)],
            check=True, capture_output=True, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert json.loads(runs[1].stdout)["compiled_before"] is True
    assert runs[1].stderr == ""


def test_opened_and_closed_many_times(bundle: Bundle, package: Name) -> None:
    from moon.runtime.trt.cuda import Driver
    from moon.runtime.trt.device import Device

    device = Device(Driver.load())
    batch, free = _batch(bundle, MOST), []
    for _ in range(6):
        backend = open_tensorrt(bundle, package)
        for _ in range(3):
            backend.run(batch)
        backend.close()
        with device:
            free.append(device.free_memory())
    device.close()
    assert free[-1] >= free[1] - (8 << 20)  # the first open loads libraries for good


def test_a_process_ends_while_threads_run(bundle: Bundle, package: Name) -> None:
    script = (
        "import sys, threading\n"
        "from moon.bundle import Bundle\n"
        "from moon.runtime.backend import open_backend\n"
        "bundle = Bundle.open(sys.argv[1])\n"
        f"backend = open_backend(bundle, {package!r})\n"
        "batch = bundle.preprocess.normalise(bundle.golden()['pixels'])\n"
        "def work():\n"
        "    while True:\n"
        "        backend.run(batch)\n"
        "for _ in range(4):\n"
        "    threading.Thread(target=work, daemon=True).start()\n"
        "import time; time.sleep(1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(bundle.path)], capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
