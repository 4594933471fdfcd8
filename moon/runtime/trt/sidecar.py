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

from moon.errors import BundleError
from moon.fields import Fields
from moon.runtime.trt.package import PACKAGES, Name

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
_PRECISIONS = ("fp32", "fp16")
_COMPRESSIONS = (None, "zstd")
_CHECKED = ("header", "opened")
_REMEDY = "Build the engine again: moon export BUNDLE --trt"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Numbers of images an engine takes together, and the one that it is fastest for."""

    min: int
    opt: int
    max: int

    def __str__(self) -> str:
        return f"{self.min},{self.opt},{self.max}"


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An input or output.

    Attributes:
        dtype: as numpy spells it, such as ``float32``.
        shape: -1 for the batch.
    """

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """What 2:4 came to.

    Attributes:
        pattern: of the model's weights, as its manifest has it.
        asked: whether the builder was told that weights are sparse.
        eligible: layers that could run on sparse tensor cores; None where nobody counted.
        picked: layers for which the builder chose such a kernel; None where it did not say.
        why: the reason for what is None, or "".
    """

    pattern: str
    asked: bool
    eligible: tuple[str, ...] | None
    picked: tuple[str, ...] | None
    why: str


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
            plain[side] = {
                name: {"dtype": one.dtype, "shape": list(one.shape)}
                for name, one in plain[side].items()
            }
        plain["profile"] = vars(self.profile)
        plain["flags"] = list(self.flags)
        plain["layers"] = _listed(self.layers)
        plain["parity"] = dict(self.parity)
        plain["sparsity"] = {
            **vars(self.sparsity),
            "eligible": _listed(self.sparsity.eligible),
            "picked": _listed(self.sparsity.picked),
        }
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
            raise _bad(f"it has {len(data):,} bytes, more than any record needs")
        try:
            plain = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise _bad("it is not readable JSON") from error
        fields = Fields(plain, "the record", _bad)
        schema = fields.take("schema_version")
        if isinstance(schema, bool) or schema != SCHEMA_VERSION:
            raise _bad(f"it has another schema than {SCHEMA_VERSION}")
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


def _bad(cause: str) -> BundleError:
    return BundleError(cause, remedy=_REMEDY)


def _one_of(what: str, value: Any, known: tuple[Any, ...]) -> Any:
    if value not in known:
        names = ", ".join("null" if one is None else one for one in known)
        raise _bad(f"{what} must be one of {names}, not {value!r}")
    return value


def _matching(what: str, value: str, pattern: re.Pattern[str]) -> str:
    if pattern.fullmatch(value) is None:
        raise _bad(f"{what} cannot be {value!r}")
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
        inputs={name: _tensor(one) for name, one in fields.mapping("inputs").items()},
        outputs={name: _tensor(one) for name, one in fields.mapping("outputs").items()},
        profile=_profile(fields.take("profile")),
        flags=fields.texts("flags"),
        layers=_maybe_texts(fields, "layers"),
        checked=_one_of("checked", fields.text("checked"), _CHECKED),
        parity=_parity(fields.mapping("parity")),
        model_sha256=_matching("model_sha256", fields.text("model_sha256"), _SHA256),
        sparsity=_sparsity(fields.take("sparsity")),
    )


def _targets(names: tuple[str, ...]) -> tuple[int, ...]:
    if not names or not all(re.fullmatch(r"sm_\d{2,3}", name) for name in names):
        raise _bad(f"targets must be GPUs such as sm_86, not {', '.join(names) or 'none'}")
    return tuple(int(name.removeprefix("sm_")) for name in names)


def _maybe_text(fields: Fields, name: str) -> str | None:
    value = fields.take(name)
    if value is not None and not isinstance(value, str):
        raise _bad(f"{name} must be a text or null")
    return value


def _maybe_texts(fields: Fields, name: str) -> tuple[str, ...] | None:
    value = fields.take(name)
    if value is None:
        return None
    if not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
        raise _bad(f"{name} must be a list of names or null")
    return tuple(value)


def _tensor(plain: object) -> Tensor:
    fields = Fields(plain, "a tensor", _bad)
    tensor = Tensor(dtype=fields.text("dtype"), shape=fields.integers("shape"))
    fields.done()
    return tensor


def _profile(plain: object) -> Profile:
    fields = Fields(plain, "profile", _bad)
    profile = Profile(**{name: fields.integer(name) for name in ("min", "opt", "max")})
    fields.done()
    if not 1 <= profile.min <= profile.opt <= profile.max:
        raise _bad(f"a profile must rise from at least 1, not {profile}")
    return profile


def _sparsity(plain: object) -> Sparsity:
    fields = Fields(plain, "sparsity", _bad)
    asked = fields.take("asked")
    if not isinstance(asked, bool):
        raise _bad("sparsity.asked must be true or false")
    found = Sparsity(
        pattern=fields.text("pattern"),
        asked=asked,
        eligible=_maybe_texts(fields, "eligible"),
        picked=_maybe_texts(fields, "picked"),
        why=fields.text("why"),
    )
    fields.done()
    return found


def _parity(plain: Mapping[str, Any]) -> dict[str, float | None]:
    fields = Fields(plain, "parity", _bad)
    return {name: fields.maybe_number(name) for name in plain}


def _listed(names: tuple[str, ...] | None) -> list[str] | None:
    return None if names is None else list(names)
