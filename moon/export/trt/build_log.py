"""What the builder's log says of sparse layers, and its errors in a line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from moon.errors import ExportError
from moon.runtime.trt.log import Log, Message

__all__ = ["build_error", "eligible_layers", "parse_error", "picked_layers", "sparse_tactics"]

# TensorRT 8 and 10 word them differently.
_ELIGIBLE = (
    re.compile(r"\(Sparsity\) Layers eligible for sparse math:(.*)"),
    re.compile(r"\(Sparsity\) Found (\d+) layer\(s\) eligible to use sparse tactics:?(.*)"),
)
_PICKED = (
    re.compile(r"\(Sparsity\) TRT inference plan picked sparse implementation for layers:(.*)"),
    re.compile(r"\(Sparsity\) Chose (\d+) layer\(s\) using sparse tactics:?(.*)"),
)
_SPARSE_TACTIC = re.compile(r"sparse|_sp_|spgemm|spconv", re.IGNORECASE)
_MEMORY = re.compile(r"out of memory|insufficient memory|OutOfMemory", re.IGNORECASE)
_GEMM = re.compile(r"operation '([^']*)' for Turing \(SM75\): FP32 GEMM")


def eligible_layers(messages: Iterable[Message]) -> tuple[str, ...] | None:
    """Layers that the builder found to be sparse; None where it says nothing of it."""
    return _named(messages, _ELIGIBLE)


def picked_layers(messages: Iterable[Message]) -> tuple[str, ...] | None:
    """Layers for which the builder chose a sparse kernel; None where it says nothing of it."""
    return _named(messages, _PICKED)


def sparse_tactics(layers: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Layers of the engine, as its inspector lists them, whose kernel is a sparse one.

    The second way to the same answer, by the kernels' names.
    """
    found = []
    for layer in layers:
        tactic = str(layer.get("TacticName", ""))
        if _SPARSE_TACTIC.search(tactic):
            found.append(str(layer.get("Name", "")))
    return tuple(found)


def parse_error(parser: Any, messages: Iterable[Message]) -> ExportError:
    """Why the ONNX parser refused a graph: the operator, its node and the reason."""
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        operator, node = error.node_operator(), error.node_name()
        where = f"the operator {operator}" if operator else "the graph"
        where += f" of the node {node}" if node else ""
        reason = re.sub(r"^.*?Assertion failed: ", "", error.desc()).strip()
        return ExportError(
            f"TensorRT does not support {where}: {reason}",
            remedy="Use another operator in the model, or run it with --backend onnxruntime",
        )
    said = next(iter(Log.errors(list(messages))), "no reason given")
    return ExportError(f"TensorRT cannot read the graph: {said}")


def build_error(title: str, messages: Iterable[Message]) -> ExportError:
    """Why a build failed, from the errors it logged."""
    errors = Log.errors(list(messages))
    said = errors[0] if errors else "no reason given"
    if any(_MEMORY.search(one) for one in errors):
        return ExportError(
            f"{title} ran out of memory: {said}",
            remedy="Build with a smaller --trt-batch, or close what else uses the GPU",
        )
    if found := _GEMM.search(said):
        return ExportError(
            f"{title} cannot build the layer {found[1]} for sm_75: it multiplies two fp32 "
            "matrices that are both computed",
            remedy="Leave sm_75 out",
        )
    return ExportError(f"{title} could not build the engine: {said}")


def _named(
    messages: Iterable[Message], patterns: Sequence[re.Pattern[str]]
) -> tuple[str, ...] | None:
    for message in messages:
        for pattern in patterns:
            if found := pattern.search(message.text):
                names = found.groups()[-1].strip().rstrip(".")
                return tuple(one.strip() for one in names.split(",") if one.strip())
    return None
