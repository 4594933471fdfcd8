"""The numbered examples run as they stand, warnings being errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("01_gate_your_own_onnx.py", ["a known 3: 3", "an unknown 9: "]),
        ("02_sparse_training_in_your_loop.py", ["accuracy 9", "2,998 of 29,984 weights"]),
        ("03_train_export_decide.py", ["at 90% sparsity", "of 106 digits it was never shown"]),
    ],
)
def test_example(name: str, words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for word in words:
        assert word in done.stdout


def test_every_example_is_tested() -> None:
    tested = {mark.args[1][i][0] for mark in test_example.pytestmark for i in range(3)}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested
