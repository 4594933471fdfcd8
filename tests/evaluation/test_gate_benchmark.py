"""benchmarks/gate.py: passes for a right gate, fails for a wrong one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moon.gate_calibration import calibrate_conformal
from moon.per_class import PerClass
from tests.bundles import CLASSES, images, make_bundle

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gate.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("gate_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("gate")
    make_bundle(root / "bundle")
    np.savez(root / "set.npz", test_images=images(400, seed=9))
    return root


def test_one_command_measures_and_writes(place):
    out = place / "gate.json"
    done = subprocess.run(
        [sys.executable, SCRIPT, place / "bundle", "--data", f"{place}/set.npz#test",
         "--reject", "0.1", "--splits", "5", "--out", out],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "5 of 5 splits within the bound: passed" in done.stdout
    result = json.loads(out.read_text())
    rejects = [split["reject"] for split in result["splits"]]
    assert result["mean"] == pytest.approx(np.mean(rejects))
    assert result["n"] == 400
    # a + 3 sqrt(a (1 - a) (1/200 + 1/200)) at a = 0.1
    assert result["bound"] == pytest.approx(0.1 + 3 * 0.3 * 0.1)
    assert len(set(rejects)) > 1
    assert result["environment"]["onnxruntime"]


def test_by_class_every_class_is_measured(benchmark, place, capsys):
    words = [str(place / "bundle"), "--data", f"{place}/set.npz#test", "--reject", "0.1",
             "--per-class", "--splits", "4", "--out", str(place / "classes.json")]  # fmt: skip
    assert benchmark.main(words) == 0
    result = json.loads((place / "classes.json").read_text())
    assert set(result["classes"]) == set(CLASSES)
    for split in result["splits"]:
        rows = split["classes"].values()
        assert sum(row["n_calibration"] for row in rows) == split["n_calibration"] == 200
        total = sum(row["reject"] * row["n_test"] for row in rows)
        assert total / 200 == pytest.approx(split["reject"])
    for name, row in result["classes"].items():
        found = [split["classes"][name]["reject"] for split in result["splits"]]
        assert row["mean"] == pytest.approx(np.mean(found)) and row["within"]
    assert all(f"{name:>12} " in capsys.readouterr().out for name in CLASSES[:1])


def test_a_class_that_is_rejected_too_often_fails(benchmark, place, monkeypatch, capsys):
    """One threshold for all is not enough for a promise to each class."""

    def one_for_all(scores, labels, classes, promise):
        gate = calibrate_conformal(scores, promise.alpha)
        own = dict.fromkeys(classes, gate.overall)
        by_class = PerClass(classes=tuple(classes), fewest=9, own=own, pooled={}, pool=None)
        object.__setattr__(gate, "per_class", by_class)
        return gate

    monkeypatch.setattr(benchmark, "calibrate_per_class", one_for_all)
    words = [str(place / "bundle"), "--data", f"{place}/set.npz#test", "--reject", "0.1"]
    assert benchmark.main([*words, "--per-class"]) == 1
    said = capsys.readouterr().out
    assert "TOO MANY" in said and "FAILED" in said


def test_the_same_seed_gives_the_same_splits(benchmark):
    scores = np.random.default_rng(0).normal(size=500).astype(np.float32)
    options = {"method": "conformal", "delta": "0.05"}
    one, same, other = (
        benchmark.measure(scores, "0.05", 3, seed=seed, **options) for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other


def test_pac_rejects_less_than_conformal(benchmark):
    scores = np.random.default_rng(0).normal(size=2000).astype(np.float32)
    means = {
        method: np.mean([
            split["reject"]
            for split in benchmark.measure(
                scores, "0.05", 30, method=method, delta="0.05", seed=0
            )
        ])
        for method in ("conformal", "pac")
    }  # fmt: skip
    assert means["conformal"] == pytest.approx(0.05, abs=0.01)
    assert means["pac"] < 0.042


def test_a_gate_that_rejects_too_much_fails(benchmark, place, monkeypatch, capsys):
    """The check can fail: a calibration at twice the rate asked for is caught."""
    monkeypatch.setattr(
        benchmark, "calibrate_conformal", lambda s, a: calibrate_conformal(s, 2 * float(a))
    )
    words = [str(place / "bundle"), "--data", f"{place}/set.npz#test", "--reject", "0.2"]
    assert benchmark.main(words) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--splits", "0"], 2, "--splits"),
        (["--score", "nope"], 2, "does not carry the score nope"),
        (["--reject", "0.001"], 1, "0.001"),
        (["--reject", "2"], 2, "alpha"),
    ],
)
def test_misuse_is_one_line(benchmark, place, capsys, words, code, message):
    given = [str(place / "bundle"), "--data", f"{place}/set.npz#test", *words]
    assert benchmark.main(given) == code
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
