"""benchmarks/structures.py: the cells of the table, the runs behind it, the picture."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def structures(scripts):
    return scripts["structures"]


def test_every_cell_is_a_recipe(structures):
    args = structures._arguments([])
    cells = structures._cells(args)
    assert len(cells) == len(set(cells)) == 1 + 3 * (1 + 2 * 5)
    recipes = [structures._recipe(args, *cell) for cell in cells]
    assert len({recipe.hash for recipe in recipes}) == len(cells)
    assert len({recipe.name for recipe in recipes}) == len(cells)
    assert all(recipe.dense == ("stem",) for recipe in recipes[1:])


def test_it_trains_measures_and_draws(structures, in_process, tmp_path, capsys):
    words = ["--data", "sklearn:digits", "--recipes", "digits-cnn", "--epochs", "1", "--seeds",
             "0,1", "--sparsities", "90", "--rows", "RigL 1:10", "--device", "cpu"]  # fmt: skip
    assert structures.main([*words, "--images", "200", "--out", str(tmp_path)]) == 0
    assert "RigL" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "structures.json").read_text())["rows"]
    assert row["kind"] == "1:M" and row["accuracy"]["n"] == 2
    assert row["sparsity"]["mean"] == pytest.approx(0.9, abs=0.005)
    assert (tmp_path / "structures.png").read_bytes().startswith(b"\x89PNG")
    assert "| RigL | 1:10 | " in (tmp_path / "structures.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "x#train"], "has a split"),
        (["--sparsities", "80;90"], "--sparsities '80;90' is no list"),
        (["--jobs", "0"], "--jobs must be at least 1"),
    ],
)
def test_misuse_is_one_line(structures, tmp_path, capsys, words, message):
    assert structures.main([*words, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
