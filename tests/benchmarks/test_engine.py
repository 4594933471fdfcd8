"""benchmarks/engine.py as a whole, and its processes, limits and figures."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from moon.errors import BackendError

FOLDER = Path(__file__).parents[2] / "benchmarks"
NAMES = ("engine", "engine_models", "engine_processes", "engine_rounds")


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(FOLDER))
    try:
        return {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture
def tiny(scripts, monkeypatch):
    """A family quick to make."""
    models = scripts["engine_models"]
    monkeypatch.setitem(models.FAMILIES, "tiny", models.Family("cnn", 16, 11))
    return "tiny"


def test_one_command(scripts, tiny, tmp_path, capsys):
    result, picture = tmp_path / "engine.json", tmp_path / "engine.png"
    words = ["--models", tiny, "--sparsity", "50,95", "--rounds", "2", "--calls", "2"]
    words += ["--engines", "onnxruntime,moon,deepsparse", "--folder", str(tmp_path / "models")]
    words += ["--python", f"deepsparse={tmp_path / 'nowhere'}"]
    assert scripts["engine"].main([*words, "--json", str(result), "--picture", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "tiny-95: deepsparse left out" in said and "limits of one core" in said
    found = json.loads(result.read_text())
    half, few = found["models"]
    assert few["macs"]["dense"] == half["macs"]["dense"] > half["macs"]["left"]
    assert half["macs"]["left"] > few["macs"]["left"] > 0
    for model in (half, few):
        assert list(model["engines"]) == ["onnxruntime", "moon"]
        assert list(model["left_out"]) == ["deepsparse"]
        moon, ort = model["engines"]["moon"], model["engines"]["onnxruntime"]
        assert "times_moon" not in moon and moon["cold"]["ready_s"] > 0
        low, high = ort["times_moon"]["ci95"]
        assert 0 < low <= ort["times_moon"]["median"] <= high
        assert ort["agrees"] < 1e-6 and moon["agrees"] < 1e-5
        for one in (moon, ort):
            assert len(one["blocks_ms"]) == 2 and 0 < one["best_ms"] <= one["median_ms"]
            assert one["peak_bytes"] >= one["loaded_bytes"] > one["before_bytes"] > 10**7
            reached = model["macs"]["left"] / one["best_ms"] / 1e6
            limit = found["limits_of_one_core"]["registers"]
            assert one["gmacs"] == pytest.approx(reached)
            assert one["share_of_limit"]["registers"] == pytest.approx(reached / limit)


def test_own_files_are_measured_with_two_threads_and_a_batch(scripts, tiny, tmp_path):
    path = scripts["engine_models"].made(tmp_path, tiny, 80.0, "unstructured")
    words = [str(path), "--threads", "2", "--batch", "3", "--rounds", "2", "--calls", "1"]
    words += ["--engines", "moon", "--json", str(tmp_path / "engine.json")]
    assert scripts["engine"].main(words) == 0
    (model,) = json.loads((tmp_path / "engine.json").read_text())["models"]
    moon = model["engines"]["moon"]
    assert moon["agrees"] < 1e-5
    assert moon["gmacs"] == pytest.approx(3 * model["macs"]["left"] / moon["best_ms"] / 1e6)


@pytest.mark.parametrize(
    ("words", "about"),
    [
        (["--engines", "moon,tvm"], "tvm"),
        (["--python", "deepsparse"], "no path"),
        (["--python", "tvm=/x"], "tvm"),
        (["--models", "vgg"], "vgg"),
        (["--sparsity", "100"], "below 100"),
        (["--sparsity", "much"], "much"),
        (["--rounds", "1"], "--rounds"),
        (["nowhere.onnx"], "nowhere.onnx"),
    ],
)
def test_wrong_arguments(scripts, words, about, capsys):
    assert scripts["engine"].main(words) == 2
    assert about in capsys.readouterr().err


def test_a_file_that_is_no_model(scripts, tmp_path, capsys):
    (tmp_path / "a.onnx").write_bytes(b"no model")
    assert scripts["engine"].main([str(tmp_path / "a.onnx")]) == 1
    assert "a.onnx" in capsys.readouterr().err


def start(scripts, engine, tmp_path):
    process = scripts["engine_processes"].EngineProcess
    return process(engine, python=sys.executable, log=tmp_path / "log")


@pytest.fixture
def order(scripts, tiny, tmp_path):
    path = scripts["engine_models"].made(tmp_path, tiny, 90.0, "unstructured")
    images = np.random.default_rng(1).standard_normal((1, 3, 16, 16)).astype(np.float32)
    np.save(tmp_path / "input.npy", images)
    places = {"input": str(tmp_path / "input.npy"), "output": str(tmp_path / "output.npy")}
    return {"model": str(path), **places, "name": "input", "index": 0, "threads": 1}


def test_a_process_stays_and_answers(scripts, order, tmp_path):
    with start(scripts, "onnxruntime", tmp_path) as process:
        assert process.ask("load", **order)["load_s"] > 0
        assert np.load(order["output"]).shape == (1, 11)
        before = process.ask("state")
        found = process.ask("run", warm=3, warm_s=1.0, calls=4)
        assert len(found["wall_s"]) == len(found["cpu_s"]) == 4
        assert found["first_s"]["wall"] > 0
        after = process.ask("state")
        assert after["cpu_s"] - before["cpu_s"] > sum(found["cpu_s"]) > 0
        assert after["peak_bytes"] > 10**7


def test_the_peak_is_not_the_parents(scripts, order, tmp_path):
    held = np.ones(100_000_000)  # 800 MB
    with start(scripts, "onnxruntime", tmp_path) as process:
        process.ask("load", **order)
        assert process.ask("state")["peak_bytes"] < held.nbytes / 2


def test_an_engine_that_is_not_installed(scripts, order, tmp_path):
    if find_spec("deepsparse"):
        pytest.skip("it is installed")
    with (
        start(scripts, "deepsparse", tmp_path) as process,
        pytest.raises(BackendError, match="not installed"),
    ):
        process.ask("load", **order)


def test_an_engine_that_refuses_or_dies(scripts, order, tmp_path):
    with (
        start(scripts, "moon", tmp_path) as process,
        pytest.raises(BackendError, match="No such file"),
    ):
        process.ask("load", **{**order, "model": str(tmp_path / "none.onnx")})
    with start(scripts, "onnxruntime", tmp_path) as process:
        process.ask("load", **order)
        os.kill(process._process.pid, signal.SIGKILL)
        with pytest.raises(BackendError, match="SIGKILL"):
            process.ask("state")


def test_the_spread_of_equal_and_of_other_values(scripts):
    spread = scripts["engine_rounds"].spread
    assert spread(np.full(5, 2.0)) == {"median": 2.0, "ci95": [2.0, 2.0]}
    found = spread(np.arange(101.0))
    assert found["median"] == 50
    assert 25 < found["ci95"][0] < 50 < found["ci95"][1] < 75


def test_a_time_that_does_not_follow_the_sparsity_is_told(scripts):
    def model(name, left, best, share=1.0, agrees=0.0):
        deepsparse = {"best_ms": best, "supported_share": share, "agrees": agrees}
        return {
            "name": name, "family": "a", "macs": {"left": left},
            "engines": {"deepsparse": deepsparse},
        }  # fmt: skip

    doubts = scripts["engine"].doubts
    assert not doubts([model("a-80", 100, 4.0), model("a-99", 10, 1.0)])
    assert "hardly" in doubts([model("a-80", 100, 4.0), model("a-99", 10, 3.9)])[0]
    assert "40%" in doubts([model("a-80", 100, 4.0, share=0.4)])[0]
    assert "agree" in doubts([model("a-80", 100, 4.0, agrees=0.01)])[0]
    assert not doubts([{**model("a-80", 1, 1.0), "engines": {}}])


def test_answers_of_another_shape_or_nan_are_none(scripts, tmp_path):
    difference = scripts["engine_rounds"]._difference
    path, expected = tmp_path / "a.npy", np.array([[1.0, -4.0]], np.float32)
    np.save(path, np.array([[1.0, -3.0]], np.float32))
    assert difference(path, expected) == 0.25
    for wrong in ([[1.0]], [[1.0, np.nan]]):
        np.save(path, np.array(wrong, np.float32))
        with pytest.raises(BackendError, match="logits"):
            difference(path, expected)
