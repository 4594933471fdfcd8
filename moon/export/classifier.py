"""Find the last linear layer of a classifier's graph: the one that makes the logits."""

from __future__ import annotations

from onnx import ModelProto, NodeProto

from moon.export.graph import initializers

__all__ = ["classifier_input", "classifier_nodes"]


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
