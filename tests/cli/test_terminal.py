"""What a terminal sees and a pipe does not."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

from tests.cli.conftest import environment, process


def on_a_terminal(words: list[str]) -> tuple[bytes, bytes]:
    """stdout through a pipe, and what stderr showed on a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    env = {**environment(), "TERM": "xterm-256color", "COLUMNS": "80"}
    child = subprocess.Popen(
        [sys.executable, "-m", "moon", *words], stdout=subprocess.PIPE, stderr=theirs, env=env
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # how Linux says that the other end has closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert child.stdout is not None
    out = child.stdout.read()
    child.stdout.close()
    assert child.wait(60) == 0
    return out, shown


def test_progress_is_drawn_on_a_terminal_and_json_stays_clean(exported: Path) -> None:
    out, shown = on_a_terminal(["bench", str(exported), "--json"])
    assert json.loads(out)["latency_ms"]["n"] >= 1024
    assert b"measuring" in shown
    assert b"\x1b[" in shown


def test_epochs_are_a_live_table_on_a_terminal(tmp_path: Path) -> None:
    words = ["train", "digits-cnn-rigl90-moon", "--set", "epochs=2", "--out", str(tmp_path / "r")]
    _, shown = on_a_terminal(words)
    assert b"p(unknown)" in shown
    assert b"1/2" in shown
    assert b"moon: epoch" not in shown


def test_a_pipe_gets_plain_text_without_progress(exported: Path) -> None:
    done = process("inspect", exported)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "\x1b" not in done.stdout


def test_nothing_is_cut_in_a_pipe_or_at_80_columns(exported: Path, tmp_path: Path) -> None:
    long = tmp_path / ("long" * 30) / "image.png"
    for env in ({}, {"COLUMNS": "80"}):
        command = [sys.executable, "-m", "moon", "predict", str(exported), str(long)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**environment(), **env}
        )
        assert done.returncode == 1
        assert str(long) in done.stdout.replace("\n", "") or str(long) in done.stdout
        assert "…" not in done.stdout
