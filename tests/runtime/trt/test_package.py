"""Which package fits which GPU, and which are installed."""

import sys
from pathlib import Path

import pytest

from moon.runtime.trt.gpu import compute_capability, gpus
from moon.runtime.trt.package import fitting, installed, which_fits


@pytest.mark.parametrize(
    ("sm", "names"),
    [
        (75, ("tensorrt_rtx", "tensorrt")),
        (86, ("tensorrt_rtx", "tensorrt")),
        (121, ("tensorrt_rtx", "tensorrt")),
        (87, ("tensorrt",)),
        (90, ("tensorrt",)),
        (100, ("tensorrt",)),
        (101, ("tensorrt",)),
        (110, ("tensorrt",)),
        (61, ()),
    ],
)
def test_what_fits(sm: int, names: tuple[str, ...]) -> None:
    assert fitting(sm) == names


def test_boards_are_named() -> None:
    assert "Jetson Orin" in which_fits([87]) and "moon-toolkit[trt]" in which_fits([87])
    assert "moon-toolkit[trt-rtx]" not in which_fits([90])
    assert "moon-toolkit[trt-rtx]" in which_fits([86])
    assert "older" in which_fits([61])


@pytest.mark.parametrize(
    ("text", "sm"),
    [("sm_86", 86), ("SM86", 86), ("8.6", 86), ("86", 86), ("sm_120", 120), ("12.0", 120)],
)
def test_spellings(text: str, sm: int) -> None:
    assert compute_capability(text) == sm


@pytest.mark.parametrize("text", ["", "sm", "ampere", "8", "sm_8600", "-86"])
def test_what_is_no_compute_capability(text: str) -> None:
    assert compute_capability(text) is None


def test_stubs_alone_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.pyi").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert installed("tensorrt") is None
    (tmp_path / "tensorrt" / "__init__.py").touch()
    assert installed("tensorrt") == ""


def test_gpus_are_listed_or_there_are_none() -> None:
    assert all(gpu.sm >= 10 and gpu.name for gpu in gpus())
