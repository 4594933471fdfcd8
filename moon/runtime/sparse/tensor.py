"""Tensors of an ONNX file as numpy arrays.

Every way of storing one: raw data (a view of the file, without a copy), lists of numbers, packed
or not, and sparse tensors, which are made dense. Shapes are checked against the bytes there are
before anything is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.runtime.sparse.message import Message, damaged, unsupported

__all__ = [
    "BFLOAT16",
    "DTYPES",
    "MOST_BYTES",
    "allowance",
    "read_sparse",
    "read_tensor",
    "refuse_external",
    "tensor_name",
]

MOST_BYTES = 1 << 31
_LEAST_ALLOWED, _PER_BYTE = 1 << 28, 1 << 10
_MOST_DIMS = 32

# TensorProto.DataType. bfloat16 has no numpy type; its values are read as float32.
BFLOAT16, _STRING = 16, 8
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.float32),
    2: np.dtype(np.uint8),
    3: np.dtype(np.int8),
    4: np.dtype(np.uint16),
    5: np.dtype(np.int16),
    6: np.dtype(np.int32),
    7: np.dtype(np.int64),
    9: np.dtype(np.bool_),
    10: np.dtype(np.float16),
    11: np.dtype(np.float64),
    12: np.dtype(np.uint32),
    13: np.dtype(np.uint64),
}
_FLOATS, _INT32S, _INT64S, _NAME, _RAW, _DOUBLES, _UINT64S = 4, 5, 7, 8, 9, 10, 11
_DIMS, _TYPE, _SEGMENT, _STRINGS, _EXTERNAL, _LOCATION = 1, 2, 3, 6, 13, 14
_LISTS = (_FLOATS, _INT32S, _STRINGS, _INT64S, _DOUBLES, _UINT64S)
# In which list a type without raw data lies; all others are in _INT32S.
_LIST_OF = {1: _FLOATS, 7: _INT64S, 11: _DOUBLES, 12: _UINT64S, 13: _UINT64S}
_VALUES, _INDICES, _SPARSE_DIMS = 1, 2, 3


def allowance(file_size: int) -> int:
    """How many bytes a file may ask for beyond its own.

    Weights of 99.9% zeros take a 300th of what they are when dense, so a thousand times is ample;
    a file of a kilobyte does not get gigabytes.
    """
    return min(MOST_BYTES, max(_LEAST_ALLOWED, _PER_BYTE * file_size))


def tensor_name(tensor: Message) -> str:
    return tensor.text(_NAME)


def refuse_external(tensor: Message) -> None:
    """Raise BackendError if the tensor's values lie outside the file."""
    if tensor.has(_EXTERNAL) or tensor.integer(_LOCATION):
        raise unsupported(f"the values of {tensor_name(tensor) or 'a tensor'} are in another file")


def read_tensor(tensor: Message) -> tuple[NDArray[Any], bool]:
    """The values of a tensor, read-only and maybe unaligned; and whether they were bfloat16.

    Raises:
        BackendError: damaged, outside the file, of a type there is no numpy type for, or lists
            that take more memory than allowed.
    """
    name, kind = tensor_name(tensor) or "(unnamed)", tensor.integer(_TYPE)
    refuse_external(tensor)
    if tensor.has(_SEGMENT):
        raise unsupported(f"{name} is stored in segments")
    if kind not in DTYPES and kind != BFLOAT16:
        raise unsupported(f"{name} is of the tensor type {kind}")
    dtype = DTYPES.get(kind, np.dtype(np.uint16))
    dims = _checked(name, tensor.integers(_DIMS), dtype.itemsize)
    lists = [number for number in _LISTS if tensor.has(number)]
    if len(lists) + tensor.has(_RAW) > 1 or not set(lists) <= {_LIST_OF.get(kind, _INT32S)}:
        raise damaged(f"{name} stores its values twice, or those of another type")
    flat = _values(tensor, name, dtype, math.prod(dims), lists)
    if dtype == np.bool_:
        # Any byte but zero is true; numpy counts on there being ones only.
        flat = flat.view(np.uint8) != 0
    elif kind == BFLOAT16:
        tensor.budget.take_bytes(4 * flat.size, name)
        flat = (flat.astype(np.uint32) << np.uint32(16)).view(np.float32)
    values = flat.reshape(dims)
    values.flags.writeable = False
    return values, kind == BFLOAT16


def read_sparse(sparse: Message) -> tuple[str, NDArray[Any], bool]:
    """A sparse tensor's name, its dense values, and whether they were bfloat16.

    Raises:
        BackendError: see :func:`read_tensor`; indices out of range or out of order.
    """
    stored, places = sparse.child(_VALUES), sparse.child(_INDICES)
    if stored is None:
        raise damaged("a sparse tensor has no values")
    name = tensor_name(stored)
    values, is_bfloat16 = read_tensor(stored)
    dims = _checked(name, sparse.integers(_SPARSE_DIMS), values.dtype.itemsize)
    size = math.prod(dims)
    if values.ndim != 1 or (places is None and values.size):
        raise damaged(f"the sparse tensor {name} has no list of values or no indices")
    sparse.budget.take_bytes(size * values.itemsize, name)
    flat = np.zeros(size, values.dtype)
    if places is not None and values.size:
        flat[_linear(name, read_tensor(places)[0], dims, len(values))] = values
    dense = flat.reshape(dims)
    dense.flags.writeable = False
    return name, dense, is_bfloat16


def _linear(name: str, places: NDArray[Any], dims: tuple[int, ...], count: int) -> NDArray[Any]:
    if places.dtype != np.int64 or places.shape not in ((count,), (count, len(dims))):
        raise damaged(f"the indices of {name} are no int64 for each of its {count} values")
    if places.ndim == 2:
        if ((places < 0) | (places >= np.array(dims, np.int64))).any():
            raise damaged(f"an index of {name} is out of range")
        strides = [math.prod(dims[axis + 1 :]) for axis in range(len(dims))]
        places = places @ np.array(strides, np.int64)
    if places[0] < 0 or places[-1] >= math.prod(dims) or (places[1:] <= places[:-1]).any():
        raise damaged(f"the indices of {name} are out of range or not in ascending order")
    return places


def _values(
    tensor: Message, name: str, dtype: np.dtype[Any], count: int, lists: Sequence[int]
) -> NDArray[Any]:
    raw = tensor.one(_RAW)
    if raw is not None:
        if raw.end - raw.start != count * dtype.itemsize:
            raise damaged(f"{name} has {raw.end - raw.start} bytes for {count} values")
        return np.frombuffer(tensor.data, dtype.newbyteorder("<"), count, raw.start)
    if not lists:
        if count:
            raise damaged(f"{name} has no values")
        return np.zeros(0, dtype)
    if lists[0] in (_FLOATS, _DOUBLES):
        flat = tensor.fixed(lists[0], dtype.newbyteorder("<"))
        if flat.size != count:
            raise damaged(f"{name} has {flat.size} values instead of {count}")
        return flat
    # What is too large for the type wraps around, as it does where these are cast.
    numbers = tensor.numbers(lists[0], count)
    if dtype == np.bool_:
        return np.not_equal(numbers, 0)
    if dtype == np.float16:
        return numbers.astype(np.uint16).view(np.float16)
    return numbers.astype(dtype)


def _checked(name: str, dims: tuple[int, ...], width: int) -> tuple[int, ...]:
    if len(dims) > _MOST_DIMS or min(dims, default=0) < 0:
        raise damaged(f"the shape of {name} is {list(dims[:_MOST_DIMS])}")
    # numpy counts the elements without zeros among the dimensions, too.
    if math.prod(dim for dim in dims if dim) * width > MOST_BYTES:
        raise unsupported(f"{name} of the shape {list(dims)} takes more than 2 GiB")
    return dims
