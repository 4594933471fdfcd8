"""A recipe that trains in a second: what the tests of whole runs share."""

from __future__ import annotations

from moon.data.preprocess import Preprocess
from moon.trainer.recipe import DataRecipe, MoonRecipe, Recipe, UpdateRecipe

GREY8 = Preprocess(crop=(8, 8), mean=(0.3,), std=(0.4,))


def tiny_recipe(*settings: str) -> Recipe:
    """Digits 0 to 3, 6 epochs of 6 steps: warm-up in the first, votes in the last two."""
    recipe = Recipe(
        name="tiny",
        model="cnn",
        rule="rigl",
        sparsity=0.8,
        epochs=6,
        batch_size=32,
        lr=0.05,
        schedule="moon",
        data=DataRecipe(
            train="sklearn:digits#train{label in 0..3}[0:200]",
            val=20,
            preprocess=GREY8,
            augment="crop-flip",
        ),
        update=UpdateRecipe(interval=4, stop=0.6),
        moon=MoonRecipe(enabled=True, warmup_epochs=1, vote_epochs=2),
    )
    return recipe.override(settings)
