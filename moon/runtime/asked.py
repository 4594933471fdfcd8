"""What a calibration was asked to promise, checked before any image is read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moon.bundle import Bundle
from moon.class_calibration import calibrate_per_class
from moon.errors import CalibrationError, UsageError
from moon.gate import METHODS, Gate
from moon.gate_calibration import (
    Evidence,
    Promise,
    Rate,
    calibrate_conformal,
    calibrate_pac,
    rate,
)
from moon.rewrite import require_by_class
from moon.risk_calibration import calibrate_risk, fewest_for_risk
from moon.runtime.choose import parts, smallest
from moon.runtime.scoring import Scored

__all__ = ["AUTO", "Asked"]

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was asked for, checked before any image is read."""

    classes: tuple[str, ...]
    score: str
    method: str
    reject: Rate
    delta: Rate
    risk: Rate | None
    per_class: bool

    @classmethod
    def checked(
        cls,
        bundle: Bundle,
        score: str,
        reject: Rate,
        method: str,
        delta: Rate,
        risk: Rate | None,
        per_class: bool,
    ) -> Asked:
        carried = bundle.manifest.scores
        if score != AUTO and score not in carried:
            raise UsageError(
                f"the bundle does not carry the score {score}",
                remedy=f"Choose one of {', '.join(carried)}, or {AUTO}; or export the model again "
                "with the score",
            )
        if method not in METHODS:
            raise UsageError(
                f"no method is called {method}", remedy=f"Choose one of {', '.join(METHODS)}"
            )
        if (method == "risk") != (risk is not None):
            raise UsageError(
                "the method risk and the largest error, risk, go together",
                remedy="Give both, such as --method risk --risk 0.02, or neither",
            )
        for name, value in (("reject", reject), ("delta", delta), ("risk", risk)):
            if value is not None:
                rate(value, name)
        if per_class:
            if method == "risk":
                raise UsageError(
                    "the method risk has no thresholds by class",
                    remedy="Use the method conformal or pac, or one threshold for all classes",
                )
            require_by_class(bundle)
        return cls(
            classes=bundle.classes,
            score=score,
            method=method,
            reject=reject,
            delta=delta,
            risk=risk,
            per_class=per_class,
        )

    def parts(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows to choose a score by, and rows to calibrate by: enough for what is promised.

        Raises:
            CalibrationError: there are too few, and how many it would take.
        """
        if self.risk is not None:
            fewest = fewest_for_risk(rate(self.risk, "risk"), rate(self.delta, "delta"))
        else:
            delta = self.delta if self.method == "pac" else None
            fewest = Promise.of(self.reject, delta).fewest
        choosing, calibrating = parts(rows)
        if len(calibrating) < fewest:
            raise CalibrationError(
                f"{len(rows)} images are too few to choose a score by some and keep the promise "
                f"with the others: {len(calibrating)} would be left to calibrate by, and it "
                f"takes {fewest}",
                remedy=f"Use at least {smallest(fewest)} held-out images, or name a score",
            )
        return choosing, calibrating

    def gate(self, found: Scored, correct_N: NDArray[np.bool_] | None, evidence: Evidence) -> Gate:
        scores_N, name = found.scores[self.score], self.score
        if self.per_class:
            promise = Promise.of(self.reject, self.delta if self.method == "pac" else None)
            return calibrate_per_class(
                scores_N, found.labels, self.classes, promise, score=name, evidence=evidence
            )
        if self.method == "conformal":
            return calibrate_conformal(scores_N, self.reject, score=name, evidence=evidence)
        if self.method == "pac":
            return calibrate_pac(scores_N, self.reject, self.delta, score=name, evidence=evidence)
        assert self.risk is not None and correct_N is not None
        return calibrate_risk(
            scores_N, correct_N, self.risk, self.delta, score=name, evidence=evidence
        )
