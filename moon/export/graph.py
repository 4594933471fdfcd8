"""Plumbing over ONNX graphs: who uses what, weights, renaming, pruning, ordering.

Everything here edits a ``ModelProto`` in place or reads it; nothing copies
weights without need.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from moon.errors import ExportError

__all__ = [
    "HEAD",
    "IR_VERSION",
    "OPSET",
    "array",
    "constants_to_initializers",
    "copied",
    "densify",
    "initializers",
    "prune",
    "rename",
    "set_initializer",
    "sort_nodes",
    "tidy",
    "users",
    "weight_names",
]

OPSET = 18
# Runtimes of two years ago refuse a newer IR, and nothing here needs one.
IR_VERSION = 10

# What the values and constants of the score head are named after.
HEAD = "head/"
# Operators whose second input is a weight.
_WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_WEIGHT_TYPES = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8}


def copied(model: ModelProto) -> ModelProto:
    """A deep copy."""
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def initializers(model: ModelProto) -> dict[str, TensorProto]:
    """The main graph's initializers by name."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def array(tensor: TensorProto) -> NDArray[np.generic]:
    """The values of a tensor, writable."""
    return np.array(numpy_helper.to_array(tensor))


def set_initializer(model: ModelProto, name: str, values: NDArray[np.generic]) -> None:
    """Replace the initializer ``name``, or add it, keeping its place in the file."""
    new = numpy_helper.from_array(values, name)
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(new)
            return
    model.graph.initializer.append(new)


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def _nested_names(graph: GraphProto) -> Iterator[str]:
    for node in graph.node:
        for nested in _subgraphs(node):
            yield from (tensor.name for tensor in (*nested.initializer, *nested.input))
            yield from (name for inner in nested.node for name in inner.output)
            yield from _nested_names(nested)


def _reads(node: NodeProto) -> Iterator[str]:
    """Every name the node reads, those its nested graphs take from outside included."""
    yield from (name for name in node.input if name)
    for graph in _subgraphs(node):
        for inner in graph.node:
            yield from _reads(inner)
        yield from (output.name for output in graph.output)


def users(model: ModelProto) -> dict[str, list[NodeProto]]:
    """For each value, the nodes of the main graph that read it."""
    found: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in dict.fromkeys(_reads(node)):
            found.setdefault(name, []).append(node)
    return found


def weight_names(model: ModelProto) -> list[str]:
    """Names of the initializers that are weights of Conv, Gemm or MatMul, in graph order.

    They are float, or int8 behind a DequantizeLinear. Constants of the score head (``head/...``)
    are not weights of the model.
    """
    known = initializers(model)
    stored = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    names: dict[str, None] = {}
    for node in model.graph.node:
        if node.op_type not in _WEIGHTED or len(node.input) < 2:
            continue
        candidates = node.input[:2] if node.op_type == "MatMul" else node.input[1:2]
        for name in (stored.get(name, name) for name in candidates):
            tensor = known.get(name)
            if tensor is None or tensor.data_type not in _WEIGHT_TYPES:
                continue
            if len(tensor.dims) >= 2 and not name.startswith(HEAD):
                names[name] = None
    return list(names)


def constants_to_initializers(model: ModelProto) -> None:
    """Turn ``Constant`` nodes of the main graph into initializers, so that weights are found."""
    kept = []
    for node in model.graph.node:
        values = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type != "Constant" or "sparse_value" in values:
            kept.append(node)
            continue
        attribute = next(iter(values.values()))
        if attribute.name == "value":
            tensor = TensorProto()
            tensor.CopyFrom(attribute.t)
        else:
            plain = onnx.helper.get_attribute_value(attribute)
            kind = np.float32 if attribute.name.startswith("value_float") else np.int64
            if attribute.name.startswith("value_string"):
                kept.append(node)
                continue
            tensor = numpy_helper.from_array(np.asarray(plain, dtype=kind))
        tensor.name = node.output[0]
        model.graph.initializer.append(tensor)
    del model.graph.node[:]
    model.graph.node.extend(kept)


def densify(model: ModelProto) -> None:
    """Make sparse initializers dense; both ways of writing the indices are understood."""
    for sparse in model.graph.sparse_initializer:
        dims = tuple(sparse.dims)
        indices = array(sparse.indices)
        values = array(sparse.values)
        dense = np.zeros(dims, dtype=values.dtype)
        if indices.ndim == 1:
            dense.reshape(-1)[indices] = values
        else:
            dense[tuple(indices.T)] = values
        model.graph.initializer.append(numpy_helper.from_array(dense, sparse.values.name))
    del model.graph.sparse_initializer[:]


def prune(model: ModelProto) -> None:
    """Drop nodes and initializers that no output needs."""
    needed = {output.name for output in model.graph.output}
    kept: list[NodeProto] = []
    for node in reversed(model.graph.node):
        if any(name in needed for name in node.output):
            kept.append(node)
            needed.update(_reads(node))
    nodes = list(reversed(kept))
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    for held, new in ((model.graph.node, nodes), (model.graph.initializer, tensors)):
        if len(held) != len(new):
            copies = [type(item).FromString(item.SerializeToString()) for item in new]
            del held[:]
            held.extend(copies)


def sort_nodes(model: ModelProto) -> None:
    """Put the main graph's nodes in an order in which each value is made before it is read.

    Raises:
        ExportError: the graph has a cycle or reads a value that nothing makes.
    """
    ready = {tensor.name for tensor in model.graph.initializer}
    ready |= {value.name for value in model.graph.input}
    made = {name for node in model.graph.node for name in node.output}
    waiting = list(model.graph.node)
    order: list[NodeProto] = []
    while waiting:
        later = []
        for node in waiting:
            # Names that a nested graph makes for itself are never in `made`, so never waited for.
            if all(name in ready or name not in made for name in _reads(node)):
                order.append(node)
                ready.update(node.output)
            else:
                later.append(node)
        if len(later) == len(waiting):
            raise ExportError(f"the graph has a cycle through node {later[0].name!r}")
        waiting = later
    copies = [NodeProto.FromString(node.SerializeToString()) for node in order]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def rename(model: ModelProto, new_name: Callable[[str], str]) -> None:
    """Rename every value, in nested graphs too, by ``new_name(old)``, which must be injective."""

    def walk(graph: GraphProto) -> None:
        for node in graph.node:
            for field in (node.input, node.output):
                for i, name in enumerate(field):
                    if name:
                        field[i] = new_name(name)
            for nested in _subgraphs(node):
                walk(nested)
        for held in (graph.input, graph.output, graph.value_info, graph.initializer):
            for item in held:
                item.name = new_name(item.name)
        for sparse in graph.sparse_initializer:
            sparse.values.name = new_name(sparse.values.name)

    walk(model.graph)


def _strip(graph: GraphProto) -> None:
    graph.ClearField("doc_string")
    del graph.metadata_props[:]
    for node in graph.node:
        node.ClearField("doc_string")
        del node.metadata_props[:]
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
        for nested in _subgraphs(node):
            _strip(nested)
    for held in (graph.input, graph.output, graph.value_info, graph.initializer):
        for item in held:
            item.ClearField("doc_string")
            del item.metadata_props[:]


def tidy(model: ModelProto, *, producer: str, taken: frozenset[str] = frozenset()) -> None:
    """Make the file say the same whoever exported it, wherever.

    Drops doc strings and metadata (exporters write source paths there) and the inferred shapes,
    gives nodes and the values between them plain names (``Conv_3``), makes every negative zero a
    zero, so that a weight stored as its nonzeros comes back bit for bit, and sets the IR version.

    Args:
        model: changed in place.
        producer: what the file names as its producer.
        taken: names that other parts of the graph will use; values of these names give way.
    """
    _strip(model.graph)
    del model.metadata_props[:]
    model.ClearField("doc_string")
    for field in ("producer_version", "domain", "model_version"):
        model.ClearField(field)
    model.producer_name = producer
    model.graph.name = "classifier"
    model.ir_version = min(model.ir_version, IR_VERSION) if model.ir_version else IR_VERSION
    # Written anew by whoever needs them: stale shapes are worse than none.
    del model.graph.value_info[:]

    names: dict[str, str] = {}
    fixed = {value.name for value in (*model.graph.input, *model.graph.output)}
    held = {tensor.name for tensor in model.graph.initializer}
    used = fixed | held | taken | set(_nested_names(model.graph))
    for name in held & taken:
        names[name] = _free(f"{name}_", used)
    for i, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{i}"
        for k, output in enumerate(node.output):
            if output and output not in fixed:
                wanted = f"{node.op_type.lower()}_{i}" + (f"_{k}" if k else "")
                names[output] = _free(wanted, used)
    rename(model, lambda name: names.get(name, name))
    for tensor in model.graph.initializer:
        if tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16):
            values = array(tensor)
            values[values == 0] = 0
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _free(wanted: str, used: set[str]) -> str:
    name = re.sub(r"[^\w./-]", "_", wanted)
    while name in used:
        name += "_"
    used.add(name)
    return name
