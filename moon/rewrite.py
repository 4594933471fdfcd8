"""Changing the gate, or an engine's file, of a bundle that is already written."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np

from moon.bundle import Bundle, Golden, gates_bytes, golden_bytes, write_bundle
from moon.data.training_file import TrainingFile
from moon.errors import BundleError
from moon.gate import Gate
from moon.onnxfile import has_initializer, patch_matrix, patch_scalar, patch_vector
from moon.p_table import PTable

__all__ = ["carries_p_values", "gates_lost", "with_engine_file", "with_engine_files", "with_gate"]


def with_gate(
    bundle: Bundle,
    gate: Gate,
    backend: str = "default",
    golden: Golden | None = None,
    p_table: PTable | None = None,
) -> Bundle:
    """Give ``bundle`` another gate for ``backend``, as one change of the whole folder.

    The default gate also sets the graph's thresholds and the score it gates by, and the
    golden decisions, which follow from the golden scores and labels. Gates of other backends
    stay as long as they use the same score; engines/ stays as it is.

    Args:
        bundle: rewritten in place.
        gate: the new gate; its score must be one the graph carries.
        backend: ``default``, or a backend that needs a gate of its own.
        golden: arrays to replace the golden ones, by name (``pixels`` and graph outputs).
        p_table: p-values of every carried score for a graph that gives them, from the same
            calibration as the default ``gate``. Without it they are reset to not calibrated:
            those that were there belong to another gate. A gate of another backend leaves
            them as they are.

    Returns:
        The bundle, reopened.

    Raises:
        BundleError: the graph does not carry the gate's score, a backend's own gate does
            not use the score of the default one, or a gate by class is given to a graph that
            has one threshold.
    """
    scores = bundle.manifest.scores
    if gate.score not in scores:
        raise BundleError(
            f"the bundle does not carry the score {gate.score}",
            remedy=f"Choose one of {', '.join(scores)}, or export it again with that score",
        )
    if gate.per_class is not None:
        require_by_class(bundle)
        if gate.per_class.classes != bundle.classes:
            raise BundleError(
                "the classes of per_class are not the bundle's, in order",
                remedy=f"Calibrate by the classes {', '.join(bundle.classes)}",
            )
    default = bundle.gates.get("default")
    if backend != "default" and (default is None or default.score != gate.score):
        raise BundleError(
            f"a gate for {backend} alone needs a default gate by the same score, {gate.score}",
            remedy=f"Run moon calibrate --score {gate.score} without --backend first",
        )
    lost = gates_lost(bundle, gate)
    kept = {name: old for name, old in bundle.gates.items() if name not in lost}
    gates = {**kept, backend: gate}
    model = _gated(bundle, gates["default"])
    arrays = {**bundle.golden(), **(golden or {})}
    arrays["score"] = arrays[f"score_{gate.score}"]
    arrays["accept"] = gates["default"].accepts(arrays["score"], arrays["label"])
    if backend == "default" and has_initializer(model, "p_scores"):
        table = PTable.blank(len(scores)) if p_table is None else p_table
        model = patch_matrix(model, "p_scores", table.scores)
        model = patch_matrix(model, "p_levels", table.levels)
        for row, name in enumerate(scores):
            if f"p_{name}" in arrays:
                arrays[f"p_{name}"] = table.p_values(row, arrays[f"score_{name}"])
    files = _engines(bundle)
    seen = TrainingFile(bundle.training, bundle.fitted).to_bytes()
    if seen is not None:
        files["training.json"] = seen
    files["model.onnx"] = model
    files["gate.json"] = gates_bytes(gates)
    files["golden.npz"] = golden_bytes(arrays.pop("pixels"), arrays)
    return write_bundle(bundle.path, manifest_fields=_fields(bundle), files=files, force=True)


def with_engine_file(bundle: Bundle, name: str, data: bytes) -> Bundle:
    """:func:`with_engine_files` of one file."""
    return with_engine_files(bundle, {name: data})


def with_engine_files(
    bundle: Bundle, files: Mapping[str, bytes], *, drop: Collection[str] = ()
) -> Bundle:
    """Put files into engines/, as one change of the whole folder; the version stays the same.

    Args:
        bundle: rewritten in place.
        files: content by name, with engines/ before it.
        drop: names of files of engines/ that go, where they are there.

    Returns:
        The bundle, reopened.

    Raises:
        BundleError: the bundle was changed or damaged since it was opened.
    """
    for name in (*files, *drop):
        if not name.startswith("engines/"):
            raise ValueError(f"{name} is no file of engines/")
    listed = {path: bundle.file(path) for path in bundle.manifest.files}
    held = {name: data for name, data in (_engines(bundle) | listed).items() if name not in drop}
    fields = _fields(bundle)
    return write_bundle(bundle.path, manifest_fields=fields, files={**held, **files}, force=True)


def gates_lost(bundle: Bundle, gate: Gate) -> tuple[str, ...]:
    """Backends whose own gates :func:`with_gate` takes out, as they are by another score."""
    return tuple(
        name for name, old in bundle.gates.items() if name != "default" and old.score != gate.score
    )


def carries_p_values(bundle: Bundle) -> bool:
    """Whether the graph gives p-values of its scores."""
    return has_initializer(bundle.model_bytes(), "p_scores")


def require_by_class(bundle: Bundle) -> None:
    """Refuse a bundle whose graph has one threshold and no place for more.

    Raises:
        BundleError: it was exported before graphs had one a class.
    """
    if not bundle.by_class:
        raise BundleError(
            f"the graph of {bundle.path} has one threshold, so it cannot gate by class",
            remedy="Export it again with moon export, then calibrate with --per-class",
        )


def _gated(bundle: Bundle, gate: Gate) -> bytes:
    """The model with the bytes of ``gate``."""
    model, one = bundle.model_bytes(), gate.per_class is None
    model = patch_scalar(model, "threshold", gate.threshold if one else math.nan)
    if bundle.by_class:
        bars_K = np.broadcast_to(gate.bars(np.arange(len(bundle.classes))), len(bundle.classes))
        model = patch_vector(model, "thresholds", bars_K)
    return patch_scalar(model, "gate_score", bundle.manifest.scores.index(gate.score))


def _engines(bundle: Bundle) -> dict[str, bytes]:
    folder = bundle.path / "engines"
    return {
        path.relative_to(bundle.path).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def _fields(bundle: Bundle) -> dict[str, object]:
    plain = bundle.manifest.to_json()
    return {key: plain[key] for key in plain if key not in ("version", "sha256", "files")}
