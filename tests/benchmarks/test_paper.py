"""benchmarks/paper.py: the tables are what they say, and runs are trained, kept and measured."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moon.evaluation.evaluate import evaluate
from moon.export.to_bundle import to_bundle
from moon.trainer.checkpoint import Checkpoint

DIGITS = ["--table", "digits", "--rows", "MOON + RigL", "--epochs", "2", "--device", "cpu",
          "--seeds", "0"]  # fmt: skip


@pytest.fixture
def paper(scripts):
    return scripts["paper"]


def table(out):
    return json.loads((out / "table-digits.json").read_text())


def test_every_row_of_every_table_is_a_recipe(scripts):
    protocols = scripts["image_sets"].PROTOCOLS
    for table in scripts["paper_tables"].TABLES.values():
        assert table.data in protocols
        recipes = [row.recipe(f"{table.data}-{table.model}", [], None) for row in table.rows]
        assert len({recipe.hash for recipe in recipes}) == len(recipes)
        assert len({recipe.name for recipe in recipes}) == len(recipes)


def test_every_set_of_every_protocol_is_known(scripts):
    sets = scripts["image_sets"]
    for protocol in sets.PROTOCOLS.values():
        for name in (f"{protocol.known}-train", protocol.known, *protocol.near, *protocol.far):
            assert name in sets.SETS


def test_the_papers_figures(scripts):
    rows = {row.label: row.paper for row in scripts["paper_tables"].TABLES["1"].rows}
    assert rows["RigL 95%"] == {"near": 86.67, "far": 88.19}
    assert rows["MOON + RigL 99%"] == {"near": 84.43, "far": 87.70}
    for name, one in scripts["paper_tables"].TABLES.items():
        assert one.numbered == name.isdecimal() == any(row.paper for row in one.rows)


def test_a_setting_equal_to_the_recipes_own_is_the_same_run(scripts):
    votes = scripts["paper_tables"].TABLES["votes"].rows
    names = [row.recipe("cifar10-resnet18", [], None).name for row in votes]
    assert names[-1] == "cifar10-resnet18-rigl95-moon"
    assert names[0] == "cifar10-resnet18-rigl95-moon_vote_epochs-2"


def test_epochs_of_a_hundred_follow_the_length(scripts):
    rows = scripts["paper_tables"].TABLES["votes"].rows
    found = [row.recipe("cifar10-resnet18", [], 50).vote_epochs for row in rows]
    assert found == [1, 2, 5, 10]


def test_a_run_is_trained_once_measured_and_shown(paper, in_process, tmp_path, capsys):
    words = [*DIGITS, "--out", str(tmp_path)]
    assert paper.main(words) == 0
    said = capsys.readouterr().out
    assert "MOON + RigL 90%" in said and "near: mean over digits-8-9 (1 of 1 sets)" in said
    (row,) = table(tmp_path)["rows"]
    assert row["figures"]["accuracy"]["n"] == 1
    assert row["figures"]["accuracy"]["mean"] > 0.5
    assert "| MOON + RigL 90% | 1 |" in (tmp_path / "table-digits.md").read_text()
    kept = tmp_path / "digits-cnn-rigl90-moon-seed0"
    before = {path: path.stat().st_mtime_ns for path in kept.rglob("*") if path.is_file()}
    assert paper.main(words) == 0
    after = {path: path.stat().st_mtime_ns for path in kept.rglob("*") if path.is_file()}
    assert before == after


@pytest.mark.slow
def test_figures_are_those_of_the_exported_bundle(paper, in_process, tmp_path):
    assert paper.main([*DIGITS, "--out", str(tmp_path / "out")]) == 0
    (row,) = table(tmp_path / "out")["rows"]
    run = tmp_path / "out" / "digits-cnn-rigl90-moon-seed0" / "run"
    bundle = to_bundle(Checkpoint.load(run), tmp_path / "bundle")
    report = evaluate(
        bundle,
        id="sklearn:digits#test{label in 0..7}",
        near={"digits-8-9": "sklearn:digits#test{label in 8..9}"},
        far={"photos": "sklearn:photos"},
        resamples=0,
    ).to_json()
    assert row["figures"]["accuracy"]["mean"] == report["id"]["accuracy"]
    assert row["figures"]["ece"]["mean"] == pytest.approx(report["id"]["ece"], abs=1e-5)
    for score, groups in row["figures"]["scores"].items():
        for group in ("near", "far"):
            expected = report["scores"][score][group]["auroc"]
            assert groups[group]["mean"] == pytest.approx(expected, abs=1e-5)


def test_train_here_measure_there(paper, in_process, tmp_path, capsys):
    train, measured = tmp_path / "train", tmp_path / "measured"
    assert paper.main([*DIGITS, "--out", str(train), "--train-only"]) == 0
    packed = train / "checkpoints" / "digits-cnn-rigl90-moon-seed0.moonckpt"
    run = train / "digits-cnn-rigl90-moon-seed0" / "run" / "checkpoint.safetensors"
    assert packed.stat().st_size < 0.35 * run.stat().st_size
    assert not (train / "table-digits.json").exists()
    words = [*DIGITS, "--evaluate-only", "--checkpoints", str(packed.parent)]
    assert paper.main([*words, "--out", str(measured)]) == 0
    assert paper.main([*DIGITS, "--out", str(train)]) == 0
    assert table(measured)["rows"][0]["figures"] == table(train)["rows"][0]["figures"]
    # Of another recipe: refused, by name, and the table says what is not there.
    capsys.readouterr()
    other = [word if word != "2" else "3" for word in words]
    assert paper.main([*other, "--out", str(tmp_path / "other")]) == 1
    said = capsys.readouterr()
    assert "was trained by another recipe: epochs = 2 there, epochs = 3 here" in said.err
    assert "1 of 1 runs are not there yet" in said.out


def test_different_recipes_with_the_same_figures_are_called_out(scripts):
    view, rows = scripts["paper_view"], scripts["paper_tables"].TABLES["parts"].rows
    one, same, other = (scripts["spread"].figures([result(a)]) for a in (0.8, 0.8, 0.9))
    lines = [view.Line(row=row, recipe=None) for row in rows[:3]]
    (said,) = view._alike(lines, [one, same, other])
    assert "WARNING: RigL 95%, MOON + RigL 95% have identical figures" in said
    assert not view._alike(lines, [one, other, scripts["spread"].figures([])])


def test_rows_that_come_to_one_recipe_are_one_run(scripts):
    view, rows = scripts["paper_view"], scripts["paper_tables"].TABLES["warmup"].rows
    lines = [view.Line(row=row, recipe=row.recipe("cifar10-cnn", [], 20)) for row in rows]
    same = scripts["spread"].figures([result(0.8)])
    assert view._alike(lines, [same] * 4) == []
    assert view._same(lines) == [
        "T_e = 1, T_e = 2, T_e = 3, T_e = 5: one recipe, and one run, at this number of epochs"
    ]
    lines = [view.Line(row=row, recipe=row.recipe("cifar10-cnn", [], 100)) for row in rows]
    assert view._same(lines) == []
    assert len(view._alike(lines, [same] * 4)) == 1


def test_training_images_of_ones_own_are_trained_on(paper, in_process, tmp_path, capsys):
    source = "sklearn:digits#train{label in 0..7}[0:300]"
    own = ["--set", f"data.train={source}", "--set", "data.val=60"]
    words = [*DIGITS, "--out", str(tmp_path)]
    assert paper.main([*words, *own]) == 0
    run = tmp_path / "digits-cnn-rigl90-moon-seed0" / "run"
    assert Checkpoint.load(run).recipe.data.train == source
    assert "trained on 240 images" in capsys.readouterr().out
    # The same options but for the images: not what was asked for, so not reused.
    assert paper.main([*words, "--set", "data.val=60"]) == 1
    assert "was begun with other training images" in capsys.readouterr().err


def result(accuracy):
    return {"id": {"accuracy": accuracy, "ece": 0.1}, "scores": {}}


def test_nothing_is_run_to_show(paper, in_process, tmp_path, capsys):
    assert paper.main([*DIGITS, "--out", str(tmp_path), "--show"]) == 0
    assert "1 of 1 runs are not there yet" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"table-digits.json", "table-digits.md"}


def test_a_packed_set_under_data_is_found_and_the_others_are_named(paper, tmp_path, capsys):
    np.savez(tmp_path / "cifar10.npz", train_images=np.zeros((1, 32, 32, 3), np.uint8))
    assert paper.main(["--table", "1", "--list", "--data", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "far: Places365 not found: no places365_test.npz or places365 in" in said
    assert "CIFAR-10 not found" not in said
    assert paper.main(["--table", "1", "--list"]) == 0
    said = capsys.readouterr().out
    assert "CIFAR-10 not found: no --data DIR; give --source cifar10-train=SOURCE" in said


def test_rows_without_their_data_are_not_run(paper, in_process, tmp_path, capsys):
    assert paper.main(["--table", "imagenet", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "MOON + RigL 90%: ImageNet not found" in said.err
    assert said.out.count("not run: ImageNet not found") == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which table?"),
        (["--table", "wfinal"], "Did you mean w-final?"),
        (["--table", "1", "--seeds", "0,0"], "--seeds '0,0' is no list"),
        (["--table", "1", "--rows", "nope"], "no row matches 'nope'"),
        (["--table", "1", "--source", "nope=x"], "'nope', which is no set"),
        (["--table", "1", "--data", "nowhere"], "--data nowhere is no folder"),
        (["--table", "digits", "--jobs", "0"], "--jobs must be at least 1"),
        (["--table", "digits", "--limit", "0"], "--limit must be at least 1"),
        (["--table", "digits", "--jpeg", "200"], "--jpeg must be a quality from 1 to 100"),
    ],
)
def test_misuse_is_one_line(paper, tmp_path, capsys, words, message):
    assert paper.main([*words, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
