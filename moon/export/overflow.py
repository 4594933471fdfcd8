"""Which tensor of a graph outgrows fp16, whose largest number is 65,504.

Looked for in fp32: ONNX Runtime's CPU computes most of an fp16 graph in fp32 between casts, and
folds some casts away, so that an infinity of a GPU's may not show there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from moon.errors import ParityError
from moon.export.graph import copied, prune, weight_names
from moon.export.session import Session

__all__ = ["Largest", "largest_in_half", "refuse_overflow"]

_MOST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Largest:
    """The tensor with the largest number among those that an fp16 graph holds in fp16.

    Attributes:
        layer: what computes it, by its weight where it has one.
        value: the largest absolute value, NaN where one is no number.
        first: whether it is the first, in the graph's order, that fp16 cannot hold.
    """

    layer: str
    value: float
    first: bool


def largest_in_half(
    wide: ModelProto, half: ModelProto, batches: Iterable[NDArray[Any]]
) -> Largest | None:
    """The first tensor that fp16 cannot hold, else the largest; None where fp16 holds none.

    Args:
        wide: the graph in fp32, with the weights of ``half``.
        half: the same graph computing in fp16.
        batches: inputs, [n, ...] each.
    """
    names = _half_tensors(wide, half)
    if not names:
        return None
    probe = copied(wide)
    del probe.graph.output[:]
    for i, name in enumerate(names):
        probe.graph.node.extend(
            [
                helper.make_node("Abs", [name], [f"moon/abs_{i}"], name=f"moon/abs_{i}"),
                helper.make_node(
                    "ReduceMax", [f"moon/abs_{i}"], [f"moon/most_{i}"], keepdims=0, name=f"moon/{i}"
                ),
            ]
        )
        value = helper.make_tensor_value_info(f"moon/most_{i}", TensorProto.FLOAT, [])
        probe.graph.output.append(value)
    prune(probe)
    # The threshold, an input as well, goes with the nodes that read it.
    for i in reversed(range(len(probe.graph.input))):
        if probe.graph.input[i].name != "input":
            del probe.graph.input[i]
    session = Session(probe, threads=0)
    most = np.zeros(len(names))
    for items in batches:
        found = session.run({"input": items})
        # NaN stays, once there.
        most = np.maximum(most, [float(found[f"moon/most_{i}"]) for i in range(len(names))])
    beyond = np.flatnonzero(~(most <= _MOST))
    at = int(beyond[0]) if len(beyond) else int(most.argmax())
    return Largest(_layer(wide, names[at]), float(most[at]), bool(len(beyond)))


def refuse_overflow(found: Largest | None, images: int) -> None:
    """Refuse a graph whose tensors outgrow fp16.

    Raises:
        ParityError: names the first layer that does.
    """
    if found is None or not found.first:
        return
    raise ParityError(
        f"the layer {found.layer} reaches {found.value:,.0f} over {images:,} images, and fp16 ends "
        f"at {_MOST:,.0f}",
        remedy="Export with --precision fp32; --values fp16 makes the file as small",
    )


def _half_tensors(wide: ModelProto, half: ModelProto) -> list[str]:
    """Tensors that nodes of ``wide`` compute in fp32 and ``half`` holds in fp16, in order."""
    kinds = _kinds(half)
    made = [name for node in wide.graph.node for name in node.output]
    wide_kinds = _kinds(wide)
    return [
        name
        for name in made
        if kinds.get(name) == TensorProto.FLOAT16 and wide_kinds.get(name) == TensorProto.FLOAT
    ]


def _kinds(model: ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model)
    return {
        value.name: value.type.tensor_type.elem_type
        for value in (*inferred.graph.value_info, *inferred.graph.output)
    }


def _layer(model: ModelProto, tensor: str) -> str:
    """A node as people know it: by its weight, else its name."""
    node = next(node for node in model.graph.node if tensor in node.output)
    weights = set(weight_names(model))
    own = [name for name in node.input if name in weights]
    return f"{own[0].removesuffix('.weight')} ({_called(node)})" if own else _called(node)


def _called(node: NodeProto) -> str:
    return f"{node.op_type} {node.name}".strip()
