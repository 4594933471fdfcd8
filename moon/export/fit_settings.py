"""Settings a score is fitted with, for a graph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from moon.errors import UsageError
from moon.scores import Training

__all__ = ["check_settings", "defaults"]

# In a file, a bank of all features would be larger than the model. k-center covers them with
# few; the fifth nearest of so few passes over lone outliers, which such a cover is full of.
_BANK, _BANK_K = 1000, 5


def check_settings(name: str, given: Mapping[str, Any]) -> None:
    """Refuse what cannot be meant, before any image is read.

    Raises:
        UsageError: such a setting of the score ``name``.
    """
    for option, value in given.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{name}.{option} must be a finite number, not {value}")
    if "progress" in given:
        raise UsageError(f"progress is no setting of the score {name}")
    if name == "knn" and given.get("bank") == "all" and "size" in given:
        raise UsageError(
            "a bank of all features has no size of its own",
            remedy="Leave knn.size out, or make knn.bank random or k-center",
        )


def defaults(name: str, training: Training, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for a graph, where a score's own would make it as large as the training set.

    Args:
        given: the settings that were asked for; the others follow them.
    """
    if training.features is None:
        return {}
    count = len(np.asarray(training.features))
    if name == "knn":
        part = "size" in given or count > _BANK
        how = given.get("bank", "k-center" if part else "all")
        if how == "all":
            return {"dtype": "float32", "bank": how}
        few = {"k": _BANK_K} if how == "k-center" else {}
        return {"dtype": "float32", "bank": how, "size": min(_BANK, count), **few}
    if name == "nnguide":
        return {"dtype": "float32", "alpha": min(0.01, _BANK / count)}
    return {}
