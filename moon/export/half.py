"""Turn a float32 graph into one that computes in float16.

Inputs and outputs stay float32, and so does the last linear layer: its logits decide, and
rounding a logit of 20 to fp16 alone moves it by up to 0.008. The score head is added afterwards,
in float32.
"""

from __future__ import annotations

from onnx import ModelProto, NodeProto, TensorProto, helper

from moon.errors import ExportError
from moon.export.classifier import classifier_nodes
from moon.export.graph import IR_VERSION, copied, prune, sort_nodes

__all__ = ["to_half"]


def to_half(body: ModelProto) -> ModelProto:
    """A copy of ``body`` whose layers compute in float16.

    Args:
        body: graph with the input ``input`` float32 and the one output ``logits`` float32.

    Raises:
        ExportError: the graph cannot be converted.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    trunk = copied(body)
    last = [NodeProto.FromString(n.SerializeToString()) for n in classifier_nodes(trunk)]
    if last:
        _cut(trunk, last)
    try:
        # A list keeps just the named ones; the trunk's own output becomes float16.
        half: ModelProto = convert_float_to_float16(
            trunk, keep_io_types=["input"] if last else True
        )
    except Exception as error:
        raise ExportError(
            f"the graph cannot be converted to fp16: {error}", remedy="Export with --precision fp32"
        ) from error
    if last:
        _join(half, body, last)
    del half.graph.value_info[:]
    half.ir_version = min(half.ir_version, IR_VERSION)
    sort_nodes(half)
    prune(half)
    return half


def _cut(trunk: ModelProto, last: list[NodeProto]) -> None:
    """Leave only what computes the features, as the one output."""
    features = last[0].input[0]
    made = {name for node in last for name in node.output}  # nodes need not have names
    for i in reversed(range(len(trunk.graph.node))):
        if set(trunk.graph.node[i].output) & made:
            del trunk.graph.node[i]
    del trunk.graph.output[:]
    trunk.graph.output.append(helper.make_tensor_value_info(features, TensorProto.FLOAT, None))
    prune(trunk)


def _join(half: ModelProto, body: ModelProto, last: list[NodeProto]) -> None:
    """Put the float32 last layer back behind the float16 features."""
    features = last[0].input[0]
    held = {tensor.name for tensor in half.graph.initializer}
    wide = f"{features}/fp32"
    half.graph.node.append(
        helper.make_node("Cast", [features], [wide], name=wide, to=TensorProto.FLOAT)
    )
    last[0].input[0] = wide
    half.graph.node.extend(last)
    needed = {name for node in last for name in node.input}
    for tensor in body.graph.initializer:
        if tensor.name in needed:
            if tensor.name in held:
                raise ExportError(
                    f"the weight {tensor.name} is used by the last layer and another one",
                    remedy="Export with --precision fp32",
                )
            half.graph.initializer.append(tensor)
    del half.graph.output[:]
    half.graph.output.extend(body.graph.output)
