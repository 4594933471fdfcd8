"""Turn a float32 graph into one whose layers compute in int8, by explicit Q and DQ nodes.

Ranges are measured and nodes placed by ``onnxruntime.quantization``. Weights are int8 with a scale
an output channel, activations have one scale each, both symmetric: a zero stays a zero, and the
same numbers serve ONNX Runtime, whose x86 kernels want uint8 activations (zero point 128), and
TensorRT, which wants int8 (zero point 0). Biases stay float32, and so do the last linear layer and
the score head: their numbers decide.

Shapes: O output channels first, whatever follows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto

from moon.errors import ExportError
from moon.export.classifier import classifier_nodes
from moon.export.graph import (
    IR_VERSION,
    array,
    copied,
    initializers,
    prune,
    rename,
    users,
    weight_names,
)

__all__ = ["to_int8", "without_cut_pairs"]

Floats = NDArray[np.float32]

_REMEDY = "Export with --precision fp16 or fp32"
_STORED = "_quantized"  # what ONNX Runtime calls the int8 weight, behind the weight's own name
# Where integers pay in ONNX Runtime and TensorRT alike; others compute in float32 in between.
_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Concat", "Relu", "Clip",
              "MaxPool", "AveragePool", "GlobalAveragePool")  # fmt: skip
# What cuts off and leaves the rest as it is.
_CUTS = {"Relu", "Clip"}


def to_int8(body: ModelProto, batches: Iterable[Floats]) -> ModelProto:
    """A copy of ``body`` whose convolutions, linear layers and additions compute in int8.

    Args:
        body: graph with the input ``input`` and the one output ``logits``, both float32.
        batches: float32 [n, C, H, W] images that the ranges of activations are measured on.

    Raises:
        ExportError: the graph cannot be converted, or nothing in it is left to convert.
    """
    kept = [node.name for node in classifier_nodes(body)]
    with tempfile.TemporaryDirectory(prefix="moon-int8-") as folder:
        model = _quantised(body, batches, kept, Path(folder))
    _own_names(model)
    _join_ranges(model)
    prune(model)
    del model.graph.value_info[:]
    model.ir_version = min(model.ir_version, IR_VERSION)
    _check(model, body)
    return model


def _quantised(
    body: ModelProto, batches: Iterable[Floats], kept: list[str], folder: Path
) -> ModelProto:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    marked = copied(body)
    add_pre_process_metadata(marked)  # batch normalisation is folded: nothing to warn of
    onnx.save(marked, folder / "body.onnx")
    try:
        quantize_static(
            str(folder / "body.onnx"),
            str(folder / "int8.onnx"),
            _reader(batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_OPERATORS),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=kept,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
            },
        )
        found = onnx.load(folder / "int8.onnx")
    except Exception as error:  # of ONNX, of ONNX Runtime or of its Python code
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(
            f"the graph cannot be converted to int8: {cause[0][:300]}", remedy=_REMEDY
        ) from error
    del found.metadata_props[:]
    return found


def _reader(batches: Iterable[Floats]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(batches)

        def get_next(self) -> dict[str, Floats] | None:
            batch = next(self._left, None)
            return None if batch is None else {"input": batch}

    return Reader()


def _own_names(model: ModelProto) -> None:
    """Give the int8 weight the name of the float one, which its layer is known by."""
    new = {}
    held = initializers(model)
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or not node.input[0].endswith(_STORED):
            continue
        weight = node.input[0].removesuffix(_STORED)
        if node.input[0] not in held:
            continue
        new[node.input[0]] = weight
        new[node.input[1]] = f"{weight}/scale"
        new[node.input[2]] = f"{weight}/zero_point"
        new[node.output[0]] = f"{weight}/float"
    rename(model, lambda name: new.get(name, name))


def _join_ranges(model: ModelProto) -> None:
    """Give what a ReLU alone reads the range of what it makes.

    Quantising before it then changes nothing, as rounding keeps the order of numbers: ONNX Runtime
    needs these nodes to see an integer convolution, and TensorRT is given a graph without them.
    """
    for (before, wide), after in _around_cuts(model):
        for node in (before, wide):
            node.input[1], node.input[2] = after.input[1], after.input[2]


def without_cut_pairs(model: ModelProto) -> int:
    """Take out the Q and DQ between a layer and its ReLU, in place; no output changes.

    Returns:
        How many pairs.
    """
    pairs = _around_cuts(model)
    for (before, wide), after in pairs:
        if list(before.input[1:]) == list(after.input[1:]):
            rename_reads = {wide.output[0]: before.input[0]}
            for node in model.graph.node:
                for i, name in enumerate(node.input):
                    node.input[i] = rename_reads.get(name, name)
    prune(model)
    return len(pairs)


def _around_cuts(model: ModelProto) -> list[tuple[tuple[NodeProto, NodeProto], NodeProto]]:
    """For each ReLU between quantised values that nothing else reads: Q and DQ before, Q after."""
    made = {name: node for node in model.graph.node for name in node.output}
    read = users(model)
    found = []
    for cut in model.graph.node:
        wide = made.get(cut.input[0]) if cut.op_type in _CUTS else None
        if wide is None or wide.op_type != "DequantizeLinear":
            continue
        before = made.get(wide.input[0])
        if before is None or before.op_type != "QuantizeLinear":
            continue
        alone = len(read[wide.output[0]]) == 1 and len(read[wide.input[0]]) == 1
        after = [n for n in read.get(cut.output[0], []) if n.op_type == "QuantizeLinear"]
        if alone and len(after) == 1:
            found.append(((before, wide), after[0]))
    return found


def _check(model: ModelProto, body: ModelProto) -> None:
    """What must hold of the graph, whatever the library did.

    Raises:
        ExportError: an operator that is not ONNX's own, no int8 weight, a zero that came to life
            or a weight that is off by more than half a step.
    """
    foreign = {node.domain for node in model.graph.node} - {"", "ai.onnx"}
    if foreign:
        raise ExportError(
            f"the int8 graph has operators of {sorted(foreign)[0]}, not of ONNX", remedy=_REMEDY
        )
    held, before = initializers(model), initializers(body)
    names = [n for n in weight_names(model) if held[n].data_type == TensorProto.INT8]
    if not names:
        raise ExportError("no layer of the graph can compute in int8", remedy=_REMEDY)
    for name in names:
        stored, weight = array(held[name]).astype(np.int64), array(before[name]).astype(np.float64)
        alive = int(np.count_nonzero(stored[weight == 0]))
        if alive or np.count_nonzero(array(held[f"{name}/zero_point"])):
            raise ExportError(
                f"{alive} zero weights of {name} are not zero in int8", remedy=_REMEDY
            )
        step = _along(array(held[f"{name}/scale"]).astype(np.float64), model, name, weight.ndim)
        off = np.abs(stored * step - weight) > 0.501 * step
        if off.any():
            raise ExportError(
                f"{int(off.sum())} weights of {name} are off by more than half an int8 step",
                remedy=_REMEDY,
            )


def _along(scale: NDArray[Any], model: ModelProto, name: str, ndim: int) -> NDArray[Any]:
    """A weight's scales, shaped so that they multiply it."""
    node = next(n for n in model.graph.node if n.output[0] == f"{name}/float")
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    shape = [1] * ndim
    if scale.ndim:
        shape[axis] = len(scale)
    return scale.reshape(shape) if scale.size > 1 else scale.reshape(())
