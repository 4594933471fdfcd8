"""A model opened: what of it the engine runs, what ONNX Runtime does, and why."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from numpy.typing import NDArray

from moon.errors import BackendError
from moon.runtime.sparse.input import Input
from moon.runtime.sparse.isa import llvm
from moon.runtime.sparse.session import Session

if TYPE_CHECKING:
    from moon.runtime.sparse.division import Division, Foreign
    from moon.runtime.sparse.machine import Kernels, Machine
    from moon.runtime.sparse.memory import Guard
    from moon.runtime.sparse.model import Model, Value
    from moon.runtime.sparse.plan import Plan
    from moon.runtime.sparse.tuning import Tuning

__all__ = ["Opened", "Options", "open_model", "verified_here"]

# An ONNX file, or where it is.
Source: TypeAlias = "bytes | str"

# A larger file is read by ONNX Runtime alone.
_MOST_FILE = 1 << 31


@dataclass(frozen=True, kw_only=True)
class Options:
    """As the arguments of :class:`moon.runtime.sparse.engine.SparseEngine`."""

    threads: int
    isa: str
    force: bool
    plans: Mapping[str, Plan] | None
    spin: bool
    guard: Guard | None
    warn: Callable[[str], None]
    tuning: Tuning | None = None


@dataclass(frozen=True, kw_only=True)
class Opened:
    """Parts that run one after the other, each adding to the values there are.

    Attributes:
        parts: in order.
        inputs: what must be fed.
        optional: what may be fed.
        outputs: names, in the graph's order.
        handed_over: what ONNX Runtime runs, and why.
        layers: convolutions and linear layers that the engine runs, and those and the
            convolutions that ONNX Runtime runs.
        machine: what the engine's parts share; None where there are none.
        constants: outputs that nothing makes, by name.
    """

    parts: Sequence[Kernels | Session]
    inputs: tuple[Input, ...]
    optional: tuple[Input, ...]
    outputs: tuple[str, ...]
    handed_over: str
    layers: tuple[int, int] = (0, 0)
    machine: Machine | None = None
    constants: Mapping[str, NDArray[Any]] = field(default_factory=dict)


class _WholeError(Exception):
    """Why ONNX Runtime runs the whole model."""


def verified_here() -> str:
    """Why the engine is not used on this system; "" where it is."""
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        return ""
    return f"the engine is not verified on {platform.system()} {platform.machine()}"


def open_model(source: Source, options: Options) -> Opened:
    """Open a model.

    Raises:
        BackendError: the file cannot be read, or neither the engine nor ONNX Runtime takes it.
        UsageError, MissingExtraError: as :class:`moon.runtime.sparse.engine.SparseEngine`.
    """
    unread: BackendError | None = None
    try:
        _check_system(options.force)
        data = _contents(source) if isinstance(source, str) else source
        try:
            model = _read(data)
        except BackendError as error:
            unread = error
            raise _WholeError(error.cause) from error
        return _divided(model, options)
    except _WholeError as why:
        reason = str(why)
    except MemoryError:
        reason = "there is too little memory for the engine's tables"
    try:
        return _whole(source, reason, options)
    except BackendError as refused:
        if unread is None:
            raise
        raise BackendError(f"{unread.cause}; {refused.cause}", remedy=unread.remedy) from refused


def _check_system(force: bool) -> None:
    if not force and verified_here():
        raise _WholeError(verified_here())
    try:
        llvm()
    except BackendError as error:  # not that it is missing: that is another error
        raise _WholeError(error.cause) from error


def _contents(path: str) -> bytes:
    try:
        if Path(path).stat().st_size > _MOST_FILE:
            raise _WholeError("its file is larger than 2 GiB")
        return Path(path).read_bytes()
    except OSError as error:
        raise BackendError(
            f"could not read {path}: {error.strerror or error}", remedy="Check the path"
        ) from error


def _read(data: bytes) -> Model:
    from moon.runtime.sparse.fold import fold
    from moon.runtime.sparse.model import read_model

    return fold(read_model(data))


def _divided(model: Model, options: Options) -> Opened:
    from moon.runtime.sparse.division import Native, divide
    from moon.runtime.sparse.machine import Kernels, Machine

    _check_input(model)
    try:
        division = divide(model, force=options.force)
    except BackendError as error:
        raise _WholeError(error.cause) from error
    _check_worth(division, options.force)
    if options.tuning is not None and options.tuning.hands_over and not options.force:
        raise _WholeError("it was faster when both were measured on this CPU")
    foreign = _sessions(model, division, options)
    machine = Machine(options.threads, options.isa, options.guard, options.plans, options.tuning)
    (given,) = model.inputs
    with _closed_unless_done(machine):
        parts = [
            Kernels(part, machine, trusted=part.source == given.name)
            if isinstance(part, Native)
            else foreign[i]
            for i, part in enumerate(division.parts)
        ]
    left = division.convolutions_left
    if left:
        options.warn(f"ONNX Runtime runs {left} of the convolutions; {division.first}")
    outputs = tuple(value.name for value in model.outputs)
    return Opened(
        parts=parts,
        inputs=(_input(given),),
        optional=tuple(_input(value, optional=True) for value in model.feedable),
        outputs=outputs,
        handed_over=division.first,
        layers=(division.layers, division.layers + left),
        machine=machine,
        constants={name: model.constants[name] for name in outputs if name in model.constants},
    )


@contextmanager
def _closed_unless_done(machine: Machine) -> Iterator[None]:
    """What goes wrong in preparing the kernels: ONNX Runtime has none of it."""
    try:
        yield
    except ValueError as error:  # larger than the kernels' tables can say
        machine.close()
        raise _WholeError(f"it is too large for the engine: {error}") from error
    except BackendError as error:  # no memory for it
        machine.close()
        raise _WholeError(error.cause) from error
    except BaseException:
        machine.close()
        raise


def _input(value: Value, *, optional: bool = False) -> Input:
    shape = value.shape
    if shape is not None:
        shape = tuple(size if isinstance(size, int) else None for size in shape)
    return Input(value.name, value.dtype, shape, optional)


def _check_input(model: Model) -> None:
    if len(model.inputs) != 1:
        raise _WholeError(f"it has {len(model.inputs)} inputs")
    (value,) = model.inputs
    shape = value.shape
    if value.dtype is None or not shape:
        raise _WholeError(f"the input {value.name} is no tensor of a known number of dimensions")
    if not all(isinstance(size, int) and size > 0 for size in shape[1:]) or shape[0] == 0:
        raise _WholeError(f"the sizes of the input {value.name} vary, or are zero")


def _check_worth(division: Division, force: bool) -> None:
    from moon.runtime.sparse.worth import LITTLE, shortfall

    if not division.native:
        refused = division.refused
        why = shortfall(refused) or LITTLE if refused.dense else division.first
        raise _WholeError(why or shortfall(refused))
    if not force and (why := shortfall(division.effort)):
        raise _WholeError(why)


def _sessions(model: Model, division: Division, options: Options) -> dict[int, Session]:
    """ONNX Runtime's parts, by their place among all."""
    from moon.runtime.sparse.division import Native

    found = {}
    for i, part in enumerate(division.parts):
        if not isinstance(part, Native):
            try:
                graph = _cut(model, part)
                found[i] = Session(graph, threads=options.threads, spin=False)
            except BackendError as error:
                raise _WholeError(error.cause) from error
    return found


def _cut(model: Model, part: Foreign) -> bytes:
    from moon.runtime.sparse.cut import cut

    read = {name for node in part.nodes for name in (*node.inputs, *node.captured)}
    fed = [value for value in model.feedable if value.name in read]
    return cut(model, [*part.inputs, *fed], part.outputs, part.nodes)


def _whole(source: Source, why: str, options: Options) -> Opened:
    session = Session(source, threads=options.threads, spin=options.spin)
    options.warn(f"ONNX Runtime runs the whole model: {why}")
    return Opened(
        parts=[session],
        inputs=session.inputs,
        optional=session.optional,
        outputs=tuple(session.outputs),
        handed_over=f"the whole model: {why}",
    )
