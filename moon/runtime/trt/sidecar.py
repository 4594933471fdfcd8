"""The record beside each engine: what it is, for which GPUs, and of which model.

An engine says little of itself, and what it says only TensorRT can read. Its record is plain JSON,
from a file that anybody may have written: everything is checked, and the engine's own checksum.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moon.fields import Fields
from moon.runtime.trt.package import PACKAGES, Name
from moon.runtime.trt.parts import Profile, Sparsity, Tensor, bad_record, maybe_texts

__all__ = [
    "SCHEMA_VERSION",
    "EngineRecord",
    "Profile",
    "Sparsity",
    "Tensor",
    "engine_name",
    "is_record",
    "record_name",
]

SCHEMA_VERSION = 1
_FOLDER = "engines/"
_RECORD = re.compile(r"engines/tensorrt(_rtx)?-[A-Za-z0-9_.+-]+\.json")
_ENGINE = re.compile(r"engines/tensorrt(_rtx)?-[A-Za-z0-9_.+-]+\.engine(\.zst)?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_BYTES = 1 << 24
_PRECISIONS = ("fp32", "fp16", "int8")
_COMPRESSIONS = (None, "zstd")
_CHECKED = ("header", "opened")


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """All that is known of an engine.

    Attributes:
        file: of the bundle, in engines/, ``.engine`` or ``.engine.zst``.
        sha256: of the engine, not compressed.
        size: of the engine in bytes, not compressed.
        compression: of the file: ``zstd``, or None.
        package: ``tensorrt`` or ``tensorrt_rtx``.
        package_version: that built it.
        parser_version: of the ONNX parser; "" where it does not say.
        moon: the version that built it.
        built: when, in UTC as ISO 8601.
        build_s: seconds the builder took.
        targets: compute capabilities it is for, as 86.
        gpu: name of the GPU it was built on; None where it was built without one.
        precision: of the layers; the last one and the scores are always fp32.
        inputs, outputs: by name. Inputs beside ``input`` are what calibrating sets.
        profile: numbers of images.
        flags: of the builder, by name.
        layers: of the engine itself, after fusing, by name; None where it could not be opened.
        checked: how far it was tried where it was built: ``header``, or ``opened`` on a GPU.
        parity: of the network that was built, run by ONNX Runtime, against the bundle's graph:
            ``images``, ``max_abs`` of a logit, ``top1_agreement``, ``gate_agreement`` or None.
        model_sha256: of the model, see :func:`moon.calibrated.model_hash`.
        sparsity: what 2:4 came to.
    """

    file: str
    sha256: str
    size: int
    compression: str | None = None
    package: Name
    package_version: str
    parser_version: str
    moon: str
    built: str
    build_s: float
    targets: tuple[int, ...]
    gpu: str | None
    precision: str
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    profile: Profile
    flags: tuple[str, ...]
    layers: tuple[str, ...] | None
    checked: str
    parity: Mapping[str, float | None]
    model_sha256: str
    sparsity: Sparsity

    @property
    def title(self) -> str:
        """Package and version, for people."""
        return f"{PACKAGES[self.package].title} {self.package_version}"

    @property
    def gpus(self) -> str:
        """What it is for, as ``sm_86 and sm_120``."""
        return " and ".join(f"sm_{sm}" for sm in self.targets)

    def to_json(self) -> dict[str, Any]:
        plain = {
            "bytes" if key == "size" else key: getattr(self, key)
            for key in self.__dataclass_fields__
        }
        plain["targets"] = [f"sm_{sm}" for sm in self.targets]
        for side in ("inputs", "outputs"):
            plain[side] = {name: one.to_json() for name, one in plain[side].items()}
        plain["profile"] = self.profile.to_json()
        plain["flags"] = list(self.flags)
        plain["layers"] = None if self.layers is None else list(self.layers)
        plain["parity"] = dict(self.parity)
        plain["sparsity"] = self.sparsity.to_json()
        return {"schema_version": SCHEMA_VERSION, **plain}

    def to_bytes(self) -> bytes:
        """The file."""
        return (json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> EngineRecord:
        """Read a file.

        Raises:
            BundleError: it is no such file; says why.
        """
        if len(data) > _MOST_BYTES:
            raise bad_record(f"it has {len(data):,} bytes, more than any record needs")
        try:
            plain = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise bad_record("it is not readable JSON") from error
        fields = Fields(plain, "the record", bad_record)
        schema = fields.take("schema_version")
        if isinstance(schema, bool) or schema != SCHEMA_VERSION:
            raise bad_record(f"it has another schema than {SCHEMA_VERSION}")
        record = _record(cls, fields)
        fields.done()
        return record


def engine_name(package: Name, version: str, targets: tuple[int, ...], precision: str) -> str:
    """Where a bundle keeps an engine: the same for the same package, GPUs and precision."""
    gpus = "+".join(f"sm_{sm}" for sm in targets)
    return f"{_FOLDER}{package}-{version}-{gpus}-{precision}.engine"


def record_name(engine: str) -> str:
    """Where the record of an engine is, compressed or not."""
    return re.sub(r"\.engine(\.zst)?$", ".json", engine)


def is_record(name: str) -> bool:
    """Whether a bundle's file of this name is the record of an engine."""
    return _RECORD.fullmatch(name) is not None


def _one_of(what: str, value: Any, known: tuple[Any, ...]) -> Any:
    if value not in known:
        names = ", ".join("null" if one is None else one for one in known)
        raise bad_record(f"{what} must be one of {names}, not {value!r}")
    return value


def _matching(what: str, value: str, pattern: re.Pattern[str]) -> str:
    if pattern.fullmatch(value) is None:
        raise bad_record(f"{what} cannot be {value!r}")
    return value


def _record(cls: type[EngineRecord], fields: Fields) -> EngineRecord:
    build_s = fields.number("build_s")
    return cls(
        file=_matching("file", fields.text("file"), _ENGINE),
        sha256=_matching("sha256", fields.text("sha256"), _SHA256),
        size=fields.integer("bytes"),
        compression=_one_of("compression", fields.take("compression"), _COMPRESSIONS),
        package=_one_of("package", fields.text("package"), tuple(PACKAGES)),
        package_version=fields.text("package_version"),
        parser_version=fields.text("parser_version"),
        moon=fields.text("moon"),
        built=fields.text("built"),
        build_s=build_s,
        targets=_targets(fields.texts("targets")),
        gpu=_maybe_text(fields, "gpu"),
        precision=_one_of("precision", fields.text("precision"), _PRECISIONS),
        inputs={name: Tensor.from_json(one) for name, one in fields.mapping("inputs").items()},
        outputs={name: Tensor.from_json(one) for name, one in fields.mapping("outputs").items()},
        profile=Profile.from_json(fields.take("profile")),
        flags=fields.texts("flags"),
        layers=maybe_texts(fields, "layers"),
        checked=_one_of("checked", fields.text("checked"), _CHECKED),
        parity=_parity(fields.mapping("parity")),
        model_sha256=_matching("model_sha256", fields.text("model_sha256"), _SHA256),
        sparsity=Sparsity.from_json(fields.take("sparsity")),
    )


def _targets(names: tuple[str, ...]) -> tuple[int, ...]:
    if not names or not all(re.fullmatch(r"sm_\d{2,3}", name) for name in names):
        raise bad_record(f"targets must be GPUs such as sm_86, not {', '.join(names) or 'none'}")
    return tuple(int(name.removeprefix("sm_")) for name in names)


def _maybe_text(fields: Fields, name: str) -> str | None:
    value = fields.take(name)
    if value is not None and not isinstance(value, str):
        raise bad_record(f"{name} must be a text or null")
    return value


def _parity(plain: Mapping[str, Any]) -> dict[str, float | None]:
    fields = Fields(plain, "parity", bad_record)
    return {name: fields.maybe_number(name) for name in plain}
