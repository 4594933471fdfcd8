"""benchmarks/training.py: one command measures and writes; its arithmetic by hand."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import training, training_loops
from benchmarks.training_memory import live_bytes
from benchmarks.training_step import WholeStep

ROOT = Path(__file__).parents[2]
TINY = ["--model", "cnn", "--size", "8", "--batch", "4", "--threads", "1"]


def options(*words: str) -> argparse.Namespace:
    return training.parser().parse_args([*TINY, *words])


def command(module: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *TINY, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_one_command_measures_and_writes(tmp_path: Path) -> None:
    out = tmp_path / "training.json"
    done = command("benchmarks.training", "--rounds", 2, "--no-memory", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "a run in all" in done.stdout and "masking" in done.stdout
    found = json.loads(out.read_text())
    assert set(found["step_seconds"]) == {"dense", "sparse", "moon"}
    for name in ("sparse", "moon"):
        low, high = found["ratio"][name]["ci95"]
        assert 0 < low <= found["ratio"][name]["ratio"] <= high
        assert len(found["rounds"][name]) == 2
    assert found["parts"]["update"]["seconds"] > 0
    assert found["whole_step"]["eager"]["step_seconds"] > 0
    assert found["environment"]["torch"] == torch.__version__
    assert found["environment"]["threads"] == 1


def test_memory_is_counted_in_a_process_of_its_own() -> None:
    words = ["--variant", "moon", "--allocated"]
    done = command("benchmarks.training_memory", *words)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    live = found["live_bytes"]
    assert live["masks"] > 0 and 0 < live["votes"] < live["weights"] / 4
    outliving = sum(live[name] for name in ("weights", "gradients", "optimizer", "masks"))
    assert found["peak_voting_bytes"] >= found["peak_bytes"] > outliving


def test_a_mistake_is_one_line() -> None:
    done = command("benchmarks.training", "--structure", "hexagons")
    assert done.returncode == 2
    assert done.stderr.startswith("training: ") and done.stderr.count("\n") == 1


def test_the_parts_are_spread_over_the_steps_between_them() -> None:
    given = options("--interval", "100", "--images", "400", "--epochs", "50")
    parts = {"masking": 0.01, "loss": 0.02, "update": 1.0, "vote": 2.0, "batch norm": 0.3}
    ratios = {
        "sparse": {"ratio": 1.01, "ci95": [1.0, 1.02]},
        "moon": {"ratio": 1.03, "ci95": [1.02, 1.05]},
    }
    found = training.in_all(ratios, parts, 1.0, given)
    # An epoch has 100 steps of one second: an update adds 1%, a vote 2%, the last pass 0.6%.
    assert found["sparse"]["updating"]["ratio"] == pytest.approx(1.02)
    assert found["sparse"]["voting"]["ratio"] == pytest.approx(1.01)
    assert found["sparse"]["run"]["ratio"] == pytest.approx(1.01 + 0.7 * 0.01)
    assert found["moon"]["voting"]["ratio"] == pytest.approx(1.05)
    run = found["moon"]["run"]
    assert run["ratio"] == pytest.approx(1.03 + 0.7 * 0.01 + 0.2 * 0.02 + 0.006)
    assert run["ci95"] == pytest.approx([1.037, 1.067])


def test_the_interval_is_that_of_the_median() -> None:
    found = training.interval([1.0, 1.1, 5.0])
    assert found["ratio"] == pytest.approx(1.1)
    assert found["ci95"] == pytest.approx([1.0, 5.0])
    assert training.interval([1.02] * 9)["ci95"] == pytest.approx([1.02, 1.02])


def test_steps_hold_no_update_until_one_is_asked_for() -> None:
    loop = training_loops.Loop("sparse", options())
    assert loop.sparsifier is not None
    for _ in range(3):
        loop.step()
    assert loop.sparsifier.update_count == 0
    for asked in (1, 2):
        loop.ask_update()
        loop.step()
        loop.step()
        assert loop.sparsifier.update_count == asked


def test_the_loops_differ_in_what_they_compare_alone() -> None:
    dense, sparse, moon = (training_loops.Loop(v, options()) for v in training_loops.VARIANTS)
    assert dense.sparsifier is None and torch.equal(dense.images, moon.images)
    assert moon.criterion.w > 0.5
    assert moon.model.head.out_features == dense.model.head.out_features + 1
    for loop in (dense, sparse, moon):
        loop.step()
    live = {loop.variant: live_bytes(loop) for loop in (dense, sparse)}
    assert live["dense"]["masks"] == 0
    assert live["sparse"]["weights"] == live["dense"]["weights"]


def test_the_whole_step_is_that_of_a_session() -> None:
    torch.manual_seed(0)
    whole = WholeStep(options(), graphs=False)
    before = {name: p.clone() for name, p in whole.session.model.named_parameters()}
    whole.step()
    assert whole.session.sparsifier.step_count == 1
    moved = [not torch.equal(before[n], p) for n, p in whole.session.model.named_parameters()]
    assert all(moved) and whole.session.objective.w > 0
