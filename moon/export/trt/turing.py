"""Linear layers for Turing GPUs: TensorRT-RTX multiplies no fp32 matrices there, but convolves."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.shape_inference import infer_shapes

from moon.export.graph import array, initializers

__all__ = ["linear_as_conv"]


def linear_as_conv(model: ModelProto) -> int:
    """Turn fp32 Gemm and MatMul by a constant matrix into 1x1 convolutions, in place.

    The same products in the same precision. Other products stay as they are, and TensorRT then
    names the first that it cannot compile.

    Returns:
        How many were turned.
    """
    held = initializers(model)
    ranks = _ranks(model)
    nodes: list[NodeProto] = []
    turned = 0
    for node in model.graph.node:
        parts = _linear(node, held, ranks)
        if parts is None:
            nodes.append(NodeProto.FromString(node.SerializeToString()))
            continue
        weight_OI, bias_O = parts
        turned += 1
        nodes.extend(_convolution(model, node, weight_OI, bias_O))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return turned


def _linear(
    node: NodeProto, held: dict[str, TensorProto], ranks: dict[str, int]
) -> tuple[NDArray[Any], NDArray[Any] | None] | None:
    """Weight [out, in] and bias [out] of a product that can be turned, else None."""
    if node.op_type not in ("Gemm", "MatMul") or node.input[0] in held:
        return None
    tensor = held.get(node.input[1])
    if tensor is None or tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2:
        return None
    weight = array(tensor)
    if node.op_type == "MatMul":
        return (weight.T, None) if ranks.get(node.input[0]) == 2 else None
    options = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    if options.get("transA", 0):
        return None
    weight = (weight if options.get("transB", 0) else weight.T) * _factor(options, "alpha")
    if len(node.input) < 3 or not node.input[2]:
        return weight, None
    if node.input[2] not in held:
        return None
    bias = array(held[node.input[2]]) * _factor(options, "beta")
    if bias.size not in (1, len(weight)):  # a row for each image
        return None
    return weight, np.broadcast_to(bias.reshape(-1), (len(weight),))


def _factor(options: dict[str, Any], name: str) -> Any:
    return np.float32(options.get(name, 1.0))


def _convolution(
    model: ModelProto, node: NodeProto, weight_OI: NDArray[Any], bias_O: NDArray[Any] | None
) -> list[NodeProto]:
    out = node.output[0]
    constants = {f"{out}/weight": weight_OI[:, :, None, None], f"{out}/sides": np.array([2, 3])}
    if bias_O is not None:
        constants[f"{out}/bias"] = bias_O
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
    wide, conv = f"{out}/image", f"{out}/conv"
    inputs = [wide, f"{out}/weight", *([f"{out}/bias"] if bias_O is not None else [])]
    return [
        helper.make_node("Unsqueeze", [node.input[0], f"{out}/sides"], [wide], name=wide),
        helper.make_node("Conv", inputs, [conv], name=node.name or conv),
        helper.make_node("Squeeze", [conv, f"{out}/sides"], [out], name=f"{out}/flat"),
    ]


def _ranks(model: ModelProto) -> dict[str, int]:
    graph = infer_shapes(model).graph
    return {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*graph.value_info, *graph.input)
        if value.type.tensor_type.HasField("shape")
    }
