"""The score head cut off its model: a graph fed with logits and features."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

Arrays = dict[str, NDArray[Any]]


def head_alone(model: ModelProto, feeds: Arrays) -> ModelProto:
    """The nodes between ``feeds`` and the outputs, all feeds being inputs; no output is a feed."""
    graph = model.graph
    wanted = {value.name for value in graph.output} - set(feeds)
    kept = []
    for node in reversed(graph.node):
        if wanted & set(node.output) and not set(node.output) & set(feeds):
            kept.append(node)
            wanted |= set(node.input)
    constants = [tensor for tensor in graph.initializer if tensor.name in wanted]
    others = [value for value in graph.input if value.name not in ("input", *feeds)]
    return _graph(
        list(reversed(kept)),
        [*_inputs(feeds), *others],
        [value for value in graph.output if value.name not in feeds],
        constants,
        model,
    )


def passing(feeds: Arrays) -> ModelProto:
    """A graph with these inputs that does nothing: what a call costs by itself."""
    node = helper.make_node("Identity", ["logits"], ["same"])
    same = helper.make_tensor_value_info("same", TensorProto.FLOAT, ["N", None])
    return _graph([node], _inputs(feeds), [same], [])


def _inputs(feeds: Arrays) -> list[Any]:
    shapes = {name: ["N", *array.shape[1:]] for name, array in feeds.items()}
    return [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]


def _graph(
    nodes: Any, inputs: Any, outputs: Any, constants: Any, like: ModelProto | None = None
) -> ModelProto:
    graph = helper.make_graph(nodes, "head", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 18)] if like is None else list(like.opset_import)
    return helper.make_model(graph, ir_version=10, opset_imports=opsets)
