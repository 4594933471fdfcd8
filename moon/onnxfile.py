"""Reading and patching small initializers of an ONNX file without the onnx package.

An ONNX file is a protocol buffer. This walks it far enough to find the main
graph's initializers, to overwrite a scalar or a small array in place, and to notice tensors whose
data lies outside the file. It trusts nothing: damaged or deceptive bytes raise BundleError.

Field numbers are those of onnx.proto.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moon.errors import BundleError
from moon.wire import BYTES, VARINT, Field, WireError, fields, varints

__all__ = [
    "FLOAT32",
    "INT64",
    "Initializer",
    "find_initializer",
    "has_external_data",
    "has_initializer",
    "patch_matrix",
    "patch_scalar",
    "patch_vector",
    "read_matrix",
    "read_scalar",
    "read_vector",
]

FLOAT32, INT64 = 1, 7
_FORMATS = {FLOAT32: "<f", INT64: "<q"}
_SIZES = {FLOAT32: 4, INT64: 8}

_MODEL_GRAPH, _GRAPH_INITIALIZER = 7, 5
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13, 14
# Protobuf's own readers stop at this depth too.
_DEEPEST = 100

# Which fields of which message hold further messages that may lead to a tensor.
_CHILDREN = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "function": {7: "node", 11: "attribute"},
    "tensor": {},
}


@dataclass(frozen=True, kw_only=True)
class Initializer:
    """Where an initializer's raw data lies in the file.

    Attributes:
        offset, length: of its ``raw_data``, in bytes.
        dtype: ONNX's TensorProto.DataType, such as :data:`FLOAT32`.
        dims: its shape, () for a scalar.
    """

    offset: int
    length: int
    dtype: int
    dims: tuple[int, ...]


def find_initializer(data: bytes, name: str) -> Initializer:
    """The main graph's initializer ``name``.

    Raises:
        BundleError: malformed file, no such initializer, two of them, no raw data, or a raw
            data of another length than its type and shape need.
    """
    found = _named(data, name)
    if len(found) != 1:
        count = "no initializer" if not found else f"{len(found)} initializers"
        raise BundleError(
            f"the ONNX graph has {count} called {name}, expected one",
            remedy="Export the bundle again with moon export",
        )
    return _initializer(data, found[0], name)


def has_initializer(data: bytes, name: str) -> bool:
    """Whether the main graph has an initializer ``name``.

    Raises:
        BundleError: malformed file.
    """
    return bool(_named(data, name))


def read_scalar(data: bytes, name: str) -> float | int:
    """The value of the scalar initializer ``name``, float32 or int64.

    Raises:
        BundleError: see :func:`find_initializer`, or it is no float32 or int64 scalar.
    """
    at = _scalar(data, name)
    (value,) = struct.unpack_from(_FORMATS[at.dtype], data, at.offset)
    result: float | int = value
    return result


def patch_scalar(data: bytes, name: str, value: float | int) -> bytes:
    """The file with another value in the scalar initializer ``name``; all else is the same.

    Raises:
        BundleError: see :func:`read_scalar`.
        ValueError: the value does not fit the initializer's type exactly.
    """
    at = _scalar(data, name)
    try:
        packed = struct.pack(_FORMATS[at.dtype], value)
    except (struct.error, OverflowError) as error:
        raise ValueError(f"{value!r} does not fit the initializer {name}") from error
    (back,) = struct.unpack(_FORMATS[at.dtype], packed)
    if back != value and not (math.isnan(back) and math.isnan(value)):
        raise ValueError(f"{value!r} is not representable in the initializer {name}")
    return data[: at.offset] + packed + data[at.offset + at.length :]


def read_vector(data: bytes, name: str) -> NDArray[np.float32]:
    """The values of the float32 initializer ``name`` of one dimension.

    Raises:
        BundleError: see :func:`find_initializer`, or it is no float32 vector.
    """
    at = _array(data, name, 1, "vector")
    return np.frombuffer(data, "<f4", at.dims[0], at.offset).astype(np.float32)


def patch_vector(data: bytes, name: str, values: NDArray[np.float32]) -> bytes:
    """The file with other values in the float32 vector ``name``; all else is the same.

    Raises:
        BundleError: see :func:`read_vector`.
        ValueError: the initializer has another length.
    """
    return _patched(data, name, _array(data, name, 1, "vector"), values)


def read_matrix(data: bytes, name: str) -> NDArray[np.float32]:
    """The values of the float32 initializer ``name`` of two dimensions.

    Raises:
        BundleError: see :func:`find_initializer`, or it is no float32 matrix.
    """
    at = _array(data, name, 2, "matrix")
    flat = np.frombuffer(data, "<f4", math.prod(at.dims), at.offset)
    return flat.reshape(at.dims).astype(np.float32)


def patch_matrix(data: bytes, name: str, values: NDArray[np.float32]) -> bytes:
    """The file with other values in the float32 matrix ``name``; all else is the same.

    Raises:
        BundleError: see :func:`read_matrix`.
        ValueError: the initializer has another shape.
    """
    return _patched(data, name, _array(data, name, 2, "matrix"), values)


def has_external_data(data: bytes) -> str | None:
    """Name of the first tensor whose data lies outside the file, or None.

    Looks at every tensor: initializers, sparse initializers, attributes, nested graphs,
    functions and training graphs.

    Raises:
        BundleError: malformed file.
    """
    return _external(data, "model", 0, len(data), 0)


def _external(data: bytes, kind: str, start: int, end: int, depth: int) -> str | None:
    if depth > _DEEPEST:
        raise _malformed("its messages are nested too deep")
    if kind == "tensor":
        return _external_tensor(data, start, end)
    children = _CHILDREN[kind]
    for field in _fields(data, start, end):
        if field.wire == BYTES and field.number in children:
            child = children[field.number]
            name = _external(data, child, field.start, field.end, depth + 1)
            if name is not None:
                return name
    return None


def _external_tensor(data: bytes, start: int, end: int) -> str | None:
    name, external = b"", False
    for field in _fields(data, start, end):
        if field.number == _TENSOR_NAME and field.wire == BYTES:
            name = data[field.start : field.end]
        elif field.number == _TENSOR_EXTERNAL and field.wire == BYTES:
            external = True
        elif field.number == _TENSOR_LOCATION and field.wire == VARINT:
            external = external or field.value != 0
    return (name.decode("utf-8", "replace") or "(unnamed)") if external else None


def _scalar(data: bytes, name: str) -> Initializer:
    at = find_initializer(data, name)
    if at.dtype not in _FORMATS or at.dims:
        raise BundleError(
            f"the initializer {name} is not a float32 or int64 scalar",
            remedy="Export the bundle again with moon export",
        )
    return at


def _array(data: bytes, name: str, rank: int, what: str) -> Initializer:
    at = find_initializer(data, name)
    if at.dtype != FLOAT32 or len(at.dims) != rank:
        raise BundleError(
            f"the initializer {name} is not a float32 {what}",
            remedy="Export the bundle again with moon export",
        )
    return at


def _patched(data: bytes, name: str, at: Initializer, values: NDArray[np.float32]) -> bytes:
    if values.shape != at.dims:
        raise ValueError(f"{name} has {math.prod(at.dims)} values, not {list(values.shape)}")
    packed = values.astype("<f4").tobytes()
    return data[: at.offset] + packed + data[at.offset + at.length :]


def _named(data: bytes, name: str) -> list[Field]:
    wanted = name.encode()
    return [
        tensor
        for graph in _messages(data, 0, len(data), _MODEL_GRAPH)
        for tensor in _messages(data, graph.start, graph.end, _GRAPH_INITIALIZER)
        if _tensor_name(data, tensor) == wanted
    ]


def _tensor_name(data: bytes, tensor: Field) -> bytes:
    name = b""
    for field in _fields(data, tensor.start, tensor.end):
        if field.number == _TENSOR_NAME and field.wire == BYTES:
            name = data[field.start : field.end]
    return name


def _initializer(data: bytes, tensor: Field, name: str) -> Initializer:
    dims: list[int] = []
    dtype, raw, raws = 0, (0, 0), 0
    for field in _fields(data, tensor.start, tensor.end):
        if field.number == _TENSOR_DIMS:
            dims += _varints(data, field)
        elif field.number == _TENSOR_TYPE and field.wire == VARINT:
            dtype = field.value
        elif field.number == _TENSOR_RAW and field.wire == BYTES:
            raw, raws = (field.start, field.end), raws + 1
        elif field.number in (_TENSOR_EXTERNAL, _TENSOR_LOCATION):
            raise _malformed(f"the initializer {name} is stored outside the file")
    length = raw[1] - raw[0]
    if raws != 1:
        raise _malformed(f"the initializer {name} must have its raw data once, not {raws} times")
    if dtype in _SIZES and length != _SIZES[dtype] * math.prod(dims):
        raise _malformed(f"the initializer {name} has {length} bytes for shape {dims}")
    return Initializer(offset=raw[0], length=length, dtype=dtype, dims=tuple(dims))


def _varints(data: bytes, field: Field) -> list[int]:
    try:
        return varints(data, field)
    except WireError as error:
        raise _malformed(str(error)) from error


def _messages(data: bytes, start: int, end: int, number: int) -> Iterator[Field]:
    for field in _fields(data, start, end):
        if field.number == number and field.wire == BYTES:
            yield field


def _fields(data: bytes, start: int, end: int) -> Iterator[Field]:
    try:
        yield from fields(data, start, end)
    except WireError as error:
        raise _malformed(str(error)) from error


def _malformed(cause: str) -> BundleError:
    return BundleError(
        f"the ONNX file is damaged: {cause}",
        remedy="Take a good copy of the bundle, or export it again",
    )
