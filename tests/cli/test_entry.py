"""Failures: one line on stderr, the right status, no traceback unless asked for."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moon.cli.app import app
from moon.cli.entry import main
from tests.cli.conftest import Moon, environment, process

COMMANDS = [info.name for info in app.registered_commands]


def test_version(moon: Moon) -> None:
    result = moon("--version")
    assert (result.code, result.out, result.err) == (0, "moon 0.1.0\n", "")


def test_alone_it_lists_the_commands(moon: Moon) -> None:
    result = moon()
    assert result.code == 0
    assert all(f"  {name} " in result.out for name in COMMANDS)


def test_python_m_moon() -> None:
    done = process("--version")
    assert (done.returncode, done.stdout) == (0, "moon 0.1.0\n")


def test_the_commands_are_those_promised() -> None:
    promised = "demo train export calibrate predict eval bench serve package score drift monitor"
    assert [*promised.split(), "sign", "verify", "inspect", "recipes", "doctor"] == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_the_common_options(moon: Moon, command: str) -> None:
    result = moon(command, "--help")
    assert result.code == 0
    assert f"Example: moon {command}" in result.out
    assert "--json" in result.out
    assert "--debug" in result.out
    assert max(map(len, result.out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["predct", "x"],
            "moon: error: there is no command 'predct'. Did you mean predict? "
            "See moon --help for the list.",
        ),
        (
            ["predict", "b", "i.png", "--treshold", "3"],
            "moon: error: moon predict has no option --treshold. Did you mean --threshold? "
            "See moon predict --help.",
        ),
        (
            ["bench", "b", "--batch", "two"],
            "moon: error: invalid value for '--batch': ",
        ),
        (
            ["predict", "b"],
            "moon: error: missing argument 'IMAGE'. See moon predict --help.",
        ),
        (
            ["export", "r", "--out", "o", "--weights", "zip"],
            "moon: error: invalid value for '--weights': 'zip' is not one of "
            "'compact', 'dense', 'coo'. See moon export --help.",
        ),
        (
            ["train", "nope", "--out", "r"],
            "moon: error: there is no recipe nope.",
        ),
        (
            ["recipes", "cifar10-resnet81"],
            "moon: error: there is no recipe cifar10-resnet81. Did you mean cifar10-resnet18",
        ),
    ],
)
def test_wrong_use_is_one_line_and_status_2(moon: Moon, words: list[str], line: str) -> None:
    result = moon(*words)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith(line)
    assert result.err.count("\n") == 1
    assert result.err.rstrip().endswith(".")


@pytest.mark.parametrize(
    "words",
    [
        ["predict", "missing.moon", "a.png"],
        ["verify", "missing.moon"],
        ["inspect", "missing.moon"],
        ["calibrate", "missing.moon", "--data", "x"],
        ["bench", "missing.moon"],
        ["score", "missing.moon", "x", "--out", "o.parquet"],
        ["eval", "missing.moon", "--id", "x", "--out", "o"],
        ["bench", "--compare", "a.json", "b.json"],
    ],
)
def test_a_failure_is_one_line_and_status_1(
    moon: Moon, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = moon(*words, "--json")
    assert result.code == 1
    assert result.out == ""
    assert result.error.startswith("moon: error: ")
    assert result.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["verify", "nope", "--debug"], ["--debug", "verify", "nope"]])
def test_debug_shows_the_traceback_and_the_line(moon: Moon, words: list[str]) -> None:
    result = moon(*words)
    assert result.code == 1
    assert "Traceback" in result.err
    assert result.error.startswith("moon: error: ")


def test_debug_shows_a_traceback_for_wrong_use_too(moon: Moon) -> None:
    result = moon("predict", "--bogus", "--debug")
    assert result.code == 2
    assert "Traceback" in result.err


def test_debug_after_two_dashes_is_a_file_name(moon: Moon, exported: Path) -> None:
    result = moon("predict", exported, "--", "--debug")
    assert result.code == 1
    assert "Traceback" not in result.err


def test_an_unexpected_exception_is_one_line_too(
    moon: Moon, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("moon.runtime.verify.verify", broken)
    result = moon("verify", exported)
    assert result.code == 1
    assert result.err == (
        "moon: error: RuntimeError: two lines. "
        "This is a defect in moon; --debug shows where it happened.\n"
    )


def test_a_missing_extra_names_what_to_install(
    moon: Moon, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "moon.trainer.fit", raising=False)
    result = moon("train", "digits-cnn-rigl90", "--out", exported.parent / "never")
    assert result.code == 1
    assert "pip install 'moon-toolkit[train]'" in result.error


def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "moon", "recipes", "--json"]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.read(10)
    child.stdout.close()
    error = child.stderr.read()
    child.stderr.close()
    assert child.wait(60) == 1
    assert error == b""


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["train", "digits-cnn-rigl90-moon", "--out", str(out), "--set", "epochs=2000"]
    command = [sys.executable, "-m", "moon", *words, "moon.vote_epochs=400"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    metrics = out / "metrics.jsonl"
    end = time.monotonic() + 60
    while not metrics.exists() and child.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=60)
    assert child.returncode == 130
    assert error.splitlines()[-1] == "moon: interrupted. Go on with --resume."
    assert "Traceback" not in error
    assert "epoch 1/2000: loss " in error


def test_a_name_that_is_not_utf8_can_be_printed(exported: Path, tmp_path: Path) -> None:
    strange = bytes(tmp_path / "x") + b"\xff.png"
    done = process("predict", exported, *[strange.decode("utf-8", "surrogateescape")])
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "could not be read" in done.stderr


def test_main_takes_its_words_from_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["moon", "--version"])
    assert main() == 0
