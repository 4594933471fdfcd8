"""The last linear layer of a body, as the scores that use its weights see it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, helper

from moon.export.classifier import classifier_nodes, classifier_weights

__all__ = ["LastLayer"]

Floats = NDArray[np.float64]


class LastLayer:
    """What computes the logits from features.

    Attributes:
        nodes: in graph order; none when the body does not end in a linear layer of features [N, D].
    """

    def __init__(self, body: ModelProto) -> None:
        self.nodes = classifier_nodes(body)
        if self.nodes and self._attribute("transA", 0):
            self.nodes = []
        self._body = body

    def _attribute(self, name: str, default: float) -> float:
        found = {a.name: helper.get_attribute_value(a) for a in self.nodes[0].attribute}
        return float(found.get(name, default))

    @property
    def by_row(self) -> bool:
        """The weight is stored [L, D], not [D, L]."""
        return bool(self._attribute("transB", 0))

    @property
    def factor(self) -> float:
        """What the stored weight is multiplied with."""
        return self._attribute("alpha", 1)

    def parameters(self) -> tuple[Floats, Floats]:
        """Weight [L, D] and bias [L], as they act."""
        found = classifier_weights(self._body)
        assert found is not None
        weight, bias = found
        wide = weight.astype(np.float64)
        return wide, np.zeros(len(wide)) if bias is None else bias.astype(np.float64)
