"""The models of benchmarks/engine.py: made here or given, and how many multiply-adds they have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper, shape_inference

from moon.bundle import Bundle
from moon.errors import DataError, ExportError, UsageError
from moon.files import write_bytes

OPSET, IR = 13, 8  # the newest that DeepSparse 1.8 takes
LOGITS = "logits"
SEED = 0


@dataclass(frozen=True)
class Family:
    """What models are made of."""

    model: str
    size: int
    outputs: int


FAMILIES = {"r18c": Family("resnet18", 32, 11), "r50": Family("resnet50", 224, 1001)}


@dataclass(frozen=True)
class Model:
    """One to measure.

    Attributes:
        name, family: of the table's row and of the picture's panel.
        path: the ONNX file that engines are given.
        input: the input's name.
        shape: of one image, (C, H, W).
        index: the place of the logits among the outputs.
        macs: multiply-adds an image, of the dense model and of the weights that are not zero.
    """

    name: str
    family: str
    path: Path
    input: str
    shape: tuple[int, int, int]
    index: int
    macs: tuple[int, int]


def made(folder: Path, family: str, sparsity: float, structure: str) -> Path:
    """A model with random weights and masks, ERK over the layers, made where it is not there yet.

    Args:
        folder: that keeps them.
        family: a key of `FAMILIES`.
        sparsity: in percent; 0 is the dense model.
        structure: of the masks, as recipes name it.
    """
    if family not in FAMILIES:
        raise UsageError(f"no model {family!r}", remedy=f"There are {', '.join(FAMILIES)}")
    path = folder / f"{_name(family, sparsity, structure)}.onnx"
    if not path.exists():
        write_bytes(path, _traced(FAMILIES[family], sparsity, structure).SerializeToString())
    return path


def _name(family: str, sparsity: float, structure: str) -> str:
    return f"{family}-{sparsity:g}" + ("" if structure == "unstructured" else f"-{structure}")


def _traced(family: Family, sparsity: float, structure: str) -> ModelProto:
    import torch

    from moon.export.trace import trace
    from moon.trainer.models import build
    from moon.trainer.sparsity.budget import counts, densities
    from moon.trainer.sparsity.structure import parse_structure
    from moon.trainer.sparsity.topology import find_layers, generator, random_mask

    size, form = (family.size, family.size), parse_structure(structure)
    net = build(family.model, outputs=family.outputs, channels=3, size=size, seed=SEED)
    if sparsity:
        layers = find_layers(net)
        kept = counts(layers, densities(layers, 1 - sparsity / 100, "erk", form), form)
        with torch.no_grad():
            for layer in layers:
                draw = generator(SEED, 0, layer.name)
                layer.weight.mul_(random_mask(layer.weight, kept[layer.name], draw, form))
    return trace(net, channels=3, size=size)


def opened(path: Path, folder: Path) -> Model:
    """A model file or a bundle.

    Args:
        folder: for files made of it.

    Raises:
        DataError: it is no classifier of images of one size.
    """
    if path.is_dir():
        file = folder / f"{path.name}.onnx"
        file.write_bytes(Bundle.open(path).model_bytes())
    else:
        file = path
    try:
        graph = onnx.load(str(file)).graph
    except Exception as error:  # of protobuf, or of the file system
        raise DataError(f"{path} cannot be read: {error}") from error
    known = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in known]
    shape = [d.dim_value for d in inputs[0].type.tensor_type.shape.dim] if inputs else []
    if len(inputs) != 1 or len(shape) != 4 or not all(shape[1:]):
        raise DataError(f"{path} has no single input [N, C, H, W] of a fixed size")
    outputs = [value.name for value in graph.output]
    index = outputs.index(LOGITS) if LOGITS in outputs else 0
    channels, height, width = shape[1:]
    macs = multiply_adds(body(file, folder, batch=1))
    name = path.name if path.is_dir() else path.stem
    family = name.split("-")[0]
    return Model(
        name, family, file.resolve(), inputs[0].name, (channels, height, width), index, macs
    )


def body(path: Path, folder: Path, *, batch: int) -> ModelProto:
    """The graph up to the logits for one batch size, its constants computed and shapes known."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "folded.onnx")
    try:
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        model = onnx.load(options.optimized_model_filepath)
    except Exception as error:  # of ONNX Runtime, which has no root of its own
        raise DataError(f"{path} cannot be read: {error}") from error
    finally:
        Path(options.optimized_model_filepath).unlink(missing_ok=True)
    outputs = [value.name for value in model.graph.output]
    _keep(model, LOGITS if LOGITS in outputs else outputs[0])
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    del model.graph.value_info[:]
    return shape_inference.infer_shapes(model)


def _keep(model: ModelProto, output: str) -> None:
    """Only what leads to one output."""
    graph, wanted = model.graph, {output}
    nodes: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            nodes.insert(0, node)
            wanted |= set(node.input)
    tensors = [tensor for tensor in graph.initializer if tensor.name in wanted]
    known = {tensor.name for tensor in tensors}
    inputs = [v for v in graph.input if v.name in wanted - known]
    outputs = [v for v in graph.output if v.name == output]
    for field, kept in (
        ("node", nodes), ("initializer", tensors), ("input", inputs), ("output", outputs)
    ):  # fmt: skip
        copies = [type(one).FromString(one.SerializeToString()) for one in kept]
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(copies)
    # ONNX Runtime names all domains it knows.
    standard = [
        helper.make_opsetid("", one.version) for one in model.opset_import if not one.domain
    ]
    del model.opset_import[:]
    model.opset_import.extend(standard)


def _shapes(model: ModelProto) -> dict[str, tuple[int, ...]]:
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    return {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}


def multiply_adds(model: ModelProto) -> tuple[int, int]:
    """Of convolutions and products with constants: in all, and where the weight is not zero."""
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    shapes = _shapes(model)
    dense = left = 0
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.input[1] not in weights:
            continue
        weight = weights[node.input[1]]
        found = shapes[node.output[0]]
        places = int(np.prod(found[2:] if node.op_type == "Conv" else found[1:-1]))
        dense += weight.size * places
        left += int(np.count_nonzero(weight)) * places
    return dense, left


def for_deepsparse(model: Model, folder: Path, *, batch: int) -> Path:
    """The model in the form of which DeepSparse runs all; else it hands it to its ONNX Runtime.

    Opset 13, a fixed batch size, GlobalAveragePool for ReduceMean, Flatten for Reshape.

    Raises:
        ExportError: there is no such form.
    """
    graph = body(model.path, folder, batch=batch)
    nodes = list(_plainer(graph))
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    _keep(graph, graph.graph.output[0].name)
    try:
        # onnx's converter knows no way back from the opset of most operators. Those in use have
        # changed only in what types they take since, and the checker refuses the others.
        del graph.opset_import[:]
        graph.opset_import.append(helper.make_opsetid("", OPSET))
        graph.ir_version = IR
        onnx.checker.check_model(graph, full_check=True)
    except Exception as error:  # of onnx, whose C++ raises what it likes
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"{model.name} has no form of opset {OPSET}: {reason}") from error
    path = folder / f"{model.name}-deepsparse.onnx"
    onnx.save(graph, str(path))
    return path


def _plainer(model: ModelProto) -> Iterator[onnx.NodeProto]:
    shapes = _shapes(model)
    constants = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.INT64}
    for node in model.graph.node:
        given, found = (shapes.get(names[0], ()) for names in (node.input, node.output))
        if node.op_type == "ReduceMean" and _axes(node, constants) == [2, 3] and len(given) == 4:
            pooled = node.output[0] if len(found) == 4 else f"{node.output[0]}/pooled"
            yield helper.make_node("GlobalAveragePool", node.input[:1], [pooled])
            if len(found) != 4:
                yield helper.make_node("Flatten", [pooled], node.output, axis=1)
        elif node.op_type == "Reshape" and len(found) == 2 and found[:1] == given[:1]:
            yield helper.make_node("Flatten", node.input[:1], node.output, axis=1)
        else:
            yield node


def _axes(node: onnx.NodeProto, constants: dict[str, TensorProto]) -> Sequence[int]:
    """Of a reduction of [N, C, H, W]; older opsets have them as an attribute."""
    given = [axis for a in node.attribute if a.name == "axes" for axis in a.ints]
    if len(node.input) > 1 and node.input[1] in constants:
        given = numpy_helper.to_array(constants[node.input[1]]).tolist()
    return sorted(axis % 4 for axis in given)
