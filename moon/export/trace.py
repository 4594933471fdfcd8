"""From a PyTorch classifier to a plain ONNX graph ``input`` -> ``logits``."""

from __future__ import annotations

import copy
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from onnx import ModelProto

from moon.errors import ExportError, MissingExtraError
from moon.export.fold import fold_batch_norm
from moon.export.graph import OPSET, constants_to_initializers, copied, prune, sort_nodes, tidy
from moon.export.head import RESERVED

if TYPE_CHECKING:
    from torch import nn

__all__ = ["trace"]

PRODUCER = "moon"


def trace(model: nn.Module, *, channels: int, size: tuple[int, int]) -> ModelProto:
    """Export ``model`` with a free batch size; batch norms right behind convolutions are folded.

    Weights keep their names of the module tree (``layer1.0.conv1.weight``), so that a layer can
    be found again; sources, docs and other metadata are dropped.

    Args:
        model: [N, C, H, W] float32 -> logits [N, L]. Left as it is: a copy on the CPU, in
            evaluation mode, is exported.
        channels: C.
        size: (H, W).

    Raises:
        MissingExtraError: PyTorch or onnxscript is not installed.
        ExportError: the model has an operation that cannot be exported, or a batch size of its own.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", "train", "exporting a trained model") from error
    if importlib.util.find_spec("onnxscript") is None:
        raise MissingExtraError("onnxscript", "train", "exporting a trained model")
    held = copy.deepcopy(model).to("cpu", torch.float32).eval()
    # Two items: a batch of one would be taken for a constant.
    example = torch.zeros(2, channels, *size)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                held,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=({0: torch.export.Dim("N")},),
                input_names=["input"],
                output_names=["logits"],
                verbose=False,
            )
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(
            f"the model {type(model).__name__} cannot be exported to ONNX: {reason[0]}",
            remedy="Use a model whose forward is one traceable expression in its input",
        ) from error
    if program is None:
        raise ExportError(f"PyTorch gave no ONNX program for {type(model).__name__}")
    graph = copied(program.model_proto)
    constants_to_initializers(graph)
    fold_batch_norm(graph)
    prune(graph)
    sort_nodes(graph)
    tidy(graph, producer=PRODUCER, taken=RESERVED)
    return graph


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's own notes: deprecations inside it are not the user's."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
