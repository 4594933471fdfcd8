"""An int8 graph as TensorRT takes it: the same numbers, zero points of zero, layers not cut apart.

ONNX Runtime's x86 kernels want uint8 activations around 128, TensorRT int8 around 0: the numbers
they stand for are the same, and no output changes.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, numpy_helper

from moon.errors import ExportError
from moon.export.graph import array, copied, initializers, prune
from moon.export.int8 import without_cut_pairs

__all__ = ["signed"]

_MIDDLE = 128
_ZERO = "int8/zero_point"


def signed(network: ModelProto) -> ModelProto:
    """A copy whose activations are int8 around zero; the graph itself where none is quantised.

    Raises:
        ExportError: an activation is quantised around another number.
    """
    held = initializers(network)
    around = {
        name: array(held[name])
        for node in network.graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
        for name in node.input[2:]
        if name in held and array(held[name]).dtype == np.uint8
    }
    if not around:
        return network
    turned = copied(network)
    for name, values in around.items():
        if (values != _MIDDLE).any():
            raise ExportError(
                f"{name} is not {_MIDDLE}, and TensorRT takes symmetric int8 alone",
                remedy="Export the model again with --precision int8",
            )
    turned.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.int8), _ZERO))
    for node in turned.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            for i, name in enumerate(node.input):
                if name in around:
                    node.input[i] = _ZERO
    without_cut_pairs(turned)
    prune(turned)
    return turned
