"""``moon train`` and ``moon recipes``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moon.trainer.recipe import Recipe
from moon.trainer.recipes import RECIPES
from tests.cli.conftest import Moon

SMALL = ["digits-cnn-rigl90-moon", "--device", "cpu"]


def test_a_run_holds_what_was_promised(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert {"recipe.toml", "checkpoint.safetensors", "checkpoint.json"} <= names
    assert {"last", "metrics.jsonl", "log.txt"} <= names
    assert Recipe.load(run / "recipe.toml").epochs == 3


def test_settings_may_follow_one_set(moon: Moon, tmp_path: Path) -> None:
    words = ["--set", "epochs=1", "batch_size=64", "--set", "seed=7", "--out", tmp_path / "r"]
    result = moon("train", *SMALL, *words, "--json")
    assert result.code == 0
    assert result.json["kind"] == "run"
    assert result.json["recipe"]["batch_size"] == 64
    assert result.json["recipe"]["seed"] == 7
    weights, layers = result.json["weights"], result.json["layers"]
    assert weights == sum(layer["weights"] for layer in layers)
    assert result.json["nonzeros"] == pytest.approx(0.1 * weights, abs=len(layers))
    assert 0 <= result.json["metrics"]["accuracy"] <= 1
    assert "epoch 1/1: loss " in result.err


def test_an_existing_run_is_kept(moon: Moon, run: Path) -> None:
    before = (run / "checkpoint.json").read_bytes()
    result = moon("train", *SMALL, "--set", "epochs=3", "--out", run)
    assert result.code == 2
    assert "already holds a run. Go on with it by --resume" in result.error
    assert (run / "checkpoint.json").read_bytes() == before


def test_resuming_a_finished_run_says_so(moon: Moon, run: Path) -> None:
    result = moon("train", *SMALL, "--set", "epochs=3", "--out", run, "--resume")
    assert result.code == 0
    assert "was finished already" in result.err
    assert "moon export" in result.out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--set", "epoch=3"], "Did you mean epochs"),
        (["--set", "epochs"], "epochs"),
        (["--set", "sparsity=1.5"], "sparsity is 1.5"),
        (["--device", "tpu"], "there is no device 'tpu'"),
    ],
)
def test_wrong_settings(moon: Moon, tmp_path: Path, words: list[str], text: str) -> None:
    result = moon("train", SMALL[0], *words, "--out", tmp_path / "r")
    assert result.code == 2
    assert text in result.error


def test_recipes_as_json_are_complete(moon: Moon) -> None:
    found = moon("recipes", "--json").json["recipes"]
    assert [recipe["name"] for recipe in found] == list(RECIPES)
    assert Recipe.from_dict(found[0]) == RECIPES[found[0]["name"]]


def test_recipes_by_parts_of_their_names(moon: Moon) -> None:
    found = moon("recipes", "digits", "rigl90", "--json").json["recipes"]
    assert {recipe["name"] for recipe in found} >= {"digits-cnn-rigl90", "digits-cnn-rigl90-moon"}
    assert all("rigl90" in recipe["name"] for recipe in found)
    table = moon("recipes", "digits", "rigl90").out
    assert "digits-cnn-rigl90-moon-novt" in table
    assert "no voting" in table


def test_one_recipe_is_a_file_to_train_from(moon: Moon) -> None:
    text = moon("recipes", "cifar10-resnet18-rigl95-moon").out
    assert "sparsity = 0.95\n" in text
    assert Recipe.from_toml(text) == RECIPES["cifar10-resnet18-rigl95-moon"]


def test_the_list_names_every_family(moon: Moon) -> None:
    text = moon("recipes").out
    for stem in ("digits-cnn", "mnist-cnn", "cifar10-resnet18", "imagenet-resnet50"):
        assert stem in text
    assert json.dumps(len(RECIPES)) in text
