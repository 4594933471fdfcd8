"""The gate: one threshold on one confidence score, and the decision it gives an input.

A gate accepts an input when ``score >= threshold`` and the score is finite, and for no other
reason: a second way to reject would void what its calibration promises. How thresholds are
found is in :mod:`moon.gate_calibration`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moon.errors import BundleError
from moon.fields import Fields

__all__ = [
    "METHODS",
    "REASONS",
    "STORED_SCORES",
    "Achieved",
    "Decision",
    "Gate",
    "explain",
]

METHODS = ("conformal", "pac", "risk")
REASONS = ("unknown", "low_confidence", "ood")
QUANTILES = ("p_unknown", "msp", "ebo")
STORED_SCORES = 10_000


class _AchievedRisk(TypedDict, total=False):
    error: float
    error_bound: float


class Achieved(_AchievedRisk):
    """What a threshold does on the calibration scores.

    Attributes:
        reject: share of the calibration scores rejected.
        ci95: central 95% interval of the true reject rate of in-distribution inputs.
        error: share of the accepted that were classified wrongly (method risk only).
        error_bound: upper confidence bound of that error, at 1 - delta (method risk only).
    """

    reject: float
    ci95: list[float]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A calibrated threshold and the evidence for it.

    Attributes:
        score: name of the score, as in :data:`moon.scores.SCORES`.
        threshold: accept when score >= threshold; always a float32 value.
        method: conformal, pac or risk.
        alpha: largest reject rate promised (conformal, pac), else None.
        delta: chance that the promise fails over the calibration draw (pac, risk), else None.
        risk: largest error among the accepted promised (risk), else None.
        n: calibration scores in all.
        k: rank of the threshold among them, 1 for the smallest (conformal, pac), else None.
        nonfinite: how many of the n were NaN or infinite; they hold the lowest ranks.
        achieved: what the threshold does on the calibration scores.
        backend: backend that computed the calibration scores.
        data_sha256: hash of the calibration items, or "" when unknown.
        scores: finite calibration scores, sorted; thinned to at most 10,000.
        ranks: rank, from 1, of each of ``scores`` among all n; rank k is never thinned away.
        per_class: thresholds by predicted class; always None here.
        reason: in-distribution quantiles of p_unknown, msp and ebo, which only explain.
    """

    score: str
    threshold: float
    method: str
    n: int
    achieved: Achieved
    scores: tuple[float, ...]
    ranks: tuple[int, ...]
    alpha: float | None = None
    delta: float | None = None
    risk: float | None = None
    k: int | None = None
    nonfinite: int = 0
    backend: str = "onnxruntime"
    data_sha256: str = ""
    per_class: None = None
    reason: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_gate(self)

    def accepts(self, scores_N: ArrayLike) -> NDArray[np.bool_]:
        """Which scores are accepted: finite and >= the threshold, compared as float32."""
        values = as_float32(scores_N)
        accepted: NDArray[np.bool_] = np.isfinite(values) & (values >= np.float32(self.threshold))
        return accepted

    def p_value(self, score: float) -> float | None:
        """(1 + #{calibration scores <= score}) / (n + 1), or None for a score not finite.

        The share of equally unusual in-distribution inputs. Between two stored scores of a
        thinned gate the larger count is taken, which keeps it a valid p-value; it is too
        large by at most n / 9,998 ranks. Under the method conformal, accepting is exactly
        p > alpha.
        """
        value = as_float32(score)
        if not np.isfinite(value):
            return None
        below = int(np.searchsorted(self._sorted, value, side="right"))
        next_rank = self.ranks[below] if below < len(self.ranks) else self.n + 1
        return next_rank / (self.n + 1)

    @cached_property
    def _sorted(self) -> NDArray[np.float32]:
        return np.asarray(self.scores, dtype=np.float32)

    def to_json(self) -> dict[str, Any]:
        """The gate's entry in gate.json."""
        return {
            "score": self.score,
            "threshold": self.threshold,
            "method": self.method,
            "alpha": self.alpha,
            "delta": self.delta,
            "risk": self.risk,
            "n": self.n,
            "k": self.k,
            "nonfinite": self.nonfinite,
            "per_class": self.per_class,
            "achieved": dict(self.achieved),
            "backend": self.backend,
            "data_sha256": self.data_sha256,
            "reason": dict(self.reason),
            "scores": list(self.scores),
            "ranks": list(self.ranks),
        }

    @classmethod
    def from_json(cls, plain: object) -> Gate:
        """Read an entry of gate.json.

        Raises:
            BundleError: a field is missing, of the wrong type, or contradicts another.
        """
        fields = Fields(plain, "a gate", _bad)
        if fields.take_or("per_class", None) is not None:
            raise _bad("per_class thresholds need a newer version of moon")
        gate = cls(
            score=fields.text("score"),
            threshold=fields.number("threshold"),
            method=fields.text("method"),
            alpha=fields.maybe_number("alpha"),
            delta=fields.maybe_number("delta"),
            risk=fields.maybe_number("risk"),
            n=fields.integer("n"),
            k=fields.maybe_integer("k"),
            nonfinite=fields.integer("nonfinite"),
            achieved=_achieved(fields.mapping("achieved")),
            backend=fields.text("backend"),
            data_sha256=fields.text("data_sha256"),
            reason=_quantiles(fields.mapping("reason")),
            scores=fields.numbers("scores"),
            ranks=fields.integers("ranks"),
        )
        fields.done()
        return gate


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the gate decided for one input.

    Attributes:
        accepted: accepted, or abstained.
        label: name of the most likely known class; None when abstaining.
        reason: why it abstained, one of :data:`REASONS`; None when accepted.
        top: known classes and their probability, most likely first.
        score_name: the gate's score.
        score: its value, None when it was not finite.
        threshold: what it was compared with.
        p_value: see :meth:`Gate.p_value`; None without a calibrated gate.
        input: file name, index or None.
    """

    accepted: bool
    label: str | None
    reason: str | None
    top: tuple[tuple[str, float], ...]
    score_name: str
    score: float | None
    threshold: float
    p_value: float | None
    input: str | int | None = None

    def to_json(self) -> dict[str, Any]:
        """The prediction object shared by ``moon predict --json`` and ``/predict``."""
        return {
            "input": self.input,
            "decision": "accept" if self.accepted else "abstain",
            "label": self.label,
            "reason": self.reason,
            "top": [{"label": label, "p": p} for label, p in self.top],
            "score": {
                "name": self.score_name,
                "value": self.score,
                "threshold": self.threshold,
                "direction": "higher_is_in_distribution",
            },
            "p_value": self.p_value,
        }


def explain(
    quantiles: Mapping[str, float], *, p_unknown: float | None, msp: float, ebo: float
) -> str:
    """Why an input was abstained from; this never changes the decision.

    ``unknown`` when p(unknown) exceeds its own in-distribution quantile; ``low_confidence``
    when the top known probability is below its quantile but the energy looks
    in-distribution; else ``ood``. Without quantiles (a gate that was never calibrated) only
    an unknown class that outweighs every known one is called unknown.

    Args:
        quantiles: :attr:`Gate.reason`.
        p_unknown: p(unknown), None when the model has no unknown class.
        msp: top known probability.
        ebo: negative free energy over the known classes.
    """
    bar = quantiles.get("p_unknown")
    if p_unknown is not None and p_unknown > (msp if bar is None else bar):
        return "unknown"
    if "msp" in quantiles and "ebo" in quantiles:
        low, in_distribution = msp < quantiles["msp"], ebo >= quantiles["ebo"]
        if low and in_distribution:
            return "low_confidence"
    return "ood"


def as_float32(values: ArrayLike) -> NDArray[np.float32]:
    """Scores as backends compute them; a value beyond float32 becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(values).astype(np.float32)


def _check_gate(gate: Gate) -> None:
    if gate.method not in METHODS:
        raise _bad(f"the method {gate.method} is unknown, expected one of {', '.join(METHODS)}")
    if not math.isfinite(gate.threshold) or float(as_float32(gate.threshold)) != gate.threshold:
        raise _bad(f"the threshold {gate.threshold} is not a finite float32")
    for name in ("alpha", "delta", "risk"):
        value = getattr(gate, name)
        if value is not None and not 0 < value < 1:
            raise _bad(f"{name} must lie between 0 and 1, not {value}")
    promised = gate.risk if gate.method == "risk" else gate.alpha
    if promised is None or (gate.method != "conformal" and gate.delta is None):
        raise _bad(f"a gate by the method {gate.method} lacks its promised rate or delta")
    if gate.n < 1 or not 0 <= gate.nonfinite < gate.n:
        raise _bad(f"n = {gate.n} and nonfinite = {gate.nonfinite} contradict each other")
    if not set(gate.reason) <= set(QUANTILES):
        raise _bad(f"reason may hold only {', '.join(QUANTILES)}")
    _check_evidence(gate)


def _check_evidence(gate: Gate) -> None:
    scores, ranks = np.asarray(gate.scores), np.asarray(gate.ranks)
    if not 1 <= len(scores) == len(ranks) <= STORED_SCORES:
        raise _bad("scores and ranks must have one length, from 1 to 10,000")
    if not np.isfinite(scores).all() or (np.diff(scores) < 0).any():
        raise _bad("the calibration scores must be finite and sorted")
    if (np.diff(ranks) < 1).any() or ranks[0] != gate.nonfinite + 1 or ranks[-1] != gate.n:
        raise _bad("the ranks must grow from the first finite score's to n")
    if gate.method == "risk":
        return
    at = np.flatnonzero(ranks == gate.k)
    if len(at) != 1 or scores[at[0]] != gate.threshold:
        raise _bad(f"the threshold is not the calibration score of rank {gate.k}")


def _achieved(plain: dict[str, Any]) -> Achieved:
    fields = Fields(plain, "achieved", _bad)
    ci95 = fields.numbers("ci95")
    if len(ci95) != 2:
        raise _bad("achieved.ci95 must hold two numbers")
    achieved: Achieved = {"reject": fields.number("reject"), "ci95": list(ci95)}
    error, error_bound = fields.maybe_number("error"), fields.maybe_number("error_bound")
    fields.done()
    if error is not None and error_bound is not None:
        achieved["error"], achieved["error_bound"] = error, error_bound
    return achieved


def _quantiles(plain: dict[str, Any]) -> dict[str, float]:
    fields = Fields(plain, "reason", _bad)
    found = {name: fields.maybe_number(name) for name in QUANTILES}
    fields.done()
    return {name: value for name, value in found.items() if value is not None}


def _bad(cause: str) -> BundleError:
    return BundleError(f"gate.json: {cause}", remedy="Run moon calibrate again")
