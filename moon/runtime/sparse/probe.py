"""Types and shapes of tensors inside a graph, as ONNX Runtime infers them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from moon.runtime.onnxruntime import open_session
from moon.runtime.sparse.cut import cut
from moon.runtime.sparse.input import dtype_of
from moon.runtime.sparse.model import Dimension, Model, Value

__all__ = ["probe"]

# Numbers of images to infer shapes for. Where the number stands, and nothing else, is then seen.
_NUMBERS = (2, 3)


def probe(model: Model, names: Sequence[str], fixed: int | None) -> Iterator[Value]:
    """What is known of tensors.

    Args:
        model: with one input.
        names: of what its nodes make.
        fixed: the number of images, where the graph is for one only.

    Returns:
        Of each a value whose first size is None where it is the number of images; without a shape
        where that is not known, or depends on the number in another way.

    Raises:
        BackendError: ONNX Runtime refuses the graph.
    """
    numbers = _NUMBERS if fixed is None else (fixed,)
    found = [_inferred(model, names, number) for number in numbers]
    for seen in zip(*found, strict=True):
        name, kind, _ = seen[0]
        yield Value(name, dtype_of(kind), _shape([shape for _, _, shape in seen], numbers))


def _inferred(
    model: Model, names: Sequence[str], images: int
) -> list[tuple[str, str, tuple[Any, ...]]]:
    (value,) = model.inputs
    shape = None if value.shape is None else (images, *value.shape[1:])
    graph = cut(model, [replace(value, shape=shape)], names, model.nodes)
    session = open_session(graph, optimise=False)
    return [(one.name, one.type, tuple(one.shape)) for one in session.get_outputs()]


def _shape(
    seen: Sequence[tuple[Any, ...]], numbers: tuple[int, ...]
) -> tuple[Dimension, ...] | None:
    first = seen[0]
    known = all(isinstance(size, int) for shape in seen for size in shape)
    if not first or not known or any(len(shape) != len(first) for shape in seen):
        return None
    if [shape[0] for shape in seen] != list(numbers):
        return None
    if any(shape[1:] != first[1:] for shape in seen):
        return None
    return (None if len(numbers) > 1 else first[0], *first[1:])
