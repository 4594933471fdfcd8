"""Scores that need logits alone: msp, ebo, mls, unknown and gen.

Every score is a confidence: higher means more in-distribution. The gate accepts when
``score >= threshold``.

Shape suffixes: N inputs, L logits as the model gives them (K known classes, and one more
for the unknown class when there is one), K known classes.

All arithmetic is float64, whatever the logits' type, and large logits do not overflow.
A row with NaN or +inf gives a NaN or infinite score, which no gate accepts.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moon.errors import UsageError

__all__ = [
    "SCORES",
    "TOP",
    "Score",
    "ebo",
    "gen",
    "known_logits",
    "known_probabilities",
    "log_softmax",
    "logsumexp",
    "mls",
    "msp",
    "score_function",
    "softmax",
    "unknown",
    "unknown_probability",
]

Floats = NDArray[np.float64]

TOP = 100  # M of gen, where there are as many classes


class Score(Protocol):
    """Logits [N, L] and the unknown class's column (None: there is none) -> confidence [N]."""

    def __call__(self, logits_NL: ArrayLike, unknown_index: int | None) -> Floats: ...


def softmax(logits_NL: ArrayLike) -> Floats:
    """Softmax over the last axis, shifted by the row's maximum.

    Args:
        logits_NL: [N, L], any float type.

    Returns:
        [N, L] float64, rows summing to 1; a row with NaN or +inf, or all -inf, is NaN.
    """
    logits = _as_logits(logits_NL)
    with np.errstate(invalid="ignore", over="ignore"):
        exp = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities: Floats = exp / exp.sum(axis=1, keepdims=True)
    return probabilities


def known_logits(logits_NL: ArrayLike, unknown_index: int | None) -> Floats:
    """The columns of the known classes, in order: [N, L] -> [N, K] float64.

    Raises:
        UsageError: ``unknown_index`` is outside the columns, or no known class would remain.
    """
    return _without_unknown(_as_logits(logits_NL), unknown_index)


def known_probabilities(logits_NL: ArrayLike, unknown_index: int | None) -> Floats:
    """Probabilities of the K known classes in the softmax over all L logits.

    They are not renormalised: with an unknown class they sum to 1 - p(unknown).
    """
    return _without_unknown(softmax(logits_NL), unknown_index)


def unknown_probability(logits_NL: ArrayLike, unknown_index: int | None) -> Floats:
    """p(unknown) in the softmax over all L logits: [N] float64.

    Raises:
        UsageError: the model has no unknown class.
    """
    if unknown_index is None:
        raise no_unknown()
    probabilities = softmax(logits_NL)
    return probabilities[:, _column(unknown_index, probabilities.shape[1])]


def msp(logits_NL: ArrayLike, unknown_index: int | None) -> Floats:
    """Maximum softmax probability: max over the known c of p_c.

    p is the softmax over all L logits, the unknown class included and not renormalised away.
    Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution
    Examples in Neural Networks", ICLR 2017.

    Args:
        logits_NL: [N, L].
        unknown_index: column of the unknown class, or None.

    Returns:
        [N] float64 in [0, 1]. Cost: one softmax, O(N L).
    """
    best: Floats = known_probabilities(logits_NL, unknown_index).max(axis=1)
    return best


def ebo(
    logits_NL: ArrayLike,
    unknown_index: int | None,
    *,
    temperature: float = 1.0,
    over_all: bool = False,
) -> Floats:
    """Negative free energy: T * logsumexp(z_known / T).

    Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020, equation 4 with
    the sign turned so that higher is more in-distribution.

    Args:
        logits_NL: [N, L].
        unknown_index: column of the unknown class, or None.
        temperature: T > 0.
        over_all: sum over all L logits, the unknown one included, instead of the known K.

    Returns:
        [N] float64 in the units of the logits. Cost: one logsumexp, O(N L).
    """
    if not (np.isfinite(temperature) and temperature > 0):
        raise UsageError(f"the temperature must be a positive number, not {temperature}")
    logits = _as_logits(logits_NL)
    terms = logits if over_all else _without_unknown(logits, unknown_index)
    return temperature * logsumexp(terms / temperature)


def unknown(logits_NL: ArrayLike, unknown_index: int | None) -> Floats:
    """-p(unknown), with p the softmax over all L logits.

    The learned unknown class read as a score, as in deep abstaining classifiers
    (Thulasidasan et al., ICML 2019).

    Args:
        logits_NL: [N, L].
        unknown_index: column of the unknown class.

    Returns:
        [N] float64 in [-1, 0]. Cost: one softmax, O(N L).

    Raises:
        UsageError: ``unknown_index`` is None.
    """
    return -unknown_probability(logits_NL, unknown_index)


def mls(logits_NL: ArrayLike, unknown_index: int | None) -> Floats:
    """Maximum logit over the known classes: max over the known c of z_c.

    Hendrycks et al., "Scaling Out-of-Distribution Detection for Real-World Settings",
    ICML 2022.

    Args:
        logits_NL: [N, L].
        unknown_index: column of the unknown class, or None.

    Returns:
        [N] float64 in the units of the logits. Cost: O(N L).
    """
    best: Floats = known_logits(logits_NL, unknown_index).max(axis=1)
    return best


def gen(
    logits_NL: ArrayLike,
    unknown_index: int | None,
    *,
    gamma: float = 0.1,
    top: int | None = None,
) -> Floats:
    """Negative generalised entropy: -sum over the M largest p_c of (p_c (1 - p_c))^gamma.

    Liu, Lochman and Zach, "GEN: Pushing the Limits of Softmax-Based Out-of-Distribution
    Detection", CVPR 2023. p is the softmax over the known logits alone: with the
    unknown class among them, an input surely unknown would have the lowest entropy of all.
    1 - p is summed from the other classes, so that confident inputs do not tie at 1 - p = 0.

    Args:
        logits_NL: [N, L].
        unknown_index: column of the unknown class, or None.
        gamma: above 0; the paper's 0.1.
        top: M, how many of the largest probabilities count; None is min(K, 100), the paper's
            and OpenOOD's choice.

    Returns:
        [N] float64 in [-M / 4^gamma, 0]. Cost: one softmax and a sort, O(N K log K).

    Raises:
        UsageError: gamma is out of range, or M larger than K.
    """
    check_gamma(gamma)
    logits = known_logits(logits_NL, unknown_index)
    count = top_count(top, logits.shape[1])
    ordered = -np.sort(-logits, axis=1)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        log_p = log_softmax(ordered)
        rest = np.log1p(-np.exp(log_p))
        if logits.shape[1] > 1:
            rest[:, 0] = logsumexp(log_p[:, 1:])
        total: Floats = -np.exp(gamma * (log_p + rest)[:, :count]).sum(axis=1)
    return total


def check_gamma(gamma: float) -> None:
    if not 0 < gamma < np.inf:
        raise UsageError(f"gamma must be a positive number, not {gamma}")


def top_count(top: int | None, classes: int) -> int:
    """M of :func:`gen`, checked."""
    if top is None:
        return min(classes, TOP)
    if not 1 <= top <= classes:
        raise UsageError(
            f"gen sums the {top} largest of {classes} known classes' probabilities",
            remedy=f"Choose M from 1 to {classes}",
        )
    return top


# What the score head of an exported graph has a twin of.
SCORES: dict[str, Score] = {"msp": msp, "ebo": ebo, "mls": mls, "unknown": unknown}


def score_function(name: str) -> Score:
    """The score called ``name``.

    Raises:
        UsageError: there is no such score; lists those there are.
    """
    if name not in SCORES:
        raise UsageError(f"no score is called {name}", remedy=f"Choose one of {', '.join(SCORES)}")
    return SCORES[name]


def no_unknown() -> UsageError:
    return UsageError(
        "the score unknown needs a model with an unknown class, and this one has none",
        remedy="Choose msp, ebo or mls",
    )


def _as_logits(logits_NL: ArrayLike) -> Floats:
    logits: NDArray[Any] = np.asarray(logits_NL)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise UsageError(f"logits must have shape [N, L] with L >= 1, not {list(logits.shape)}")
    return logits.astype(np.float64)


def _column(unknown_index: int, columns: int) -> int:
    if not -columns <= unknown_index < columns:
        raise UsageError(f"unknown_index {unknown_index} is outside the {columns} logits")
    return unknown_index % columns


def _without_unknown(values_NL: Floats, unknown_index: int | None) -> Floats:
    if unknown_index is None:
        return values_NL
    columns = values_NL.shape[1]
    if columns < 2:
        raise UsageError("the unknown class is the only logit: no known class remains")
    return np.delete(values_NL, _column(unknown_index, columns), axis=1)


def log_softmax(logits_NK: Floats) -> Floats:
    """Logarithm of the softmax, without the underflow of taking one after the other."""
    shifted: Floats = logits_NK - logits_NK.max(axis=1, keepdims=True)
    return shifted - logsumexp(shifted)[:, None]


def logsumexp(values_NK: Floats) -> Floats:
    """log(sum(exp)) over the last axis: [N, K] -> [N]."""
    peak_N = values_NK.max(axis=1)
    # Where the peak is infinite the shift would be inf - inf; the answer is the peak itself.
    shift_N = np.where(np.isfinite(peak_N), peak_N, 0.0)
    with np.errstate(over="ignore", divide="ignore"):
        total: Floats = shift_N + np.log(np.exp(values_NK - shift_N[:, None]).sum(axis=1))
    return total
