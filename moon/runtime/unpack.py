"""A packed graph made plain: every constant part computed once, every weight dense.

Packed graphs rebuild their weights from small constants when they are loaded. Tools that look
at weights, or runtimes that would rebuild them at every inference, need them plain. Nothing
here knows how a graph was packed: whatever depends on constants alone is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moon.errors import BackendError, BundleError
from moon.runtime.onnxruntime import open_session

if TYPE_CHECKING:
    import onnx

__all__ = ["dense_model", "weights"]

# Operators whose result differs from run to run, and one that tells a runtime, by standing in
# front of a layer, that the layer can compute in integers.
_KEPT = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial",
     "Bernoulli", "Dropout", "DequantizeLinear"}
)  # fmt: skip
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def dense_model(model: bytes) -> bytes:
    """The same graph with constant nodes and sparse initializers as dense initializers.

    Weights behind a DequantizeLinear stay in the type they are stored in. Initializers that are
    also graph inputs can be overridden, so what depends on them stays.
    Nested graphs are left as they are, but what they read from outside is kept.

    Args:
        model: an ONNX file.

    Returns:
        An ONNX file with the same inputs, outputs and results.

    Raises:
        BundleError: not an ONNX file.
        BackendError: onnx is missing, or ONNX Runtime cannot compute the constant part.
    """
    onnx = _onnx()
    proto = _parse(model)
    _densify(proto)
    graph = proto.graph
    constant, folded = _constant_nodes(graph)
    if folded:
        kept = [node for i, node in enumerate(graph.node) if i not in folded]
        made = {name for i in folded for name in graph.node[i].output if name}
        needed = made & {*_reads(kept), *(output.name for output in graph.output)}
        values = _compute(proto, [graph.node[i] for i in sorted(folded)], sorted(needed), constant)
        kept_outputs = needed & {output.name for output in graph.output}
        plain = [
            onnx.numpy_helper.from_array(value, name)
            for name, value in values.items()
            if name not in kept_outputs
        ]
        kept += [_constant(name, values[name]) for name in sorted(kept_outputs)]
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del graph.node[:]
        graph.node.extend(copies)
        graph.initializer.extend(plain)
    _drop_unused(graph)
    result: bytes = proto.SerializeToString()
    return result


def weights(model: bytes) -> dict[str, NDArray[Any]]:
    """The constant weights of Conv, ConvTranspose, Gemm and MatMul by name, dense.

    Those behind a DequantizeLinear are given as stored. Constants of the score head
    (``head/...``) are not weights of the model.

    Args:
        model: an ONNX file, packed or not.

    Raises:
        BundleError, BackendError: see :func:`dense_model`.
    """
    onnx = _onnx()
    graph = _parse(dense_model(model)).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    stored = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    found: dict[str, NDArray[Any]] = {}
    for node in graph.node:
        if node.op_type not in _WEIGHTED:
            continue
        read = node.input[:2] if node.op_type == "MatMul" else node.input[1:2]
        for name in (stored.get(name, name) for name in read):
            if name in tensors and len(tensors[name].dims) >= 2 and not name.startswith("head/"):
                found[name] = np.array(onnx.numpy_helper.to_array(tensors[name]))
    return found


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise BackendError(
            "unpacking a model needs the package onnx, which is not installed",
            remedy="pip install onnx",
        ) from error
    return onnx


def _parse(model: bytes) -> onnx.ModelProto:
    package = _onnx()
    try:
        proto: onnx.ModelProto = package.load_model_from_string(model)
    except Exception as error:  # protobuf's DecodeError lives in a private module
        raise BundleError(f"the model is not an ONNX file: {error}") from error
    return proto


def _densify(proto: onnx.ModelProto) -> None:
    onnx = _onnx()
    for sparse in proto.graph.sparse_initializer:
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(_dense(sparse), sparse.values.name)
        )
    del proto.graph.sparse_initializer[:]
    for node in proto.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "sparse_value":
                value = onnx.numpy_helper.from_array(_dense(attribute.sparse_tensor))
                attribute.CopyFrom(onnx.helper.make_attribute("value", value))


def _dense(sparse: onnx.SparseTensorProto) -> NDArray[Any]:
    onnx = _onnx()
    values = onnx.numpy_helper.to_array(sparse.values)
    indices = onnx.numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 2:  # one row of coordinates a value, instead of a linear index
        dense[tuple(indices.T)] = values
    else:
        dense.reshape(-1)[indices] = values
    return dense


def _constant_nodes(graph: onnx.GraphProto) -> tuple[set[str], set[int]]:
    """Names of constant values, and positions of the nodes that make them from constants."""
    fed = {node.name for node in graph.input}
    constant = {tensor.name for tensor in graph.initializer} - fed
    folded: set[int] = set()
    for i, node in enumerate(graph.node):  # nodes stand in an order they can run in
        inputs = [name for name in node.input if name]
        own = node.op_type == "Constant" or (inputs and node.op_type not in _KEPT)
        if own and not _subgraphs(node) and all(name in constant for name in inputs):
            folded.add(i)
            constant |= {name for name in node.output if name}
    return constant, folded


def _subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    found = []
    for attribute in node.attribute:
        if attribute.HasField("g"):
            found.append(attribute.g)
        found.extend(attribute.graphs)
    return found


def _reads(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    for node in nodes:
        yield from node.input
        for graph in _subgraphs(node):
            yield from _reads(graph.node)
            yield from (output.name for output in graph.output)


def _compute(
    proto: onnx.ModelProto, nodes: list[onnx.NodeProto], needed: list[str], constant: set[str]
) -> dict[str, NDArray[Any]]:
    """The values ``needed``, computed by a model of the constant ``nodes`` alone."""
    if not needed:
        return {}
    onnx = _onnx()
    part = onnx.ModelProto(ir_version=proto.ir_version)
    part.opset_import.extend(proto.opset_import)
    part.functions.extend(proto.functions)
    part.graph.name = "constants"
    part.graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    part.graph.initializer.extend(
        tensor for tensor in proto.graph.initializer if tensor.name in read & constant
    )
    # Types are left for ONNX Runtime to infer.
    part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in needed)
    session = open_session(part.SerializeToString(), optimise=False)
    try:
        values = session.run(needed, {})
    except Exception as error:  # its exceptions share no base class but Exception
        raise BackendError(f"ONNX Runtime cannot compute the packed weights: {error}") from error
    return dict(zip(needed, values, strict=True))


def _constant(name: str, value: NDArray[Any]) -> onnx.NodeProto:
    package = _onnx()
    tensor = package.numpy_helper.from_array(value)
    node: onnx.NodeProto = package.helper.make_node("Constant", [], [name], value=tensor)
    return node


def _drop_unused(graph: onnx.GraphProto) -> None:
    onnx = _onnx()
    used = {*_reads(graph.node), *(n.name for n in (*graph.input, *graph.output))}
    kept = [
        onnx.TensorProto.FromString(tensor.SerializeToString())
        for tensor in graph.initializer
        if tensor.name in used
    ]
    del graph.initializer[:]
    graph.initializer.extend(kept)
