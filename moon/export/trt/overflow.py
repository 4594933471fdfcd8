"""Where fp16 overflows: the first layer whose output is not finite, found before building."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper
from onnx.shape_inference import infer_shapes

from moon.errors import ParityError
from moon.export.graph import HEAD, copied
from moon.export.session import Session

__all__ = ["check_finite", "first_overflow"]

_FLOATS = (TensorProto.FLOAT16, TensorProto.FLOAT)
_LARGEST = 65504.0  # of fp16


def check_finite(network: ModelProto, feeds: dict[str, NDArray[Any]]) -> None:
    """Refuse an fp16 network that overflows.

    Args:
        network: with fp16 layers.
        feeds: a few images and what the gate needs, by input.

    Raises:
        ParityError: a layer's output is not finite; names the first.
    """
    found = first_overflow(network, feeds)
    if found is not None:
        name, op = found
        raise ParityError(
            f"in fp16 the layer {name} ({op}) gives values beyond {_LARGEST:g}",
            remedy="Build it with --trt-precision fp32",
        )


def first_overflow(network: ModelProto, feeds: dict[str, NDArray[Any]]) -> tuple[str, str] | None:
    """Name and operator of the first layer with an output that is not finite; None without one.

    The score head is left out: infinities have a meaning there.
    """
    probe = copied(network)
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in infer_shapes(network).graph.value_info
    }
    given = {value.name for value in probe.graph.output}
    watched: dict[str, tuple[str, str]] = {}
    for node in probe.graph.node:
        if node.name.startswith(HEAD) or any(name.startswith(HEAD) for name in node.output):
            continue
        for name in node.output:
            if types.get(name) in _FLOATS and name not in given:
                watched[name] = (node.name or name, node.op_type)
                value = helper.make_tensor_value_info(name, types[name], None)
                probe.graph.output.append(value)
    session = Session(probe, threads=0)
    batch = len(feeds["input"])
    for i in range(batch):  # one by one: every value of a large network is kept
        outputs = session.run({**feeds, "input": feeds["input"][i : i + 1]})
        for name, layer in watched.items():
            if not np.isfinite(outputs[name]).all():
                return layer
    return None
