"""A backend over many images, and how far it agrees with a reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.backend_name import BackendName
from moon.bundle import Bundle
from moon.errors import BackendError, MissingExtraError
from moon.gate import Gate
from moon.runtime.agreement import Agreement, Budget, agreement, precision_of, tolerance
from moon.runtime.backend import DEFAULT, Backend, backends, open_backend
from moon.runtime.providers import providers

__all__ = [
    "BATCHES",
    "Compared",
    "Ran",
    "compared",
    "flips_remedy",
    "run_backend",
    "run_images",
    "that_run",
]

# Sizes of batches that every backend must take, and answer alike.
BATCHES = (1, 2, 7)
_BATCH = 64

Pixels = NDArray[np.uint8]
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Ran:
    """What a backend gave for a sample of images.

    Attributes:
        name: of the backend, as asked for.
        outputs: ``logits``, ``label`` and ``score`` [N, ...]; empty where it could not run.
        small: largest difference of a logit between batches of 1, 2 and 7 on one thread and
            the reference.
        info: of the backend.
        refused: why it could not run, "" where it did.
        notes: what it warned of.
    """

    name: str
    outputs: Arrays = field(default_factory=dict)
    small: float = 0.0
    info: Mapping[str, Any] = field(default_factory=dict)
    refused: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compared:
    """A backend's agreement with a reference, and what of it is beyond the budget.

    Attributes:
        name: of the backend.
        agreement: None where it could not run.
        excess: what is beyond the budget, to be read behind the backend's name; "" for nothing.
        refused: why it could not run.
        own_gate: it decides by a gate of its own.
        ran: what it gave.
    """

    name: str
    agreement: Agreement | None
    excess: str
    refused: str
    own_gate: bool
    ran: Ran

    def to_json(self) -> dict[str, Any]:
        """As the manifest and ``--json`` hold it."""
        if self.agreement is None:
            return {"not_compared": self.refused}
        small = self.ran.small if np.isfinite(self.ran.small) else None
        return {
            **self.agreement.to_json(),
            "small_batches_max_abs": small,
            "own_gate": self.own_gate,
            "provider": self.ran.info.get("provider"),
            "backend_version": self.ran.info.get("version"),
            "within": not self.excess,
            "notes": list(self.ran.notes),
        }


def that_run() -> list[str]:
    """Names of the backends that can run here, providers among them; not the one for tests."""
    found = {**backends(), **providers()}
    return [name for name, here in found.items() if here.ok and name != "fake"]


def run_backend(
    bundle: Bundle,
    name: str,
    pixels_NHWC: Pixels,
    reference: Arrays,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Ran:
    """Run a backend over images: all of them with all cores, a few in small batches with one.

    Args:
        pixels_NHWC: the model's input pixels, N >= 1.
        reference: what small batches are compared with: ``logits`` [N, L].
        progress: told how many images are done, of how many.
    """
    notes: list[str] = []
    try:
        backend = open_backend(bundle, name, threads=0, warn=notes.append)
        outputs = run_images(bundle, backend, pixels_NHWC, progress)
        single = open_backend(bundle, name, threads=1)
        small = _small(bundle, single, pixels_NHWC, reference["logits"])
    except (BackendError, MissingExtraError) as error:
        return Ran(name, refused=str(error))
    return Ran(name, outputs, small, backend.info(), notes=tuple(notes))


def run_images(
    bundle: Bundle,
    backend: Backend,
    pixels_NHWC: Pixels,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, NDArray[Any]]:
    """``logits``, ``label`` and ``score`` of prepared pixels, a batch at a time."""
    parts: list[dict[str, NDArray[Any]]] = []
    for start in range(0, len(pixels_NHWC), _BATCH):
        found = backend.run(_fed(bundle, pixels_NHWC[start : start + _BATCH]))
        parts.append({key: found[key] for key in ("logits", "label", "score")})
        progress(min(start + _BATCH, len(pixels_NHWC)), len(pixels_NHWC))
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def compared(ran: Ran, reference: Arrays, bundle: Bundle, budget: Budget) -> Compared:
    """What a backend gave, against a reference and a budget.

    The reference decides by the default gate, and the backend by its own where it has one.

    Args:
        ran: from :func:`run_backend`.
        reference: ``logits``, ``label`` and ``score``.
        bundle: with its gates.
    """
    if ran.refused:
        return Compared(ran.name, None, "", ran.refused, False, ran)
    precision = precision_of(bundle.manifest.precision, ran.name)
    default, own = bundle.gate(), bundle.gate(ran.name)
    found = agreement(
        reference,
        ran.outputs,
        precision=precision,
        score=bundle.gate_score,
        bars=_bars(default, reference["label"]),
        own=_bars(own, ran.outputs["label"]),
    )
    excess = budget.excess(found, precision)
    allowed = tolerance(reference["logits"], precision)
    if not excess and not ran.small <= allowed:
        excess = (
            f"gives logits that differ by {ran.small:.3g} in batches of "
            f"{', '.join(map(str, BATCHES))}, more than {allowed:.3g}"
        )
    return Compared(ran.name, found, excess, "", own is not default, ran)


def _bars(gate: Gate | None, labels_N: NDArray[Any]) -> NDArray[np.float32] | None:
    return None if gate is None else gate.bars(labels_N)


def _fed(bundle: Bundle, pixels_NHWC: Pixels) -> NDArray[Any]:
    if bundle.manifest.input.dtype == "uint8":
        return np.ascontiguousarray(pixels_NHWC)
    return bundle.preprocess.normalise(pixels_NHWC)


def _small(bundle: Bundle, backend: Backend, pixels_NHWC: Pixels, logits_NL: NDArray[Any]) -> float:
    worst = 0.0
    for size in BATCHES:
        # Wraps around, so that few images still make a batch of seven.
        chosen = np.arange(size) % len(pixels_NHWC)
        found = backend.run(_fed(bundle, pixels_NHWC[chosen]))["logits"].astype(np.float64)
        gap = np.abs(found - logits_NL[chosen])
        worst = max(worst, float(np.where(np.isnan(gap), np.inf, gap).max()))
    return worst


def flips_remedy(found: Compared, bundle: str) -> str:
    """What to do about a backend that decides otherwise too often."""
    key = BackendName.parse(found.name).key
    if key == DEFAULT:
        return "Export with --precision fp32"
    return f"Give it a gate of its own: moon calibrate {bundle} --data SOURCE --backend {key}"
