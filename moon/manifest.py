"""The manifest of a bundle: what it holds, read strictly from JSON and written back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from moon.data.preprocess import Preprocess
from moon.errors import BundleError, MoonError
from moon.fields import Fields
from moon.files import canonical_json, sha256_bytes
from moon.scores import SCORE_TABLE

__all__ = [
    "SCHEMA_VERSION",
    "FileEntry",
    "InputSpec",
    "Layer",
    "Manifest",
    "Sparsity",
]

SCHEMA_VERSION = 1
_LAYOUTS = {"float32": "NCHW", "uint8": "NHWC"}


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """The graph's image input.

    Attributes:
        name: name of the graph input.
        dtype: float32 (normalised by the runtime) or uint8 (normalised in the graph).
        layout: NCHW for float32, NHWC for uint8.
        size: height and width in pixels.
    """

    name: str
    dtype: str
    layout: str
    size: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "dtype": self.dtype,
            "layout": self.layout,
            "size": list(self.size),
        }

    @classmethod
    def from_json(cls, plain: object) -> InputSpec:
        fields = Fields(plain, "input", _bad)
        name, dtype, layout = fields.text("name"), fields.text("dtype"), fields.text("layout")
        size = fields.integers("size")
        fields.done()
        if _LAYOUTS.get(dtype) != layout:
            raise _bad(f"input must be float32 NCHW or uint8 NHWC, not {dtype} {layout}")
        if len(size) != 2 or min(size) < 1:
            raise _bad(f"input.size must be height and width, not {list(size)}")
        return cls(name=name, dtype=dtype, layout=layout, size=(size[0], size[1]))


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One weight tensor: its shape, how many values are not zero, and its forward FLOPs.

    ``flops`` counts a multiply-add as 2, dense, for one input; None when unknown.
    """

    shape: tuple[int, ...]
    nonzeros: int
    density: float
    flops: int | None = None

    def to_json(self) -> dict[str, Any]:
        plain = {"shape": list(self.shape), "nonzeros": self.nonzeros, "density": self.density}
        return plain if self.flops is None else {**plain, "flops": self.flops}

    @classmethod
    def from_json(cls, name: str, plain: object) -> Layer:
        fields = Fields(plain, f"sparsity.layers.{name}", _bad)
        layer = cls(
            shape=fields.integers("shape"),
            nonzeros=fields.integer("nonzeros"),
            density=fields.number("density"),
            flops=fields.maybe_integer("flops"),
        )
        fields.done()
        if min(layer.shape, default=1) < 1 or not 0 <= layer.nonzeros <= math.prod(layer.shape):
            raise _bad(f"sparsity.layers.{name} has {layer.nonzeros} nonzeros in {layer.shape}")
        return layer


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """How sparse the weights are.

    Attributes:
        share: zeros among the weights of all ``layers``, in [0, 1]; ``global`` in JSON.
        layers: weight tensors by name, in graph order.
        pattern: dense, unstructured, or the name of a structure.
    """

    share: float
    layers: Mapping[str, Layer]
    pattern: str

    def to_json(self) -> dict[str, Any]:
        return {
            "global": self.share,
            "layers": {name: layer.to_json() for name, layer in self.layers.items()},
            "pattern": self.pattern,
        }

    @classmethod
    def from_json(cls, plain: object) -> Sparsity:
        fields = Fields(plain, "sparsity", _bad)
        layers = fields.mapping("layers")
        sparsity = cls(
            share=fields.number("global"),
            layers={str(name): Layer.from_json(name, layer) for name, layer in layers.items()},
            pattern=fields.text("pattern"),
        )
        fields.done()
        if not 0 <= sparsity.share <= 1:
            raise _bad(f"sparsity.global must lie between 0 and 1, not {sparsity.share}")
        return sparsity


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """SHA-256 (hexadecimal) and size in bytes of one file."""

    sha256: str
    size: int

    def to_json(self) -> dict[str, Any]:
        return {"sha256": self.sha256, "bytes": self.size}

    @classmethod
    def from_json(cls, path: str, plain: object) -> FileEntry:
        fields = Fields(plain, f"files.{path}", _bad)
        entry = cls(sha256=fields.text("sha256"), size=fields.integer("bytes"))
        fields.done()
        if len(entry.sha256) != 64 or entry.size < 0:
            raise _bad(f"files.{path} must hold a SHA-256 and a size")
        return entry


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a runtime must know of a model without reading its graph.

    Attributes:
        name: the model's name.
        version: ``sha256:`` and the hash of the contents, gate.json and engines/ left out.
        classes: names of the K known classes; the graph's ``label`` is an index into them.
        unknown_index: column of the unknown class among the logits, None when there is none.
        input: the graph's image input.
        preprocess: from an image to that input.
        outputs: names of the graph's outputs.
        scores: the scores the graph carries, in the order its ``gate_score`` counts.
        sparsity: how sparse the weights are.
        provenance: where the model comes from; any JSON object.
        files: the bundle's other files by relative path.
        sha256: hash of this manifest with the field itself left out.
    """

    name: str
    version: str
    classes: tuple[str, ...]
    unknown_index: int | None
    input: InputSpec
    preprocess: Preprocess
    outputs: tuple[str, ...]
    scores: tuple[str, ...]
    sparsity: Sparsity
    provenance: Mapping[str, Any]
    files: Mapping[str, FileEntry]
    sha256: str

    @property
    def logits(self) -> int:
        """Number of logits: K, and one more with an unknown class."""
        return len(self.classes) + (self.unknown_index is not None)

    @property
    def precision(self) -> str:
        """fp32, or fp16 or int8 where the export says the graph computes in it."""
        export = self.provenance.get("export")
        given = export.get("precision") if isinstance(export, dict) else None
        return given if given in ("fp16", "int8") else "fp32"

    def to_json(self) -> dict[str, Any]:
        """The content of manifest.json."""
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "version": self.version,
            "classes": list(self.classes),
            "unknown_index": self.unknown_index,
            "input": self.input.to_json(),
            "preprocess": self.preprocess.to_json(),
            "outputs": list(self.outputs),
            "scores": list(self.scores),
            "sparsity": self.sparsity.to_json(),
            "provenance": dict(self.provenance),
            "files": {path: entry.to_json() for path, entry in self.files.items()},
            "sha256": self.sha256,
        }

    @classmethod
    def seal(cls, fields: Mapping[str, Any], files: Mapping[str, FileEntry]) -> Manifest:
        """A manifest of ``fields`` and ``files``, its version and hash computed.

        Args:
            fields: name, classes, unknown_index, input, preprocess, outputs, scores, sparsity
                and provenance as in manifest.json.
            files: the bundle's other files.

        Raises:
            BundleError: a field is missing, unknown or wrong.
        """
        plain = dict(fields)
        for computed in ("version", "sha256", "files"):
            plain.pop(computed, None)
        plain["schema_version"] = SCHEMA_VERSION
        plain["files"] = {path: files[path].to_json() for path in sorted(files)}
        plain["version"] = content_version(plain)
        plain["sha256"] = self_hash(plain)
        return cls.from_json(plain)

    @classmethod
    def from_json(cls, plain: object) -> Manifest:
        """Read manifest.json strictly.

        Raises:
            BundleError: unknown schema, a hash that does not match, or a field that is
                missing, unknown or wrong; names it.
        """
        fields = Fields(plain, "the manifest", _bad)
        schema = fields.take("schema_version")
        if isinstance(schema, bool) or schema != SCHEMA_VERSION:
            raise BundleError(
                f"manifest.json has schema_version {schema!r}, this moon reads {SCHEMA_VERSION}",
                remedy="Use a moon of the version that wrote the bundle, or export it again",
            )
        assert isinstance(plain, dict)
        _check_hashes(plain)
        preprocess = _preprocess(fields.take("preprocess"))
        manifest = cls(
            name=fields.text("name"),
            version=fields.text("version"),
            classes=fields.texts("classes"),
            unknown_index=fields.maybe_integer("unknown_index"),
            input=InputSpec.from_json(fields.take("input")),
            preprocess=preprocess,
            outputs=fields.texts("outputs"),
            scores=fields.texts("scores"),
            sparsity=Sparsity.from_json(fields.take("sparsity")),
            provenance=fields.mapping("provenance"),
            files=_files(fields.mapping("files")),
            sha256=fields.text("sha256"),
        )
        fields.done()
        _check_manifest(manifest)
        return manifest


def content_version(plain: Mapping[str, Any]) -> str:
    """The version of a manifest: its hash without gate.json, engines/, version and sha256."""
    content = {key: value for key, value in plain.items() if key not in ("version", "sha256")}
    content["files"] = {
        path: entry
        for path, entry in plain["files"].items()
        if path != "gate.json" and not path.startswith("engines/")
    }
    return "sha256:" + sha256_bytes(canonical_json(content))


def self_hash(plain: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's canonical JSON with its own ``sha256`` left out."""
    content = {key: value for key, value in plain.items() if key != "sha256"}
    return sha256_bytes(canonical_json(content))


def _check_hashes(plain: dict[str, Any]) -> None:
    try:
        agree = plain.get("sha256") == self_hash(plain)
        current = agree and plain.get("version") == content_version(plain)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _bad("it cannot be hashed, so it was not written by moon") from error
    if not agree:
        raise _bad("its contents do not match its sha256: it was changed or damaged")
    if not current:
        raise _bad("its version is not the hash of its contents")


def _preprocess(plain: object) -> Preprocess:
    if not isinstance(plain, dict):
        raise _bad("preprocess must be an object")
    try:
        return Preprocess.from_json(plain)
    except MoonError as error:
        raise _bad(f"preprocess: {error.cause}") from error


def _files(plain: dict[str, Any]) -> dict[str, FileEntry]:
    for path in plain:
        parts = PurePosixPath(path).parts
        odd = "\\" in path or "\0" in path or ":" in path or path != "/".join(parts)
        if odd or not parts or path.startswith("/") or ".." in parts or path == "manifest.json":
            raise _bad(f"it lists a file at {path!r}, which is not a plain path inside the bundle")
    return {path: FileEntry.from_json(path, entry) for path, entry in plain.items()}


def _check_manifest(manifest: Manifest) -> None:
    if not manifest.classes or len(set(manifest.classes)) != len(manifest.classes):
        raise _bad("classes must be one or more different names")
    index = manifest.unknown_index
    if index is not None and not 0 <= index <= len(manifest.classes):
        raise _bad(f"unknown_index {index} is outside the {len(manifest.classes) + 1} logits")
    if manifest.input.size != manifest.preprocess.crop:
        raise _bad("input.size differs from preprocess.crop")
    strange = [name for name in manifest.scores if name not in SCORE_TABLE]
    if strange or not manifest.scores or len(set(manifest.scores)) != len(manifest.scores):
        raise _bad(f"scores must be some of {', '.join(SCORE_TABLE)}, each once")
    expected = {"label", "accept", "score", "logits", *(f"score_{s}" for s in manifest.scores)}
    missing = sorted(expected - set(manifest.outputs))
    if missing:
        raise _bad(f"outputs lacks {', '.join(missing)}")


def _bad(cause: str) -> BundleError:
    return BundleError(
        f"manifest.json: {cause}", remedy="Take a good copy of the bundle, or export it again"
    )
