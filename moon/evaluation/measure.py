"""From what was observed to the figures of report.json. Rates are in [0, 1], None where unknown.

The mean of a group (near or far) is the unweighted mean over its sets, which are never pooled,
so that a large set does not drown a small one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from moon.bundle import Bundle
from moon.evaluation.by_class import by_class_figures
from moon.evaluation.intervals import (
    auroc_ci,
    fpr95_ci,
    mean_auroc_ci,
    mean_fpr95_ci,
    mean_rate_ci,
)
from moon.evaluation.metrics import OOD_METRICS, Floats, Ints, RocCurve, rate_ci
from moon.evaluation.observe import Observed
from moon.evaluation.reliability import accuracy, aurc, reliability, risk_coverage
from moon.gate import Gate

__all__ = ["GROUPS", "Groups", "gate_figures", "id_figures", "model_figures", "score_figures"]

GROUPS = ("near", "far")
_INTERVALS = ("auroc_ci95", "fpr95_id_pos_ci95", "fpr95_ood_pos_ci95")
Groups = Mapping[str, Mapping[str, Observed]]


def id_figures(known: Observed, labels: Ints | None) -> dict[str, Any]:
    """n, accuracy and ECE over the items with a label; both None without labels."""
    if labels is None:
        return {"n": len(known), "labelled": 0, "accuracy": None, "accuracy_ci95": None,
                "ece": None}  # fmt: skip
    has = labels >= 0
    correct = known.predicted[has] == labels[has]
    return {
        "n": len(known),
        "labelled": int(has.sum()),
        "accuracy": accuracy(known.predicted[has], labels[has]),
        "accuracy_ci95": list(rate_ci(int(correct.sum()), len(correct))),
        "ece": reliability(known.confidence[has], correct).ece,
    }


def score_figures(
    name: str, known: Observed, groups: Groups, labels: Ints | None, resamples: int
) -> dict[str, Any]:
    """Every metric of one score, over each set and each group; and its AURC."""
    figures: dict[str, Any] = {}
    for group in GROUPS:
        sets = {
            set_name: _set_figures(known.scores[name], seen.scores[name], resamples)
            for set_name, seen in groups[group].items()
        }
        means = _mean_figures(sets, known.scores[name], groups[group], name, resamples)
        figures[group] = {**means, "sets": sets} if sets else None
    figures["aurc"] = None
    if labels is not None:
        has = labels >= 0
        figures["aurc"] = aurc(known.scores[name][has], known.predicted[has] == labels[has])
    return figures


def gate_figures(
    gate: Gate | None, known: Observed, groups: Groups, labels: Ints | None
) -> dict[str, Any] | None:
    """The gate without its stored scores, and what it accepts and rejects; None without one."""
    if gate is None:
        return None
    figures: dict[str, Any] = {**gate.to_json(stored=False), "id": _accepted_figures(known, labels)}
    figures["by_class"] = by_class_figures(gate, known)
    for group in GROUPS:
        sets = {}
        for set_name, seen in groups[group].items():
            caught = int(np.sum(~seen.accepted))
            sets[set_name] = {
                "n": len(seen),
                "reject": caught / len(seen),
                "reject_ci95": list(rate_ci(caught, len(seen))),
            }
        figures[group] = {**_mean_reject(sets), "sets": sets} if sets else None
    return figures


def model_figures(bundle: Bundle) -> dict[str, Any]:
    """Sizes of the model; FLOPs count a multiply-add as 2, for one image, and only nonzeros."""
    manifest = bundle.manifest
    layers = list(manifest.sparsity.layers.values())
    dense = [layer.flops for layer in layers if layer.flops is not None]
    complete = bool(layers) and len(dense) == len(layers)
    return {
        "name": manifest.name,
        "path": str(bundle.path),
        "version": manifest.version,
        "classes": len(manifest.classes),
        "unknown_class": manifest.unknown_index is not None,
        "sparsity": manifest.sparsity.share,
        "pattern": manifest.sparsity.pattern,
        "nonzeros": sum(layer.nonzeros for layer in layers),
        "weights": sum(math.prod(layer.shape) for layer in layers),
        "flops": round(sum((layer.flops or 0) * layer.density for layer in layers))
        if complete
        else None,
        "flops_dense": sum(dense) if complete else None,
        "bytes": manifest.files["model.onnx"].size,
    }


def plot_figures(
    known: Observed, groups: Groups, labels: Ints | None, thresholds: Mapping[str, float]
) -> dict[str, Any]:
    """Points for the plots, thinned, so that a report.json can be drawn again.

    Args:
        thresholds: of the gate's score, to keep it within the histogram.
    """
    plots: dict[str, Any] = {"reliability": None, "scores": {}}
    right = None
    if labels is not None:
        has = labels >= 0
        right = known.predicted[has] == labels[has]
        bins = reliability(known.confidence[has], right)
        plots["reliability"] = {
            "edges": bins.edges.tolist(),
            "counts": bins.counts.tolist(),
            "confidence": _plain(bins.confidence),
            "accuracy": _plain(bins.accuracy),
        }
    for name, values in known.scores.items():
        sets = {g: {s: seen.scores[name] for s, seen in groups[g].items()} for g in GROUPS}
        entry: dict[str, Any] = {
            "roc": {
                g: {s: RocCurve.of(values, v).points() for s, v in sets[g].items()} for g in GROUPS
            },
            "histogram": _histogram(values, sets, thresholds.get(name)),
            "risk_coverage": None,
        }
        if right is not None and labels is not None:
            coverage, risk = risk_coverage(values[labels >= 0], right)
            chosen = np.unique(np.linspace(0, len(coverage) - 1, 200).round().astype(int))
            entry["risk_coverage"] = [
                [round(float(coverage[i]), 6), round(float(risk[i]), 6)] for i in chosen
            ]
        plots["scores"][name] = entry
    return plots


def _set_figures(id_scores: Floats, ood_scores: Floats, resamples: int) -> dict[str, Any]:
    curve = RocCurve.of(id_scores, ood_scores)
    figures: dict[str, Any] = {"n": len(ood_scores), **curve.metrics()}
    if not resamples:
        return {**figures, **dict.fromkeys(_INTERVALS)}
    found = (auroc_ci(curve), *fpr95_ci(id_scores, ood_scores, resamples=resamples))
    return {**figures, **{name: list(ci) for name, ci in zip(_INTERVALS, found, strict=True)}}


def _mean_figures(
    sets: Mapping[str, Mapping[str, Any]],
    id_scores: Floats,
    members: Mapping[str, Observed],
    score: str,
    resamples: int,
) -> dict[str, Any]:
    """The means of a group of sets, with intervals that know of the ID images they share."""
    if not sets:
        return {}
    means: dict[str, Any] = _means(sets, OOD_METRICS)
    if not resamples:
        return {**means, **dict.fromkeys(_INTERVALS)}
    if len(sets) == 1:
        (only,) = sets.values()
        return {**means, **{name: only[name] for name in _INTERVALS}}
    ood = [seen.scores[score] for seen in members.values()]
    found = (mean_auroc_ci(id_scores, ood), *mean_fpr95_ci(id_scores, ood, resamples=resamples))
    return {**means, **{name: list(ci) for name, ci in zip(_INTERVALS, found, strict=True)}}


def _mean_reject(sets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    if not sets:
        return {}
    rates = [figures["reject"] for figures in sets.values()]
    low, high = mean_rate_ci(rates, [figures["reject_ci95"] for figures in sets.values()])
    return {"reject": float(np.mean(rates)), "reject_ci95": [low, high]}


def _accepted_figures(known: Observed, labels: Ints | None) -> dict[str, Any]:
    kept = int(known.accepted.sum())
    figures: dict[str, Any] = {
        "n": len(known),
        "accept": kept / len(known),
        "accept_ci95": list(rate_ci(kept, len(known))),
        "accuracy": None,
        "accuracy_ci95": None,
    }
    if labels is not None:
        judged = known.accepted & (labels >= 0)
        correct = int(np.sum(known.predicted[judged] == labels[judged]))
        if judged.any():
            figures["accuracy"] = correct / int(judged.sum())
            figures["accuracy_ci95"] = list(rate_ci(correct, int(judged.sum())))
    return figures


def _means(sets: Mapping[str, Mapping[str, Any]], names: tuple[str, ...]) -> dict[str, float]:
    return {name: float(np.mean([figures[name] for figures in sets.values()])) for name in names}


def _histogram(
    known: Floats, sets: Mapping[str, Mapping[str, Floats]], threshold: float | None
) -> dict[str, Any]:
    """Share of each set in each of 60 bins; what lies beyond the ends is in the end bins.

    ``line`` is where the threshold stands on the axis, or without one where 95% of the known
    inputs lie to its right. Edges and line are positions by ``place``.
    """
    pooled = np.concatenate([known, *(v for group in sets.values() for v in group.values())])
    scale = scale_of(pooled)
    placed = place(pooled, scale)
    finite = placed[np.isfinite(placed)]
    low, high = np.quantile(finite, [0.002, 0.998]) if len(finite) else (0.0, 1.0)
    line = np.sort(known)[-math.ceil(0.95 * len(known))] if threshold is None else threshold
    at = float(place(np.array([line]), scale)[0])
    if np.isfinite(at):
        low, high = min(low, at), max(high, at)
    if high - low < 1e-9 * max(1.0, abs(low)):
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, 61)

    def shares(values: Floats) -> list[float]:
        clipped = np.clip(place(values, scale), low, high)
        counts, _ = np.histogram(clipped, edges)
        return [round(float(share), 6) for share in counts / len(values)]

    return {
        "scale": scale,
        "edges": edges.tolist(),
        "line": at if np.isfinite(at) else None,
        "id": shares(known),
        **{g: {s: shares(v) for s, v in group.items()} for g, group in sets.items()},
    }


def scale_of(values: Floats) -> str:
    """``probability`` or ``-probability`` for values in [0, 1] or [-1, 0], else ``linear``."""
    finite = values[np.isfinite(values)]
    if len(finite) == 0 or np.ptp(finite) == 0:
        return "linear"
    if finite.min() >= 0 and finite.max() <= 1:
        return "probability"
    if finite.min() >= -1 and finite.max() <= 0:
        return "-probability"
    return "linear"


def place(values: Floats, scale: str) -> Floats:
    """Positions on the axis: log-odds for probabilities, which else crowd at one end."""
    if scale == "linear":
        return values
    p = np.clip(values if scale == "probability" else -values, 0.0, 1.0)
    with np.errstate(divide="ignore"):
        odds: Floats = np.log(p) - np.log1p(-p)
    return odds if scale == "probability" else -odds


def _plain(values: Floats) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]
