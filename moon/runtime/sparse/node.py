"""Nodes of an ONNX graph and their attributes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moon.runtime.sparse.message import Message, damaged, unsupported
from moon.runtime.sparse.tensor import read_sparse, read_tensor, refuse_external

__all__ = ["Attribute", "Node", "read_node"]

Attribute: TypeAlias = (
    "float | int | bytes | str | tuple[float, ...] | tuple[int, ...] | tuple[str, ...]"
    " | NDArray[Any]"
)
Constant: TypeAlias = "tuple[NDArray[Any], bool]"

_INPUTS, _OUTPUTS, _NAME, _OP_TYPE, _ATTRIBUTES, _DOMAIN = 1, 2, 3, 4, 5, 7
_A_NAME, _F, _I, _S, _T, _G, _FLOATS, _INTS, _STRINGS = 1, 2, 3, 4, 5, 6, 7, 8, 9
_TENSORS, _GRAPHS, _TYPE, _REFERENCE, _SPARSE, _SPARSES = 10, 11, 20, 21, 22, 23
# AttributeProto.AttributeType.
_KIND_FLOAT, _KIND_INT, _KIND_STRING, _KIND_TENSOR, _KIND_GRAPH = 1, 2, 3, 4, 5
_KIND_FLOATS, _KIND_INTS, _KIND_STRINGS, _KIND_SPARSE = 6, 7, 8, 11
_GRAPH_NODES, _GRAPH_INITIALIZERS, _GRAPH_OUTPUTS, _GRAPH_SPARSE = 1, 5, 12, 15
_OUTPUT_NAME = 1
_SPARSE_VALUES, _SPARSE_INDICES = 1, 2
# Protobuf's own readers stop at this depth too.
_DEEPEST = 100


@dataclass(frozen=True, eq=False)
class Node:
    """One operator of a graph.

    Attributes:
        inputs, outputs: names, "" where an optional one is left out.
        attributes: by name. Text is str, or bytes where it is not UTF-8; subgraphs and lists of
            tensors are the bytes of their messages.
        domain: "" for ONNX's own operators.
        raw: the node as it stands in the file, to write it again.
        captured: names its subgraphs read, or may read, from the graph around them.
    """

    op_type: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute]
    domain: str
    raw: bytes
    captured: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """How to name it in a message."""
        return f"{self.name or self.outputs[0]} ({self.op_type})"


def read_node(message: Message) -> tuple[Node, Constant | None]:
    """A node, and its values where it is a Constant (else None).

    Raises:
        BackendError: malformed, values outside the file, or of a type there is no numpy type for.
    """
    attributes: dict[str, Attribute] = {}
    captured: set[str] = set()
    bfloat16: set[str] = set()
    for entry in message.children(_ATTRIBUTES):
        name = entry.text(_A_NAME)
        if not name or name in attributes:
            raise damaged(f"an attribute has no name, or there are two called {name}")
        attributes[name], is_bfloat16 = _attribute(entry, name)
        if is_bfloat16:
            bfloat16.add(name)
        if isinstance(attributes[name], bytes):
            _visit_attribute(entry, captured, 0)
    domain = message.text(_DOMAIN)
    node = Node(
        op_type=message.text(_OP_TYPE),
        name=message.text(_NAME),
        inputs=message.texts(_INPUTS),
        outputs=message.texts(_OUTPUTS),
        attributes=attributes,
        domain="" if domain == "ai.onnx" else domain,
        raw=message.raw(),
        captured=tuple(sorted(captured)),
    )
    if not node.op_type or not any(node.outputs):
        raise damaged(f"the node {node.name} has no operator or no output")
    if (node.op_type, node.domain) != ("Constant", ""):
        return node, None
    return node, _constant(node, bool(bfloat16))


def _constant(node: Node, is_bfloat16: bool) -> Constant | None:
    if node.inputs or len(node.outputs) != 1 or len(node.attributes) != 1:
        raise damaged(f"the constant {node.title} is none")
    ((name, value),) = node.attributes.items()
    if name in ("value", "sparse_value") and isinstance(value, np.ndarray):
        return value, is_bfloat16
    kinds: dict[str, Any] = {"value_float": np.float32, "value_int": np.int64}
    kind = kinds.get(name.removesuffix("s"))
    if (
        kind is None
        or isinstance(value, (str, bytes))
        or isinstance(value, tuple) != (name.endswith("s"))
    ):
        raise unsupported(f"the constant {node.title} has the attribute {name}")
    values = np.array(value, kind)
    values.flags.writeable = False
    return values, False


def _attribute(entry: Message, name: str) -> tuple[Attribute, bool]:
    """An attribute's value, and whether it is a tensor of bfloat16."""
    kind = entry.integer(_TYPE)
    if entry.has(_REFERENCE):
        raise unsupported(f"the attribute {name} stands for one of a function")
    if kind in (_KIND_TENSOR, _KIND_SPARSE):
        return _tensor(entry, name, kind)
    return _plain(entry, kind), False


def _plain(entry: Message, kind: int) -> Attribute:
    if kind == _KIND_FLOAT:
        return entry.real(_F)
    if kind == _KIND_INT:
        return entry.integer(_I)
    if kind == _KIND_STRING:
        return _string(entry)
    if kind == _KIND_FLOATS:
        values = entry.fixed(_FLOATS, np.dtype("<f4"))
        entry.budget.take_fields(values.size)
        return tuple(map(float, values))
    if kind == _KIND_INTS:
        return entry.integers(_INTS)
    if kind == _KIND_STRINGS:
        return entry.texts(_STRINGS)
    if kind == _KIND_GRAPH:
        graph = entry.child(_G)
        return b"" if graph is None else graph.raw()
    if kind == 0:
        raise damaged("an attribute has no type")
    return entry.raw()


def _string(entry: Message) -> str | bytes:
    found = entry.one(_S)
    text = b"" if found is None else entry.data[found.start : found.end]
    try:
        return text.decode()
    except UnicodeDecodeError:
        return text


def _tensor(entry: Message, name: str, kind: int) -> tuple[NDArray[Any], bool]:
    tensor = entry.child(_T if kind == _KIND_TENSOR else _SPARSE)
    if tensor is None:
        raise damaged(f"the attribute {name} has no tensor")
    if kind == _KIND_TENSOR:
        return read_tensor(tensor)
    return read_sparse(tensor)[1:]


def _visit_graph(graph: Message, captured: set[str], depth: int) -> None:
    """Add what a subgraph may read from outside; refuse values in other files."""
    if depth > _DEEPEST:
        raise damaged("its graphs are nested too deep")
    for output in graph.children(_GRAPH_OUTPUTS):
        captured.add(output.text(_OUTPUT_NAME))
    for tensor in graph.children(_GRAPH_INITIALIZERS):
        refuse_external(tensor)
    for sparse in graph.children(_GRAPH_SPARSE):
        _visit_sparse(sparse)
    for node in graph.children(_GRAPH_NODES):
        captured.update(node.texts(_INPUTS))
        for entry in node.children(_ATTRIBUTES):
            _visit_attribute(entry, captured, depth)
    captured.discard("")


def _visit_attribute(entry: Message, captured: set[str], depth: int) -> None:
    for tensor in entry.children(_T) + entry.children(_TENSORS):
        refuse_external(tensor)
    for sparse in entry.children(_SPARSE) + entry.children(_SPARSES):
        _visit_sparse(sparse)
    for graph in entry.children(_G) + entry.children(_GRAPHS):
        _visit_graph(graph, captured, depth + 1)


def _visit_sparse(sparse: Message) -> None:
    for tensor in sparse.children(_SPARSE_VALUES) + sparse.children(_SPARSE_INDICES):
        refuse_external(tensor)
