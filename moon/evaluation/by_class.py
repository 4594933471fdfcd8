"""A gate by predicted class, judged as it promises: each class by its own known images.

A class's threshold is the k-th smallest of n calibration scores, so its true reject rate is
Beta(k, n + 1 - k), and of m new known images predicted as it as many are rejected as a
beta-binomial draw says; ties only lower that. The chance of at least as many as were is exact for
both kinds of luck, that of the calibration and that of the images here. Among K classes one is
unlucky by chance alone, so the chances are adjusted by Holm ("A Simple Sequentially Rejective
Multiple Test Procedure", Scandinavian Journal of Statistics 6, 1979): with probability 95% no
class whose promise holds is said to break it, however many there are.

Classes that share a threshold were promised something together, and are judged together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moon.evaluation.metrics import Floats, rate_ci
from moon.evaluation.observe import Observed
from moon.evaluation.words import asked, percent
from moon.gate import Gate

__all__ = ["beyond_chance", "by_class_figures", "chance_of_as_many", "holm", "judged_by_class"]

Figures = Mapping[str, Any]
_LEVEL = 0.05


def by_class_figures(gate: Gate, known: Observed) -> list[dict[str, Any]] | None:
    """What every threshold of a gate by class does here; None for a gate with one for all.

    Returns:
        An entry a threshold: ``classes`` it is of, ``threshold``, ``n`` known images predicted as
        one of them, ``reject`` the share of those rejected and its ``reject_ci95`` (Wilson's),
        ``chance`` of at least as many if the promise holds, ``chance_holm`` after Holm's
        adjustment over all thresholds. None where no image was predicted so.
    """
    parts = gate.per_class
    if parts is None:
        return None
    position = {name: i for i, name in enumerate(parts.classes)}
    groups = [([name], found) for name, found in parts.own.items()]
    if parts.pool is not None:
        groups.append((list(parts.pooled), parts.pool))
    size = len(parts.classes)
    here = np.bincount(known.predicted, minlength=size)
    lost = here - np.bincount(known.predicted[known.accepted], minlength=size)
    figures: list[dict[str, Any]] = []
    for names, found in groups:
        rows = [position[name] for name in names]
        m, rejected = int(here[rows].sum()), int(lost[rows].sum())
        assert found.k is not None  # as checked when the gate was read
        figures.append(
            {
                "classes": names,
                "threshold": found.value,
                "n": m,
                "reject": rejected / m if m else None,
                "reject_ci95": list(rate_ci(rejected, m)) if m else None,
                "chance": chance_of_as_many(rejected, m, found.k, found.n) if m else None,
                "chance_holm": None,
            }
        )
    seen = [one for one in figures if one["n"]]
    for one, adjusted in zip(seen, holm([one["chance"] for one in seen]), strict=True):
        one["chance_holm"] = adjusted
    return figures


def chance_of_as_many(rejected: int, m: int, k: int, n: int) -> float:
    """P(X >= rejected), X beta-binomial of m trials at Beta(k, n + 1 - k).

    By the ratios of neighbouring terms, so that no term of millions of trials overflows.
    """
    if rejected <= 0:
        return 1.0
    i = np.arange(1, m + 1)
    ratios = np.log(m - i + 1) - np.log(i) + np.log(k + i - 1) - np.log(n - k + 1 + m - i)
    logs = np.concatenate([[0.0], np.cumsum(ratios)])
    terms = np.exp(logs - logs.max())
    return float(terms[rejected:].sum() / terms.sum())


def holm(chances: Sequence[float]) -> list[float]:
    """Each of the chances times how many are no smaller, never below a smaller one's; at most 1."""
    count = len(chances)
    order = np.argsort(chances, kind="stable")
    raised: Floats = np.asarray(chances, np.float64)[order] * (count - np.arange(count))
    adjusted = np.empty(count)
    adjusted[order] = np.minimum(np.maximum.accumulate(raised), 1.0) if count else raised
    return [float(value) for value in adjusted]


def beyond_chance(by_class: Sequence[Figures], limit: float) -> list[Figures]:
    """The thresholds that reject more than was promised and chance allows, the surest first."""
    broken = [
        one for one in by_class if one["n"] and one["reject"] > limit and
        one["chance_holm"] <= _LEVEL
    ]  # fmt: skip
    return sorted(broken, key=lambda one: (one["chance"], -one["reject"]))


def judged_by_class(by_class: Sequence[Figures], limit: float, overall: float) -> tuple[str, str]:
    """State (good, fair, bad, none) and sentence on whether each class gets what was promised.

    Args:
        by_class: of ``by_class_figures``.
        limit: the share of rejected known images that was promised of each class.
        overall: the share of all known images rejected here.
    """
    checked = [one for one in by_class if one["n"]]
    over = [one for one in checked if one["reject"] > limit]
    broken = beyond_chance(by_class, limit)
    few = [one for one in checked if one["n"] * limit < 1]
    promised = f"at most {asked(limit)} rejected was promised of each"
    count = _counted(checked)
    if broken:
        return "bad", (
            f"The promise does not hold on this data for {_classes(broken)} of {count}: "
            f"{promised}; worst is {_worst(broken)}. {_tests(checked)}"
        )
    if len(few) == len(checked):
        return "none", (
            f"There are too few known images of each of {count} to check what was promised, at "
            f"most {asked(limit)} of those predicted as it rejected."
        )
    unsure = f" Of {_classes(few)} there are too few images here to tell." if few else ""
    if over:
        return "fair", (
            f"The promise is not contradicted for any of {count}: {promised}, "
            f"exceeded for {_classes(over)}, most for {_worst(over)}, but chance allows as much. "
            f"{_tests(checked)}{unsure}"
        )
    return "good", (
        f"The promise holds here for each of {count}: {promised}; the most rejected is "
        f"{_worst(checked)}, and of all {percent(overall)}.{unsure}"
    )


def _tests(checked: Sequence[Figures]) -> str:
    over = f", by Holm over all {len(checked)} thresholds" if len(checked) > 1 else ""
    return f"(Beta-binomial tests at 5%{over}.)"


def _classes(groups: Sequence[Figures]) -> int:
    return sum(len(one["classes"]) for one in groups)


def _counted(groups: Sequence[Figures]) -> str:
    count, shared = _classes(groups), max((len(one["classes"]) for one in groups), default=1)
    together = f" ({shared} share a threshold)" if shared > 1 else ""
    return f"{count} predicted class{'' if count == 1 else 'es'}{together}"


def _worst(groups: Sequence[Figures]) -> str:
    """The most rejected class: its name, its share and of how many."""
    worst = max(groups, key=lambda one: float(one["reject"]))
    names = ", ".join(worst["classes"][:3]) + (", ..." if len(worst["classes"]) > 3 else "")
    what = "class" if len(worst["classes"]) == 1 else "classes"
    return f"the {what} {names} ({percent(worst['reject'])} of {worst['n']:,} images)"
