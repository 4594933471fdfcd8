"""Is a bundle whole, and does every backend here compute what was computed when it was made?"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moon.bundle import Bundle, Golden
from moon.errors import BackendError, BundleError, MissingExtraError
from moon.gate import Gate
from moon.progress import Progress, silent
from moon.runtime.agreement import TOLERANCE, precision_of, tolerance
from moon.runtime.backend import open_backend
from moon.runtime.sampled import that_run
from moon.runtime.trt.check import check_engines
from moon.threshold import accepts, as_float32

if TYPE_CHECKING:
    from moon.data.items import Source

__all__ = ["Check", "Parity", "golden_bars", "golden_outputs", "parity", "tolerance", "verify"]


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: what was checked.
        ok: whether it held.
        detail: the figures, or what is wrong.
        figures: the figures again, for ``--json``, where images were compared.
        remedy: what to do where it did not hold, "" where the detail says it.
    """

    name: str
    ok: bool
    detail: str
    figures: Mapping[str, Any] | None = None
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far outputs are from the golden ones.

    Attributes:
        max_abs: largest difference of a logit; infinite when one is NaN.
        top1_agreement: share of inputs with the same label.
        gate_agreement: share with the same decision, leaving out scores closer to the
            threshold than the tolerance; None when that leaves none.
        max_abs_within: whether max_abs is within the tolerance.
        within: whether it is, and both shares are 1.
    """

    max_abs: float
    top1_agreement: float
    gate_agreement: float | None
    max_abs_within: bool
    within: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "max_abs": self.max_abs if np.isfinite(self.max_abs) else None,
            "top1_agreement": self.top1_agreement,
            "gate_agreement": self.gate_agreement,
            "within": self.within,
        }


def verify(
    bundle: Bundle | str | os.PathLike[str],
    data: str | Source | None = None,
    *,
    backends: Sequence[str] = (),
    limit: int | None = None,
    flips: int | None = None,
    progress: Progress = silent,
) -> list[Check]:
    """Check a bundle's files, thresholds, and outputs on every backend that can run.

    Args:
        bundle: the bundle, which is read again from its folder, or that folder.
        data: images, to compare every backend with ONNX Runtime's CPU provider over them too:
            see :mod:`moon.runtime.verify_data`. Labels are not needed.
        backends: names of those to check; default all that can run here.
        limit: compare over so many of the images, spread evenly; default 1,000.
        flips: decisions beyond the tolerance that may differ; default none in fp32, and one in
            two hundred in fp16.
        progress: told how many images are done.

    Returns:
        A check for the files, one for the gate, one for each backend over the golden inputs, one
        for each TensorRT engine in the bundle, and one for each backend over ``data``.
        A bundle that cannot be opened gives the first alone, not ok.

    Raises:
        DataError, ImageError: the images cannot be read.
    """
    path = bundle.path if isinstance(bundle, Bundle) else bundle
    try:
        opened = Bundle.open(path)
    except BundleError as error:
        return [Check("files", False, str(error))]
    files = len(opened.manifest.files) + 1
    checks = [Check("files", True, f"{files} files whole, schema 1"), _gate(opened)]
    names = list(backends) or that_run()
    checks += [_golden(opened, name) for name in names]
    checks.extend(Check(*found) for found in check_engines(opened))
    if data is not None:
        from moon.runtime.verify_data import over_images

        checks += over_images(opened, data, names, limit, flips, progress)
    return checks


def parity(
    golden: Golden,
    outputs: dict[str, NDArray[Any]],
    *,
    precision: str,
    threshold: float | NDArray[np.float32] | None,
) -> Parity:
    """Compare a backend's outputs for the golden inputs with the golden ones.

    Args:
        golden: from :meth:`moon.bundle.Bundle.golden`.
        outputs: the backend's, for ``golden["pixels"]``.
        precision: fp32 or fp16.
        threshold: what decisions are compared by, one for all or [n] one for each input;
            None when there is no gate.
    """
    allowed = tolerance(golden["logits"], precision)
    gap_NL = np.abs(outputs["logits"].astype(np.float64) - golden["logits"])
    max_abs = float(np.where(np.isnan(gap_NL), np.inf, gap_NL).max())
    top1 = float(np.mean(outputs["label"] == golden["label"]))
    agreement = None
    if threshold is not None:
        bar = as_float32(threshold)
        then, now = as_float32(golden["score"]), as_float32(outputs["score"])
        # Some scores are in the hundreds, and float32 rounds them in proportion.
        slack = np.maximum(allowed, TOLERANCE[precision] * np.abs(then.astype(np.float64)))
        clear = ~(np.abs(then.astype(np.float64) - bar) <= slack)
        same = accepts(then, bar) == accepts(now, bar)
        agreement = float(np.mean(same[clear])) if clear.any() else None
    near = max_abs <= allowed
    return Parity(
        max_abs=max_abs,
        top1_agreement=top1,
        gate_agreement=agreement,
        max_abs_within=near,
        within=near and top1 == 1 and agreement in (None, 1.0),
    )


def _silent(message: str) -> None:
    """Nobody is told."""


def golden_outputs(
    bundle: Bundle, name: str, threads: int = 1, *, warn: Callable[[str], None] = _silent
) -> dict[str, NDArray[Any]]:
    """A backend's outputs for the bundle's golden inputs, at its own threshold.

    Args:
        bundle: the bundle.
        name: of the backend.
        threads: for one inference.
        warn: told what may make the backend slower than expected.
    """
    pixels = bundle.golden()["pixels"]
    as_is = bundle.manifest.input.dtype == "uint8"
    batch: NDArray[Any] = pixels if as_is else bundle.preprocess.normalise(pixels)
    gate = bundle.gate(name)
    backend = open_backend(bundle, name, threads=threads, warn=warn)
    one = gate is not None and gate.per_class is None
    return backend.run(batch, gate.threshold if gate is not None and one else None)


def golden_bars(bundle: Bundle, golden: Golden, name: str) -> NDArray[np.float32] | None:
    """What a backend's gate compares each golden score with; None when it is not calibrated."""
    gate = bundle.gate(name)
    return None if gate is None else gate.bars(golden["label"])


def _gate(bundle: Bundle) -> Check:
    gate = bundle.gate()
    if gate is None:
        return Check("gate", True, "not calibrated; the graph accepts nothing")
    promised = f"risk {gate.risk:g}" if gate.risk is not None else f"alpha {gate.alpha:g}"
    return Check(
        "gate",
        True,
        f"{gate.score} >= {_bar(gate)} in gate.json and graph alike "
        f"({gate.method}, {promised}, n = {gate.n:,})",
    )


def _bar(gate: Gate) -> str:
    if gate.per_class is None:
        return f"{gate.threshold:g}"
    values = gate.per_class.values
    return f"{values.min():g} to {values.max():g} by class"


def _golden(bundle: Bundle, name: str) -> Check:
    golden = bundle.golden()
    notes: list[str] = []
    try:
        outputs = golden_outputs(bundle, name, warn=notes.append)
    except (BackendError, MissingExtraError) as error:
        return Check(name, False, str(error))
    precision = precision_of(bundle.manifest.precision, name)
    found = parity(
        golden, outputs, precision=precision, threshold=golden_bars(bundle, golden, name)
    )
    allowed = tolerance(golden["logits"], precision)
    decisions = "none to compare" if found.gate_agreement is None else f"{found.gate_agreement:.1%}"
    gates_itself = _gates_itself(bundle, name, outputs)
    return Check(
        name,
        found.within and gates_itself,
        f"golden logits within {found.max_abs:.1e} (allowed {allowed:.0e}), "
        f"labels {found.top1_agreement:.1%}, decisions {decisions}"
        + ("" if gates_itself else "; accept is not what its own score and gate.json give")
        + "".join(f"; {note}" for note in notes),
    )


def _gates_itself(bundle: Bundle, name: str, outputs: dict[str, NDArray[Any]]) -> bool:
    """Whether ``accept`` follows from the backend's own score and label, by the gate's rule."""
    gate = bundle.gate(name)
    if gate is None:
        return not outputs["accept"].any()
    if gate.per_class is not None and gate is not bundle.gate():
        return (
            True  # the graph holds the default gate's thresholds, and this one stands in for them
        )
    return bool((outputs["accept"] == gate.accepts(outputs["score"], outputs["label"])).all())
