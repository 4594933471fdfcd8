"""The commands with --backend sparse: the same decisions, and a line where it hands over."""

from __future__ import annotations

from pathlib import Path

import pytest

from moon.runtime.sparse import worth
from tests.cli.conftest import KNOWN, Moon

ALL = "ONNX Runtime runs the whole model: it is so small"
NEAR = "eights=sklearn:digits#test{label==8}"


@pytest.fixture
def engaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine runs what is too small to gain by it."""
    monkeypatch.setattr(worth, "LEAST_SAVED", 0)


def test_a_model_that_is_handed_over_is_told_of(
    moon: Moon, exported: Path, images: list[Path], tmp_path: Path
) -> None:
    wanted = moon("predict", exported, *images, "--json").json
    for command in (
        ["predict", exported, *images], ["score", exported, KNOWN, "--out", tmp_path / "a.parquet"]
    ):  # fmt: skip
        found = moon(*command, "--backend", "sparse", "--json")
        assert found.code == 0 and f"warning: {ALL}" in found.err
    again = moon("predict", exported, *images, "--backend", "sparse", "--json")
    assert again.json == wanted
    checks = {check["name"]: check for check in moon("verify", exported, "--json").json["checks"]}
    assert checks["sparse"]["ok"] and ALL in checks["sparse"]["detail"]


def test_decisions_by_the_engine(
    moon: Moon, exported: Path, images: list[Path], engaged: None
) -> None:
    wanted = moon("predict", exported, *images, "--json").json["predictions"]
    found = moon("predict", exported, *images, "--backend", "sparse", "--json")
    assert found.code == 0 and found.err == ""
    for one, other in zip(found.json["predictions"], wanted, strict=True):
        assert one["decision"] == other["decision"] and one["label"] == other["label"]
        assert one["score"]["value"] == pytest.approx(other["score"]["value"], abs=1e-4)
    checks = {check["name"]: check for check in moon("verify", exported, "--json").json["checks"]}
    assert checks["sparse"]["ok"] and "ONNX Runtime" not in checks["sparse"]["detail"]


def test_an_evaluation_names_the_backend(
    moon: Moon, exported: Path, tmp_path: Path, engaged: None
) -> None:
    words = ["eval", exported, "--id", KNOWN, "--near", NEAR, "--limit", "40", "--out", tmp_path]
    found = moon(*words, "--backend", "sparse", "--json").json
    assert found["backend"]["sparse_layers"]["picked"] > 0


def test_an_evaluation_tells_of_a_model_that_is_handed_over(
    moon: Moon, exported: Path, tmp_path: Path
) -> None:
    words = ["eval", exported, "--id", KNOWN, "--near", NEAR, "--limit", "40", "--out", tmp_path]
    found = moon(*words, "--backend", "sparse")
    assert found.code == 0 and f"warning: {ALL}" in found.err


def test_a_measurement_beside_onnx_runtime(moon: Moon, exported: Path, engaged: None) -> None:
    words = ["bench", exported, "--backend", "sparse", "--baseline", "onnxruntime"]
    found = moon(*words, "--queries", "64", "--json").json
    assert found["backend"]["isa"] and found["backend"]["provider"].startswith("moon, ")
    assert found["parity"]["within"] is True
    text = moon(*words, "--queries", "64").out
    assert "sparse hands over to ONNX Runtime: head/" in text
    assert "times as fast as onnxruntime" in text


def test_calibrating_by_it(moon: Moon, bundle: Path, engaged: None) -> None:
    words = ["calibrate", bundle, "--data", KNOWN, "--reject", "0.1", "--backend", "sparse"]
    found = moon(*words, "--json").json
    assert found["backend"] == "sparse" and found["gate"]["threshold"] is not None
