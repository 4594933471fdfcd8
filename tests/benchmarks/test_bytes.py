"""benchmarks/bytes.py and benchmarks/load.py: what they say of a real model."""

from __future__ import annotations

import json

import pytest

from tests.bundles import make_bundle


@pytest.fixture
def table(scripts):
    return scripts["bytes"]


def test_every_form_of_a_bundle_is_measured(table, tmp_path, capsys):
    make_bundle(tmp_path / "tiny.moon", size=16, channels=3)
    words = [str(tmp_path / "tiny.moon"), "--out", str(tmp_path / "out")]
    assert table.main(words) == 0
    (model,) = json.loads((tmp_path / "out" / "bytes.json").read_text())["models"]
    assert model["sparsity"] == pytest.approx(0.8, abs=0.01)
    rows = {row["form"]: row for row in model["rows"]}
    assert list(rows) == [form.title for form in table.FORMS]
    assert rows["dense fp32"]["share"] == 1
    assert all(row["exact"] and row["checker"] != "refused" for row in rows.values())
    assert rows["dense fp16"]["bytes"] < rows["dense fp32"]["bytes"]
    assert rows["compact fp16"]["bytes"] <= min(
        rows[f"{kind} fp16"]["bytes"] for kind in ("bitmask", "deltas")
    )
    assert all(0 < row["zstd_bytes"] < rows["dense fp32"]["bytes"] for row in rows.values())
    page = (tmp_path / "out" / "bytes.md").read_text()
    assert page.count("\n") == 2 + 2 * len(table.FORMS)
    assert "tiny.moon: 79.94%" in capsys.readouterr().out


def test_misuse_is_one_line(table, tmp_path, capsys):
    assert table.main(["--sparsity", "1.5"]) == 2
    assert "--sparsity 1.5 is not from 0" in capsys.readouterr().err
    assert table.main([str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_loads_are_timed_against_the_first_file(scripts, tmp_path, capsys):
    bundle = make_bundle(tmp_path / "tiny.moon")
    path = str(bundle.path / "model.onnx")
    words = [path, path, "--rounds", "1", "--json", str(tmp_path / "load.json")]
    assert scripts["load"].main(words) == 0
    first, second = json.loads((tmp_path / "load.json").read_text())
    assert first["ratio"] == 1 and second["ratio"] > 0
    assert first["bytes"] == (bundle.path / "model.onnx").stat().st_size
    assert 0 < first["after"] <= first["peak"]
