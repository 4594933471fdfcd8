"""How far two computations of one model agree over many images, and how far they must.

Logits may differ by rounding, and a decision by that much more. So a decision is counted only
where the reference's score is further from its threshold than rounding moves it: the threshold
is itself a score that was observed. What is counted and decided otherwise is a flip.

Shape suffixes: N images, L logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moon.backend_name import BackendName
from moon.scores import SCORES
from moon.threshold import accepts, as_float32

__all__ = [
    "IMAGES",
    "TOLERANCE",
    "Agreement",
    "Budget",
    "agreement",
    "precision_of",
    "scaled_tolerance",
    "slack",
    "tolerance",
]

# Rates to a tenth of a percent need a thousand images.
IMAGES = 1000
# Largest difference of a logit, for logits of up to about 10.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "int8": 2e-1}
_LARGE = 10.0
# Least shares of labels and of decisions. Between two ways of rounding integers a model that is
# unsure of many images was seen to change 1.2% of the labels.
_TOP1 = {"fp32": 0.999, "fp16": 0.999, "int8": 0.98}
_GATE = {"fp16": 0.995, "int8": 0.98}

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How outputs compare with a reference's.

    Attributes:
        images: how many.
        max_abs: largest difference of a logit; infinite where one is not finite.
        not_finite: images with a logit that is not finite on either side.
        tolerance: largest difference of a logit allowed.
        top1_agreement: share of images with the same label.
        labels_differ: images with another label.
        labels_differ_within: of these, where the reference's two best classes are closer than
            both may move.
        gate_images: images whose decision counts; 0 without a gate.
        flips: of these, how many are decided otherwise.
        flips_within: decided otherwise within the tolerance of the threshold; not counted.
        gate_agreement: share of those counted with the same decision; None where there are none.
    """

    images: int
    max_abs: float
    not_finite: int
    tolerance: float
    top1_agreement: float
    labels_differ: int
    labels_differ_within: int
    gate_images: int = 0
    flips: int = 0
    flips_within: int = 0
    gate_agreement: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As the manifest and ``--json`` hold it; an infinite difference is null."""
        plain = asdict(self)
        plain["max_abs"] = self.max_abs if np.isfinite(self.max_abs) else None
        return plain

    def __str__(self) -> str:
        line = (
            f"{self.images:,} images: logits within {self.max_abs:.1e} "
            f"(allowed {self.tolerance:.0e}), labels {self.top1_agreement:.2%}"
        )
        if self.gate_agreement is None:
            return f"{line}, no decisions to compare"
        return (
            f"{line}, decisions {self.gate_agreement:.2%} of {self.gate_images:,} "
            f"({self.flips} flips; {self.flips_within} within the tolerance)"
        )


@dataclass(frozen=True)
class Budget:
    """What a difference may amount to.

    Args:
        flips: decisions beyond the tolerance that may differ, and classes; default no decision
            in fp32, one in two hundred in fp16, and one class in a thousand; one in fifty of
            either in int8.
    """

    flips: int | None = None

    def allowed(self, found: Agreement, precision: str) -> int:
        """Flips allowed."""
        if self.flips is not None:
            return self.flips
        return 0 if precision == "fp32" else int((1 - _GATE[precision]) * found.gate_images + 1e-9)

    def excess(self, found: Agreement, precision: str) -> str:
        """What is beyond it, to be read behind the name of who differs; "" where nothing is."""
        if found.not_finite:
            return f"gives NaN or infinite logits for {found.not_finite} of {found.images:,} images"
        if found.max_abs > found.tolerance:
            return (
                f"gives logits that differ by {found.max_abs:.3g}, more than "
                f"{found.tolerance:.3g}, over {found.images:,} images"
            )
        least = _TOP1[precision]
        if found.labels_differ > max((1 - least) * found.images + 1e-9, self.flips or 0):
            return (
                f"gives another class for {found.labels_differ} of {found.images:,} images, "
                f"{found.labels_differ_within} of them within the tolerance of a tie, and the same "
                f"for less than {least:.1%}"
            )
        allowed = self.allowed(found, precision)
        if found.flips > allowed:
            return (
                f"decides otherwise for {found.flips} of {found.gate_images:,} images, more than "
                f"the {allowed} allowed"
            )
        return ""


def agreement(
    reference: Arrays,
    outputs: Arrays,
    *,
    precision: str,
    score: str,
    bars: float | NDArray[np.float32] | None,
    own: float | NDArray[np.float32] | None = None,
) -> Agreement:
    """Compare two sets of outputs of the same images.

    Args:
        reference, outputs: ``logits`` [N, L], ``label`` [N] and ``score`` [N], the gate's.
        precision: what the outputs may have been computed in, fp32, fp16 or int8.
        score: the gate's score, by name.
        bars: what the reference's scores are compared with, one or [N]; None without a gate.
        own: what those of ``outputs`` are compared with; default the same.
    """
    wide, narrow = reference["logits"].astype(np.float64), outputs["logits"].astype(np.float64)
    bad_N = ~(np.isfinite(wide).all(axis=1) & np.isfinite(narrow).all(axis=1))
    gap = np.abs(wide[~bad_N] - narrow[~bad_N]).max(initial=0.0)
    allowed = tolerance(wide[np.isfinite(wide).all(axis=1)], precision)
    differs_N = reference["label"] != outputs["label"]
    best_N2 = np.sort(wide, axis=1)[:, -2:]
    tied_N = differs_N & ~bad_N & (best_N2[:, -1] - best_N2[:, 0] <= 2 * allowed)
    known: dict[str, Any] = {
        "images": len(wide),
        "max_abs": float("inf") if bad_N.any() else float(gap),
        "not_finite": int(bad_N.sum()),
        "tolerance": allowed,
        "top1_agreement": float(np.mean(~differs_N)),
        "labels_differ": int(differs_N.sum()),
        "labels_differ_within": int(tied_N.sum()),
    }
    if bars is None:
        return Agreement(**known)
    bar, other = as_float32(bars), as_float32(bars if own is None else own)
    then, now = as_float32(reference["score"]), as_float32(outputs["score"])
    near_N = slack(score, then, wide, precision)
    counted_N = ~(np.abs(then.astype(np.float64) - bar) <= near_N)
    other_N = accepts(then, bar) != accepts(now, other)
    flips, counted = int((other_N & counted_N).sum()), int(counted_N.sum())
    return Agreement(
        **known,
        gate_images=counted,
        flips=flips,
        flips_within=int((other_N & ~counted_N).sum()),
        gate_agreement=1 - flips / counted if counted else None,
    )


def tolerance(logits_NL: NDArray[Any], precision: str) -> float:
    """Largest difference allowed, in proportion for logits past 10.

    1e-4 in fp32 and 2e-2 in fp16; 2e-1 in int8, where runtimes round to other integers.
    """
    return float(scaled_tolerance(np.abs(logits_NL).max(initial=0.0), precision))


def scaled_tolerance(largest: ArrayLike, precision: str) -> NDArray[np.float64]:
    """The same by the largest logit, or by each image's own."""
    return TOLERANCE[precision] * np.maximum(1.0, np.asarray(largest, np.float64) / _LARGE)


def slack(
    score: str, scores_N: NDArray[Any], logits_NL: NDArray[Any], precision: str
) -> NDArray[np.float64]:
    """How far each score may move when every logit moves by the tolerance, [N].

    ``ebo`` and ``mls`` move no further than the logits. A probability p moves by at most twice
    that times p (1 - p), to first order: near 0 and 1, where ``unknown`` and ``msp`` decide,
    hardly further than float32 itself rounds. Another score may read features, whose error is
    not known: a hundredth of its spread in fp16 and int8, and 1e-4 of its size in fp32, as every
    export checks.
    """
    allowed = tolerance(logits_NL[np.isfinite(logits_NL).all(axis=1)], precision)
    scores = np.nan_to_num(scores_N.astype(np.float64), posinf=0.0, neginf=0.0)
    if score in ("ebo", "mls"):
        return np.full(len(scores), allowed)
    if score in SCORES:
        p = np.abs(scores)
        moved: NDArray[np.float64] = 2 * allowed * p * (1 - p) + 4 * np.finfo(np.float32).eps
        return moved
    if precision != "fp32":
        return np.full(len(scores), 0.01 * float(np.std(scores)) if len(scores) else 0.0)
    return np.maximum(allowed, TOLERANCE["fp32"] * np.abs(scores))


def precision_of(bundle_precision: str, backend: str, own: str | None = None) -> str:
    """What a backend may compute a graph in: the graph's own precision, or less.

    Args:
        bundle_precision: of the graph.
        backend: as it was asked for.
        own: what the backend says that it computes in, as a TensorRT engine may in fp16.

    ONNX Runtime's providers take TF32, bfloat16 or fp16 for fp32 by themselves (CUDA's
    ``use_tf32`` is on; OpenVINO takes bfloat16 where the CPU has it), so that they are held to
    what is allowed of fp16. An int8 graph says itself where it computes in what.
    """
    less = BackendName.parse(backend).provider or own == "fp16"
    return "fp16" if less and bundle_precision == "fp32" else bundle_precision
