"""Find the last linear layer of a classifier's graph: the one that makes the logits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

from moon.export.graph import array, initializers

__all__ = ["classifier_input", "classifier_nodes", "classifier_weights"]


def classifier_nodes(model: ModelProto) -> list[NodeProto]:
    """The nodes that compute ``logits`` from the features: Gemm, MatMul, or MatMul and Add.

    Returns:
        In graph order; empty when the logits come from something else.
    """
    made = {name: node for node in model.graph.node for name in node.output}
    weights = initializers(model)
    last = made.get("logits")
    if last is None:
        return []
    if last.op_type in ("Gemm", "MatMul"):
        return [last] if last.input[1] in weights and last.input[0] not in weights else []
    if last.op_type != "Add":
        return []
    for product, bias in (last.input[:2], reversed(last.input[:2])):
        before = made.get(product)
        if before is None or before.op_type != "MatMul" or bias not in weights:
            continue
        if before.input[1] in weights and before.input[0] not in weights:
            return [before, last]
    return []


def classifier_input(model: ModelProto) -> str | None:
    """Name of the features the last linear layer reads, or None when there is none."""
    nodes = classifier_nodes(model)
    return nodes[0].input[0] if nodes else None


def classifier_weights(model: ModelProto) -> tuple[NDArray[Any], NDArray[Any] | None] | None:
    """Weight [L, D] and bias [L] (None for none) of the last linear layer: z = x W^T + b.

    Returns:
        None when there is no such layer.
    """
    nodes = classifier_nodes(model)
    if not nodes:
        return None
    held = initializers(model)
    first = nodes[0]
    weight = array(held[first.input[1]])
    options = {item.name: helper.get_attribute_value(item) for item in first.attribute}
    bias = None
    if first.op_type == "Gemm":
        if not options.get("transB", 0):
            weight = weight.T
        weight = weight * np.float32(options.get("alpha", 1.0))
        if len(first.input) > 2 and first.input[2]:
            bias = array(held[first.input[2]]) * np.float32(options.get("beta", 1.0))
    else:
        weight = weight.T
        if len(nodes) > 1:
            bias = next(array(held[name]) for name in nodes[1].input if name in held)
    outputs = len(weight)
    flat = None if bias is None else np.broadcast_to(np.asarray(bias).reshape(-1), (outputs,))
    return np.ascontiguousarray(weight), None if flat is None else flat.copy()
