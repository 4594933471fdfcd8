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

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from moon.errors import ExportError, UsageError
from moon.export.codec import KINDS, Kind, encode
from moon.export.graph import array, copied, initializers, weight_names
from moon.export.unpacking import SHARED, Parts, compact, coordinates, narrow, plain

__all__ = [
    "PRECISIONS",
    "VALUES",
    "WEIGHTS",
    "Precision",
    "Values",
    "Weights",
    "pack",
    "round_values",
]

Weights = Literal["dense", "compact", "coo"]
Values = Literal["fp32", "fp16"]
Precision = Literal["fp32", "fp16", "int8"]
WEIGHTS: tuple[str, ...] = ("dense", "compact", "coo")
VALUES: tuple[str, ...] = ("fp32", "fp16")
PRECISIONS: tuple[str, ...] = ("fp32", "fp16", "int8")


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
        tensors[name].CopyFrom(numpy_helper.from_array(half, name))
    return rounded


def pack(
    model: ModelProto,
    *,
    weights: Weights = "compact",
    values: Values = "fp32",
    kinds: Sequence[Kind] = KINDS,
) -> ModelProto:
    """Rewrite the weights of Conv, Gemm and MatMul in another form; the model given stays.

    Args:
        model: a plain model, whose weights are initializers.
        weights: "dense", "compact" or "coo". Each weight takes the form with the fewest bytes in
            the file, operators included; one that would not get smaller stays dense.
        values: how the values are stored; the arithmetic keeps the graph's own type.
        kinds: the forms that "compact" may take.

    Raises:
        UsageError: no such form.
        ExportError: a weight is too large for fp16.
    """
    for given, known, what in ((weights, WEIGHTS, "weights"), (values, VALUES, "values")):
        if given not in known:
            raise UsageError(f"{what} {given!r} is none of {', '.join(known)}")
    packed = copied(model)
    tensors = initializers(packed)
    found: list[Parts] = []
    for name in weight_names(packed):
        weight = array(tensors[name])
        stored = _half(name, weight) if values == "fp16" and weight.dtype == np.float32 else weight
        parts = _smallest(name, stored, weight.dtype, weights, kinds)
        if parts.nodes or parts.sparse:
            found.append(parts)
    _drop_initializers(packed, (parts.weight for parts in found))
    _add(packed, found)
    return packed


def _smallest(
    name: str, stored: NDArray[Any], dtype: np.dtype[Any], weights: Weights, kinds: Sequence[Kind]
) -> Parts:
    same = stored.dtype == dtype
    forms = [plain(name, stored) if same else narrow(name, stored, dtype)]
    if weights == "coo":
        forms.append(coordinates(name, stored, dtype))
    elif weights == "compact":
        forms += [compact(name, encode(stored, kind), dtype) for kind in kinds]
    return min(forms, key=lambda parts: parts.nbytes)


def _add(model: ModelProto, found: Sequence[Parts]) -> None:
    graph = model.graph
    for name in dict.fromkeys(name for parts in found for name in sorted(parts.shared)):
        graph.initializer.append(numpy_helper.from_array(SHARED[name], name))
    for parts in found:
        graph.initializer.extend(parts.tensors)
        graph.sparse_initializer.extend(parts.sparse)
    nodes = [node for parts in found for node in parts.nodes]
    rest = [NodeProto.FromString(node.SerializeToString()) for node in graph.node]
    del graph.node[:]
    graph.node.extend([*nodes, *rest])


def _half(name: str, weight: NDArray[Any]) -> NDArray[np.float16]:
    largest = float(np.abs(weight).max(initial=0))
    if largest > float(np.finfo(np.float16).max):
        raise ExportError(
            f"the weight {name} holds {largest:.3g}, which fp16 cannot",
            remedy="Export with --values fp32 and --precision fp32",
        )
    half = weight.astype(np.float16)
    # A small negative weight becomes a negative zero, which no list of nonzeros keeps.
    half[half == 0] = 0
    return half


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
