"""Changing the gate of a bundle that is already written."""

from __future__ import annotations

from moon.bundle import Bundle, Golden, gates_bytes, golden_bytes, write_bundle
from moon.errors import BundleError
from moon.gate import Gate
from moon.onnxfile import patch_scalar

__all__ = ["with_gate"]


def with_gate(
    bundle: Bundle, gate: Gate, backend: str = "default", golden: Golden | None = None
) -> Bundle:
    """Give ``bundle`` another gate for ``backend``, as one change of the whole folder.

    The default gate also sets the graph's threshold and the score it gates by, and the
    golden decisions, which follow from the golden scores. Gates of other backends stay as
    long as they use the same score; engines/ stays as it is.

    Args:
        bundle: rewritten in place.
        gate: the new gate; its score must be one the graph carries.
        backend: ``default``, or a backend that needs a gate of its own.
        golden: arrays to replace the golden ones, by name (``pixels`` and graph outputs).

    Returns:
        The bundle, reopened.

    Raises:
        BundleError: the graph does not carry the gate's score, or a backend's own gate does
            not use the score of the default one.
    """
    scores = bundle.manifest.scores
    if gate.score not in scores:
        raise BundleError(
            f"the bundle does not carry the score {gate.score}",
            remedy=f"Choose one of {', '.join(scores)}, or export it again with that score",
        )
    default = bundle.gates.get("default")
    if backend != "default" and (default is None or default.score != gate.score):
        raise BundleError(
            f"a gate for {backend} alone needs a default gate by the same score, {gate.score}",
            remedy=f"Run moon calibrate --score {gate.score} without --backend first",
        )
    kept = {name: old for name, old in bundle.gates.items() if old.score == gate.score}
    gates = {**kept, backend: gate}
    model = bundle.model_bytes()
    model = patch_scalar(model, "threshold", gates["default"].threshold)
    model = patch_scalar(model, "gate_score", scores.index(gate.score))
    arrays = {**bundle.golden(), **(golden or {})}
    arrays["score"] = arrays[f"score_{gate.score}"]
    arrays["accept"] = gates["default"].accepts(arrays["score"])
    files = _engines(bundle)
    files["model.onnx"] = model
    files["gate.json"] = gates_bytes(gates)
    files["golden.npz"] = golden_bytes(arrays.pop("pixels"), arrays)
    return write_bundle(bundle.path, manifest_fields=_fields(bundle), files=files, force=True)


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
