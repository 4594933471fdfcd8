"""Evaluate in numpy what a graph computes from constants alone.

Compact weights above all: a runtime folds their decoding operators away while loading, and so does
this. A node whose operator is not known here, or that cannot be evaluated the same way everywhere,
stays as it is.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from moon.errors import BackendError
from moon.runtime.sparse.fold_call import Array, Call, LeaveError, too_much
from moon.runtime.sparse.fold_math import MATH
from moon.runtime.sparse.fold_shape import SHAPE
from moon.runtime.sparse.model import Model, Node
from moon.runtime.sparse.tensor import allowance

__all__ = ["FOLDED", "fold"]

_OPERATORS = {**MATH, **SHAPE}
FOLDED = frozenset(_OPERATORS)
# Older operators broadcast by other rules.
_OLDEST_OPSET = 7
# Of all results together, in what may be held at a time.
_MOST_WORK = 8


def fold(model: Model) -> Model:
    """The model with every node folded that reads only constants.

    Inputs that may be fed (``model.optional``) are no constants. Constants that nothing reads any
    more are gone. Bit for bit what ONNX Runtime computes, but for Exp, Log and Pow of floats,
    which may differ in the last place.

    Raises:
        BackendError: a result, what is held at a time, or all results together take more memory
            than a file of its size could need (:func:`allowance`; 2 GiB at most).
    """
    if model.opset < _OLDEST_OPSET:
        return model
    folding = _Folding(model)
    with np.errstate(all="ignore"):
        kept = tuple(node for node in model.nodes if not folding.folds(node))
    return replace(
        model,
        nodes=kept,
        constants=folding.constants,
        bfloat16=model.bfloat16 & folding.constants.keys(),
    )


class _Folding:
    """The constants while nodes are folded, those needed no more dropped at once."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._uses = Counter(name for node in model.nodes for name in _reads(node))
        self._uses.update(value.name for value in model.outputs)
        self.constants = {
            name: values
            for name, values in model.constants.items()
            if self._uses[name] or name in model.optional
        }
        self._made: dict[str, int] = {}
        self._held = self._work = 0
        self._limit = allowance(model.file_size)

    def folds(self, node: Node) -> bool:
        """Whether the node could be evaluated; its result is then among the constants."""
        try:
            result = self._result(node)
        except (LeaveError, ValueError, IndexError, TypeError, OverflowError):
            # Whatever is wrong with it, the runtime that gets the node says so.
            return False
        except MemoryError as error:
            raise BackendError(
                f"there is no memory for the constant {node.outputs[0]}",
                remedy="Free some memory, or run the model on a larger machine",
            ) from error
        result.flags.writeable = False
        self._account(node.outputs[0], result)
        for name in _reads(node):
            self._uses[name] -= 1
            if not self._uses[name] and name not in self._model.optional:
                del self.constants[name]
                self._held -= self._made.pop(name, 0)
        return True

    def _result(self, node: Node) -> Array:
        if node.op_type not in _OPERATORS or node.domain or len(node.outputs) != 1:
            raise LeaveError
        evaluate, attributes = _OPERATORS[node.op_type]
        if not node.attributes.keys() <= attributes or not node.outputs[0]:
            raise LeaveError
        inputs = tuple(self._input(name, node) for name in node.inputs)
        result = evaluate(Call(inputs, node.attributes, self._model.opset, self._limit))
        # Unlike ascontiguousarray this keeps a scalar one.
        result = np.asarray(result, order="C")
        whole: object = result.base
        # A small part must not keep alive what is counted no more.
        small = isinstance(whole, np.ndarray) and whole.nbytes > 2 * result.nbytes
        return result.copy() if small else result

    def _input(self, name: str, node: Node) -> Array | None:
        if not name:
            return None
        if name not in self.constants or name in self._model.optional:
            raise LeaveError
        if name in self._model.bfloat16 and node.op_type not in ("Cast", "Shape", "Size"):
            raise LeaveError
        return self.constants[name]

    def _account(self, name: str, result: Array) -> None:
        if self._uses[name]:
            self.constants[name] = result
            self._made[name] = result.nbytes
            self._held += result.nbytes
        self._work += result.nbytes
        if self._work > _MOST_WORK * self._limit or self._held > self._limit:
            raise too_much("constants")


def _reads(node: Node) -> list[str]:
    return [name for name in (*node.inputs, *node.captured) if name]
