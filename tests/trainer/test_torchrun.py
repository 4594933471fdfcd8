"""``torchrun -m moon train``, the real one, with processes that are really killed."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc"),
]

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
TRAIN = ["-m", "moon", "train", "digits-cnn-rigl90-moon", "--device", "cpu"]
SCRIPT = """
import sys
import moon
from moon.trainer.recipes import find_recipe

def run(seed, out):
    recipe = find_recipe("digits-cnn-rigl90-moon").override(["epochs=1", f"seed={seed}"])
    return moon.fit(recipe, out, device="cpu").metrics

def say(what):
    sys.stdout.write(f"{what}\\n")  # at once, lest two processes' lines mix

say(run(0, sys.argv[1])["processes"])
try:
    run(0, sys.argv[1])
except moon.errors.MoonError as error:
    say("already" in str(error))
say(run(1, None)["processes"])
"""


def start(*words: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*TORCHRUN, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
        **options,
    )


def lines(text: str) -> list[str]:
    """What moon said but for the epochs, without torchrun's own report."""
    said = [line for line in text.splitlines() if line.startswith("moon: ")]
    return [line for line in said if not line.startswith("moon: epoch")]


def kill(rank: int, run: Path, epoch: int, process: subprocess.Popen[str]) -> str:
    """SIGKILL a rank once the run has come to an epoch; what the others say then."""
    metrics = run / "metrics.jsonl"
    end = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < epoch:
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)
    os.kill(_process_of(rank, process.pid), signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in error.partition("Sending process")[0].partition("failed (exit")[0]
    return error


def _process_of(rank: int, parent: int) -> int:
    for folder in Path("/proc").iterdir():
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            environment = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        if stat[1] == str(parent) and f"RANK={rank}".encode() in environment:
            return int(folder.name)
    raise AssertionError(f"rank {rank} is not there")


def sha256(run: Path) -> str:
    return hashlib.sha256((run / "checkpoint.safetensors").read_bytes()).hexdigest()


def test_either_rank_killed_and_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    command = [*TRAIN, "--set", "epochs=20", "--out"]
    whole = start(*command, tmp_path / "whole")
    out, error = whole.communicate(timeout=200)
    assert whole.returncode == 0, error
    assert out.count("Accuracy") == 1  # from one rank only
    assert error.count("moon: epoch 20/20") == 1

    run = tmp_path / "run"
    error = kill(1, run, 2, start(*command, run))
    assert any("--resume" in line for line in lines(error)), error
    assert "gloo" not in error
    error = kill(0, run, 6, start(*command, run, "--resume"))
    assert any("rank 1: " in line and "--resume" in line for line in lines(error)), error
    rest = start(*command, run, "--resume")
    _, error = rest.communicate(timeout=200)
    assert rest.returncode == 0, error
    assert sha256(run) == sha256(tmp_path / "whole")


def test_a_mistake_is_told_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "thesis.tex").write_text("")
    for words, text in (
        (["nonesuch"], "there is no recipe nonesuch"),
        (["digits-cnn-rigl90-moon"], "holds other files, such as thesis.tex"),
    ):
        process = start("-m", "moon", "train", *words, "--out", run, "--device", "cpu")
        _, error = process.communicate(timeout=120)
        assert process.returncode == 1
        found = lines(error)
        assert len(found) == 1 and found[0].startswith("moon: error: ") and text in found[0]


def test_a_script_of_ones_own_trains_again_and_again(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    process = start(script, tmp_path / "run")
    out, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    assert sorted(out.split()) == ["2"] * 4 + ["True"] * 2


@pytest.mark.gpu
def test_two_gpus_train_one_model(tmp_path: Path) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    words = ["digits-cnn-rigl90-moon", "--device", "cuda", "--set", "epochs=6", "--out"]
    runs = [tmp_path / "one", tmp_path / "two"]
    for run in runs:
        process = start("-m", "moon", "train", *words, run)
        _, error = process.communicate(timeout=200)
        assert process.returncode == 0, error
    assert sha256(runs[0]) == sha256(runs[1])
