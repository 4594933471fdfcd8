"""Small graphs as TensorRT is given them, for what a whole bundle would be too much."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper


def model(
    nodes: Sequence[NodeProto],
    constants: dict[str, NDArray[Any]],
    output: str = "logits",
    *,
    shape: Sequence[str | int] = ("N", 1, 8, 8),
    result: Sequence[str | int] = ("N", 4),
) -> ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, list(result))],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def node(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> NodeProto:
    return helper.make_node(op, list(inputs), [output], name=f"{output}/{op}", **attributes)


def two_four(outputs: int, channels: int, kernel: int = 3, seed: int = 0) -> NDArray[np.float32]:
    """A weight [K, C, R, R] with two zeros in every four input channels."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((outputs, channels, kernel, kernel)).astype(np.float32)
    weight.reshape(outputs, -1, 4, kernel, kernel)[:, :, 2:] = 0
    return weight / np.float32(np.sqrt(channels * kernel * kernel / 2))
