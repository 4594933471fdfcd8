"""One small run and its bundle, made by the commands themselves, and a way to call commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moon.cli import main
from moon.data.source import open_source

KNOWN = "sklearn:digits#test{label in 0..7}"


@dataclass(frozen=True)
class Result:
    """What a command left: its exit status, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout, which must be one JSON document and nothing else."""
        return json.loads(self.out, parse_constant=_refuse)

    @property
    def error(self) -> str:
        """The last line of stderr."""
        return self.err.strip().splitlines()[-1]


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


Moon = Callable[..., Result]


@pytest.fixture
def moon(capsys: pytest.CaptureFixture[str]) -> Moon:
    """Call a command in this process."""

    def call(*words: object) -> Result:
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return call


def process(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Call a command in a process of its own."""
    command = [sys.executable, "-m", "moon", *(str(word) for word in words)]
    settings = {"capture_output": True, "text": True, "timeout": 120, **options}
    return subprocess.run(command, check=False, env=environment(), **settings)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three epochs on digits 0 to 7."""
    out = tmp_path_factory.mktemp("cli") / "run"
    words = ["train", "digits-cnn-rigl90-moon", "--set", "epochs=3", "--out", str(out)]
    assert main([*words, "--device", "cpu"]) == 0
    return out


@pytest.fixture(scope="session")
def exported(run: Path) -> Path:
    """The run's bundle; not to be changed."""
    out = run.parent / "digits.moon"
    assert main(["export", str(run), "--out", str(out)]) == 0
    return out


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may change."""
    return Path(shutil.copytree(exported, tmp_path / "digits.moon"))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A three, an eight and a crop of a photograph, as PNG files."""
    folder = tmp_path_factory.mktemp("images")
    specs = {
        "three": "sklearn:digits#test{label==3}",
        "eight": "sklearn:digits#test{label==8}",
        "photo": "sklearn:photos",
    }
    for name, spec in specs.items():
        item: Any = open_source(spec).item(0)
        image = item if isinstance(item, Image.Image) else Image.fromarray(item)
        image.save(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in specs]
