"""moon inspect --engine and moon bench --tune."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moon.bundle import Bundle
from moon.runtime.sparse import worth
from tests.cli.conftest import Moon
from tests.runtime.sparse.graphs import Graph


@pytest.fixture
def engaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine runs what is too small to gain by it."""
    monkeypatch.setattr(worth, "LEAST_SAVED", 0)


@pytest.fixture
def own(exported: Path, tmp_path: Path) -> Path:
    """A bundle to be changed."""
    return Path(shutil.copytree(exported, tmp_path / "own.moon"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    graph = Graph(32, 32, 32)
    y = graph.add("Relu", graph.conv("x", 32, 32))
    graph.conv(y, 32, 32, 1)
    (tmp_path / "[m].onnx").write_bytes(graph.data())
    return tmp_path / "[m].onnx"


def test_a_profile_of_a_model(moon: Moon, model: Path) -> None:
    found = moon("inspect", model, "--engine", "--batch", "2", "--json").json
    assert found["kind"] == "engine" and found["images"] == 2 and found["tuned_batches"] == []
    assert [one["shape"] for one in found["layers"]] == [
        "32->32 3x3 /1 32x32", "32->32 1x1 /1 32x32"
    ]  # fmt: skip
    for one in found["layers"]:
        assert one["kind"] == "conv" and one["us"] > 0 and 0 < one["share_of_limit"] < 2
        assert set(one["plan"]) == {"tile", "together", "reading", "block"}
        assert any(name.startswith("conv_") for name in one["kernels"])
    assert found["limit_gmacs"] > 0 and found["times"]["convolutions"] > 0
    text = moon("inspect", model, "--engine").out
    assert "[m].onnx" in text and "32->32 3x3 /1 32x32" in text and "convolutions" in text


def test_a_profile_names_what_is_handed_over(moon: Moon, exported: Path, engaged: None) -> None:
    found = moon("inspect", exported, "--engine", "--json")
    assert found.code == 0 and found.err == ""
    assert "is not known" in found.json["handed_over"] and found.json["times"]["onnxruntime"] > 0
    assert "ONNX Runtime runs head/" in moon("inspect", exported, "--engine").out


def test_a_whole_model_that_is_handed_over(moon: Moon, exported: Path) -> None:
    found = moon("inspect", exported, "--engine", "--json")
    assert found.code == 0 and "warning: ONNX Runtime runs the whole model" in found.err
    assert found.json["layers"] == [] and found.json["limit_gmacs"] is None
    assert "so small" in moon("inspect", exported, "--engine").out


def test_what_cannot_be_profiled(moon: Moon, model: Path, tmp_path: Path) -> None:
    assert "could not read" in moon("inspect", tmp_path / "none.onnx", "--engine").error
    assert "instruction set" in moon("inspect", model, "--engine", "--isa", "z80").error
    assert moon("inspect", model, "--engine", "--batch", "0").code == 2
    assert "Ask for a view of it" in moon("inspect", model).error


def test_tuning_stores_plans(moon: Moon, own: Path, engaged: None) -> None:
    version = Bundle.open(own).manifest.version
    words = ["bench", own, "--tune", "--budget", "0.5"]
    found = moon(*words, "--out", own.parent / "found.json", "--json").json
    assert found["schema_version"] == 1 and found["verdict"] in ("sparse", "onnxruntime")
    assert found["version"] == version == Bundle.open(own).manifest.version
    assert found["plans"].keys() == found["measured"]["layers_us"].keys() != set()
    assert found["measured"]["tuned_ms"] > 0 and found["batch"] == 1 and found["speedup"] > 0
    assert json.loads((own.parent / "found.json").read_text()) == found
    assert (own / found["file"]).is_file()
    checks = moon("verify", own, "--json").json["checks"]
    assert all(check["ok"] for check in checks)
    assert moon("inspect", own, "--engine", "--json").json["tuned_batches"] == [1]
    (plans,) = moon("inspect", own, "--json").json["plans"]
    assert plans["file"] == found["file"] and plans["plans"] == len(found["plans"])
    assert f"{plans['cpu']} {plans['isa']}, images together: 1" in moon("inspect", own).out


def test_tuning_for_people(moon: Moon, own: Path, engaged: None) -> None:
    text = moon("bench", own, "--tune", "--budget", "0.3", "--batch", "3", "--threads", "2").out
    assert "convolutions are faster done in another way" in text
    assert "images: 3, threads: 2" in text and f"written: {own}/engines/sparse-" in text


def test_what_cannot_be_tuned(moon: Moon, own: Path, model: Path) -> None:
    found = moon("bench", own, "--tune")
    assert found.code == 2 and "nothing to tune: ONNX Runtime runs the whole model" in found.error
    assert not (own / "engines").exists()
    assert "takes one bundle" in moon("bench", own, own, "--tune").error
    assert "--tune goes with neither" in moon("bench", own, own, "--tune", "--compare").error
    assert "it is a file" in moon("bench", model, "--tune").error


def test_a_bundle_without_plans_has_none(moon: Moon, exported: Path) -> None:
    assert moon("inspect", exported, "--json").json["plans"] == []
    assert "Plans" not in moon("inspect", exported).out
