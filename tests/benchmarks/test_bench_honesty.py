"""The measurements of moon bench itself, done small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_agreement, bench_honesty
from tests.bundles import make_bundle


def test_the_same_against_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_bundle(tmp_path / "b", size=16)
    file = tmp_path / "r.json"
    words = [str(made.path), "--runs", "3", "--queries", "64", "--loads", "4"]
    assert bench_honesty.main([*words, "--disturb", "1", "--json", str(file)]) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["within"]["runs"] == 3 and len(result["runs"]) == 3
    assert result["between, by the common baseline"]["runs"] == 2
    assert "interval holds 1" in capsys.readouterr().out


def test_coverage_by_hand() -> None:
    runs = [{"ratio": 1.0, "ci95": [0.9, 1.1]}] * 18
    runs += [{"ratio": 1.1, "ci95": [1.05, 1.2]}, {"ratio": 0.9, "ci95": [0.8, 0.95]}]
    found = bench_honesty.summary(runs)
    assert (found["covered"], found["false_faster"], found["false_slower"]) == (0.9, 0.05, 0.05)
    # Clopper and Pearson's table for 18 of 20.
    assert found["covered_ci95"] == [pytest.approx(0.683, abs=1e-3), pytest.approx(0.988, abs=1e-3)]


def test_clocks_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle(tmp_path / "b", size=16)
    result = bench_agreement.run(bundle, rounds=2, queries=64)
    assert set(result["clocks"]) == {"loop", "profiler", "moon"}
    assert all(one["p50"] > 0 for one in result["clocks"].values())
    bench_agreement.show(result)
    assert "of the loop's" in capsys.readouterr().out


def test_what_agrees_by_hand() -> None:
    def of(moon: float, loop: float, profiler: float) -> dict[str, object]:
        pairs = {"moon": moon, "loop": loop, "profiler": profiler}
        return {"clocks": {name: {"p50": value} for name, value in pairs.items()}}

    assert bench_agreement.agrees(of(10.2, 10.0, 10.5), 0.03)
    assert not bench_agreement.agrees(of(10.5, 10.0, 10.5), 0.03)
    assert not bench_agreement.agrees(of(9.0, 10.0, 10.5), 0.03)
    assert not bench_agreement.agrees(of(10.2, 10.0, 5.0), 0.03)


@pytest.mark.slow
def test_moon_agrees_with_a_plain_loop_over_onnx_runtime(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", size=96)
    result = bench_agreement.run(bundle, rounds=5, queries=512)
    assert bench_agreement.agrees(result, 0.10), result["clocks"]
