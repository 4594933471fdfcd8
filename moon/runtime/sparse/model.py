"""An ONNX file as plain Python values, without the onnx package.

Reads the main graph: its nodes in order, every constant as a numpy array, inputs and outputs. It
trusts nothing: damaged or deceptive bytes, and whatever the engine has no use for (values in other
files, local functions, tensors of odd types), raise BackendError. Training information is skipped.

Field numbers are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moon.runtime.sparse.message import Budget, Message, damaged, unsupported
from moon.runtime.sparse.node import Attribute, Node, read_node
from moon.runtime.sparse.tensor import (
    DTYPES,
    MOST_BYTES,
    allowance,
    read_sparse,
    read_tensor,
    tensor_name,
)

__all__ = ["Attribute", "Dimension", "Model", "Node", "Value", "read_model"]

Dimension: TypeAlias = "int | str | None"

_IR_VERSION, _GRAPH, _OPSETS, _FUNCTIONS = 1, 7, 8, 25
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
_NODES, _INITIALIZERS, _INPUTS, _OUTPUTS, _SPARSE = 1, 5, 11, 12, 15
_VALUE_NAME, _VALUE_TYPE, _TENSOR_TYPE, _ELEM_TYPE, _SHAPE = 1, 2, 1, 1, 2
_DIMENSIONS, _SIZE, _SYMBOL = 1, 1, 2
# Since this version of the format an initializer need not be an input too, and one that is can be
# fed; before, every initializer is an input, and none can.
_IR_OPTIONAL_INPUTS = 4
_MOST_RANK = 32


@dataclass(frozen=True)
class Value:
    """An input or output of a graph.

    Attributes:
        dtype: None where it is no tensor, or one of a type numpy lacks.
        shape: sizes; a name or None for one that varies; None as a whole where the rank does.
    """

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[Dimension, ...] | None


@dataclass(frozen=True, eq=False)
class Model:
    """The main graph of an ONNX file.

    Attributes:
        nodes: in the file's order, in which each reads only what is there already. No Constant
            nodes: those are constants.
        constants: by name. Read-only; views of the file where possible, hence maybe unaligned:
            ``numpy.require(values, requirements="CA")`` before an address is taken.
        inputs: what must be fed.
        outputs: of the graph; one may be a constant or an input.
        opset, ir_version: of ONNX's own operators, and of the format.
        feedable: inputs that may be fed; else they are as in ``constants``.
        domains: opsets of further domains.
        bfloat16: constants that are float32 here and bfloat16 in the file.
        file_size: in bytes; bounds what folding may allocate.
    """

    nodes: tuple[Node, ...]
    constants: Mapping[str, NDArray[Any]]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    opset: int
    ir_version: int
    feedable: tuple[Value, ...] = ()
    domains: Mapping[str, int] = field(default_factory=dict)
    bfloat16: frozenset[str] = frozenset()
    file_size: int = 0

    @cached_property
    def optional(self) -> frozenset[str]:
        """Names of what may be fed."""
        return frozenset(value.name for value in self.feedable)


def read_model(data: bytes) -> Model:
    """Read an ONNX file.

    Args:
        data: the whole file. Constants keep it alive.

    Raises:
        BackendError: see the module.
    """
    if len(data) > MOST_BYTES:
        raise unsupported("it is larger than 2 GiB")
    message = Message(data, 0, len(data), Budget(allowance(len(data))))
    graph = message.child(_GRAPH)
    if graph is None:
        raise damaged("it has no graph")
    if message.has(_FUNCTIONS):
        raise unsupported("it has local functions")
    domains = _opsets(message)
    opset, ir_version = domains.pop("", 0), message.integer(_IR_VERSION)
    if opset < 1 or ir_version < 1:
        raise damaged("it names no version of the format or of its operators")
    constants, bfloat16 = _initializers(graph)
    given = [_value(value) for value in graph.children(_INPUTS)]
    needed = tuple(value for value in given if value.name not in constants)
    feedable = tuple(value for value in given if value.name in constants)
    nodes = _nodes(graph, constants, bfloat16)
    model = Model(
        nodes=nodes,
        constants=constants,
        inputs=needed,
        outputs=tuple(_value(value) for value in graph.children(_OUTPUTS)),
        opset=opset,
        ir_version=ir_version,
        feedable=feedable if ir_version >= _IR_OPTIONAL_INPUTS else (),
        domains=domains,
        bfloat16=frozenset(bfloat16),
        file_size=len(data),
    )
    _check_names(model)
    return model


def _opsets(message: Message) -> dict[str, int]:
    domains: dict[str, int] = {}
    for opset in message.children(_OPSETS):
        domain = opset.text(_OPSET_DOMAIN)
        domain = "" if domain == "ai.onnx" else domain
        if domain in domains:
            raise damaged(f"it names two versions of the operators {domain or 'of ONNX'}")
        domains[domain] = opset.integer(_OPSET_VERSION)
    return domains


def _initializers(graph: Message) -> tuple[dict[str, NDArray[Any]], set[str]]:
    constants: dict[str, NDArray[Any]] = {}
    bfloat16: set[str] = set()
    for tensor in graph.children(_INITIALIZERS):
        _add(constants, bfloat16, tensor_name(tensor), *read_tensor(tensor))
    for sparse in graph.children(_SPARSE):
        _add(constants, bfloat16, *read_sparse(sparse))
    return constants, bfloat16


def _add(
    constants: dict[str, NDArray[Any]],
    bfloat16: set[str],
    name: str,
    values: NDArray[Any],
    is_bfloat16: bool,
) -> None:
    if not name or name in constants:
        raise damaged(f"a constant has no name, or there are two called {name}")
    constants[name] = values
    if is_bfloat16:
        bfloat16.add(name)


def _nodes(
    graph: Message, constants: dict[str, NDArray[Any]], bfloat16: set[str]
) -> tuple[Node, ...]:
    """The nodes; the constants among them join the others."""
    kept = []
    for message in graph.children(_NODES):
        node, constant = read_node(message)
        if constant is None:
            kept.append(node)
        else:
            _add(constants, bfloat16, node.outputs[0], *constant)
    return tuple(kept)


def _check_names(model: Model) -> None:
    """Every name stands for one thing, and is there before it is read."""
    known = set(model.constants)
    for value in model.inputs:
        if value.name in known:
            raise damaged(f"there are two inputs called {value.name}")
        known.add(value.name)
    for node in model.nodes:
        for name in node.inputs:
            if name and name not in known:
                raise damaged(f"the node {node.title} reads {name}, which is not there yet")
        for name in node.outputs:
            if name in known:
                raise damaged(f"there are two values called {name}")
            if name:
                known.add(name)
    for value in model.outputs:
        if value.name not in known:
            raise damaged(f"nothing makes the output {value.name}")


def _value(message: Message) -> Value:
    name = message.text(_VALUE_NAME)
    if not name:
        raise damaged("an input or output has no name")
    kind = message.child(_VALUE_TYPE)
    tensor = None if kind is None else kind.child(_TENSOR_TYPE)
    if tensor is None:
        return Value(name, None, None)
    dtype = DTYPES.get(tensor.integer(_ELEM_TYPE))
    shape = tensor.child(_SHAPE)
    if shape is None:
        return Value(name, dtype, None)
    dimensions = shape.children(_DIMENSIONS)
    if len(dimensions) > _MOST_RANK:
        raise damaged(f"{name} has {len(dimensions)} dimensions")
    return Value(name, dtype, tuple(map(_dimension, dimensions)))


def _dimension(message: Message) -> Dimension:
    if message.has(_SIZE):
        size = message.integer(_SIZE)
        # Some exporters write -1 for a size that varies.
        return size if size >= 0 else None
    return message.text(_SYMBOL) or None
