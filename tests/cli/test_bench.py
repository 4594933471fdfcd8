"""moon bench: how it is measured, two results compared, and being interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moon.cli import bench_view
from moon.cli.bench_view import _BODY_BINS
from moon.runtime import bench_stats
from tests.cli.conftest import Moon, environment

QUICK = ["--processes", "0", "--loads", "4"]


def test_how_it_is_measured_is_written(moon: Moon, exported: Path) -> None:
    core = str(min(os.sched_getaffinity(0)))
    words = ["--affinity", core, "--no-spin", "--warmup", "3", "--settle", "1", "--queries", "32"]
    found = moon("bench", exported, *QUICK, *words, "--json").json
    config = found["config"]
    assert config["affinity"] == [int(core)] == found["host"]["affinity"]
    asked = {"spin": False, "warmup": 3, "settle": 1, "loads": 4, "queries": 32, "processes": 0}
    assert asked.items() <= config.items()
    assert found["start"] is None and "fresh processes" in found["unavailable"]["start"]
    assert len(os.sched_getaffinity(0)) >= 1


def test_a_bounded_time(moon: Moon, exported: Path) -> None:
    words = ["--max-time", "0.05", "--baseline", "none"]
    found = moon("bench", exported, *QUICK, *words, "--json").json
    assert found["config"]["max_time"] == 0.05 and 1 <= found["config"]["queries"] < 5000
    text = moon("bench", exported, "--processes", "0", "--queries", "1", "--loads", "1").out
    assert "95% interval none of one loading" in text


def test_starts_energy_and_memory_in_the_table(moon: Moon, exported: Path) -> None:
    words = ["--queries", "16", "--processes", "1", "--baseline", "none"]
    text = moon("bench", exported, *words).out
    for row in ("load", "first, cold", "first, warm", "peak memory", "images/s", "min to p90"):
        assert row in text
    assert "note: " in text or "governor" not in text


def test_a_verdict_on_two_results(moon: Moon, exported: Path, tmp_path: Path) -> None:
    words = ["--backend", "onnxruntime", "--backend", "fake", "--queries", "32"]
    found = moon("bench", exported, *QUICK, *words, "--json").json
    # As on a quiet machine, which the one that tests may not be.
    calm = [1 + i % 3 / 100 for i in range(len(found["block_p50_ms"]))]
    found |= {"valid": True, "warnings": [], "block_p50_ms": calm}
    found["baseline"]["block_p50_ms"] = found["others"][0]["block_p50_ms"] = calm
    half = {**found, "block_p50_ms": [ms / 2 for ms in calm]}
    files = {"a": found, "b": half}
    for name, one in files.items():
        (tmp_path / name).write_text(json.dumps(one), encoding="utf-8")
    text = moon("bench", "--compare", tmp_path / "a", tmp_path / "b").out
    assert "B is 2.00 times as fast as A" in text and "relative to the common baseline" in text
    assert "verdict: B is faster" in text and "verdict: B's fake shows no difference" in text
    back = moon("bench", "--compare", tmp_path / "b", tmp_path / "a", "--json").json
    assert back["verdict"] == "slower" and back["speedup"]["ratio"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--affinity", "x"], "'x' is no list of cores"),
        (["--affinity", "4000"], "may not use core 4000"),
        (["--max-time", "0"], "max_time must be more than 0"),
        (["--min-time", "3", "--max-time", "2"], "go ill together"),
        (["--loads", "0"], "'--loads'"),
        (["--backend", "fake", "--baseline", "dense"], "--baseline onnxruntime"),
    ],
)
def test_wrong_ways_to_measure(moon: Moon, exported: Path, words: list[str], text: str) -> None:
    result = moon("bench", exported, *words)
    assert result.code == 2 and text in result.error


def test_an_interrupted_measurement_leaves_nothing(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    words = ["bench", exported, "--min-time", "300", "--processes", "0", "--out", out]
    child = subprocess.Popen(
        [sys.executable, "-m", "moon", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    maps = Path(f"/proc/{child.pid}/maps")
    until = time.monotonic() + 60
    while "onnxruntime" not in maps.read_text() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(1)
    child.send_signal(signal.SIGINT)
    printed, said = child.communicate(timeout=60)
    assert child.returncode == 130 and printed == "" and said.strip() == "moon: interrupted."
    assert not list(tmp_path.iterdir())


def test_the_view_cuts_histograms_as_they_are_made() -> None:
    made = bench_stats.histogram([1.0, 2.0, 3.0, 4.0])
    assert len(made["counts"]) > _BODY_BINS == bench_stats.BODY_BINS
    assert bench_view._spark(made["counts"]).strip()
