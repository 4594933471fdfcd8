"""The standard operators that put a weight together again, and what they take in the file.

They work in float32 even for an fp16 graph: CPUs lack fp16 kernels for some of them, and what has
no kernel is not folded while loading.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper

from moon.export.codec import Encoded

__all__ = ["SHARED", "Parts", "compact", "coordinates", "narrow", "plain"]

# Constants that the operators of all weights read.
SHARED: dict[str, NDArray[Any]] = {
    "unpack/axis": np.array(0, dtype=np.int32),
    "unpack/bits": (1 << np.arange(8)).astype(np.uint8).reshape(1, 8),
    "unpack/begin": np.array([0], dtype=np.int64),
    "unpack/row": np.array([-1], dtype=np.int64),
    "unpack/zero": np.zeros(1, dtype=np.float32),
}


@dataclass
class Parts:
    """What stands in the file for one weight; tensors and values are named after it.

    Attributes:
        weight: its name, which the last node's output has, or the only tensor.
    """

    weight: str
    tensors: list[TensorProto] = field(default_factory=list)
    sparse: list[SparseTensorProto] = field(default_factory=list)
    nodes: list[NodeProto] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes in the file, the few of :data:`SHARED` not counted."""
        held = [
            item.ByteSize() for kind in (self.tensors, self.sparse, self.nodes) for item in kind
        ]
        return sum(2 + _varint(size) + size for size in held)

    @property
    def shared(self) -> set[str]:
        """Names of the shared constants it reads."""
        return {name for node in self.nodes for name in node.input} & SHARED.keys()

    def tensor(self, name: str, values: NDArray[Any]) -> str:
        name = f"{self.weight}/{name}" if name else self.weight
        self.tensors.append(numpy_helper.from_array(values, name))
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Returns the output's name: the weight's own when ``output`` is empty."""
        name = f"{self.weight}/{output}" if output else self.weight
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"{name}/{op}", **attributes))
        return name


def _varint(value: int) -> int:
    """Bytes of a length in protobuf, less the one that every field has with its tag."""
    return max(0, (value.bit_length() - 1) // 7)


def plain(name: str, stored: NDArray[Any]) -> Parts:
    """The weight as it is."""
    parts = Parts(name)
    parts.tensor("", stored)
    return parts


def narrow(name: str, stored: NDArray[Any], dtype: np.dtype[Any]) -> Parts:
    """The weight stored in a narrower type than the graph's."""
    parts = Parts(name)
    half = parts.tensor("half", stored)
    parts.node("Cast", [half], "", to=helper.np_dtype_to_tensor_dtype(dtype))
    return parts


def coordinates(name: str, stored: NDArray[Any], dtype: np.dtype[Any]) -> Parts:
    """ONNX's own sparse tensor, with linear int64 indices."""
    parts = Parts(name)
    flat = np.ascontiguousarray(stored).reshape(-1)
    positions = np.flatnonzero(flat).astype(np.int64)
    held = name if stored.dtype == dtype else f"{name}/half"
    parts.sparse.append(
        SparseTensorProto(
            values=numpy_helper.from_array(flat[positions], held),
            indices=numpy_helper.from_array(positions, ""),
            dims=stored.shape,
        )
    )
    if held != name:
        parts.node("Cast", [held], "", to=helper.np_dtype_to_tensor_dtype(dtype))
    return parts


def compact(name: str, encoded: Encoded, dtype: np.dtype[Any]) -> Parts:
    """The nonzeros with where they are, and the operators that scatter them."""
    parts = Parts(name)
    values = encoded.values
    if encoded.kind == "bitmask":
        # The running count of nonzeros starts at 1 for the first of them.
        values = np.concatenate([np.zeros(1, values.dtype), values])
    stored = parts.tensor("values", values)
    if values.dtype != np.float32:
        stored = parts.node("Cast", [stored], "wide", to=TensorProto.FLOAT)
    size = parts.tensor("size", np.array([np.prod(encoded.shape)], dtype=np.int64))
    decode = _decode_gaps if encoded.kind == "gaps" else _decode_bitmask
    flat = decode(parts, encoded.where, stored, size)
    shape = parts.tensor("shape", np.array(encoded.shape, dtype=np.int64))
    if dtype == np.float32:
        parts.node("Reshape", [flat, shape], "")
    else:
        shaped = parts.node("Reshape", [flat, shape], "shaped")
        parts.node("Cast", [shaped], "", to=helper.np_dtype_to_tensor_dtype(dtype))
    return parts


def _decode_gaps(parts: Parts, where: NDArray[np.uint8], values: str, size: str) -> str:
    steps = parts.node("Cast", [parts.tensor("gaps", where)], "steps", to=TensorProto.INT32)
    positions = parts.node("CumSum", [steps, "unpack/axis"], "positions")
    zero = numpy_helper.from_array(np.zeros(1, dtype=np.float32), "value")
    zeros = parts.node("ConstantOfShape", [size], "zeros", value=zero)
    return parts.node("ScatterElements", [zeros, positions, values], "flat", axis=0)


def _decode_bitmask(parts: Parts, where: NDArray[np.uint8], values: str, size: str) -> str:
    # NonZero would be shorter, but the shape of its output depends on data, so ONNX Runtime does
    # not fold it while loading and would decode at every inference.
    bitmask = parts.tensor("bitmask", where.reshape(-1, 1))
    grid = parts.node("BitwiseAnd", [bitmask, "unpack/bits"], "grid")
    padded = parts.node("Reshape", [grid, "unpack/row"], "padded")
    used = parts.node("Slice", [padded, "unpack/begin", size], "used")
    mask = parts.node("Cast", [used], "mask", to=TensorProto.BOOL)
    ones = parts.node("Cast", [mask], "ones", to=TensorProto.INT32)
    count = parts.node("CumSum", [ones, "unpack/axis"], "count")
    last = parts.node("Gather", [values, count], "last")
    return parts.node("Where", [mask, last, "unpack/zero"], "flat")
