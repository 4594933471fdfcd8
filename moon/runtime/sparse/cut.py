"""A part of a graph as an ONNX file of its own.

For handing what the engine does not run, such as the score head, to ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.errors import BackendError
from moon.runtime.sparse.model import Dimension, Model, Node, Value
from moon.runtime.sparse.tensor import BFLOAT16, DTYPES, MOST_BYTES
from moon.wire import bytes_field, bytes_header, varint_field

__all__ = ["cut"]

# Field numbers of onnx.proto.
_IR_VERSION, _GRAPH, _OPSETS, _OPSET_DOMAIN, _OPSET_VERSION = 1, 7, 8, 1, 2
_NODES, _GRAPH_NAME, _INITIALIZERS, _INPUTS, _OUTPUTS = 1, 2, 5, 11, 12
_VALUE_NAME, _VALUE_TYPE, _TENSOR_TYPE, _ELEM_TYPE, _SHAPE = 1, 2, 1, 1, 2
_DIMENSIONS, _SIZE, _SYMBOL = 1, 1, 2
_TENSOR_DIMS, _TENSOR_KIND, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9

_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
# Of the graph, so that the file with its header stays below 2 GiB.
_MOST = MOST_BYTES - (1 << 20)
# Before it every initializer had to be an input as well.
_OLDEST_IR = 4


def cut(
    model: Model, inputs: Sequence[Value], outputs: Sequence[str], nodes: Sequence[Node]
) -> bytes:
    """An ONNX file of some of a model's nodes and the constants they need.

    Args:
        model: where the nodes and constants are from.
        inputs: what is fed. A constant may be among them: one of ``model.optional`` keeps its
            value for when it is not fed, any other must be fed.
        outputs: names of what the nodes make, of constants or of inputs, in the file's order.
        nodes: in an order in which each reads only what is there.

    Raises:
        BackendError: a node or output needs what is not there; an input whose type has no number
            in ONNX; a file of more than 2 GiB.
    """
    fed = {value.name for value in inputs}
    constants = _constants(model, fed, outputs, nodes)
    declared = {value.name: value for value in model.outputs}
    if sum(model.constants[name].nbytes for name in constants) > _MOST:
        raise _too_large()
    graph: list[bytes | memoryview] = [bytes_field(_NODES, node.raw) for node in nodes]
    graph.append(bytes_field(_GRAPH_NAME, b"part"))
    for name in constants:
        graph += _tensor(name, model.constants[name], name in model.bfloat16)
    graph += [bytes_field(_INPUTS, _value(value)) for value in inputs]
    for name in outputs:
        value = declared.get(name, Value(name, None, None))
        graph.append(bytes_field(_OUTPUTS, _value(value, typed=value.dtype is not None)))
    size = sum(map(_length, graph))
    if size > _MOST:
        raise _too_large()
    head = varint_field(_IR_VERSION, max(model.ir_version, _OLDEST_IR)) + b"".join(
        bytes_field(_OPSETS, opset) for opset in _opsets(model)
    )
    return b"".join([head, bytes_header(_GRAPH, size), *graph])


def _constants(
    model: Model, fed: set[str], outputs: Sequence[str], nodes: Sequence[Node]
) -> list[str]:
    """Names of the constants to write, in the model's order."""
    made = set(fed)
    needed: set[str] = fed & model.optional
    for node in nodes:
        missing = [name for name in node.inputs if name and name not in made]
        needed.update(_known(model, missing, node.title))
        # A subgraph's own names are among what it may read from outside.
        needed.update(
            name for name in node.captured if name not in made and name in model.constants
        )
        made.update(name for name in node.outputs if name)
    needed.update(_known(model, [name for name in outputs if name not in made], "an output"))
    return [name for name in model.constants if name in needed]


def _known(model: Model, names: Iterable[str], reader: str) -> Iterator[str]:
    for name in names:
        if name not in model.constants:
            raise BackendError(
                f"{reader} needs {name}, which is not in this part of the model",
                remedy="Run the whole model with ONNX Runtime",
            )
        yield name


def _opsets(model: Model) -> Iterator[bytes]:
    for domain, version in {"": model.opset, **model.domains}.items():
        named = bytes_field(_OPSET_DOMAIN, domain.encode()) if domain else b""
        yield named + varint_field(_OPSET_VERSION, version)


def _tensor(name: str, values: NDArray[Any], is_bfloat16: bool) -> list[bytes | memoryview]:
    """An initializer, its values not copied if they need not be."""
    kind = BFLOAT16 if is_bfloat16 else _KINDS[values.dtype]
    shape = values.shape
    if is_bfloat16:
        values = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    raw: bytes | memoryview = b""
    if values.size:
        raw = np.asarray(values, order="C").reshape(-1).view(np.uint8).data
    head = b"".join(varint_field(_TENSOR_DIMS, size) for size in shape)
    head += varint_field(_TENSOR_KIND, kind) + bytes_field(_TENSOR_NAME, name.encode())
    head += bytes_header(_TENSOR_RAW, len(raw))
    return [bytes_header(_INITIALIZERS, len(head) + len(raw)) + head, raw]


def _value(value: Value, *, typed: bool = True) -> bytes:
    name = bytes_field(_VALUE_NAME, value.name.encode())
    if not typed:
        # ONNX Runtime infers what an output is.
        return name
    kind = None if value.dtype is None else _KINDS.get(value.dtype)
    if kind is None:
        raise BackendError(
            f"the input {value.name} of a part of the model is of the type {value.dtype}",
            remedy="Run the whole model with ONNX Runtime",
        )
    tensor = varint_field(_ELEM_TYPE, kind)
    if value.shape is not None:
        tensor += bytes_field(_SHAPE, b"".join(map(_dimension, value.shape)))
    return name + bytes_field(_VALUE_TYPE, bytes_field(_TENSOR_TYPE, tensor))


def _dimension(size: Dimension) -> bytes:
    if size is None:
        return bytes_field(_DIMENSIONS, b"")
    if isinstance(size, str):
        return bytes_field(_DIMENSIONS, bytes_field(_SYMBOL, size.encode()))
    return bytes_field(_DIMENSIONS, varint_field(_SIZE, size))


def _too_large() -> BackendError:
    return BackendError(
        "a part of the model takes 2 GiB or more, which ONNX files cannot hold",
        remedy="Run the whole model with ONNX Runtime",
    )


def _length(part: bytes | memoryview) -> int:
    return part.nbytes if isinstance(part, memoryview) else len(part)
