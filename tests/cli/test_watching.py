"""drift and monitor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from moon.bundle import Bundle
from moon.drift import DriftTest
from tests.cli.conftest import KNOWN, Moon

UNKNOWN = "sklearn:digits#test{label in 8..9}"


def table(path: Path, rejected: list[bool | None], threshold: float) -> Path:
    """As `moon score` writes them; None for an image that could not be read."""
    words = [None if x is None else "abstain" if x else "accept" for x in rejected]
    bars = [None if x is None else threshold for x in rejected]
    columns = {
        "decision": pyarrow.array(words, pyarrow.string()),
        "threshold": pyarrow.array(bars, pyarrow.float32()),
    }
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_decided_images_are_tested(moon: Moon, exported: Path, tmp_path: Path) -> None:
    for name, source in (("id", KNOWN), ("ood", UNKNOWN)):
        assert moon("score", exported, source, "--out", tmp_path / f"{name}.parquet").code == 0
    known, unknown = tmp_path / "id.parquet", tmp_path / "ood.parquet"
    quiet = moon("drift", exported, known, "--json").json
    rows = parquet.read_table(known).to_pylist()
    assert quiet["images"] == len(rows)
    assert quiet["rejected"] == sum(row["decision"] == "abstain" for row in rows)
    assert (quiet["alarm"], quiet["first_image"]["e_value"]) == (False, None)
    assert "No drift" in moon("drift", exported, known).out
    found = moon("drift", exported, known, *[unknown] * 3, "--json").json
    assert found["alarm"]
    assert quiet["images"] < found["first_image"]["e_value"] < found["images"]
    assert found["log10_e_value"] > 3
    shown = moon("drift", exported, known, *[unknown] * 3)
    assert shown.code == 0
    assert f"reached 10^3 at image {found['first_image']['e_value']:,}" in shown.out


def test_unreadable_images_do_not_count(moon: Moon, exported: Path, tmp_path: Path) -> None:
    gate = Bundle.open(exported).gate()
    assert gate is not None
    path = table(tmp_path / "t.parquet", [True, None, False], gate.threshold)
    found = moon("drift", exported, path, "--json").json
    assert (found["images"], found["rejected"]) == (2, 1)
    watched = DriftTest.of(gate).watch([True, False], gate.threshold)
    assert found["log10_e_value"] == pytest.approx(watched.log_e_value / np.log(10))
    nothing = moon("drift", exported, table(tmp_path / "n.parquet", [], 0.0), "--json").json
    assert (nothing["images"], nothing["log10_e_value"], nothing["log10_detector"]) == (0, 0, None)


def test_what_cannot_be_tested(moon: Moon, exported: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "none.parquet", tmp_path / "text.parquet", tmp_path / "other.parquet"):
        if path.name == "text.parquet":
            path.write_text("no table")
        if path.name == "other.parquet":
            parquet.write_table(pyarrow.table({"a": [1]}), path)
        result = moon("drift", exported, path)
        assert result.code == 1
        assert path.name in result.error
        assert "moon score" in result.error
    other = moon("drift", exported, table(tmp_path / "b.parquet", [True], 123.0))
    assert other.code == 2
    assert "123 is not a threshold of the gate" in other.error


def test_monitoring_files(moon: Moon, tmp_path: Path) -> None:
    out = tmp_path / "new" / "monitoring"
    found = moon("monitor", "--out", out, "--json").json
    assert [Path(name).name for name in found["files"]] == ["moon-alerts.yml", "moon-grafana.json"]
    assert json.loads((out / "moon-grafana.json").read_text())["title"] == "moon serve"
    assert moon("monitor", "--out", out).code == 0
    (out / "moon-alerts.yml").write_text("groups: []")
    refused = moon("monitor", "--out", out)
    assert refused.code == 2
    assert "--force" in refused.error
    assert (out / "moon-alerts.yml").read_text() == "groups: []"
    assert moon("monitor", "--out", out, "--force").code == 0
    assert "MoonDrift" in (out / "moon-alerts.yml").read_text()
