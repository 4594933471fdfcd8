"""What was measured of a model on one CPU: plans for its convolutions, as a bundle stores them.

Numbers alone, and from a file that anybody may have written: a plan that cannot be carried out is
passed over, and what is computed never depends on one but for rounding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from moon.errors import BundleError
from moon.fields import Fields

if TYPE_CHECKING:
    from moon.runtime.sparse.plan import Plan

__all__ = ["SCHEMA_VERSION", "Measured", "Target", "Tuned", "Tuning", "file_name", "is_tuning"]

SCHEMA_VERSION = 1
Verdict = Literal["sparse", "onnxruntime"]
_FOLDER = "engines/"
_NAME = re.compile(r"engines/sparse-[A-Za-z0-9_.-]+\.json")
_READINGS = ("direct", "frame", "shift", "rows", "gather")
# No tile or block is larger; what else is wrong with one depends on the layer.
_MOST = 1 << 31
_MOST_BYTES = 1 << 24
_MOST_IMAGES = 1 << 20


@dataclass(frozen=True)
class Target:
    """What plans were measured for; others may be slow elsewhere.

    Attributes:
        cpu: its name as LLVM spells it.
        isa: instruction set.
        kernels: a hash of the source of the kernels.
        model: a hash of the model, see :func:`moon.calibrated.model_hash`.
    """

    cpu: str
    isa: str
    kernels: str
    model: str

    def differs(self, other: Target) -> str:
        """What the first difference is, in words; "" where there is none."""
        pairs = {
            "another CPU": (self.cpu, other.cpu),
            "another instruction set": (self.isa, other.isa),
            "another version of the engine": (self.kernels, other.kernels),
            "another model": (self.model, other.model),
        }
        return next((what for what, (one, two) in pairs.items() if one != two), "")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Times of whole runs, interleaved, and of layers.

    Attributes:
        default_ms: with the plans that the engine chooses itself.
        tuned_ms: with the plans found.
        onnxruntime_ms: of ONNX Runtime with the whole model; None where it refuses that.
        layers: by tensor, microseconds with the default's plan and with the one found.
    """

    default_ms: float
    tuned_ms: float
    onnxruntime_ms: float | None
    layers: Mapping[str, tuple[float, float]]

    def to_json(self) -> dict[str, Any]:
        other = self.onnxruntime_ms
        return {
            "default_ms": round(self.default_ms, 4),
            "tuned_ms": round(self.tuned_ms, 4),
            "onnxruntime_ms": None if other is None else round(other, 4),
            "layers_us": {
                name: [round(time, 1) for time in self.layers[name]] for name in sorted(self.layers)
            },
        }

    @classmethod
    def from_json(cls, plain: object) -> Measured:
        fields = Fields(plain, "measured", BundleError)
        layers = fields.mapping("layers_us")
        times = Fields(layers, "layers_us", BundleError)
        pairs = {name: times.numbers(name) for name in layers}
        if not all(len(pair) == 2 for pair in pairs.values()):
            raise BundleError("layers_us must hold two times a layer")
        measured = cls(
            default_ms=fields.number("default_ms"),
            tuned_ms=fields.number("tuned_ms"),
            onnxruntime_ms=fields.maybe_number("onnxruntime_ms"),
            layers={name: (pair[0], pair[1]) for name, pair in pairs.items()},
        )
        fields.done()
        return measured


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was found for one number of images.

    Attributes:
        threads: that ran together meanwhile. Plans serve any number of threads, so that results
            do not depend on it.
        plans: by the tensor that a convolution makes, its plan as JSON has it.
        verdict: what is faster for the whole model.
        measured: times.
    """

    threads: int
    plans: Mapping[str, Mapping[str, Any]]
    verdict: Verdict
    measured: Measured

    def to_json(self) -> dict[str, Any]:
        return {
            "threads": self.threads,
            "verdict": self.verdict,
            "measured": self.measured.to_json(),
            "plans": {name: dict(self.plans[name]) for name in sorted(self.plans)},
        }

    @classmethod
    def from_json(cls, plain: object) -> Tuned:
        fields = Fields(plain, "a batch", BundleError)
        verdict: Any = fields.text("verdict")
        if verdict not in get_args(Verdict):
            raise BundleError(f"verdict must be one of {', '.join(get_args(Verdict))}")
        tuned = cls(
            threads=fields.integer("threads"),
            plans={name: _plan(one) for name, one in fields.mapping("plans").items()},
            verdict=verdict,
            measured=Measured.from_json(fields.take("measured")),
        )
        fields.done()
        return tuned


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """All that was found for a model on a CPU.

    Attributes:
        target: what it is for.
        moon: the version that measured.
        batches: by the number of images that are run together; a larger batch is run in pieces.
    """

    target: Target
    moon: str
    batches: Mapping[int, Tuned]

    @property
    def hands_over(self) -> bool:
        """ONNX Runtime is faster with the whole model, whatever number of images was measured."""
        return bool(self.batches) and all(
            one.verdict == "onnxruntime" for one in self.batches.values()
        )

    def plans(self, images: int) -> dict[str, Plan]:
        """Plans for so many images, by tensor."""
        from moon.runtime.sparse.plan import Plan

        tuned = self.batches.get(images)
        return {} if tuned is None else {name: Plan(**one) for name, one in tuned.plans.items()}

    def with_batches(self, older: Tuning) -> Tuning:
        """Keep what was found for other numbers of images, where it is for the same target."""
        if older.target != self.target:
            return self
        batches = {**older.batches, **self.batches}
        return Tuning(target=self.target, moon=self.moon, batches=batches)

    def to_bytes(self) -> bytes:
        """The file: equal findings give equal bytes."""
        plain = {
            "schema_version": SCHEMA_VERSION,
            "cpu": self.target.cpu,
            "isa": self.target.isa,
            "kernels_sha256": self.target.kernels,
            "model_sha256": self.target.model,
            "moon": self.moon,
            "batches": {str(n): self.batches[n].to_json() for n in sorted(self.batches)},
        }
        return (json.dumps(plain, indent=1, allow_nan=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Tuning:
        """Read a file.

        Raises:
            BundleError: it is no such file; says why.
        """
        if len(data) > _MOST_BYTES:
            raise BundleError(f"it has {len(data):,} bytes, more than any plans need")
        try:
            plain = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise BundleError("it is not readable JSON") from error
        fields = Fields(plain, "the file", BundleError)
        schema = fields.take("schema_version")
        if isinstance(schema, bool) or schema != SCHEMA_VERSION:
            raise BundleError(f"it has another schema than {SCHEMA_VERSION}")
        target = Target(
            cpu=fields.text("cpu"),
            isa=fields.text("isa"),
            kernels=fields.text("kernels_sha256"),
            model=fields.text("model_sha256"),
        )
        batches = fields.mapping("batches")
        tuning = cls(
            target=target,
            moon=fields.text("moon"),
            batches={_images(name): Tuned.from_json(one) for name, one in batches.items()},
        )
        fields.done()
        return tuning


def file_name(cpu: str, isa: str) -> str:
    """Where a bundle keeps the plans for a CPU."""
    return f"{_FOLDER}sparse-{re.sub('[^A-Za-z0-9_.-]', '-', cpu) or 'cpu'}-{isa}.json"


def is_tuning(name: str) -> bool:
    """Whether a bundle's file of this name holds plans for some CPU."""
    return _NAME.fullmatch(name) is not None


def _images(name: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,6}", name) or int(name) > _MOST_IMAGES:
        raise BundleError("batches must be named by numbers of images")
    return int(name)


def _plan(plain: object) -> dict[str, Any]:
    """A plan as it is spelled, in the range of any."""
    fields = Fields(plain, "a plan", BundleError)
    plan: dict[str, Any] = {
        name: fields.integer(name) for name in ("tile", "together", "block")
    }  # fmt: skip
    plan["reading"] = fields.text("reading")
    fields.done()
    if not all(1 <= plan[name] < _MOST for name in ("tile", "together", "block")):
        raise BundleError("a plan has numbers out of range")
    if plan["reading"] not in _READINGS:
        raise BundleError("a plan reads columns in a way that there is not")
    return plan
