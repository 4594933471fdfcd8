"""moon export --trt, and what inspect, verify and doctor show of an engine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from moon.bundle import Bundle
from moon.runtime.trt.package import installed
from tests.bundles import make_bundle
from tests.cli.conftest import Moon

rtx = pytest.mark.skipif(installed("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle to which the command added an engine."""
    from moon.cli import main

    path = tmp_path_factory.mktemp("trt") / "b"
    make_bundle(path)
    words = ["--trt", "--trt-target", "sm_86", "--trt-target", "sm_75", "--trt-batch", "1,4,8"]
    assert main(["export", str(path), *words, "--trt-compress"]) == 0
    return path


@rtx
def test_an_engine_is_added_and_shown(moon: Moon, built: Path) -> None:
    facts = moon("inspect", built, "--json").json
    [engine] = facts["engines"]
    assert engine["targets"] == ["sm_75", "sm_86"] and engine["compression"] == "zstd"
    assert engine["profile"] == {"min": 1, "opt": 4, "max": 8}
    text = moon("inspect", built).out
    assert "TensorRT-RTX" in text and "sm_75, sm_86, fp16, 1 to 8 images" in text
    assert "not executed" in text and "smaller, not the model faster" in text
    checks = {check["name"]: check for check in moon("verify", built, "--json").json["checks"]}
    assert checks[engine["file"]]["ok"] is True
    assert "header valid" in checks[engine["file"]]["detail"]


@rtx
def test_a_stale_engine_fails_verify_and_is_shown(moon: Moon, built: Path, tmp_path: Path) -> None:
    from moon.bundle import write_bundle

    other = make_bundle(tmp_path / "other", seed=3)
    engines = Bundle.open(built)
    files = {name: other.file(name) for name in other.manifest.files}
    files |= {n: engines.file(n) for n in engines.manifest.files if n.startswith("engines/")}
    plain = other.manifest.to_json()
    fields = {key: plain[key] for key in plain if key not in ("version", "sha256", "files")}
    write_bundle(tmp_path / "b", manifest_fields=fields, files=files)
    assert "STALE" in moon("inspect", tmp_path / "b").out
    result = moon("verify", tmp_path / "b")
    assert result.code == 1 and "stale: it was built from another model" in result.error


@rtx
@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "is a bundle already. Add an engine to it with --trt"),
        (["--trt", "--trt-target", "sm_86", "--out", "x"], "--out does not go with a bundle"),
        (["--trt", "--trt-target", "sm_86", "--score", "msp"], "--score does not go with a bun"),
        (["--trt-batch", "1,2,3"], "--trt-batch says how an engine is built. Add --trt"),
        (["--trt", "--trt-target", "sm_86", "--trt-batch", "2,4,8"], "leave out a single image"),
        (["--trt", "--trt-target", "sm_86", "--trt-batch", "a"], "is not MIN,OPT,MAX"),
        (
            ["--trt", "--trt-target", "sm_87", "--trt-package", "tensorrt_rtx"],
            "sm_87 (Jetson Orin) needs TensorRT: pip install",
        ),
    ],
)
def test_wrong_words(moon: Moon, built: Path, words: list[str], text: str) -> None:
    before = (built / "manifest.json").read_bytes()
    result = moon("export", built, *words)
    assert result.code == 2 and text in result.error
    assert (built / "manifest.json").read_bytes() == before


def test_a_run_needs_out(moon: Moon, tmp_path: Path) -> None:
    result = moon("export", tmp_path)
    assert result.code == 2 and "Missing option --out" in result.error


@rtx
def test_images_to_compare_on(moon: Moon, tmp_path: Path) -> None:
    make_bundle(tmp_path / "b")
    words = ["--trt", "--trt-target", "sm_120", "--data", "sklearn:digits#test[0:100]"]
    result = moon("export", tmp_path / "b", *words, "--json")
    assert result.code == 0
    [engine] = result.json["engines"]
    assert engine["parity"]["images"] == 100
    shutil.rmtree(tmp_path / "b" / "engines")
    assert moon("verify", tmp_path / "b").code == 1


def test_doctor_names_both_packages(moon: Moon) -> None:
    found = moon("doctor", "--json").json
    assert set(found["tensorrt"]["packages"]) == {"tensorrt", "tensorrt_rtx"}
    assert found["tensorrt"]["packages"]["tensorrt_rtx"] == installed("tensorrt_rtx")
    text = moon("doctor").out
    assert "engines for RTX GPUs, built on any machine" in text
    assert "engines for any NVIDIA GPU, built on it" in text
