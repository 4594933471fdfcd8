"""Free the batch size of a graph that was exported with a fixed one."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper

from moon.export.graph import array, initializers

__all__ = ["free_batch"]


def free_batch(model: ModelProto, batch: int) -> None:
    """Make the first dimension of the input free, in place.

    Exporters write the batch size into the shapes that Reshape nodes read; where a Reshape keeps
    its first dimension and that is the batch size, it now copies the dimension from its input.
    Whether this sufficed is for the caller to check, by running several batch sizes.

    Args:
        model: with one input, whose first dimension is ``batch``.
        batch: the fixed size.
    """
    shapes = _first_dimensions(model)
    held = initializers(model)
    made = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type != "Reshape":
            continue
        shape = _constant(node.input[1], held, made)
        if shape is None or not len(shape) or shape[0] != batch:
            continue
        zeros = [one for one in node.attribute if one.name == "allowzero" and one.i]
        if zeros and not shape.all():
            continue  # there a 0 is a dimension of nothing
        if shapes.get(node.input[0]) == batch:
            for one in zeros:
                node.attribute.remove(one)
            shape[0] = 0
            name = f"{node.output[0]}/shape"
            model.graph.initializer.append(numpy_helper.from_array(shape, name))
            node.input[1] = name
    dim = model.graph.input[0].type.tensor_type.shape.dim[0]
    dim.Clear()
    dim.dim_param = "N"
    del model.graph.value_info[:]


def _constant(
    name: str, held: dict[str, onnx.TensorProto], made: dict[str, onnx.NodeProto]
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]] | None:
    if name in held:
        return array(held[name]).astype(np.int64)
    node = made.get(name)
    if node is None or node.op_type != "Constant":
        return None
    for attribute in node.attribute:
        if attribute.name == "value":
            return array(attribute.t).astype(np.int64)
        if attribute.name == "value_ints":
            return np.asarray(attribute.ints, dtype=np.int64)
    return None


def _first_dimensions(model: ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model)
    found: dict[str, int] = {}
    for value in (*inferred.graph.value_info, *inferred.graph.input):
        dims = value.type.tensor_type.shape.dim
        if dims and dims[0].HasField("dim_value"):
            found[value.name] = dims[0].dim_value
    return found
