"""Store a model's weights sparse, in a file that every ONNX runtime still reads.

    dense     the zeros are in the file
    compact   the nonzeros, and standard operators in front of each Conv that put them back; a
              runtime folds these once while loading, and then holds plain dense weights
    coo       ONNX's own ``sparse_initializer`` (linear int64 indices); few tools know it, and the
              checker's full check does not accept it for Conv

Packing is the last step: no graph tool after it, for several drop sparse tensors or do not look
behind the operators.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper

from moon.errors import ExportError, UsageError
from moon.export.codec import Encoded, encode
from moon.export.graph import array, copied, initializers, weight_names

__all__ = ["VALUES", "WEIGHTS", "Values", "Weights", "pack", "round_values"]

Weights = Literal["dense", "compact", "coo"]
Values = Literal["fp32", "fp16"]
WEIGHTS: tuple[str, ...] = ("dense", "compact", "coo")
VALUES: tuple[str, ...] = ("fp32", "fp16")

# What the decoding operators and tensor headers of one weight take in the file, about.
_OVERHEAD = 1000


def round_values(model: ModelProto, values: Values) -> ModelProto:
    """The same model with its weights rounded to ``values``, still stored as they were.

    A weight too small for fp16 becomes zero; biases and other small tensors stay.

    Raises:
        ExportError: a weight is too large for fp16.
    """
    rounded = copied(model)
    if values == "fp32":
        return rounded
    tensors = initializers(rounded)
    for name in weight_names(rounded):
        kept = array(tensors[name])
        half = _half(name, kept).astype(kept.dtype)
        half[half == 0] = 0
        tensors[name].CopyFrom(numpy_helper.from_array(half, name))
    return rounded


def pack(model: ModelProto, *, weights: Weights = "compact", values: Values = "fp32") -> ModelProto:
    """Rewrite the weights of Conv, Gemm and MatMul in another form; the model given stays.

    Args:
        model: a plain model, whose weights are initializers.
        weights: "dense", "compact" or "coo". A weight that would not get smaller stays dense.
        values: how the values are stored; the arithmetic keeps the graph's own type.

    Raises:
        UsageError: no such form.
        ExportError: a weight is too large for fp16.
    """
    for given, known, what in ((weights, WEIGHTS, "weights"), (values, VALUES, "values")):
        if given not in known:
            raise UsageError(f"{what} {given!r} is none of {', '.join(known)}")
    packed = copied(model)
    tensors = initializers(packed)
    nodes: list[NodeProto] = []
    gone: set[str] = set()
    shared = _Shared(packed)
    for name in weight_names(packed):
        weight = array(tensors[name])
        stored = _half(name, weight) if values == "fp16" and weight.dtype == np.float32 else weight
        if weights == "coo" and _coo_bytes(stored) < stored.nbytes:
            nodes += _add_coo(packed, name, weight, stored)
        elif (
            weights == "compact" and (encoded := encode(stored)).nbytes + _OVERHEAD < stored.nbytes
        ):
            nodes += _add_compact(packed, name, weight.dtype, encoded, shared)
        elif stored.dtype != weight.dtype:
            half_name = f"{name}/half"
            packed.graph.initializer.append(numpy_helper.from_array(stored, half_name))
            nodes.append(_cast(half_name, name, weight.dtype))
        else:
            continue
        gone.add(name)
    _drop_initializers(packed, gone)
    rest = list(packed.graph.node)
    copies = [NodeProto.FromString(node.SerializeToString()) for node in rest]
    del packed.graph.node[:]
    packed.graph.node.extend([*nodes, *copies])
    return packed


class _Shared:
    """Small constants that the decoders of all layers read, added once when first used."""

    def __init__(self, model: ModelProto) -> None:
        self._graph = model.graph
        self._added: set[str] = set()

    def add(self, name: str, values: NDArray[Any]) -> str:
        name = f"unpack/{name}"
        if name not in self._added:
            self._graph.initializer.append(numpy_helper.from_array(values, name))
            self._added.add(name)
        return name


def _half(name: str, weight: NDArray[Any]) -> NDArray[np.float16]:
    largest = float(np.abs(weight).max(initial=0))
    if largest > float(np.finfo(np.float16).max):
        raise ExportError(
            f"the weight {name} holds {largest:.3g}, which fp16 cannot",
            remedy="Export with --values fp32 and --precision fp32",
        )
    return weight.astype(np.float16)


def _cast(source: str, target: str, dtype: np.dtype[Any]) -> NodeProto:
    kind = helper.np_dtype_to_tensor_dtype(dtype)
    return helper.make_node("Cast", [source], [target], name=f"{target}/cast", to=kind)


def _drop_initializers(model: ModelProto, names: Iterable[str]) -> None:
    gone = set(names)
    kept = [t for t in model.graph.initializer if t.name not in gone]
    copies = [TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del model.graph.initializer[:]
    model.graph.initializer.extend(copies)
    # Exporters before IR 4 list weights among the inputs; one that is computed cannot be there.
    inputs = [i for i, value in enumerate(model.graph.input) if value.name in gone]
    for i in reversed(inputs):
        del model.graph.input[i]


def _add_compact(
    model: ModelProto, name: str, dtype: np.dtype[Any], encoded: Encoded, shared: _Shared
) -> list[NodeProto]:
    """Add the tensors of one weight; returns the operators that put it together again.

    They work in float32 even for an fp16 graph: CPUs lack fp16 kernels for some of them, and what
    has no kernel is not folded while loading.
    """
    decoder = _Decoder(model, name)
    values = encoded.values
    if encoded.kind == "bitmask":
        # The running count of nonzeros starts at 1 for the first of them.
        values = np.concatenate([np.zeros(1, values.dtype), values])
    stored = decoder.tensor("values", values)
    if values.dtype != np.float32:
        stored = decoder.node("Cast", [stored], "wide", to=TensorProto.FLOAT)
    size = decoder.tensor("size", np.array([np.prod(encoded.shape)], dtype=np.int64))
    decode = _decode_gaps if encoded.kind == "gaps" else _decode_bitmask
    flat = decode(decoder, encoded.where, stored, size, shared)
    shape = decoder.tensor("shape", np.array(encoded.shape, dtype=np.int64))
    if dtype == np.float32:
        decoder.node("Reshape", [flat, shape], "")
    else:
        shaped = decoder.node("Reshape", [flat, shape], "shaped")
        decoder.node("Cast", [shaped], "", to=helper.np_dtype_to_tensor_dtype(dtype))
    return decoder.nodes


class _Decoder:
    """Collects the tensors and operators of one weight, named after it."""

    def __init__(self, model: ModelProto, weight: str) -> None:
        self._graph = model.graph
        self._weight = weight
        self.nodes: list[NodeProto] = []

    def tensor(self, name: str, values: NDArray[Any]) -> str:
        name = f"{self._weight}/{name}"
        self._graph.initializer.append(numpy_helper.from_array(values, name))
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Returns the output's name: the weight's own when ``output`` is empty."""
        name = f"{self._weight}/{output}" if output else self._weight
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"{name}/{op}", **attributes))
        return name


def _decode_gaps(
    decoder: _Decoder, where: NDArray[np.uint8], values: str, size: str, shared: _Shared
) -> str:
    axis = shared.add("axis", np.array(0, dtype=np.int32))
    steps = decoder.node("Cast", [decoder.tensor("gaps", where)], "steps", to=TensorProto.INT32)
    positions = decoder.node("CumSum", [steps, axis], "positions")
    zero = numpy_helper.from_array(np.zeros(1, dtype=np.float32), "value")
    zeros = decoder.node("ConstantOfShape", [size], "zeros", value=zero)
    return decoder.node("ScatterElements", [zeros, positions, values], "flat", axis=0)


def _decode_bitmask(
    decoder: _Decoder, where: NDArray[np.uint8], values: str, size: str, shared: _Shared
) -> str:
    # NonZero would be shorter, but the shape of its output depends on data, so ONNX Runtime does
    # not fold it while loading and would decode at every inference.
    axis = shared.add("axis", np.array(0, dtype=np.int32))
    bits = shared.add("bits", (1 << np.arange(8)).astype(np.uint8).reshape(1, 8))
    begin = shared.add("begin", np.array([0], dtype=np.int64))
    row = shared.add("row", np.array([-1], dtype=np.int64))
    zero = shared.add("zero", np.zeros(1, dtype=np.float32))
    bitmask = decoder.tensor("bitmask", where.reshape(-1, 1))
    grid = decoder.node("BitwiseAnd", [bitmask, bits], "grid")
    padded = decoder.node("Reshape", [grid, row], "padded")
    used = decoder.node("Slice", [padded, begin, size], "used")
    mask = decoder.node("Cast", [used], "mask", to=TensorProto.BOOL)
    ones = decoder.node("Cast", [mask], "ones", to=TensorProto.INT32)
    count = decoder.node("CumSum", [ones, axis], "count")
    last = decoder.node("Gather", [values, count], "last")
    return decoder.node("Where", [mask, last, zero], "flat")


def _coo_bytes(weight: NDArray[Any]) -> int:
    return int(np.count_nonzero(weight)) * (8 + weight.dtype.itemsize) + _OVERHEAD


def _add_coo(
    model: ModelProto, name: str, weight: NDArray[Any], stored: NDArray[Any]
) -> list[NodeProto]:
    narrow = stored.dtype != weight.dtype
    held = f"{name}/half" if narrow else name
    flat = np.ascontiguousarray(stored).reshape(-1)
    positions = np.flatnonzero(flat).astype(np.int64)
    sparse = SparseTensorProto(
        values=numpy_helper.from_array(flat[positions], held),
        indices=numpy_helper.from_array(positions, ""),
        dims=stored.shape,
    )
    model.graph.sparse_initializer.append(sparse)
    return [_cast(held, name, weight.dtype)] if narrow else []
