"""The graph that TensorRT is given: dense weights, fp16 layers, and the gate as inputs.

What calibrating changes (:data:`moon.calibrated.CALIBRATED`) becomes inputs, so that an engine
decides by gate.json as it is at the time and need not be built again. The last linear layer and
the score head stay fp32 whatever the precision.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import ModelProto, NodeProto, TensorProto, helper, load_model_from_string
from onnx.shape_inference import infer_shapes

from moon.calibrated import CALIBRATED
from moon.errors import ExportError
from moon.export.graph import copied, initializers, prune, sort_nodes
from moon.export.half import to_half
from moon.export.trt.turing import linear_as_conv
from moon.runtime.unpack import dense_model

__all__ = ["check_size", "halved", "plain", "with_targets"]

_TURING = 75
_MOST_BYTES = (1 << 31) - 1  # of a protobuf message
_NORMALISED = "head/normalised"  # where a graph that takes pixels goes over into the model


def plain(model: bytes) -> ModelProto:
    """The graph with dense weights and with inputs for what calibrating sets.

    Args:
        model: model.onnx of a bundle, packed or not.

    Raises:
        BundleError: not an ONNX file.
    """
    graph = load_model_from_string(model)
    fed = {value.name for value in graph.graph.input}
    for tensor in graph.graph.initializer:
        # As inputs they survive the folding of constants, with all that depends on them.
        if tensor.name in CALIBRATED and tensor.name not in fed:
            value = helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            graph.graph.input.append(value)
    dense = load_model_from_string(dense_model(graph.SerializeToString()))
    kept = [t for t in dense.graph.initializer if t.name not in CALIBRATED]
    copies = [TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del dense.graph.initializer[:]
    dense.graph.initializer.extend(copies)
    for node in dense.graph.node:
        node.name = node.name or node.output[0]
    return dense


def with_targets(network: ModelProto, targets: tuple[int, ...]) -> ModelProto:
    """The network as the GPUs it is for can run it; a copy where that changes it.

    Args:
        targets: compute capabilities, as 86.
    """
    if _TURING not in targets:
        return network
    turned = copied(network)
    linear_as_conv(turned)
    return turned


def check_size(size: int) -> None:
    """Refuse a dense graph that no ONNX file can hold.

    Raises:
        ExportError: more than 2 GB.
    """
    if size > _MOST_BYTES:
        raise ExportError(
            f"the dense graph would have {size / 1e9:.1f} GB, and an ONNX graph holds at most 2 GB",
            remedy="Build engines of smaller models; the bundle itself runs on ONNX Runtime",
        )


def halved(network: ModelProto) -> ModelProto:
    """A copy whose layers compute in fp16, up to the last linear one.

    Raises:
        ExportError: the graph cannot be converted.
    """
    start = _NORMALISED if _maker(network, _NORMALISED) else "input"
    body, rest = _divided(network, start)
    try:
        half = to_half(body)
    except ExportError as error:
        raise ExportError(error.cause, remedy="Build it with --trt-precision fp32") from error
    _rename_reads(half.graph.node, "input", start)
    types = _types(half)
    held = initializers(half)
    own = initializers(network)
    for name in dict.fromkeys(name for node in rest for name in node.input):
        if name in own and name in held and held[name].data_type != own[name].data_type:
            _add(half, own[name], f"{name}/fp32")
            _rename_reads(rest, name, f"{name}/fp32")
        elif name in own and name not in held:
            _add(half, own[name], name)
        elif types.get(name) == TensorProto.FLOAT16:
            wide = f"{name}/head"
            cast = helper.make_node("Cast", [name], [wide], name=wide, to=TensorProto.FLOAT)
            half.graph.node.append(cast)
            _rename_reads(rest, name, wide)
    half.graph.node.extend(rest)
    for side in ("input", "output"):
        values = getattr(half.graph, side)
        del values[:]
        values.extend(getattr(network.graph, side))
    sort_nodes(half)
    return half


def _divided(network: ModelProto, start: str) -> tuple[ModelProto, list[NodeProto]]:
    """What computes ``logits`` from ``start``, as a graph of its own, and all other nodes."""
    body = copied(network)
    graph = body.graph
    front = _upstream(network, start)
    kept = [node for node in graph.node if not set(node.output) & front]
    copies = [NodeProto.FromString(node.SerializeToString()) for node in kept]
    del graph.node[:]
    graph.node.extend(copies)
    if start != "input":
        _rename_reads(graph.node, start, "input")
    logits = next(value for value in network.graph.output if value.name == "logits")
    for values in (graph.input, graph.output, graph.value_info):
        del values[:]
    graph.input.append(helper.make_tensor_value_info("input", TensorProto.FLOAT, _shape(network)))
    graph.output.append(logits)
    prune(body)
    made = {name for node in graph.node for name in node.output}
    rest = [
        NodeProto.FromString(node.SerializeToString())
        for node in network.graph.node
        if not set(node.output) & made
    ]
    return body, rest


def _shape(network: ModelProto) -> list[str | int]:
    """[N, C, H, W] of the images that the model itself takes."""
    value = next(one for one in network.graph.input if one.name == "input")
    sides = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    if value.type.tensor_type.elem_type == TensorProto.UINT8:
        sides = [sides[0], sides[3], sides[1], sides[2]]
    return ["N", *sides[1:]]


def _upstream(network: ModelProto, name: str) -> set[str]:
    """Every value that ``name`` is computed from, and itself, where nodes make them."""
    made = {output: node for node in network.graph.node for output in node.output}
    found: set[str] = set()
    waiting = [name]
    while waiting:
        one = waiting.pop()
        if one in made and one not in found:
            found.add(one)
            waiting.extend(made[one].input)
    return found


def _maker(network: ModelProto, name: str) -> NodeProto | None:
    return next((node for node in network.graph.node if name in node.output), None)


def _types(model: ModelProto) -> dict[str, int]:
    graph = infer_shapes(model).graph
    return {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.value_info, *graph.output, *graph.input)
    }


def _add(model: ModelProto, tensor: TensorProto, name: str) -> None:
    model.graph.initializer.append(tensor)
    model.graph.initializer[-1].name = name


def _rename_reads(nodes: Iterator[NodeProto] | list[NodeProto], old: str, new: str) -> None:
    for node in nodes:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new
