from __future__ import annotations

import re
from pathlib import Path

import pytest

from moon.errors import RecipeError
from moon.trainer.recipe import Recipe
from moon.trainer.recipes import RECIPES, SPARSITIES, find_recipe
from tests.trainer.recipes_small import tiny_recipe

NAME = re.compile(
    r"(digits|mnist|fashionmnist|cifar10|cifar100|imagenet)"
    r"-(cnn|resnet18|resnet50|wrn28-10)"
    r"-(dense|(?:static|set|rigl|gmp)\d\d)"
    r"(-moon|-moon-nolm|-moon-noat|-moon-novt|-moon-official|-moon-logitnorm"
    r"|-dac|-logitnorm|-vos|-mixup|-cigl|-ts)?"
)


def test_names_say_what_is_in_them() -> None:
    for name, recipe in RECIPES.items():
        match = NAME.fullmatch(name)
        assert match is not None, name
        assert recipe.name == name
        assert recipe.model == match[2]
        assert f"{recipe.rule}{round(100 * recipe.sparsity) or ''}" == match[3]
        variant = match[4] or ""
        assert recipe.moon.enabled is variant.startswith("-moon")
        assert recipe.schedule == ("moon" if recipe.moon.enabled or recipe.cigl else "cosine")
        assert recipe.dense == (("stem",) if recipe.sparsity == 0.99 else ())
        for method in ("dac", "logitnorm", "vos", "mixup", "cigl"):
            assert (getattr(recipe, method) is not None) is variant.endswith(f"-{method}")
        assert recipe.temperature is (variant == "-ts")
        assert recipe.compat == (("official",) if variant == "-moon-official" else ())
        switches = (recipe.moon.loss, recipe.moon.auto, recipe.moon.vote)
        off = {"-moon-nolm": 0, "-moon-noat": 1, "-moon-novt": 2}.get(variant)
        assert [i for i, on in enumerate(switches) if not on] == ([] if off is None else [off])


def test_every_recipe_survives_its_own_toml() -> None:
    for recipe in RECIPES.values():
        assert Recipe.from_toml(recipe.to_toml()) == recipe


def test_the_paper_settings() -> None:
    recipe = find_recipe("cifar10-resnet18-rigl95-moon")
    assert (recipe.epochs, recipe.batch_size, recipe.lr) == (100, 128, 0.1)
    assert (recipe.momentum, recipe.nesterov, recipe.weight_decay) == (0.9, True, 5e-4)
    assert (recipe.warmup_epochs, recipe.vote_epochs, recipe.moon.init_factor) == (5, 20, 64)
    assert (recipe.update.interval, recipe.update.drop_fraction, recipe.update.stop) == (
        100, 0.3, 0.7,
    )  # fmt: skip
    assert recipe.distribution == "erk"
    official = find_recipe("cifar10-resnet18-rigl95-moon-official")
    assert official.update.interval == 80
    assert recipe.data.augment == "crop-flip"
    w_final = {"mnist": 0.01, "cifar10": 1.0, "cifar100": 2.0}
    for data, w in w_final.items():
        assert find_recipe(f"{data}-resnet18-rigl90-moon").moon.w_final == w
    imagenet = find_recipe("imagenet-resnet50-set90-moon")
    assert (imagenet.moon.w_final, imagenet.batch_size) == (0.001, 32)
    assert imagenet.data.augment == "resized-crop"
    assert imagenet.data.preprocess.crop == (224, 224)
    mnist = find_recipe("mnist-resnet18-rigl95")
    assert (mnist.data.preprocess.crop, mnist.data.preprocess.channels) == ((32, 32), 3)


def test_all_sparsities_and_rules_are_there() -> None:
    for rule in ("static", "set", "rigl", "gmp"):
        for percent in SPARSITIES:
            for tail in ("", "-moon", "-moon-nolm", "-cigl", "-ts", "-dac", "-vos"):
                assert f"cifar10-resnet18-{rule}{percent}{tail}" in RECIPES
    assert "cifar10-resnet18-dense-mixup" in RECIPES
    assert "cifar10-resnet18-rigl95-moon-official" in RECIPES
    # Connections drawn one by one, and pruning from all of them, do not go together.
    assert "cifar10-resnet18-gmp95-moon-official" not in RECIPES
    assert "cifar10-resnet18-dense-cigl" not in RECIPES
    assert "cifar10-resnet18-dense" in RECIPES
    assert "digits-cnn-rigl90-moon" in RECIPES


def test_find_recipe(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(tiny_recipe().to_toml())
    assert find_recipe(str(path)) == tiny_recipe()
    with pytest.raises(RecipeError, match="Did you mean cifar10-resnet18-rigl95-moon"):
        find_recipe("cifar10-resnet-rigl95-moon")
    with pytest.raises(RecipeError, match="there is no recipe file"):
        find_recipe("missing.toml")
