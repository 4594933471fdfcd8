"""benchmarks/engine_variants.py as a whole."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module("engine_variants")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture
def tiny(script, monkeypatch):
    """A family quick to make."""
    models = sys.modules["engine_models"]
    monkeypatch.setitem(models.FAMILIES, "tiny", models.Family("cnn", 16, 11))
    return ["--models", "tiny", "--sparsity", "90", "--rounds", "2", "--calls", "1"]


@pytest.mark.parametrize(
    "words", [["structure", "unstructured", "block4x1"], ["batch", "1", "4"], ["threads", "1", "2"]]
)
def test_variants_are_held_against_the_first(script, tiny, words, tmp_path, capsys):
    result = tmp_path / "variants.json"
    words = [*words, *tiny, "--folder", str(tmp_path), "--json", str(result)]
    assert script.main(words) == 0
    first, second = json.loads(result.read_text())["models"]["tiny-90"]
    assert first["times_first"] is None and first["best_ms_per_image"] > 0
    low, high = second["times_first"]["ci95"]
    assert 0 < low <= second["times_first"]["ratio"] <= high
    assert f"times {words[1]}" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["batch", "one"], ["batch", "0"], ["threads", "-1"]])
def test_what_is_no_variant_is_one_line(script, tiny, words, tmp_path, capsys):
    assert script.main([*words, *tiny, "--folder", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"engine_variants: {words[0]} ")
