"""The README's Python runs, its commands exist with those options, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from tests.bundles import make_bundle

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]


def test_the_predictor_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = make_bundle(tmp_path / "mnist.moon")
    height, width, channels = bundle.preprocess.shape
    for name in ("a.png", "b.jpg"):
        Image.new("L" if channels == 1 else "RGB", (width, height), 90).save(name)
    exec(compile(PYTHON[0], "README.md", "exec"), {})  # our own text
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_training_example() -> None:
    import torch

    model = torch.nn.Linear(40, 4)
    names = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "steps": 10,
        "epochs": 10,
    }
    exec(compile(PYTHON[1], "README.md", "exec"), names)
    names["criterion"].start_epoch(1)
    names["criterion"](model(torch.randn(8, 40)), torch.arange(8) % 3).backward()
    names["optimizer"].step()
    assert int(model.weight.count_nonzero()) == round(0.05 * 160)


def test_its_commands_take_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    from moon.cli import main

    shown = re.findall(r"^moon +([a-z]+)(?: .*)?$", README, flags=re.MULTILINE)
    assert {"recipes", "train", "export", "calibrate", "eval", "predict", "serve"} <= set(shown)
    for line in re.findall(r"^moon +(.*)$", README, flags=re.MULTILINE):
        command = line.split()[0]
        assert main([command, "--help"]) == 0
        page = capsys.readouterr().out
        for option in re.findall(r"--[a-z]+", line):
            assert option in page, f"moon {command} has no {option}"


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_two_commands_are_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{command}:", makefile, flags=re.MULTILINE)
