"""The bundle: a folder, and the only thing that passes from training to running.

    manifest.json   what the other files are, with their checksums, and its own hash
    model.onnx      the graph, its thresholds initializers and one an optional input
    gate.json       the calibrated gates; missing until calibrated
    golden.npz      a few inputs with the outputs expected of every backend
    training.json   fingerprints of some images that were trained on or fitted to; not always
    engines/        compiled engines and tuning plans, each with a sidecar
    manifest.sig    a signature of manifest.json, where somebody signed it

Opening checks everything: a flipped byte, a file that is not listed, a path or symbolic link
that leaves the folder, tensors stored outside the ONNX file, an unknown schema, or a graph
whose thresholds are not gate.json's. Checksums find damage and mistakes; who wrote the bundle is
what a signature proves, where a key is given to check it by.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.backend_name import BackendName
from moon.data.fingerprint import TrainingSketch
from moon.data.preprocess import Preprocess
from moon.data.training_file import FittedSketch, TrainingFile
from moon.errors import BundleError
from moon.fields import Fields
from moon.files import replacing_directory, sha256_bytes, sha256_file
from moon.gate import Gate
from moon.gated_graph import check_graph
from moon.manifest import FileEntry, Manifest
from moon.signature import SIGNATURE, check_signature

__all__ = ["Bundle", "Golden", "Manifest", "gates_bytes", "golden_bytes", "write_bundle"]

GATES_SCHEMA_VERSION = 1
Golden = dict[str, NDArray[Any]]
_REMEDY = "Take a good copy of the bundle, or export it again"
_REQUIRED = ("golden.npz", "model.onnx")
_TRAINING = "training.json"
_OPTIONAL = ("gate.json", _TRAINING)


@dataclass(frozen=True)
class Bundle:
    """An opened, verified bundle. Make one with :meth:`open` or :func:`write_bundle`.

    Attributes:
        path: its folder.
        manifest: what manifest.json says.
        gates: by backend, and ``default``; empty until calibrated.
        gate_score: the score the graph gates by.
        by_class: the graph has a threshold for each class; bundles of earlier releases do not.
        training: a sample of the training images' fingerprints, where the bundle has one.
        fitted: samples of other images, that scores it carries were fitted to.
    """

    path: Path
    manifest: Manifest
    gates: Mapping[str, Gate]
    gate_score: str
    by_class: bool
    training: TrainingSketch | None = None
    fitted: tuple[FittedSketch, ...] = ()

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, key: str | os.PathLike[str] | None = None
    ) -> Bundle:
        """Open the bundle at ``path`` and verify all of it.

        Args:
            path: its folder.
            key: file of a public key; what its holder did not sign is refused.

        Raises:
            BundleError: it is missing, damaged, hostile, of another schema, or not signed by
                the key; names the file.
            UsageError: the key cannot be read.
            MissingExtraError: a signature cannot be checked without the package cryptography.
        """
        root = Path(path)
        manifest = _read_manifest(root, key)
        _check_folder(root, manifest)
        for name, entry in manifest.files.items():
            if name not in (*_REQUIRED, *_OPTIONAL):
                _check_file(root, name, entry)
        gates = _read_gates(root, manifest)
        graph = check_graph(_read(root, manifest, "model.onnx"), manifest, gates)
        seen = _read_training(root, manifest)
        bundle = cls(root, manifest, gates, graph.score, graph.by_class, seen.training, seen.fitted)
        _check_golden(bundle.golden(), manifest)
        return bundle

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the K known classes."""
        return self.manifest.classes

    @property
    def preprocess(self) -> Preprocess:
        """From an image to the model's input."""
        return self.manifest.preprocess

    def gate(self, backend: str = "default") -> Gate | None:
        """The gate for ``backend``, else the default one, else None: not calibrated.

        A provider has a gate of its own, as ``onnxruntime:cuda`` has; its options do not.
        """
        key = BackendName.parse(backend).key
        return self.gates.get(key, self.gates.get("default"))

    def model_bytes(self) -> bytes:
        """The ONNX file, checked again as it is read."""
        return self._read("model.onnx")

    def file(self, name: str) -> bytes:
        """Any file that the manifest lists, checked again as it is read."""
        return self._read(name)

    def golden(self) -> Golden:
        """Golden inputs and expected outputs by name.

        ``pixels`` uint8 [n, H, W, C], then the graph's outputs for them: ``logits`` [n, L],
        ``label`` [n], ``accept`` [n], ``score`` [n] and ``score_<name>`` [n].
        """
        return _load_golden(self._read("golden.npz"))

    def _read(self, name: str) -> bytes:
        try:
            return _read(self.path, self.manifest, name)
        except BundleError as error:
            if _read_manifest(self.path).sha256 == self.manifest.sha256:
                raise
            raise BundleError(
                f"{self.path} was changed after it was opened", remedy="Open it again"
            ) from error

    def with_gate(
        self, gate: Gate, backend: str = "default", golden: Golden | None = None
    ) -> Bundle:
        """Replace the gate of ``backend``: rewrites this folder, and returns it reopened.

        See :func:`moon.rewrite.with_gate`.
        """
        from moon.rewrite import with_gate

        return with_gate(self, gate, backend, golden)


def write_bundle(
    path: str | os.PathLike[str],
    *,
    manifest_fields: Mapping[str, Any],
    files: Mapping[str, bytes],
    force: bool = False,
) -> Bundle:
    """Write a bundle in one step and open it.

    Args:
        path: the folder to make.
        manifest_fields: name, classes, unknown_index, input, preprocess, outputs, scores,
            sparsity and provenance as in manifest.json; the rest is computed.
        files: the other files by relative path; model.onnx and golden.npz are required.
        force: replace a bundle that is there.

    Raises:
        BundleError: what was given does not make a valid bundle; nothing is left at ``path``.
        UsageError: ``path`` exists and ``force`` was not given, or is no bundle.
    """
    entries = {
        name: FileEntry(sha256=sha256_bytes(data), size=len(data)) for name, data in files.items()
    }
    manifest = Manifest.seal(manifest_fields, entries)
    with replacing_directory(path, force=force, marker="manifest.json") as aside:
        for name, data in files.items():
            target = aside / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        text = json.dumps(manifest.to_json(), indent=2, allow_nan=False) + "\n"
        (aside / "manifest.json").write_text(text, encoding="utf-8")
        written = Bundle.open(aside)
    return replace(written, path=Path(path))


def gates_bytes(gates: Mapping[str, Gate]) -> bytes:
    """The content of gate.json."""
    plain = {
        "schema_version": GATES_SCHEMA_VERSION,
        "gates": {backend: gate.to_json() for backend, gate in gates.items()},
    }
    return (json.dumps(plain, indent=2, allow_nan=False) + "\n").encode()


def golden_bytes(pixels_NHWC: NDArray[np.uint8], outputs: Mapping[str, NDArray[Any]]) -> bytes:
    """The content of golden.npz; the same arrays always give the same bytes.

    Args:
        pixels_NHWC: uint8 [n, H, W, C], as ``Preprocess.pixels`` makes them.
        outputs: the graph's outputs for them, by name.
    """
    buffer = io.BytesIO()
    np.savez(buffer, **{"pixels": pixels_NHWC, **outputs})  # type: ignore[arg-type]
    return buffer.getvalue()


def _read_manifest(root: Path, key: str | os.PathLike[str] | None = None) -> Manifest:
    path = root / "manifest.json"
    if not root.is_dir():
        what = "is not a bundle: it is a file" if root.exists() else "does not exist"
        raise BundleError(f"{root} {what}", remedy="Name a folder made by moon export")
    if path.is_symlink() or not path.is_file():
        raise BundleError(
            f"{root} is not a bundle: it has no manifest.json",
            remedy="Name a folder made by moon export",
        )
    try:
        data = path.read_bytes()
        if key is not None:
            check_signature(root, data, key)
        plain = json.loads(data.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not readable JSON: {error}", remedy=_REMEDY) from error
    return Manifest.from_json(plain)


def _check_folder(root: Path, manifest: Manifest) -> None:
    present = set()
    for folder, names, files in os.walk(root):
        for name in (*names, *files):
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if path.is_symlink():
                raise BundleError(
                    f"{relative} is a symbolic link, which a bundle may not hold",
                    remedy="Replace it by the file itself, from a bundle you trust",
                )
            if not path.is_dir() and not path.is_file():
                raise BundleError(f"{relative} is neither a file nor a folder", remedy=_REMEDY)
        present |= {Path(folder, name).relative_to(root).as_posix() for name in files}
    missing = sorted((set(manifest.files) | set(_REQUIRED)) - present)
    if missing:
        raise BundleError(f"{missing[0]} is missing from the bundle", remedy=_REMEDY)
    unlisted = sorted(present - set(manifest.files) - {"manifest.json", SIGNATURE})
    unlisted = [name for name in unlisted if not name.startswith("engines/")]
    if unlisted:
        raise BundleError(
            f"{unlisted[0]} is not listed in manifest.json", remedy="Remove it from the bundle"
        )


def _read(root: Path, manifest: Manifest, name: str) -> bytes:
    try:
        data = (root / name).read_bytes()
    except OSError as error:
        raise BundleError(f"could not read {name}: {error.strerror}", remedy=_REMEDY) from error
    _check_entry(name, manifest.files[name], len(data), sha256_bytes(data))
    return data


def _check_file(root: Path, name: str, entry: FileEntry) -> None:
    """Engines can be large, so they are hashed in pieces."""
    try:
        _check_entry(name, entry, (root / name).stat().st_size, sha256_file(root / name))
    except OSError as error:
        raise BundleError(f"could not read {name}: {error.strerror}", remedy=_REMEDY) from error


def _check_entry(name: str, entry: FileEntry, size: int, sha256: str) -> None:
    if size != entry.size:
        raise BundleError(
            f"{name} is damaged: it has {size} bytes, not {entry.size}", remedy=_REMEDY
        )
    if sha256 != entry.sha256:
        raise BundleError(
            f"{name} is damaged: its checksum is not the one in manifest.json", remedy=_REMEDY
        )


def _read_gates(root: Path, manifest: Manifest) -> dict[str, Gate]:
    if "gate.json" not in manifest.files:
        return {}
    try:
        plain = json.loads(_read(root, manifest, "gate.json").decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"gate.json is not readable JSON: {error}", remedy=_REMEDY) from error
    fields = Fields(plain, "gate.json", lambda cause: BundleError(cause, remedy=_REMEDY))
    schema = fields.take("schema_version")
    if isinstance(schema, bool) or schema != GATES_SCHEMA_VERSION:
        raise BundleError(
            f"gate.json has schema_version {schema!r}, this moon reads {GATES_SCHEMA_VERSION}",
            remedy="Use a moon of the version that wrote it, or run moon calibrate again",
        )
    gates = {name: Gate.from_json(gate) for name, gate in fields.mapping("gates").items()}
    fields.done()
    if "default" not in gates:
        raise BundleError("gate.json has no default gate", remedy="Run moon calibrate again")
    return gates


def _read_training(root: Path, manifest: Manifest) -> TrainingFile:
    if _TRAINING not in manifest.files:
        return TrainingFile()
    try:
        plain = json.loads(_read(root, manifest, _TRAINING).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{_TRAINING} is not readable JSON: {error}", remedy=_REMEDY) from error
    return TrainingFile.from_json(
        plain, _TRAINING, lambda cause: BundleError(cause, remedy=_REMEDY)
    )


def _load_golden(data: bytes) -> Golden:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise BundleError(f"golden.npz is not readable: {error}", remedy=_REMEDY) from error


def _check_golden(golden: Golden, manifest: Manifest) -> None:
    expected = {"pixels", "logits", "label", "accept", "score"}
    expected |= {f"score_{name}" for name in manifest.scores}
    missing = sorted(expected - set(golden))
    if missing:
        raise BundleError(f"golden.npz lacks the array {missing[0]}", remedy=_REMEDY)
    pixels = golden["pixels"]
    shape = manifest.preprocess.shape
    if pixels.dtype != np.uint8 or pixels.shape[1:] != shape or len(pixels) < 1:
        raise BundleError(
            f"golden.npz: pixels must be uint8 [n, {shape[0]}, {shape[1]}, {shape[2]}], "
            f"not {pixels.dtype} {list(pixels.shape)}",
            remedy=_REMEDY,
        )
    n = len(pixels)
    for name in sorted(expected - {"pixels"}):
        wanted = (n, manifest.logits) if name == "logits" else (n,)
        if golden[name].shape != wanted:
            raise BundleError(
                f"golden.npz: {name} has shape {list(golden[name].shape)}, not {list(wanted)}",
                remedy=_REMEDY,
            )
