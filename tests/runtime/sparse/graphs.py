"""Small ONNX graphs, and what ONNX Runtime makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from moon.runtime.sparse.engine import SparseEngine
from moon.runtime.sparse.fold import fold
from moon.runtime.sparse.layout import Planes
from moon.runtime.sparse.lower import Lowered, lower
from moon.runtime.sparse.model import read_model

Array = NDArray[Any]


class Graph:
    """A graph written node by node. ``x`` is the input [N, C, H, W], the last result the output."""

    def __init__(self, *shape: int, batch: int | str = "N", opset: int = 20) -> None:
        self.shape, self._batch, self._opset = shape, batch, opset
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._random = np.random.default_rng(0)

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def weight(self, *shape: int, density: float = 1.0) -> str:
        values = self._random.normal(size=shape) / np.sqrt(max(1, np.prod(shape[1:])))
        return self.constant(values * (self._random.random(shape) < density))

    def add(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        number = len(self._nodes)
        names = [f"t{number}" + (f"_{i}" if i else "") for i in range(outputs)]
        self._nodes.append(helper.make_node(op, inputs, names, name=f"n{number}", **attributes))
        return names[0]

    def conv(self, source: str, rows: int, own: int, kernel: int = 3, **attributes: Any) -> str:
        if "auto_pad" not in attributes:
            attributes.setdefault("pads", [kernel // 2] * 4)
        weight = self.weight(rows, own, kernel, kernel, density=0.4)
        bias = self.constant(self._random.normal(size=rows))
        return self.add("Conv", source, weight, bias, **attributes)

    def data(self, *outputs: str) -> bytes:
        wanted = outputs or (self._nodes[-1].output[0],)
        graph = helper.make_graph(
            self._nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [self._batch, *self.shape])],
            [helper.make_empty_tensor_value_info(name) for name in wanted],
            self._constants,
        )
        for value in graph.output:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
        opsets = [helper.make_opsetid("", self._opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        data: bytes = model.SerializeToString()
        return data

    def images(self, count: int = 2) -> NDArray[np.float32]:
        return np.random.default_rng(1).normal(size=(count, *self.shape)).astype(np.float32)


def opened(model: Any, **options: Any) -> SparseEngine:
    """An engine that runs all it can itself, whether or not that is worth it."""
    return SparseEngine(model, **{"force": True, **options})


def engaged(model: Any, **options: Any) -> SparseEngine:
    """The same, of a model of which nothing may be left to ONNX Runtime."""
    engine = opened(model, **options)
    assert engine.handed_over == "", engine.handed_over
    return engine


def lowered(graph: Graph, *outputs: str, images: int = 1, fixed: bool = False) -> Lowered:
    channels, height, width = graph.shape
    model = fold(read_model(graph.data(*outputs)))
    return lower(model, "x", Planes(channels, images, height, width), fixed=fixed)


def reference(data: bytes, feeds: Mapping[str, Array] | Array) -> Sequence[Array]:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    given = feeds if isinstance(feeds, Mapping) else {"x": feeds}
    found: Sequence[Array] = session.run(None, dict(given))
    return found
