"""Checks of a recipe's values, each one clear line."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moon.errors import RecipeError

__all__ = ["at_least", "one_of", "positive", "require", "share"]


def require(good: bool, cause: str, remedy: str) -> None:
    """RecipeError unless ``good``."""
    if not good:
        raise RecipeError(cause, remedy=remedy)


def one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    require(value in allowed, f"{key} is {value!r}", f"Give one of {', '.join(allowed)}")


def at_least(key: str, value: float, least: float) -> None:
    """A finite number no smaller than ``least``."""
    what = "a whole number" if isinstance(value, int) else "a number"
    good = math.isfinite(value) and value >= least
    require(good, f"{key} is {value}", f"Give {what} of at least {least}")


def positive(key: str, value: float) -> None:
    """A finite number above zero."""
    require(math.isfinite(value) and value > 0, f"{key} is {value}", "Give a number above 0")


def share(key: str, value: float) -> None:
    """A number of at least 0 and below 1."""
    require(0 <= value < 1, f"{key} is {value}", "Give a share of at least 0 and below 1")
