"""The scores that read features, as operators; see `moon.export.score_nodes`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.export.nodes import HeadNodes
from moon.export.score_nodes_rmds import rmds

__all__ = ["FEATURE_NODES"]

Constants = Mapping[str, NDArray[Any]]

FLOOR = 1e-12  # of a distance, as in numpy


def _count(head: HeadNodes, score: str, count: int) -> str:
    return head.constant(f"{score}/count", np.array([count], dtype=np.int64))


def _knn(head: HeadNodes, fitted: Constants) -> str:
    bank, k = head.fitted("knn", "bank", fitted["bank"]), int(fitted["k"])
    unit = head.unit_features("knn")
    products = head.node("Gemm", [unit, bank], "head/knn/products", transB=1)
    _, order = head.many(
        "TopK",
        [products, _count(head, "knn", k)],
        ["head/knn/nearest", "head/knn/order"],
        axis=1,
    )
    last = head.constant("knn/last", np.array(k - 1, dtype=np.int64))
    row = head.node("Gather", [order, last], "head/knn/row", axis=1)
    # The distance from the difference: a product near 1 has lost it.
    neighbour = head.node("Gather", [bank, row], "head/knn/neighbour", axis=0)
    away = head.node("Sub", [unit, neighbour], "head/knn/away")
    distance = head.node("ReduceL2", [away, head.axis], "head/knn/distance", keepdims=0)
    return head.node("Sub", [head.guard("knn", ["features"]), distance], "score_knn")


def _vim(head: HeadNodes, fitted: Constants) -> str:
    alpha = float(fitted["alpha"])
    residual = fitted["residual"] * abs(alpha)
    matrix = head.fitted("vim", "residual", residual)
    offset = head.fitted("vim", "offset", -(fitted["origin"] @ residual))
    outside = head.node("Gemm", [head.features("vim"), matrix, offset], "head/vim/outside")
    virtual = head.node("ReduceL2", [outside, head.axis], "head/vim/virtual", keepdims=0)
    op = "Sub" if alpha >= 0 else "Add"
    less = head.node(op, [head.energy, virtual], "head/vim/energy")
    return head.node("Add", [less, head.guard("vim", ["features", "logits"])], "score_vim")


def _distance(head: HeadNodes, score: str, fitted: Constants) -> tuple[str, str]:
    """Distance to the mean feature, at least FLOOR, and the guard of it and the logits: [N]."""
    distance = head.distance(score, fitted["centre"])
    guard = head.guard(score, ["features", "logits"], distance)
    return head.node("Max", [distance, head.number("floor", FLOOR)], f"{distance}_floored"), guard


def _fdbd(head: HeadNodes, fitted: Constants) -> str:
    # One over each gap, and over the number of the other classes; what the answer's own margin,
    # zero, is multiplied with does not matter.
    per_gap = 1 / (fitted["gaps"] * max(len(head.known) - 1, 1))
    rows = head.fitted("fdbd", "per_gap", per_gap)
    of_answer = head.node("Gather", [rows, head.label], "head/fdbd/per_gap_of_answer", axis=0)
    _, shifted = head.against_peak(head.known_logits, "head")
    margins = head.node("Mul", [shifted, of_answer], "head/fdbd/margins")
    below = head.node("ReduceSum", [margins, head.axis], "head/fdbd/below", keepdims=0)
    distance, guard = _distance(head, "fdbd", fitted)
    ratio = head.node("Div", [below, distance], "head/fdbd/ratio")
    return head.node("Sub", [guard, ratio], "score_fdbd")


def _nci(head: HeadNodes, fitted: Constants) -> str:
    away = head.away("nci", fitted["centre"])
    product = head.node("Mul", [away, head.answer_rows], "head/nci/product")
    towards = head.node("ReduceSum", [product, head.axis], "head/nci/towards", keepdims=0)
    distance, guard = _distance(head, "nci", fitted)
    ratio = head.node("Div", [towards, distance], "head/nci/ratio")
    size = head.size("features", "nci")
    alpha = head.fitted("nci", "alpha", fitted["alpha"])
    weighed = head.node("Mul", [size, alpha], "head/nci/size")
    both = head.node("Add", [ratio, weighed], "head/nci/both")
    return head.node("Add", [both, guard], "score_nci")


def _react(head: HeadNodes, fitted: Constants) -> str:
    clip = head.fitted("react", "clip", fitted["clip"])
    clipped = head.node("Min", [head.features("react"), clip], "head/react/features")
    logits = head.classify(clipped, "head/react")
    energy = head.logsumexp(logits, "head/react", "head/react/energy")
    return head.node("Add", [energy, head.guard("react", ["features"])], "score_react")


def _scale(head: HeadNodes, fitted: Constants) -> str:
    features, axis = head.features("scale"), head.axis
    top, _ = head.many(
        "TopK",
        [features, _count(head, "scale", int(fitted["top"]))],
        ["head/scale/largest", "head/scale/order"],
        axis=1,
    )
    top = head.node("ReduceSum", [top, axis], "head/scale/top", keepdims=1)
    total = head.node("ReduceSum", [features, axis], "head/scale/total", keepdims=1)
    # A zero vector stays one whatever it is scaled by, but not by 0 / 0.
    size = head.node("Unsqueeze", [head.size("features", "scale"), axis], "head/scale/size")
    empty = head.node("Equal", [size, head.number("zero", 0)], "head/scale/empty")
    divisor = head.node("Where", [empty, head.number("one", 1), top], "head/scale/divisor")
    ratio = head.node("Div", [total, divisor], "head/scale/ratio")
    factor = head.node("Exp", [ratio], "head/scale/factor")
    scaled = head.node("Mul", [features, factor], "head/scale/features")
    logits = head.classify(scaled, "head/scale")
    energy = head.logsumexp(logits, "head/scale", "head/scale/energy")
    return head.node("Add", [energy, head.guard("scale", ["features"])], "score_scale")


def _nnguide(head: HeadNodes, fitted: Constants) -> str:
    bank = head.fitted("nnguide", "bank", fitted["bank"])
    unit = head.unit_features("nnguide")
    products = head.node("Gemm", [unit, bank], "head/nnguide/products", transB=1)
    best, _ = head.many(
        "TopK",
        [products, _count(head, "nnguide", int(fitted["k"]))],
        ["head/nnguide/nearest", "head/nnguide/order"],
        axis=1,
    )
    mean = head.node("ReduceMean", [best, head.axis], "head/nnguide/mean", keepdims=0)
    guided = head.node("Mul", [head.energy, mean], "head/nnguide/guided")
    return head.node(
        "Add", [guided, head.guard("nnguide", ["features", "logits"])], "score_nnguide"
    )


FEATURE_NODES: dict[str, Callable[[HeadNodes, Constants], str]] = {
    "knn": _knn,
    "vim": _vim,
    "fdbd": _fdbd,
    "rmds": rmds,
    "nci": _nci,
    "react": _react,
    "scale": _scale,
    "nnguide": _nnguide,
}
