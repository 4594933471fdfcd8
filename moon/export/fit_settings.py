"""Which scores a graph is asked to carry, and the settings they are fitted with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moon.errors import UsageError
from moon.export.head import CARRIED
from moon.scores import SCORE_TABLE, Training

__all__ = ["asked_scores", "check_settings", "defaults"]

_ALL = "all"

# In a file, a bank of all features would be larger than the model. k-center covers them with
# few; the fifth nearest of so few passes over lone outliers, which such a cover is full of.
_BANK, _BANK_K = 1000, 5


def asked_scores(score: str, carry: Sequence[str]) -> tuple[str, ...]:
    """The scores that need fitting or are not carried anyway, of those asked for, in order.

    Args:
        score: the gate's.
        carry: others; "all" is every score a graph can compute.

    Raises:
        UsageError: a name that is no score, or a gate by "all".
    """
    names = {score, *carry}
    if score == _ALL:
        raise UsageError(
            "a gate compares one score, not all", remedy="Name one, and carry all beside it"
        )
    for name in sorted(names - {_ALL}):
        if name == "odin":
            raise UsageError(
                "the score odin needs a gradient, which no exported graph has",
                remedy="Compute it with moon.evaluation.odin, and gate by another score",
            )
        if name not in SCORE_TABLE:
            cause = f"no score is called {name}" if name.strip() else "the name of a score is empty"
            raise UsageError(cause, remedy=f"Choose one of {', '.join(SCORE_TABLE)}")
    every = _ALL in carry
    return tuple(
        name
        for name, entry in SCORE_TABLE.items()
        if name not in CARRIED and ((every and entry.in_graph) or name in names)
    )


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
