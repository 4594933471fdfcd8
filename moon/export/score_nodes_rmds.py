"""The relative Mahalanobis distance as operators, with constants of D K numbers instead of D^2.

Both distances of `moon.scores.rmds` are squares of whitened differences,

    score = |a A0|^2 - min over c of |a A - m_c|^2,    a = x - mu.

Let the columns of U span the class means m_c. What a A has outside U counts the same for every
class, and, as the overall covariance is the one within the classes plus that of their means,
counts the same in |a A0|^2 too: it cancels. With F = A U and n_c = m_c U there remain

    score = sum_i s_i f_i^2 - min over c of |f - n_c|^2,    f = a F,

where U is turned so that the first form is diagonal. Where the covariances are singular, and not in
the same directions, a quadratic form of a is left over. It is computed here, and its eigenvectors
are kept besides: none, few for features that are nearly dead, at most D.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.export.nodes import HeadNodes

__all__ = ["Reduced", "reduce_rmds", "rmds"]

Floats = NDArray[np.float64]

# Share of the two inverses that may be rounding.
TOLERANCE = 1e-10


@dataclass(frozen=True)
class Reduced:
    """score = sum s (a F)^2 - min over c of |a F - n_c|^2 + sum g (a E)^2.

    Attributes:
        project: F, [D, R].
        means: n_c, [K, R].
        roots: sqrt(s), [R].
        rest: E, [D, J]; J may be 0.
        signs: g, 1 or -1, [J].
    """

    project: Floats
    means: Floats
    roots: Floats
    rest: Floats
    signs: Floats


def reduce_rmds(whiten: Floats, means: Floats, whiten_all: Floats) -> Reduced:
    """The constants of the reduced form, of the same score but for float64's rounding.

    Args:
        whiten: A, [D, R].
        means: m_c, [K, R].
        whiten_all: A0, [D, S].
    """
    _, sizes, directions = np.linalg.svd(means, full_matrices=False)
    limit = sizes[0] * max(means.shape) * np.finfo(np.float64).eps
    basis = directions[: max(1, int((sizes > limit).sum()))].T
    # What a' P0 a is within U: H'H with H = A0' pinv(A)' U. Any other form is right too, as the
    # rest is what it leaves.
    try:
        half = whiten_all.T @ whiten @ np.linalg.solve(whiten.T @ whiten, basis)
    except np.linalg.LinAlgError:
        half = np.zeros_like(basis)
    shares, turn = np.linalg.eigh(half.T @ half)
    shares = np.maximum(shares, 0)
    basis = basis @ turn
    project = whiten @ basis
    form = whiten_all @ whiten_all.T - whiten @ whiten.T + (project * (1 - shares)) @ project.T
    rest, signs = _eigenvectors(form, np.linalg.norm(whiten) ** 2 + np.linalg.norm(whiten_all) ** 2)
    return Reduced(project, means @ basis, np.sqrt(shares), rest, signs)


def _eigenvectors(form_DD: Floats, size: float) -> tuple[Floats, Floats]:
    """E [D, J] and g [J] with the form E diag(g) E', but for what is rounding in ``size``."""
    if np.linalg.norm(form_DD) <= TOLERANCE * size:
        return np.empty((len(form_DD), 0)), np.empty(0)
    values, vectors = np.linalg.eigh(form_DD)
    kept = np.abs(values) > TOLERANCE * size
    rest: Floats = vectors[:, kept] * np.sqrt(np.abs(values[kept]))
    return rest, np.sign(values[kept])


def rmds(head: HeadNodes, fitted: Mapping[str, NDArray[Any]]) -> str:
    wide = {name: fitted[name].astype(np.float64) for name in ("whiten", "means", "whiten_all")}
    parts = reduce_rmds(**wide)
    away = head.away("rmds", fitted["centre"])
    project = head.fitted("rmds", "project", parts.project)
    inner = head.node("MatMul", [away, project], "head/rmds/projected")
    # The nearest class by products, and the distance to it from the difference.
    means = head.fitted("rmds", "means", parts.means)
    offset = head.fitted("rmds", "offset", -0.5 * (parts.means**2).sum(axis=1))
    near = head.node("Gemm", [inner, means, offset], "head/rmds/nearness", transB=1)
    nearest = head.node("ArgMax", [near], "head/rmds/nearest", axis=1, keepdims=0)
    mean = head.node("Gather", [means, nearest], "head/rmds/mean", axis=0)
    relative = _relative(head, parts, inner, mean)
    if parts.signs.size:
        relative = head.node("Add", [relative, _rest(head, parts, away)], "head/rmds/whole")
    return head.node("Add", [relative, head.guard("rmds", ["features"])], "score_rmds")


def _relative(head: HeadNodes, parts: Reduced, inner: str, mean: str) -> str:
    """sum of s f^2 - (f - n)^2 = (n - (1 - sqrt s) f) ((1 + sqrt s) f - n), each factor exact."""
    less = head.fitted("rmds", "less", 1 - parts.roots)
    more = head.fitted("rmds", "more", 1 + parts.roots)
    shrunk = head.node("Mul", [inner, less], "head/rmds/shrunk")
    grown = head.node("Mul", [inner, more], "head/rmds/grown")
    one = head.node("Sub", [mean, shrunk], "head/rmds/difference")
    other = head.node("Sub", [grown, mean], "head/rmds/sum")
    product = head.node("Mul", [one, other], "head/rmds/product")
    return head.node("ReduceSum", [product, head.axis], "head/rmds/relative", keepdims=0)


def _rest(head: HeadNodes, parts: Reduced, away: str) -> str:
    matrix = head.fitted("rmds", "rest", parts.rest)
    left = head.node("MatMul", [away, matrix], "head/rmds/left")
    signs = head.fitted("rmds", "signs", parts.signs)
    signed = head.node("Mul", [left, signs], "head/rmds/signed")
    squares = head.node("Mul", [left, signed], "head/rmds/squares")
    return head.node("ReduceSum", [squares, head.axis], "head/rmds/rest_form", keepdims=0)
