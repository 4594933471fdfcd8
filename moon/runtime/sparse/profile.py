"""Where the time of a run goes: layer by layer, within whole runs of the network.

A layer that is run alone, over and over, finds its weights in the caches; so all are timed where
they stand, and medians over runs count.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moon.errors import UsageError
from moon.runtime.sparse.session import Session

if TYPE_CHECKING:
    from moon.runtime.sparse.engine import SparseEngine
    from moon.runtime.sparse.machine import Kernels, Machine
    from moon.runtime.sparse.timing import Spent

__all__ = ["Layer", "Profile", "profiled"]

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A node that the engine runs, with what is done for it before and after.

    Attributes:
        name: of the node and its operator.
        kind: what the engine does, such as ``conv``, ``pool max`` or ``reduce average``.
        shape: such as ``256->1024 1x1 /1 14x14``: channels, kernel, stride, what is made.
        tensor: name of what it makes; plans go by it.
        density: nonzero weights among all; None for layers without weights.
        macs: multiply-adds with nonzero weights, of all images.
        kernels: those that run.
        plan: how a convolution is done, as JSON has it; None for others.
        us: microseconds of a run.
        around_us: of these, those of frames made before and undone after.
        gmacs: billions of such multiply-adds a second, frames included; None without weights.
        share_of_limit: of what the threads' cores could do.
    """

    name: str
    kind: str
    shape: str
    tensor: str
    density: float | None
    macs: int
    kernels: tuple[str, ...]
    plan: Mapping[str, int | str] | None
    us: float
    around_us: float
    gmacs: float | None
    share_of_limit: float | None


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A model's run, taken apart.

    Attributes:
        images: in a run.
        together: of them, the most that the engine runs at a time; 0 where ONNX Runtime runs all.
        runs: that were timed.
        threads, isa: of the engine; "" where ONNX Runtime runs all.
        limit_gmacs: of one core, with operands from the first cache; None as above.
        layers: in order.
        handed_over: what ONNX Runtime runs, or the first node of it, and why.
        times: microseconds of a run, medians: ``convolutions``, ``linear`` and ``other`` layers,
            with nothing around them; ``frames``, all that is around them; ``onnxruntime``;
            ``between``: handing numbers in, out and around; ``total``, their sum; and ``run``, of
            whole runs, which is more where other processes came between.
    """

    images: int
    together: int
    runs: int
    threads: int
    isa: str
    limit_gmacs: float | None
    layers: tuple[Layer, ...]
    handed_over: str
    times: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """As ``moon inspect --engine --json`` prints it."""
        plain = asdict(self)
        layers = [{**asdict(one), "kernels": list(one.kernels)} for one in self.layers]
        return {"schema_version": SCHEMA_VERSION, **plain, "layers": layers}


def profiled(engine: SparseEngine, feeds: Mapping[str, NDArray[Any]], runs: int) -> Profile:
    """See :meth:`moon.runtime.sparse.engine.SparseEngine.profile`."""
    if runs < 1:
        raise UsageError(f"{runs} runs", remedy="Time at least one")
    parts, machine = engine.parts, engine.machine
    images = max((len(x) for x in feeds.values() if x.ndim), default=1)
    limit = _limit(machine)
    every = [_timed(parts, machine, feeds) for _ in range(runs)]
    layers: list[Layer] = []
    together = 0
    if machine is not None and limit is not None:
        spents = [spent for spent, _, _ in every if spent is not None]
        layers = _layers(spents, limit * machine.threads)
        together = max(program.images for program, _ in spents[0].programs.values())
    return Profile(
        images=images,
        together=together,
        runs=runs,
        threads=engine.threads,
        isa=engine.isa,
        limit_gmacs=limit,
        layers=tuple(layers),
        handed_over=engine.handed_over,
        times=_times(every, layers),
    )


def _limit(machine: Machine | None) -> float | None:
    if machine is None:
        return None
    from moon.runtime.sparse.limits import Limits

    return Limits(machine.jit.isa).gmacs()["memory"]


def _timed(
    parts: Sequence[Kernels | Session], machine: Machine | None, feeds: Mapping[str, Any]
) -> tuple[Spent | None, float, float]:
    """What a run took: the kernels, ONNX Runtime's parts and all, in seconds."""
    if machine is None:
        foreign = _run(parts, feeds)
        return None, foreign, foreign
    from moon.runtime.sparse.timing import watching

    start = time.perf_counter()
    with watching(machine) as spent:
        foreign = _run(parts, feeds)
    return spent, foreign, time.perf_counter() - start


def _run(parts: Sequence[Kernels | Session], feeds: Mapping[str, Any]) -> float:
    """Seconds of ONNX Runtime's parts in a run of all."""
    values, foreign = dict(feeds), 0.0
    for part in parts:
        start = time.perf_counter()
        values.update(part.run(values))
        if isinstance(part, Session):
            foreign += time.perf_counter() - start
    return foreign


def _times(
    every: Sequence[tuple[Spent | None, float, float]], layers: Sequence[Layer]
) -> dict[str, float]:
    def median(values: Sequence[float]) -> float:
        return float(np.median(values)) * 1e6

    def own(kinds: Sequence[str]) -> float:
        return sum(one.us - one.around_us for one in layers if one.kind in kinds)

    kernels = [0.0 if spent is None else spent.seconds for spent, _, _ in every]
    rest = [
        total - foreign - inside for (_, foreign, total), inside in zip(every, kernels, strict=True)
    ]
    weighted = ("conv", "linear")
    parts = {
        "convolutions": own(["conv"]),
        "linear": own(["linear"]),
        "frames": sum(one.around_us for one in layers),
        "other": sum(one.us - one.around_us for one in layers if one.kind not in weighted),
        "onnxruntime": median([foreign for _, foreign, _ in every]),
        "between": median(rest),
    }
    whole = median([total for _, _, total in every])
    return {**parts, "total": sum(parts.values()), "run": whole}


def _layers(spents: Sequence[Spent], limit: float) -> list[Layer]:
    """Of each program that ran; where a batch was run in pieces, of the largest one's shapes."""
    from moon.runtime.sparse.profile_layers import described

    found: dict[str, Layer] = {}
    for key in spents[0].programs:
        program = spents[0].programs[key][0]
        times = np.array([spent.programs[key][1] for spent in spents])
        for layer in described(program, times, spents[0].runs[key], limit):
            before = found.get(layer.tensor)
            found[layer.tensor] = layer if before is None else _joined(before, layer, limit)
    return list(found.values())


def _joined(one: Layer, other: Layer, limit: float) -> Layer:
    """A layer that two programs run, for pieces of a batch."""
    from moon.runtime.sparse.profile_layers import speed

    larger = max(one, other, key=lambda layer: layer.macs)
    us, macs = one.us + other.us, one.macs + other.macs
    gmacs, share = speed(macs, us, limit)
    return replace(
        larger,
        macs=macs,
        us=us,
        around_us=one.around_us + other.around_us,
        gmacs=gmacs,
        share_of_limit=share,
    )
