"""Take in somebody's own ONNX classifier: float32 images [N, C, H, W] -> logits [N, L]."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, helper, version_converter

from moon.errors import ExportError, UsageError
from moon.export.batch import free_batch
from moon.export.fold import fold_batch_norm
from moon.export.graph import (
    OPSET,
    constants_to_initializers,
    copied,
    densify,
    prune,
    rename,
    sort_nodes,
    tidy,
)
from moon.export.head import RESERVED
from moon.export.session import run

__all__ = ["Foreign", "read_foreign"]

# The newest operator set that runtimes of two years ago know.
_NEWEST_OPSET = 21
_LARGEST = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """A model taken in.

    Attributes:
        reference: as it was read, cut to its logits; what the rest is compared with.
        input_name: the input of ``reference``.
        batch: the fixed batch size of ``reference``, or None when free.
        body: ``input`` float32 [N, C, H, W] -> ``logits`` float32 [N, L], batch free.
        channels, size, outputs: C, (H, W), L.
        removed: operator taken off the end ("Softmax", "LogSoftmax") or "".
    """

    reference: ModelProto
    input_name: str
    batch: int | None
    body: ModelProto
    channels: int
    size: tuple[int, int]
    outputs: int
    removed: str


def read_foreign(path: str | Path, *, size: tuple[int, int] | None = None) -> Foreign:
    """Read, check and normalise an ONNX classifier.

    Batch normalisation is folded, the batch size made free, and a Softmax or LogSoftmax at the
    end taken off, for scores need logits.

    Args:
        path: the .onnx file; weights in files beside it are taken in.
        size: (H, W), for a model that leaves these free.

    Raises:
        UsageError: no such file, or ``size`` contradicts the model.
        ExportError: not an ONNX model, or not a classifier of images as described.
    """
    reference = _load(Path(path))
    model = copied(reference)
    _plain(model, Path(path))
    given = _the_input(model)
    input_name = given.name
    batch, channels, height, width = _dimensions(given, size)
    for each in (reference, model):
        _choose_output(each)
        removed = _take_off_softmax(each)
    _name_ends(model, input_name, model.graph.output[0].name)
    if batch is not None:
        free_batch(model, batch)
    constants_to_initializers(model)
    fold_batch_norm(model)
    prune(model)
    sort_nodes(model)
    outputs = _count_outputs(model, (batch or 2, channels, height, width))
    _declare_ends(model, (channels, height, width), outputs)
    tidy(model, producer="moon", taken=RESERVED)
    return Foreign(
        reference=reference,
        input_name=input_name,
        batch=batch,
        body=model,
        channels=channels,
        size=(height, width),
        outputs=outputs,
        removed=removed,
    )


def _load(path: Path) -> ModelProto:
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    if path.stat().st_size > _LARGEST:
        raise ExportError(f"{path} is larger than 2 GiB")
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except (DecodeError, onnx.checker.ValidationError, OSError, ValueError) as error:
        raise ExportError(
            f"{path} is not a valid ONNX model: {str(error)[:300]}",
            remedy="Export it again, with its external data files beside it",
        ) from error
    if not model.graph.node:
        raise ExportError(f"{path} is not a valid ONNX model: it has no nodes")
    return model


def _plain(model: ModelProto, path: Path) -> None:
    """Inline functions, make sparse weights dense and bring the operator set into range."""
    densify(model)
    if model.functions:
        inlined = onnx.inliner.inline_local_functions(model)
        model.CopyFrom(inlined)
    # Models before IR 4 list their weights among the inputs.
    held = {tensor.name for tensor in model.graph.initializer}
    for i in reversed(range(len(model.graph.input))):
        if model.graph.input[i].name in held:
            del model.graph.input[i]
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if OPSET <= opset <= _NEWEST_OPSET:
        return
    target = OPSET if opset < OPSET else _NEWEST_OPSET
    try:
        model.CopyFrom(version_converter.convert_version(model, target))
    except Exception as error:
        raise ExportError(
            f"{path} uses operator set {opset}, and converting it to {target} failed: "
            f"{str(error).splitlines()[0][:200]}",
            remedy=f"Export it again with opset {OPSET}",
        ) from error


def _shape(value: ValueInfoProto) -> list[int | None]:
    dims = value.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else None for d in dims]


def _the_input(model: ModelProto) -> ValueInfoProto:
    if len(model.graph.input) != 1:
        names = ", ".join(value.name for value in model.graph.input) or "none"
        raise ExportError(f"the model must have one input, and has {names}")
    value: ValueInfoProto = model.graph.input[0]
    kind = value.type.tensor_type.elem_type
    shape = _shape(value)
    if kind != TensorProto.FLOAT or len(shape) != 4:
        name = TensorProto.DataType.Name(kind).lower()
        raise ExportError(
            f"the input {value.name} must be float [N, C, H, W], and is {name} {shape}",
            remedy="Export the model with float32 images, channels first",
        )
    return value


def _dimensions(
    value: ValueInfoProto, size: tuple[int, int] | None
) -> tuple[int | None, int, int, int]:
    batch, channels, height, width = _shape(value)
    if channels not in (1, 3):
        raise ExportError(
            f"the input {value.name} must have 1 or 3 channels in its second dimension, "
            f"and is {_shape(value)}",
            remedy="Export the model with channels first",
        )
    if size is not None and any(
        own not in (None, asked) for own, asked in zip((height, width), size, strict=True)
    ):
        raise UsageError(f"size {size} contradicts the model's input {_shape(value)}")
    height, width = (height, width) if size is None else size
    if not height or not width:
        raise ExportError(
            f"the input {value.name} leaves height and width free",
            remedy="Export the model with a fixed image size",
        )
    return batch or None, channels, height, width


def _choose_output(model: ModelProto) -> None:
    """Choose the logits among the outputs and make them the only one."""
    outputs = list(model.graph.output)
    floats = [v for v in outputs if v.type.tensor_type.elem_type == TensorProto.FLOAT]
    named = [v for v in floats if v.name == "logits"]
    chosen = named or floats
    if len(chosen) != 1:
        names = ", ".join(f"{one.name} ({_type_name(one)})" for one in outputs)
        raise ExportError(
            f"the model must have one float output, or one called logits, and has {names}",
            remedy="Export what comes before an arg max, and call it logits",
        )
    keep = ValueInfoProto()
    keep.CopyFrom(chosen[0])
    del model.graph.output[:]
    model.graph.output.append(keep)


def _take_off_softmax(model: ModelProto) -> str:
    made = {name: node for node in model.graph.node for name in node.output}
    output = model.graph.output[0]
    last = made.get(output.name)
    removed = ""
    while last is not None and last.op_type in ("Softmax", "LogSoftmax", "Identity"):
        removed = last.op_type if last.op_type != "Identity" else removed
        if last.input[0] not in made:
            break
        output.name = last.input[0]
        last = made[output.name]
    prune(model)
    return removed


def _name_ends(model: ModelProto, input_name: str, output_name: str) -> None:
    """Call the input ``input`` and the output ``logits``; others of reserved names give way."""
    used: set[str] = set()

    def note(name: str) -> str:
        used.add(name)
        return name

    rename(model, note)
    ends = {input_name: "input", output_name: "logits"}

    def new_name(name: str) -> str:
        if name in ends:
            return ends[name]
        if name not in RESERVED:
            return name
        free = f"{name}_"
        while free in used:
            free += "_"
        return free

    rename(model, new_name)


def _count_outputs(model: ModelProto, shape: tuple[int, ...]) -> int:
    probe = copied(model)
    _undeclare(probe.graph)
    logits = run(probe, {"input": np.zeros(shape, dtype=np.float32)})["logits"]
    if logits.ndim != 2 or logits.shape[0] != shape[0] or logits.shape[1] < 2:
        raise ExportError(
            f"the model must give logits [N, classes], and gives {list(logits.shape)} "
            f"for {list(shape)}",
            remedy="Only classifiers of whole images into 2 classes or more can be taken in",
        )
    return int(logits.shape[1])


def _type_name(value: ValueInfoProto) -> str:
    name: str = TensorProto.DataType.Name(value.type.tensor_type.elem_type)
    return name.lower()


def _undeclare(graph: GraphProto) -> None:
    """Forget the shapes that were written for the old batch size."""
    del graph.value_info[:]
    name = graph.output[0].name
    graph.output[0].CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    graph.input[0].type.tensor_type.shape.dim[0].Clear()


def _declare_ends(model: ModelProto, shape: tuple[int, int, int], outputs: int) -> None:
    graph = model.graph
    declared = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", *shape])
    graph.input[0].CopyFrom(declared)
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", outputs])
    graph.output[0].CopyFrom(logits)
