"""Confidence scores from logits, in plain numpy.

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
    "Score",
    "ebo",
    "known_logits",
    "known_probabilities",
    "mls",
    "msp",
    "score_function",
    "softmax",
    "unknown",
    "unknown_probability",
]

Floats = NDArray[np.float64]


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
        raise UsageError(
            "the score unknown needs a model with an unknown class, and this one has none",
            remedy="Choose msp, ebo or mls",
        )
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
    return temperature * _logsumexp(terms / temperature)


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


SCORES: dict[str, Score] = {"msp": msp, "ebo": ebo, "mls": mls, "unknown": unknown}


def score_function(name: str) -> Score:
    """The score called ``name``.

    Raises:
        UsageError: there is no such score; lists those there are.
    """
    if name not in SCORES:
        raise UsageError(f"no score is called {name}", remedy=f"Choose one of {', '.join(SCORES)}")
    return SCORES[name]


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


def _logsumexp(values_NK: Floats) -> Floats:
    peak_N = values_NK.max(axis=1)
    # Where the peak is infinite the shift would be inf - inf; the answer is the peak itself.
    shift_N = np.where(np.isfinite(peak_N), peak_N, 0.0)
    with np.errstate(over="ignore", divide="ignore"):
        total: Floats = shift_N + np.log(np.exp(values_NK - shift_N[:, None]).sum(axis=1))
    return total
