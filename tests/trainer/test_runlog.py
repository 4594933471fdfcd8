from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moon.errors import MoonError, TrainingError, UsageError
from moon.trainer.recipe import Recipe
from moon.trainer.runlog import RunFolder
from tests.trainer.recipes_small import tiny_recipe

CPU = torch.device("cpu")
RECIPE = tiny_recipe().resolved()


def test_a_new_run_holds_its_complete_recipe_and_log(tmp_path: Path) -> None:
    run = tmp_path / "deep" / "run"
    with RunFolder(run, RECIPE, resume=False) as folder:
        folder.log("hello")
        assert not RunFolder.check(run, RECIPE, resume=False)
        assert folder.load(CPU) is None
    text = (run / "recipe.toml").read_text()
    assert Recipe.from_toml(text) == RECIPE
    assert "warmup_epochs = 1" in text
    assert (run / "log.txt").read_text().endswith(" hello\n")


def test_state_and_metrics(tmp_path: Path) -> None:
    history = [{"epoch": 1, "p_unknown": None}, {"epoch": 2, "p_unknown": 0.5}]
    with RunFolder(tmp_path, RECIPE, resume=False) as folder:
        folder.save({"epoch": 2, "x": torch.arange(3)}, history)
        state = folder.load(CPU)
    assert state is not None
    assert state["epoch"] == 2
    assert state["history"] == history
    assert torch.equal(state["x"], torch.arange(3))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history


def test_a_run_is_only_continued_when_asked(tmp_path: Path) -> None:
    with RunFolder(tmp_path, RECIPE, resume=False) as folder:
        folder.save({"epoch": 1}, [])
    with pytest.raises(UsageError, match=r"already holds a run\. Go on with it by --resume"):
        RunFolder(tmp_path, RECIPE, resume=False)
    with RunFolder(tmp_path, RECIPE, resume=True):
        pass
    (tmp_path / "notes.txt").write_text("mine")
    with RunFolder(tmp_path, RECIPE, resume=True):
        pass


def test_another_recipe_is_refused_naming_the_difference(tmp_path: Path) -> None:
    with RunFolder(tmp_path, RECIPE, resume=False) as folder:
        folder.save({"epoch": 1}, [])
    with pytest.raises(UsageError, match=r"moon\.w_final is 1\.0 there and 3\.0 here"):
        RunFolder(tmp_path, tiny_recipe("moon.w_final=3").resolved(), resume=True)
    with RunFolder(tmp_path, tiny_recipe("name=renamed").resolved(), resume=True):
        pass


def test_a_run_without_a_whole_epoch_may_start_anew(tmp_path: Path) -> None:
    with RunFolder(tmp_path, RECIPE, resume=False):
        pass
    other = tiny_recipe("lr=0.01").resolved()
    with RunFolder(tmp_path, other, resume=False):
        pass
    assert Recipe.load(tmp_path / "recipe.toml") == other


def test_other_peoples_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    for resume in (False, True):
        with pytest.raises(UsageError, match=r"holds other files, such as thesis\.tex"):
            RunFolder(tmp_path, RECIPE, resume=resume)
    with pytest.raises(UsageError, match="is a file"):
        RunFolder(tmp_path / "thesis.tex", RECIPE, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_a_kill_leaves_behind_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("")
    (tmp_path / ".recipe.toml.12-ab.tmp").write_text("half")
    with RunFolder(tmp_path, RECIPE, resume=True):
        pass


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path, RECIPE, resume=False),
        pytest.raises(UsageError, match="another process is training in"),
    ):
        RunFolder(tmp_path, RECIPE, resume=True)
    with RunFolder(tmp_path, RECIPE, resume=True):
        pass


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    with RunFolder(tmp_path, RECIPE, resume=False) as folder:
        folder.save({"epoch": 1}, [])
        path = tmp_path / "last" / "state.pt"
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(TrainingError, match=r"cannot resume from .*state\.pt"):
            folder.load(CPU)


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MoonError, match="could not write"):
        RunFolder(tmp_path / "file" / "run", RECIPE, resume=False)
