"""The learning rate at each optimizer step."""

from __future__ import annotations

import math

from moon.trainer.recipe import Recipe

__all__ = ["learning_rate"]

COSINE_END = 1e-6
MOON_START = 1.2
MOON_END = 0.08


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The rate of optimizer step ``step`` (from 0): it moves with every step, not every epoch.

    ``cosine`` goes from ``lr`` to 1e-6 over all epochs. ``moon`` goes from 1.2 to 0.08 times
    ``lr`` over the epochs before the vote and stays there while the weights are averaged
    (Lei et al., section on training settings).
    """
    if recipe.schedule == "cosine":
        return _cosine(recipe.lr, COSINE_END, step / (recipe.epochs * steps_per_epoch))
    moving = (recipe.epochs - recipe.plateau_epochs) * steps_per_epoch
    return _cosine(MOON_START * recipe.lr, MOON_END * recipe.lr, min(1.0, step / moving))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))
