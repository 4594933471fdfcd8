"""Where the bytes of an ONNX file are: layer by layer, in what form, and against dense float32.

A layer's bytes are those of everything that only its weight is made from: tensors and the
operators that unpack them. How a file was packed is read off its graph, so files that other tools
made are counted as well.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moon.runtime.unpack import weights

if TYPE_CHECKING:
    import onnx

__all__ = ["FileBytes", "LayerBytes", "file_bytes"]

_FLOAT_BYTES = 4
_HEAD = "head/"
# The operator that tells a form.
_FORMS = {"ScatterElements": "deltas", "BitwiseAnd": "bitmask"}
# Positions are UINT8; INT32 and INT64 are shapes; stored values are floats or INT8.
_UINT8, _INT32, _INT64 = 2, 6, 7


@dataclass(frozen=True, kw_only=True)
class LayerBytes:
    """What one weight takes.

    Attributes:
        name, shape, nonzeros: of the weight.
        form: ``dense``, ``deltas``, ``bitmask`` or ``coo``.
        values: type of the stored values, such as ``fp16``.
        value_bytes: of the stored values.
        index_bytes: of what says where they are.
        file_bytes: all it takes in the file, names and operators included.
        dense_bytes: four for each weight.
    """

    name: str
    shape: tuple[int, ...]
    nonzeros: int
    form: str
    values: str
    value_bytes: int
    index_bytes: int
    file_bytes: int
    dense_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape)}


@dataclass(frozen=True, kw_only=True)
class FileBytes:
    """A whole file: ``layers``, ``score_bytes`` (constants of the score head) and ``rest_bytes``
    (biases, the operators, names) add up to ``file_bytes``."""

    layers: tuple[LayerBytes, ...]
    score_bytes: int
    rest_bytes: int
    file_bytes: int

    @property
    def dense_bytes(self) -> int:
        """Of the same file with dense float32 weights, about: headers are not counted."""
        others = self.score_bytes + self.rest_bytes
        return sum(layer.dense_bytes for layer in self.layers) + others


def file_bytes(model: bytes) -> FileBytes:
    """Count the bytes of an ONNX file.

    Raises:
        BundleError, BackendError: see :func:`moon.runtime.unpack.weights`.
    """
    import onnx

    dense = weights(model)
    graph = onnx.load_model_from_string(model).graph
    sources = _Sources(graph)
    # A weight stored as integers takes its scale as well.
    wide = {n.input[0]: n.output[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    made = {name: sources.of(wide.get(name, name)) for name in dense}
    # What several layers are made from, such as an axis, belongs to the rest.
    readers = Counter(part for parts in made.values() for part in parts)
    layers = [
        sources.layer(
            name,
            [part for part in made[name] if readers[part] == 1],
            weight.shape,
            int(np.count_nonzero(weight)),
        )
        for name, weight in dense.items()
    ]
    score = sum(_field(one) for one in graph.initializer if one.name.startswith(_HEAD))
    taken = score + sum(layer.file_bytes for layer in layers)
    return FileBytes(
        layers=tuple(layers),
        score_bytes=score,
        rest_bytes=len(model) - taken,
        file_bytes=len(model),
    )


class _Sources:
    """What each value of a graph is made from."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.sparse = {tensor.values.name: tensor for tensor in graph.sparse_initializer}
        self.nodes = {name: node for node in graph.node for name in node.output if name}

    def of(self, name: str) -> list[str]:
        """All values that this one is computed from, itself included."""
        found: dict[str, None] = {}
        waiting = [name]
        while waiting:
            value = waiting.pop()
            if value and value not in found:
                found[value] = None
                waiting += self.nodes[value].input if value in self.nodes else ()
        return list(found)

    def layer(
        self, name: str, own: Sequence[str], shape: Sequence[int], nonzeros: int
    ) -> LayerBytes:
        tensors = [self.tensors[part] for part in own if part in self.tensors]
        sparse = [self.sparse[part] for part in own if part in self.sparse]
        # By identity, for a node may make several values.
        nodes = {id(self.nodes[part]): self.nodes[part] for part in own if part in self.nodes}
        operators = {node.op_type for node in nodes.values()}
        if sparse:
            form = "coo"
            values = [one.values for one in sparse]
            index = [one.indices for one in sparse]
        else:
            form = next((form for op, form in _FORMS.items() if op in operators), "dense")
            index = [one for one in tensors if form != "dense" and one.data_type == _UINT8]
            no_values = {_INT32, _INT64, _UINT8} if index else {_INT32, _INT64}
            values = [one for one in tensors if one.data_type not in no_values]
        largest = max(values, key=_content, default=None)
        return LayerBytes(
            name=name,
            shape=tuple(shape),
            nonzeros=nonzeros,
            form=form,
            values="" if largest is None else _type(largest),
            value_bytes=sum(map(_content, values)),
            index_bytes=sum(map(_content, index)),
            file_bytes=sum(map(_field, (*tensors, *sparse, *nodes.values()))),
            dense_bytes=_FLOAT_BYTES * math.prod(shape),
        )


def _type(tensor: onnx.TensorProto) -> str:
    """``fp16``, ``int8``."""
    import onnx

    kind = str(onnx.TensorProto.DataType.Name(tensor.data_type)).lower()
    return {"float": "fp32", "float16": "fp16", "double": "fp64", "bfloat16": "bf16"}.get(
        kind, kind
    )


def _content(tensor: onnx.TensorProto) -> int:
    return len(tensor.raw_data) or int(tensor.ByteSize())


def _field(message: Any) -> int:
    """Bytes of a repeated field's item: tag, length and content."""
    size = int(message.ByteSize())
    return 1 + max(1, math.ceil(size.bit_length() / 7)) + size
