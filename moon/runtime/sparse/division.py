"""A graph divided between the engine and ONNX Runtime, into parts that run one after the other.

The engine takes what follows from the input, and then, from the data of each convolution that is
left, what follows from that: whatever is worth it. ONNX Runtime gets what is before, between and
behind.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moon.runtime.sparse.layout import Planes
from moon.runtime.sparse.lower import Lowered, lower
from moon.runtime.sparse.model import Model, Node, Value
from moon.runtime.sparse.probe import probe
from moon.runtime.sparse.steps import Conv, Linear, Rows, Tensor
from moon.runtime.sparse.worth import LITTLE, Effort, pays

__all__ = ["MOST_BYTES", "Division", "Foreign", "Native", "divide"]

# Of one image as the engine reads it, and of the largest tensor of a batch.
MOST_BYTES = 1 << 30
_MOST_IMAGES = 1024
# Tensors from which the engine tries to go on, before it leaves the rest.
_MOST_TRIES = 64
_FLOAT = np.dtype(np.float32)


@dataclass(frozen=True)
class Native:
    """A part that the engine runs.

    Attributes:
        source: name of what it reads.
        given: its shape, for the fewest images.
        model: its nodes alone; outputs are what others read of it.
        lowered: its steps, for the fewest images.
        fixed: the graph is for that number of images only.
    """

    source: str
    given: Planes
    model: Model
    lowered: Lowered
    fixed: bool

    @property
    def results(self) -> list[str]:
        """Names of what others read of it."""
        return [value.name for value in self.model.outputs]

    def lower(self, images: int) -> Lowered:
        """Its steps for so many images."""
        if images == self.given.images:
            return self.lowered
        given = replace(self.given, images=images)
        return lower(self.model, self.source, given, fixed=self.fixed)


@dataclass(frozen=True)
class Foreign:
    """A part that ONNX Runtime runs.

    Attributes:
        nodes: in order.
        inputs: what it reads of other parts.
        outputs: names of what others read of it.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Division:
    """All parts in order.

    Attributes:
        parts: of the graph.
        first: the first node that ONNX Runtime runs, and why; "" where there is none.
        effort: of what the engine runs.
        refused: of the most it could have run and did not.
    """

    parts: tuple[Native | Foreign, ...]
    first: str
    effort: Effort
    refused: Effort

    @property
    def native(self) -> int:
        """Parts that the engine runs."""
        return sum(isinstance(part, Native) for part in self.parts)

    @property
    def layers(self) -> int:
        """Convolutions and linear layers that the engine runs."""
        native = [part for part in self.parts if isinstance(part, Native)]
        return sum(isinstance(s, (Conv, Linear)) for part in native for s in part.lowered.steps)

    @property
    def convolutions_left(self) -> int:
        """Convolutions that ONNX Runtime runs."""
        foreign = [part for part in self.parts if isinstance(part, Foreign)]
        return sum(node.op_type == "Conv" for part in foreign for node in part.nodes)


def divide(model: Model, *, force: bool = False) -> Division:
    """Divide a graph with one input, whose sizes are fixed but for the number of images.

    Args:
        model: folded.
        force: the engine takes all it can, worth it or not.

    Raises:
        BackendError: the graph is damaged, or ONNX Runtime refuses it.
    """
    dividing = _Dividing(model, force)
    dividing.from_input()
    dividing.from_convolutions()
    dividing.hand_over(dividing.nodes)
    return dividing.result()


class _Dividing:
    """What was divided so far, and the nodes that are left."""

    def __init__(self, model: Model, force: bool) -> None:
        self._model, self._force = model, force
        self.nodes = list(model.nodes)
        self._parts: list[Native | Foreign] = []
        self._effort = self._refused = Effort()
        self._first = ""
        (value,) = model.inputs
        self._input = value
        shape = value.shape or (None,)
        self._fixed = shape[0] if isinstance(shape[0], int) else None
        self._known = {value.name: value}

    def result(self) -> Division:
        """All of it."""
        return Division(tuple(self._parts), self._first, self._effort, self._refused)

    def from_input(self) -> None:
        """Take what follows from the input."""
        if not self.nodes:
            return
        first = self.nodes[0].title
        given = _planes(self._input, self._fixed)
        if given is None:
            self._first = f"{first}: the input is {_spelled(self._input)}, not float32 [N, C, H, W]"
            return
        self._first = self._take(self._input.name, given).first
        if self._refused.dense:
            self._first = f"{first}: {LITTLE}"

    def from_convolutions(self) -> None:
        """Take what follows from the data of convolutions that are left."""
        if not any(_data(node) for node in self.nodes):
            return
        made = [name for node in self.nodes for name in node.outputs if name]
        self._known |= {value.name: value for value in probe(self._model, made, self._fixed)}
        tried: set[str] = set()
        while len(tried) < _MOST_TRIES:
            left = (_data(node) for node in self.nodes)
            name = next((one for one in left if one and one not in tried), None)
            if name is None:
                return
            tried.add(name)
            self._explain(name)
            given = _planes(self._known.get(name), self._fixed)
            if given is not None:
                self._take(name, given)

    def _explain(self, name: str) -> None:
        """Say that a graph computes in another type, rather than what is not known of it."""
        value = self._known.get(name)
        if value is not None and value.dtype not in (None, _FLOAT) and not self._effort.dense:
            reader = next(node for node in self.nodes if _data(node) == name)
            self._first = f"{reader.title}: it computes in {value.dtype}"

    def hand_over(self, nodes: Sequence[Node]) -> None:
        """Give nodes to ONNX Runtime."""
        own = set(nodes)
        self.nodes = [node for node in self.nodes if node not in own]
        made = {name for node in nodes for name in node.outputs if name}
        outputs = sorted(made & self._wanted(self.nodes))
        if not outputs:
            return
        read = _reads(nodes) - made
        inputs = [value for name, value in self._known.items() if name in read]
        self._parts.append(Foreign(tuple(nodes), tuple(inputs), tuple(outputs)))

    def _take(self, name: str, given: Planes) -> Lowered:
        """Take what follows from a tensor, where that is worth it."""
        before = _makers(self.nodes, name)
        own = set(before)
        after = tuple(node for node in self.nodes if node not in own)
        fixed = self._fixed is not None
        lowered = lower(replace(self._model, nodes=after), name, given, fixed=fixed)
        made = {step.target for step in lowered.steps}
        results = sorted(made & self._wanted(lowered.rest))
        effort = Effort.of(lowered.steps, lowered.tensors)
        crossing = [given, *(lowered.tensors[one] for one in results)]
        if not results or not (self._force or pays(effort, crossing)):
            self._refused = max(self._refused, effort, key=lambda one: one.dense)
            return lowered
        if before:
            self.hand_over(before)
        rest = set(lowered.rest)
        part = replace(
            self._model,
            nodes=tuple(node for node in after if node not in rest),
            outputs=tuple(self._value(one, lowered.tensors[one]) for one in results),
        )
        self._parts.append(Native(name, given, part, lowered, fixed))
        self._known |= {value.name: value for value in part.outputs}
        self.nodes = list(lowered.rest)
        self._effort += effort
        return lowered

    def _value(self, name: str, tensor: Tensor) -> Value:
        """With its shape: by it ONNX Runtime checks a part before it runs, not while it does."""
        shape = self._input.shape or (None,)
        if isinstance(tensor, Rows):
            return Value(name, _FLOAT, (shape[0], tensor.features))
        return Value(name, _FLOAT, (shape[0], tensor.channels, tensor.height, tensor.width))

    def _wanted(self, readers: Iterable[Node]) -> set[str]:
        """Names that these nodes, or who runs the model, read."""
        return _reads(readers) | {value.name for value in self._model.outputs}


def _reads(nodes: Iterable[Node]) -> set[str]:
    return {name for node in nodes for name in (*node.inputs, *node.captured) if name}


def _makers(nodes: Sequence[Node], name: str) -> list[Node]:
    """The nodes that a tensor needs, in order."""
    needed, found = {name}, []
    for node in reversed(nodes):
        if needed.intersection(node.outputs):
            found.append(node)
            needed |= _reads([node])
    return found[::-1]


def _data(node: Node) -> str:
    """What a convolution reads; "" for other nodes."""
    return node.inputs[0] if node.op_type == "Conv" and node.inputs else ""


def _planes(value: Value | None, fixed: int | None) -> Planes | None:
    """The shape as the engine has it, or None where it cannot read such a tensor."""
    if value is None or value.dtype != _FLOAT or value.shape is None or len(value.shape) != 4:
        return None
    sizes = [size for size in value.shape[1:] if isinstance(size, int) and size > 0]
    images = fixed or 1
    if len(sizes) < 3 or (fixed is not None and value.shape[0] != fixed):
        return None
    if 4 * math.prod(sizes) > MOST_BYTES or images > _MOST_IMAGES:
        return None
    return Planes(sizes[0], images, sizes[1], sizes[2])


def _spelled(value: Value) -> str:
    shape = "of any shape" if value.shape is None else [size or "N" for size in value.shape]
    return f"{value.dtype or 'no tensor'} {str(shape).replace(chr(39), '')}"
