"""The gate: a threshold on one confidence score, and the decision it gives an input.

A gate accepts an input when ``score >= threshold`` and the score is finite, and for no other
reason: a second way to reject would void what its calibration promises. The threshold is one
for all inputs, or one for each predicted class. How thresholds are found is in
:mod:`moon.gate_calibration` and :mod:`moon.class_calibration`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moon.choice import Choice
from moon.errors import BundleError
from moon.fields import Fields
from moon.per_class import PerClass
from moon.threshold import STORED_SCORES, Achieved, Threshold, accepts
from moon.threshold import as_float32 as as_float32  # its home until it had one of its own

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


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A calibrated threshold and the evidence for it.

    Attributes:
        score: name of the score, as in :data:`moon.scores.SCORES`.
        threshold: accept when score >= threshold; always a float32 value. With ``per_class``,
            what one threshold over all classes would be by the same promise; decides nothing.
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
        scores: finite calibration scores, sorted; thinned to at most 10,000, together with
            those of ``per_class``.
        ranks: rank, from 1, of each of ``scores`` among all n; rank k is never thinned away.
        per_class: thresholds by predicted class; None for one over all classes.
        reason: in-distribution quantiles of p_unknown, msp and ebo, which only explain.
        choice: how the score was chosen among others; None when it was named.
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
    per_class: PerClass | None = None
    reason: Mapping[str, float] = field(default_factory=dict)
    choice: Choice | None = None

    def __post_init__(self) -> None:
        _check_gate(self)

    def bars(self, labels_N: ArrayLike | None = None) -> NDArray[np.float32]:
        """What scores are compared with: [] one for all, or [N] by predicted class.

        Args:
            labels_N: [N] predicted classes, as the graph's ``label``; a gate with
                ``per_class`` needs them.
        """
        if self.per_class is None:
            return np.asarray(self.threshold, dtype=np.float32)
        if labels_N is None:
            raise ValueError("a gate by predicted class needs the predicted classes")
        return self.per_class.thresholds(labels_N)

    def accepts(self, scores_N: ArrayLike, labels_N: ArrayLike | None = None) -> NDArray[np.bool_]:
        """Which scores are accepted: finite and >= the threshold, compared as float32.

        Args:
            scores_N: [N] scores.
            labels_N: see :meth:`bars`.
        """
        return accepts(scores_N, self.bars(labels_N))

    def p_value(self, score: float, label: int | None = None) -> float | None:
        """(1 + #{calibration scores <= score}) / (n + 1), or None for a score not finite.

        The share of equally unusual in-distribution inputs; with ``per_class``, of those
        predicted as the same class (or as one of the pooled ones). Between two stored scores
        of a thinned gate the larger count is taken, which keeps it a valid p-value; without
        ``per_class`` it is too large by at most n / 9,998 ranks. Under the method conformal,
        accepting is exactly p > alpha.

        Args:
            score: the input's score.
            label: its predicted class; a gate with ``per_class`` needs it.
        """
        if self.per_class is None:
            return self.overall.p_value(score)
        if label is None:
            raise ValueError("a gate by predicted class needs the predicted class")
        return self.per_class.of(label).p_value(score)

    @cached_property
    def overall(self) -> Threshold:
        """The threshold over all classes, with its evidence."""
        return Threshold(
            value=self.threshold,
            n=self.n,
            k=self.k,
            nonfinite=self.nonfinite,
            achieved=self.achieved,
            scores=self.scores,
            ranks=self.ranks,
        )

    def to_json(self, *, stored: bool = True) -> dict[str, Any]:
        """The gate's entry in gate.json; ``stored`` False leaves the stored scores out."""
        by_class = self.per_class
        # Absent where there is none, so that such a gate reads as it always did.
        chosen = {} if self.choice is None else {"choice": self.choice.to_json()}
        return {
            "score": self.score,
            "method": self.method,
            "alpha": self.alpha,
            "delta": self.delta,
            "risk": self.risk,
            "per_class": None if by_class is None else by_class.to_json(stored=stored),
            "backend": self.backend,
            "data_sha256": self.data_sha256,
            "reason": dict(self.reason),
            **chosen,
            **self.overall.to_json(stored=stored),
        }

    @classmethod
    def from_json(cls, plain: object) -> Gate:
        """Read an entry of gate.json.

        Raises:
            BundleError: a field is missing, of the wrong type, or contradicts another.
        """
        fields = Fields(plain, "a gate", _bad)
        by_class = fields.take_or("per_class", None)
        choice = fields.take_or("choice", None)
        score = fields.text("score")
        found = Threshold.take(fields, _bad)
        gate = cls(
            score=score,
            threshold=found.value,
            method=fields.text("method"),
            alpha=fields.maybe_number("alpha"),
            delta=fields.maybe_number("delta"),
            risk=fields.maybe_number("risk"),
            n=found.n,
            k=found.k,
            nonfinite=found.nonfinite,
            achieved=found.achieved,
            backend=fields.text("backend"),
            data_sha256=fields.text("data_sha256"),
            reason=_quantiles(fields.mapping("reason")),
            scores=found.scores,
            ranks=found.ranks,
            per_class=None if by_class is None else PerClass.from_json(by_class, _bad),
            choice=None if choice is None else Choice.from_json(choice, _bad),
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


def _check_gate(gate: Gate) -> None:
    if gate.method not in METHODS:
        raise _bad(f"the method {gate.method} is unknown, expected one of {', '.join(METHODS)}")
    for name in ("alpha", "delta", "risk"):
        value = getattr(gate, name)
        if value is not None and not 0 < value < 1:
            raise _bad(f"{name} must lie between 0 and 1, not {value}")
    promised = gate.risk if gate.method == "risk" else gate.alpha
    if promised is None or (gate.method != "conformal" and gate.delta is None):
        raise _bad(f"a gate by the method {gate.method} lacks its promised rate or delta")
    if gate.choice is not None and gate.choice.score != gate.score:
        raise _bad(f"the score {gate.score} is not the one chosen, {gate.choice.score}")
    if not set(gate.reason) <= set(QUANTILES):
        raise _bad(f"reason may hold only {', '.join(QUANTILES)}")
    gate.overall.check(_bad)
    if gate.method != "risk":
        gate.overall.check_rank(_bad)
    if gate.per_class is not None:
        if gate.method == "risk":
            raise _bad("the method risk has no thresholds by class")
        gate.per_class.check(gate.n, gate.nonfinite, _bad)


def _quantiles(plain: dict[str, Any]) -> dict[str, float]:
    fields = Fields(plain, "reason", _bad)
    found = {name: fields.maybe_number(name) for name in QUANTILES}
    fields.done()
    return {name: value for name, value in found.items() if value is not None}


def _bad(cause: str) -> BundleError:
    return BundleError(f"gate.json: {cause}", remedy="Run moon calibrate again")
