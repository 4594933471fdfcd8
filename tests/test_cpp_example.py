"""The C++ example, built against ONNX Runtime's headers and the wheel's library, decides alike.

The headers come with Debian's libonnxruntime-dev, or lie where ORT_INCLUDE says.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from moon.bundle import Bundle
from moon.runtime import Predictor
from tests.bundles import images, make_bundle

SOURCES = Path(__file__).resolve().parents[1] / "examples" / "cpp"
HEADER = "onnxruntime_cxx_api.h"
PLACES = (
    os.environ.get("ORT_INCLUDE", ""),
    "/usr/include/onnxruntime",
    "/usr/local/include/onnxruntime",
    "/usr/local/include",
)


@pytest.fixture(scope="module")
def decide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    include = next((place for place in PLACES if place and Path(place, HEADER).is_file()), None)
    if include is None:
        pytest.skip(f"no {HEADER}: install libonnxruntime-dev, or set ORT_INCLUDE to its folder")
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("no cmake or no C++ compiler: install cmake and g++")
    capi = Path(onnxruntime.__file__).parent / "capi"
    library = next(capi.glob("libonnxruntime.so.*"), None)
    if library is None:
        pytest.skip(f"the onnxruntime wheel has no shared library in {capi}")
    build = tmp_path_factory.mktemp("cpp")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (build / name).symlink_to(library)
    choices = [f"-DORT_INCLUDE={include}", f"-DORT_LIBRARY={build / 'libonnxruntime.so'}"]
    for command in (
        ["cmake", "-S", str(SOURCES), "-B", str(build), "-DCMAKE_CXX_FLAGS=-Werror", *choices],
        ["cmake", "--build", str(build)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "decide"


def run(decide: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(decide), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def write_image(path: Path, pixels_HWC: NDArray[np.uint8]) -> Path:
    height, width, channels = pixels_HWC.shape
    magic = "P6" if channels == 3 else "P5"
    path.write_bytes(f"{magic}\n{width} {height}\n255\n".encode() + pixels_HWC.tobytes())
    return path


def constants(bundle: Bundle) -> list[str]:
    if bundle.manifest.input.dtype == "uint8":
        return []
    preprocess = bundle.preprocess
    values = {"mean": preprocess.mean, "std": preprocess.std}
    return [f"{name}={','.join(map(str, given))}" for name, given in values.items()]


@pytest.mark.parametrize(("dtype", "channels"), [("float32", 3), ("uint8", 1), ("uint8", 3)])
def test_it_decides_as_python_does(decide: Path, tmp_path: Path, dtype: str, channels: int) -> None:
    bundle = make_bundle(tmp_path / "b", channels=channels, dtype=dtype, reject=0.3)
    pixels = np.concatenate([bundle.golden()["pixels"], images(15, channels=channels, seed=9)])
    median = float(np.median(Predictor.open(bundle).raw(pixels)["score"]))
    for threshold in (None, median):
        predictor = Predictor.open(bundle, threshold=threshold, warn=lambda _: None)
        extra = constants(bundle) + ([] if threshold is None else [f"threshold={threshold!r}"])
        verdicts = set()
        for i, expected in enumerate(predictor.predict(list(pixels))):
            file = write_image(tmp_path / f"{i}.pnm", pixels[i])
            done = run(decide, bundle.path / "model.onnx", file, *extra)
            assert done.returncode == 0, done.stderr
            verdict, score = done.stdout.split()
            label = bundle.manifest.classes.index(expected.label) if expected.accepted else None
            assert verdict == ("abstain" if label is None else str(label))
            assert float(score) == pytest.approx(expected.score, abs=1e-5)
            verdicts.add(expected.accepted)
        assert verdicts == {True, False}


def test_what_goes_wrong_takes_one_line(decide: Path, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", size=8, channels=3)
    model, given = bundle.path / "model.onnx", constants(bundle)
    good = write_image(tmp_path / "good.ppm", images(1, channels=3)[0])
    small = write_image(tmp_path / "small.ppm", images(1, 7, channels=3)[0])
    grey = write_image(tmp_path / "grey.pgm", images(1)[0])
    (tmp_path / "cut.ppm").write_bytes(good.read_bytes()[:-1])
    (tmp_path / "text.ppm").write_text("P3 8 8 255 0 0 0")
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    for arguments, words in (
        ((tmp_path / "none.onnx", good, *given), "none.onnx"),
        ((tmp_path / "broken.onnx", good, *given), "broken.onnx"),
        ((model, tmp_path / "none.ppm", *given), "cannot read"),
        ((model, small, *given), "7 wide, 7 high, with 3 channels; resize it to the model's"),
        ((model, grey, *given), "with 1 channels"),
        ((model, tmp_path / "cut.ppm", *given), "ends before its last pixel"),
        ((model, tmp_path / "text.ppm", *given), "not a binary 8-bit PGM or PPM"),
        ((model, good), "give mean= and std="),
        ((model, good, *given, "threshold=high"), "threshold=high is not a list of numbers"),
        ((model, good, *given, "threshold=1,2"), "takes one number"),
    ):
        done = run(decide, *arguments)
        assert (done.returncode, done.stdout) == (1, ""), arguments
        assert words in done.stderr and done.stderr.count("\n") == 1
    done = run(decide, model)
    assert done.returncode == 2 and done.stderr.startswith("usage: decide MODEL.onnx")
    assert run(decide, model, good, "treshold=1").returncode == 2
