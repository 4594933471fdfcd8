"""Checks of a recipe's values, each one clear line."""

from __future__ import annotations

from collections.abc import Sequence

from moon.errors import RecipeError

# What float32 can hold with room for products; beyond it nothing is meant.
LARGEST = 1e30

__all__ = ["at_least", "one_of", "positive", "require", "share"]


def require(good: bool, cause: str, remedy: str) -> None:
    """RecipeError unless ``good``."""
    if not good:
        raise RecipeError(cause, remedy=remedy)


def one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    require(value in allowed, f"{key} is {value!r}", f"Give one of {', '.join(allowed)}")


def at_least(key: str, value: float, least: float) -> None:
    """A number no smaller than ``least``, and not absurdly large."""
    what = "a whole number" if isinstance(value, int) else "a number"
    above = f"and at most {LARGEST:g}" if value > LARGEST else ""
    good = least <= value <= LARGEST
    require(good, f"{key} is {value}", f"Give {what} of at least {least} {above}".rstrip())


def positive(key: str, value: float) -> None:
    """A number above zero, and not absurdly large."""
    above = f" and at most {LARGEST:g}" if value > LARGEST else ""
    require(0 < value <= LARGEST, f"{key} is {value}", f"Give a number above 0{above}")


def share(key: str, value: float) -> None:
    """A number of at least 0 and below 1."""
    require(0 <= value < 1, f"{key} is {value}", "Give a share of at least 0 and below 1")
