"""From an ONNX graph to steps: what the engine can do itself, from the input on.

A node is taken when its operator is known here, in this form, and all it reads is; what follows
from one that is not is left for ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moon.errors import BackendError
from moon.runtime.sparse.fuse import fuse
from moon.runtime.sparse.model import Model, Node
from moon.runtime.sparse.operators import OPERATORS
from moon.runtime.sparse.steps import Step, Tensor
from moon.runtime.sparse.work import UnsupportedError, Work, fits

__all__ = ["Lowered", "lower"]

# Before it, Add and Mul had ways of their own to repeat a number.
_OLDEST_OPSET = 7
# Placing tensors takes time that grows with the square of their number.
_MOST_STEPS = 5000


@dataclass(frozen=True)
class Lowered:
    """A graph divided.

    Attributes:
        steps: in order.
        tensors: shapes by name, of all that steps read and make.
        rest: nodes that are left, in order.
        first: the first node left although all it reads was there, and why; "" when there is none.
    """

    steps: tuple[Step, ...]
    tensors: Mapping[str, Tensor]
    rest: tuple[Node, ...]
    first: str


def lower(model: Model, name: str, given: Tensor, *, fixed: bool = False) -> Lowered:
    """Take as much of a graph as possible.

    Args:
        model: folded.
        name: of the tensor everything starts from.
        given: its shape.
        fixed: the graph is for this number of images only, so that shapes in it may count on it.

    Raises:
        BackendError: two nodes make the same tensor, or one makes what was there before; a padding
            is negative; what is given is empty or larger than any tensor may be.
    """
    _check_names(model)
    _check_pads(model)
    if not fits(given, fixed):
        raise BackendError(
            f"the input {name} is empty, or larger than 1 GiB", remedy="Use --backend onnxruntime"
        )
    work = Work(model, name, given, fixed)
    rest: list[Node] = []
    first = ""
    for node in model.nodes:
        reason = _take(work, node, model.opset)
        if reason is not None:
            rest.append(node)
            first = first or (reason and f"{node.title}: {reason}")
    steps = fuse(work.steps, _kept(model, rest))
    return Lowered(tuple(steps), work.tensors, tuple(rest), first)


def _check_names(model: Model) -> None:
    there = {*model.constants, *(value.name for value in model.inputs)}
    for node in model.nodes:
        for name in node.outputs:
            if name and name in there:
                raise BackendError(f"the model is damaged: {name} is made twice")
            there.add(name)


def _check_pads(model: Model) -> None:
    """ONNX Runtime ends the process over these, where it does not know the shape before it runs."""
    for node in model.nodes:
        pads = node.attributes.get("pads")
        # Pad itself may cut off.
        if node.op_type == "Pad" or not isinstance(pads, tuple):
            continue
        if any(isinstance(pad, int) and pad < 0 for pad in pads):
            raise BackendError(f"the model is damaged: a padding of {node.title} is negative")


def _take(work: Work, node: Node, opset: int) -> str | None:
    """Add the step of a node: None, or why not; "" where something it reads is missing."""
    reads = [name for name in node.inputs if name]
    ready = all(name in work.tensors or name in work.constants for name in reads)
    if not ready or not any(name in work.tensors for name in reads):
        return ""
    needed, operator = OPERATORS.get(node.op_type, (0, None))
    if operator is None or node.domain or opset < _OLDEST_OPSET:
        return "the operator is not known"
    if len(work.steps) >= _MOST_STEPS:
        return "there are too many before it"
    if len(node.outputs) != 1 or not node.outputs[0] or node.captured:
        return "it has more than one result"
    if not all(node.inputs[:needed]) or len(node.inputs) < needed:
        return "it lacks an input"
    try:
        operator(work, node)
    except UnsupportedError as reason:
        return str(reason)
    return None


def _kept(model: Model, rest: Iterable[Node]) -> frozenset[str]:
    """Names that are read from outside the steps."""
    read = {name for node in rest for name in (*node.inputs, *node.captured)}
    return frozenset(read | {value.name for value in model.outputs})
