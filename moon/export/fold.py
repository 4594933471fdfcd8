"""Fold batch normalisation into the convolution before it.

A sparse weight stays as sparse: each output channel is scaled, so a zero stays a zero.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto

from moon.export.graph import array, initializers, prune, set_initializer, users

__all__ = ["fold_batch_norm"]


def fold_batch_norm(model: ModelProto) -> int:
    """Fold each inference-mode BatchNormalization that directly follows a Conv, in place.

    One that follows something else, or whose convolution's output or weight has another reader,
    is left.

    Returns:
        How many were folded.
    """
    made = {name: node for node in model.graph.node for name in node.output}
    read = users(model)
    outputs = {value.name for value in model.graph.output}
    held = initializers(model)
    folded = 0
    for norm in model.graph.node:
        conv = made.get(norm.input[0]) if norm.op_type == "BatchNormalization" else None
        if conv is None or conv.op_type != "Conv":
            continue
        alone = len(read[conv.output[0]]) == 1 and conv.output[0] not in outputs
        # A weight that two layers share cannot be scaled for one of them.
        mine = all(len(read[name]) == 1 for name in conv.input[1:] if name)
        constant = all(
            name in held and held[name].data_type == TensorProto.FLOAT
            for name in (*(n for n in conv.input[1:] if n), *norm.input[1:5])
        )
        training = any(a.name == "training_mode" and a.i for a in norm.attribute)
        if alone and mine and constant and not training:
            _fold(model, conv, norm)
            made[norm.output[0]] = conv
            held = initializers(model)
            folded += 1
    if folded:
        _drop_folded(model)
        prune(model)
    return folded


def _fold(model: ModelProto, conv: NodeProto, norm: NodeProto) -> None:
    held = initializers(model)
    gamma, beta, mean, var = (array(held[name]).astype(np.float64) for name in norm.input[1:5])
    epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
    weight = array(held[conv.input[1]]).astype(np.float64)
    has_bias = len(conv.input) > 2 and conv.input[2]
    bias = array(held[conv.input[2]]).astype(np.float64) if has_bias else np.zeros(len(weight))
    scale = gamma / np.sqrt(var + epsilon)
    new_weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    # A scale that is not finite must not turn zeros into NaN unseen; it shows in the others.
    new_weight[weight == 0] = 0
    new_bias = (bias - mean) * scale + beta
    set_initializer(model, conv.input[1], new_weight.astype(np.float32))
    bias_name = conv.input[2] if has_bias else f"{conv.input[1]}_bias"
    set_initializer(model, bias_name, new_bias.astype(np.float32))
    if not has_bias:
        del conv.input[2:]
        conv.input.append(bias_name)
    conv.output[0] = norm.output[0]
    norm.op_type = "Folded"


def _drop_folded(model: ModelProto) -> None:
    for i in reversed(range(len(model.graph.node))):
        if model.graph.node[i].op_type == "Folded":
            del model.graph.node[i]
