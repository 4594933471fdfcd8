"""What happens to each predicted class: how often it is abstained from, and how often right."""

from __future__ import annotations

from typing import Any

import numpy as np

from moon.evaluation.measure import GROUPS, Groups
from moon.evaluation.metrics import Floats, Ints
from moon.evaluation.observe import Observed

__all__ = ["class_figures"]


def class_figures(
    names: tuple[str, ...],
    known: Observed,
    groups: Groups,
    labels: Ints | None,
    *,
    gated: bool,
) -> list[dict[str, Any]]:
    """By predicted class, the only class known of an image at run time.

    Returns:
        An entry a class: ``name``, ``n`` known images it was predicted for, ``abstain`` the
        share of them rejected, ``right`` the share of the accepted that bear the label, and
        ``near`` and ``far``: the number of unknown images accepted as this class. None where
        there is nothing to count.
    """
    size = len(names)
    n = np.bincount(known.predicted, minlength=size)
    kept = np.bincount(known.predicted[known.accepted], minlength=size)
    right = judged = np.zeros(size, np.int64)
    if labels is not None:
        has = known.accepted & (labels >= 0)
        judged = np.bincount(known.predicted[has], minlength=size)
        right = np.bincount(known.predicted[has & (known.predicted == labels)], minlength=size)
    taken = {group: _accepted(groups, group, size) for group in GROUPS}
    return [
        {
            "name": name,
            "n": int(n[i]),
            "abstain": _rate(n[i] - kept[i], n[i]) if gated else None,
            "right": _rate(right[i], judged[i]) if gated else None,
            **{
                group: int(counts[i]) if gated and groups[group] else None
                for group, counts in taken.items()
            },
        }
        for i, name in enumerate(names)
    ]


def _accepted(groups: Groups, group: str, size: int) -> Ints:
    counts = np.zeros(size, np.int64)
    for seen in groups[group].values():
        counts += np.bincount(seen.predicted[seen.accepted], minlength=size)
    return counts


def _rate(part: Floats, whole: Floats) -> float | None:
    return float(part / whole) if whole else None
