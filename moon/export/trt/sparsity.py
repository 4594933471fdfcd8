"""Which layers the sparse tensor cores of a GPU can run: the 2:4 rule, layer by layer.

NVIDIA GPUs from SM 80 on multiply by weights of which two in every four are zero at up to twice
the rate. TensorRT calls a layer eligible when its weight [K, C, R, S] has, for every k, r and s,
at most two nonzeros in each group of four along C, and C is a multiple of four; a convolution in
groups never is. A linear layer is the same with R = S = 1. Whether the builder then picks such a
kernel is another matter: it picks the fastest, and on few channels that is a dense one.

Nothing here needs TensorRT or a GPU. Source: TensorRT's documentation of structured sparsity; the
number of channels is what its developers measured, as told on NVIDIA/TensorRT's tracker.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moon.runtime.unpack import dense_model

if TYPE_CHECKING:
    import onnx

__all__ = ["LEAST_CHANNELS", "LayerVerdict", "lint", "verdict"]

# Input and output channels below which a dense kernel is as fast.
LEAST_CHANNELS = 256
_GROUP, _KEPT = 4, 2
_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_HEAD = "head/"


@dataclass(frozen=True, kw_only=True)
class LayerVerdict:
    """What 2:4 kernels can do for one layer.

    Attributes:
        name: the node's, as TensorRT's builder names the layer; the output's where it has none.
        op: the ONNX operator.
        weight: name of the weight.
        shape: of the weight as it is in the graph.
        nonzeros: of the weight.
        eligible: the weight keeps the 2:4 rule.
        why: the reason, for people.
        worth: eligible, and wide enough that a gain is plausible.
    """

    name: str
    op: str
    weight: str
    shape: tuple[int, ...]
    nonzeros: int
    eligible: bool
    why: str
    worth: bool

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape)}


def lint(model: bytes) -> list[LayerVerdict]:
    """Judge every Conv, ConvTranspose, Gemm and MatMul with a constant weight, in graph order.

    The score head's products (constants named ``head/...``) are no layers of the model.

    Args:
        model: an ONNX file; packed weights are unpacked first.

    Raises:
        BundleError: not an ONNX file.
        BackendError: onnx is missing, or ONNX Runtime cannot unpack the weights.
    """
    import onnx

    graph = onnx.load_model_from_string(dense_model(model)).graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    held |= {
        node.output[0]: attribute.t
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }
    # An int8 weight stands behind the node that makes it a float.
    for node in [node for node in graph.node if node.op_type == "DequantizeLinear"]:
        if node.input[0] in held:
            _read_instead(graph, node.output[0], node.input[0])
    found = []
    for node in graph.node:
        name = _weight(node, held) if node.op_type in _OPERATORS else None
        if name is not None:
            found.append(_judge(node, name, onnx.numpy_helper.to_array(held[name])))
    return found


def verdict(layers: Sequence[LayerVerdict]) -> str:
    """One line on what to expect of a GPU, given what :func:`lint` found."""
    if not layers:
        return "No layer has a constant weight, so there is nothing for 2:4 kernels to run."
    eligible = [layer for layer in layers if layer.eligible]
    worth = [layer for layer in eligible if layer.worth]
    if not eligible:
        if all(layer.nonzeros == _size(layer) for layer in layers):
            return "No weight is zero: a GPU runs this as the dense model it is."
        return (
            f"None of {_layers(len(layers))} keeps the 2:4 rule: on a GPU these zeros make the "
            "model smaller and not faster. Train with structure=2:4 for its sparse kernels."
        )
    head = f"{len(eligible)} of {_layers(len(layers))} can use 2:4 kernels"
    if not worth:
        return (
            f"{head}, but none has {LEAST_CHANNELS} channels on both sides: expect no gain "
            "in speed."
        )
    part = sum(map(_size, worth)) / sum(map(_size, layers))
    return (
        f"{head}, and {len(worth)}, with {part:.0%} of the weights, {_are(len(worth))} wide enough "
        "to gain: in fp16 or int8, and where the builder picks them, usually 0 to 15% of the "
        "whole model's time. Measure before relying on it."
    )


def _layers(count: int) -> str:
    return f"{count} layer{'s'[: count != 1]}"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _size(layer: LayerVerdict) -> int:
    return math.prod(layer.shape)


def _read_instead(graph: onnx.GraphProto, name: str, other: str) -> None:
    for node in graph.node:
        for i, read in enumerate(node.input):
            if read == name:
                node.input[i] = other


def _weight(node: onnx.NodeProto, held: dict[str, onnx.TensorProto]) -> str | None:
    """The constant factor of the node; of two, the second."""
    places = (1, 0) if node.op_type == "MatMul" else (1,)
    for place in places:
        name = str(node.input[place])
        if name in held and len(held[name].dims) >= 2 and not name.startswith(_HEAD):
            return name
    return None


def _judge(node: onnx.NodeProto, name: str, weight: NDArray[Any]) -> LayerVerdict:
    obstacle, weight_KCx = _by_outputs(node, name, weight)
    worth = False
    if not obstacle:
        obstacle = _broken(weight_KCx)
    if obstacle:
        why = obstacle
    else:
        outputs, channels = weight_KCx.shape[:2]
        worth = min(outputs, channels) >= LEAST_CHANNELS
        narrow = f", but with {channels} channels in and {outputs} out dense kernels are as fast"
        why = "at most two nonzeros in every four input channels" + ("" if worth else narrow)
    return LayerVerdict(
        name=node.name or node.output[0],
        op=node.op_type,
        weight=name,
        shape=tuple(weight.shape),
        nonzeros=int(np.count_nonzero(weight)),
        eligible=not obstacle,
        why=why,
        worth=worth,
    )


def _by_outputs(node: onnx.NodeProto, name: str, weight: NDArray[Any]) -> tuple[str, NDArray[Any]]:
    """An obstacle that lies in the operator, or none; and the weight as [K, C, ...]."""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type == "ConvTranspose":
        return "transposed convolutions have no 2:4 kernels", weight
    if node.op_type == "Conv":
        groups = attributes["group"].i if "group" in attributes else 1
        return (f"a convolution in {groups} groups" if groups > 1 else ""), weight
    if node.op_type == "Gemm":
        transposed = "transB" in attributes and attributes["transB"].i
        return "", weight if transposed else weight.T
    if node.input[1] != name:
        return "the constant is the left factor of the product", weight
    if weight.ndim > 2:
        return "a product of stacked matrices", weight
    return "", weight.T


def _broken(weight_KCx: NDArray[Any]) -> str:
    """How the weight breaks the rule, or nothing."""
    outputs, channels = weight_KCx.shape[:2]
    if channels % _GROUP:
        plural = "s"[: channels != 1]
        return f"{channels} input channel{plural}, not a multiple of four"
    nonzeros = np.count_nonzero(weight_KCx)
    if nonzeros == weight_KCx.size:
        return "dense: no weight is zero"
    kernel = math.prod(weight_KCx.shape[2:])
    grouped_KGFx = weight_KCx.reshape(outputs, channels // _GROUP, _GROUP, kernel)
    counts = np.count_nonzero(grouped_KGFx, axis=2)
    full = int(np.count_nonzero(counts > _KEPT))
    if not full:
        return ""
    sparsity = 1 - nonzeros / weight_KCx.size
    return (
        f"{full:,} of {counts.size:,} groups of four input channels have more than two nonzeros "
        f"({sparsity:.1%} of the weight is zero)"
    )
