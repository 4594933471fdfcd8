"""A run may be killed at any moment and go on to exactly the weights it would have had."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

ROOT = Path(__file__).resolve().parents[2]
KILLED = -signal.SIGKILL


def play(scenario: str, folder: Path) -> tuple[dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.trainer.killable", str(folder), scenario],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result, done.stderr


@pytest.mark.parametrize(
    ("spots", "count"), [("some", 5), pytest.param("everywhere", 18, marks=pytest.mark.slow)]
)
def test_killed_anywhere_it_resumes_to_the_same_bits(
    tmp_path: Path, spots: str, count: int
) -> None:
    results, _ = play(spots, tmp_path)
    assert len(results) == count
    for spot, (killed, resumed, wrong) in results.items():
        assert (killed, resumed, wrong) == (KILLED, 0, []), spot


@pytest.mark.slow
def test_killed_at_random_again_and_again(tmp_path: Path) -> None:
    result, _ = play("random", tmp_path)
    assert result["kills"] >= 1
    assert (result["status"], result["wrong"]) == (0, [])


def test_a_full_disk_is_one_clear_line_and_costs_one_epoch(tmp_path: Path) -> None:
    result, stderr = play("full", tmp_path)
    assert result["full"] == 1
    assert "state.pt: File too large." in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert result["epoch"] == 4
    assert result["left"] == ["last", "last/state.pt", "log.txt", "metrics.jsonl", "recipe.toml"]
    assert (result["status"], result["wrong"]) == (0, [])
