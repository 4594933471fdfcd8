"""Training of sparse classifiers with an unknown class; needs torch.

For one's own loop: ``Sparsifier``, ``UnknownAwareLoss``, ``Votes``. For a whole run from a
recipe: ``Recipe`` and ``moon.fit``. Names are loaded when first used, so that recipes can
be read where torch is not installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from moon.errors import MissingExtraError

if TYPE_CHECKING:
    from moon.trainer.accounting.accounts import Accounts, account
    from moon.trainer.accounting.flops import LayerCost, count_flops, training_flops
    from moon.trainer.checkpoint import Checkpoint
    from moon.trainer.objective.loss import AutoWeight, UnknownAwareLoss
    from moon.trainer.recipe import Recipe
    from moon.trainer.sparsity.sparsifier import Sparsifier
    from moon.trainer.voting import Votes, recompute_batch_norm

__all__ = [
    "Accounts",
    "AutoWeight",
    "Checkpoint",
    "LayerCost",
    "Recipe",
    "Sparsifier",
    "UnknownAwareLoss",
    "Votes",
    "account",
    "count_flops",
    "recompute_batch_norm",
    "training_flops",
]

_HOMES = {
    "Accounts": "accounting.accounts",
    "AutoWeight": "objective.loss",
    "Checkpoint": "checkpoint",
    "LayerCost": "accounting.costs",
    "Recipe": "recipe",
    "Sparsifier": "sparsity.sparsifier",
    "UnknownAwareLoss": "objective.loss",
    "Votes": "voting",
    "account": "accounting.accounts",
    "count_flops": "accounting.flops",
    "recompute_batch_norm": "voting",
    "training_flops": "accounting.costs",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        home = import_module(f"{__name__}.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "torchvision", "safetensors"):
            raise
        raise MissingExtraError(error.name, "train", f"moon.trainer.{name}") from error
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
