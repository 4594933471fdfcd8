"""moon inspect --gpu."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.cli.conftest import Moon
from tests.export.trt.test_sparsity import network


def test_layers_of_a_model_file(moon: Moon, tmp_path: Path) -> None:
    path = tmp_path / "[m].onnx"
    path.write_bytes(network().SerializeToString())
    found = moon("inspect", path, "--gpu", "--json").json
    assert found["kind"] == "gpu" and (found["eligible"], found["worth"]) == (2, 1)
    assert [one["weight"] for one in found["layers"]] == ["stem", "narrow", "wide"]
    assert found["layers"][2]["shape"] == [256, 256, 3, 3]
    text = moon("inspect", path, "--gpu").out
    assert "[m].onnx" in text and "too narrow" in text and found["verdict"] in text


def test_layers_of_a_bundle(moon: Moon, exported: Path) -> None:
    found = moon("inspect", exported, "--gpu", "--json").json
    layers = moon("inspect", exported, "--json").json["layers"]
    assert {one["weight"]: one["nonzeros"] for one in found["layers"]} == {
        one["name"]: one["nonzeros"] for one in layers
    }
    assert found["eligible"] == 0 and "smaller and not faster" in found["verdict"]


def test_what_cannot_be_judged(moon: Moon, exported: Path, tmp_path: Path) -> None:
    assert "could not read" in moon("inspect", tmp_path / "none.onnx", "--gpu").error
    (tmp_path / "bad.onnx").write_bytes(b"\xff\xff")
    assert "not an ONNX file" in moon("inspect", tmp_path / "bad.onnx", "--gpu").error
    both = moon("inspect", exported, "--gpu", "--engine")
    assert both.code == 2 and "--engine and --gpu are separate" in both.error


def test_judging_needs_no_torch() -> None:
    code = "import sys, moon.export.trt.sparsity; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
