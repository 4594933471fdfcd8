"""benchmarks/scores.py, scores_view.py."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from moon.data.source import open_source
from moon.evaluation.odin import odin
from moon.scores import SCORE_TABLE
from moon.trainer.checkpoint import Checkpoint
from moon.trainer.fit import fit
from moon.trainer.recipes import find_recipe

DIGITS = "sklearn:digits#test"
KNOWN = DIGITS + "{label in 0..7}"
PHOTOS = "sklearn:photos"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of a recipe with the unknown class, one without."""
    folder = tmp_path_factory.mktemp("runs")
    wanted = [
        ("digits-cnn-rigl90-moon", 0),
        ("digits-cnn-rigl90-moon", 1),
        ("digits-cnn-rigl90", 0),
    ]
    found = []
    for name, seed in wanted:
        recipe = find_recipe(name).override(["epochs=3", f"seed={seed}"])
        found.append(folder / f"{name}-seed{seed}")
        fit(recipe, found[-1] / "run", device="cpu")
    return found


def words_of(runs, out, *more):
    near = [f"eights={DIGITS}{{label == 8}}", f"nines={DIGITS}{{label == 9}}"]
    sets = ["--near", *near, "--far", f"photos={PHOTOS}"]
    return [*map(str, runs), "--id", KNOWN, *sets, "--limit", "40", "--out", str(out), *more]


@pytest.mark.slow
def test_the_tables_and_going_on(scripts, runs, tmp_path, capsys):
    words = words_of(runs, tmp_path, "--jpeg", "75", "--odin")
    assert scripts["scores"].main(words) == 0
    said = capsys.readouterr()
    with_unknown, without = json.loads((tmp_path / "scores.json").read_text())["recipes"]
    assert [len(with_unknown["runs"]), len(without["runs"])] == [2, 1]
    assert "unknown" in with_unknown["plain"]["scores"]
    assert "unknown" not in without["plain"]["scores"]
    for recipe in (with_unknown, without):
        here = set(recipe["plain"]["scores"])
        assert here >= {"msp", "ebo", "gen", "knn", "fdbd", "react", "scale", "odin"}
        assert here <= {*SCORE_TABLE, "odin"} and here == set(recipe["jpeg"]["scores"])
    figure = with_unknown["jpeg"]["scores"]["ebo"]["far"]["fpr95_ood_pos"]
    each = [
        run["jpeg"]["scores"]["ebo"]["far"]["fpr95_ood_pos"]
        for run in with_unknown["runs"].values()
    ]
    assert figure["n"] == 2 and figure["mean"] == pytest.approx(sum(each) / 2)
    assert figure["sd"] == pytest.approx(abs(each[0] - each[1]) / 2**0.5)
    assert with_unknown["plain"]["scores"]["odin"] != with_unknown["jpeg"]["scores"]["odin"]
    for text in (said.out, (tmp_path / "scores.md").read_text()):
        assert "digits-cnn-rigl90-moon, 2 runs, in %" in text and "q75" in text
        assert "at most 40 images a set" in text

    assert "exporting" in said.err
    assert scripts["scores"].main(words) == 0
    again = capsys.readouterr()
    assert "exporting" not in again.err and "odin" not in again.err
    assert again.out == said.out


def test_odin_is_shown_the_images_as_they_are(scripts, runs, tmp_path):
    one = scripts["scores"].Run.at(str(runs[0]), tmp_path)
    sets = scripts["jobs"].TestSets(known=KNOWN, limit=None)
    checkpoint = Checkpoint.load(one.path)
    source = open_source(KNOWN + "[0:70]")
    pixels = np.stack([checkpoint.preprocess.pixels(source.item(i)) for i in range(70)])
    expected = odin(
        checkpoint.model(),
        torch.from_numpy(checkpoint.preprocess.normalise(pixels)),
        unknown_index=checkpoint.unknown_index,
        std=checkpoint.preprocess.std,
    )
    found = scripts["scores"]._odin(checkpoint, KNOWN + "[0:70]", sets)
    np.testing.assert_allclose(found.scores["odin"], expected, rtol=1e-9)


def test_a_score_that_a_run_lacks_is_told(scripts):
    here = scripts["spread"].summary([0.9])
    recipe = {"plain": {"scores": {"klm": {"near": {"auroc": here}}}}, "runs": {"a": {}, "b": {}}}
    cell = scripts["scores_view"]._cell
    assert cell(recipe, "plain", "klm", "near", "auroc") == "90.00 (n=1)"
    assert cell(recipe, "plain", "vim", "near", "auroc") == "-"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: [w[0], *w], "the same name"),
        (lambda w: w[: w.index("--near")], "no unknown images"),
        (lambda w: ["nowhere", *w[3:]], "nowhere"),
    ],
)
def test_wrong_arguments(scripts, runs, tmp_path, capsys, change, said):
    assert scripts["scores"].main(change(words_of(runs, tmp_path))) != 0
    assert said in capsys.readouterr().err
