"""The score head: confidence scores, label and decision as operators behind the logits.

With it one ONNX file gates itself in any runtime and language. It is always float32, and stable
for large logits: no exponential of a positive number is ever taken.

Graph inputs: ``input``, and ``threshold`` (float32, shape []), which is also an initializer and so
need not be fed. Outputs, in order:

    label         int64 [N]    arg max over the known classes, counted among these
    accept        bool [N]     score >= bar, and score < +inf; the bar is ``threshold``, or where
                               that is NaN the one of ``thresholds`` for the label
    score         float32 [N]  the gate's score: the carried score number ``gate_score``
    logits        float32 [N, L]
    score_<name>  float32 [N]  for each carried score
    features      float32      on request: what the last linear layer reads

The initializers ``threshold``, ``gate_score`` (int64, shape []) and ``thresholds`` (float32, shape
[K], by known class) are plain: another gate is 12 + 4 K other bytes in the same file. A gate with
one threshold has it in all of them; one by predicted class has NaN in ``threshold``, so that a
number fed there overrides the gate either way. A graph without a gate has +inf and accepts nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from moon.data.preprocess import Preprocess
from moon.errors import ExportError, UsageError
from moon.export.classifier import classifier_input
from moon.export.graph import copied
from moon.scores import SCORES

__all__ = ["CARRIED", "RESERVED", "add_head", "add_normalisation", "carried_scores"]

CARRIED: tuple[str, ...] = ("msp", "ebo", "mls", "unknown")
# Names a body may not use for values of its own.
RESERVED: frozenset[str] = frozenset(
    {
        "input",
        "threshold",
        "thresholds",
        "gate_score",
        "label",
        "accept",
        "score",
        "logits",
        "features",
    }
    | {f"score_{name}" for name in SCORES}
)


def carried_scores(unknown_index: int | None) -> tuple[str, ...]:
    """The scores a graph carries: all that its logits allow, in graph order."""
    return tuple(name for name in CARRIED if name != "unknown" or unknown_index is not None)


def add_head(
    body: ModelProto,
    *,
    outputs: int,
    unknown_index: int | None,
    gate_score: str = "ebo",
    threshold: float = float("inf"),
    features: bool = False,
) -> ModelProto:
    """A copy of ``body`` with the head behind its output ``logits``.

    Args:
        body: graph with the input ``input`` and the one output ``logits`` float32 [N, L].
        outputs: L.
        unknown_index: column of the unknown class, or None.
        gate_score: which carried score the gate compares.
        threshold: accept from this score on; +inf accepts nothing.
        features: also give the input of the last linear layer as an output.

    Raises:
        UsageError: no such score, or ``unknown_index`` outside the logits.
        ExportError: features were asked for and the graph ends in no linear layer.
    """
    scores = carried_scores(unknown_index)
    if gate_score not in scores:
        raise UsageError(
            f"the score {gate_score} cannot be had from this model",
            remedy=f"Choose one of {', '.join(scores)}",
        )
    if unknown_index is not None and not 0 <= unknown_index < outputs:
        raise UsageError(f"unknown index {unknown_index} is outside the {outputs} logits")
    known = [column for column in range(outputs) if column != unknown_index]
    if not known:
        raise UsageError("the model has no output but the unknown class")
    model = copied(body)
    graph = model.graph
    head = _Head()
    head.scores(known if unknown_index is not None else None, unknown_index, scores)
    head.gate(scores)
    named = _feature_output(model, head) if features else []
    graph.node.extend(head.nodes)
    graph.initializer.extend(head.tensors)
    gate: dict[str, NDArray[Any]] = {
        "threshold": np.array(threshold, dtype=np.float32),
        "thresholds": np.full(len(known), threshold, dtype=np.float32),
        "gate_score": np.array(scores.index(gate_score), dtype=np.int64),
    }
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in gate.items())
    graph.input.append(helper.make_tensor_value_info("threshold", TensorProto.FLOAT, []))
    del graph.output[:]
    graph.output.extend([*_outputs(outputs, scores), *named])
    return model


def _outputs(outputs: int, scores: Sequence[str]) -> list[ValueInfoProto]:
    value = helper.make_tensor_value_info
    return [
        value("label", TensorProto.INT64, ["N"]),
        value("accept", TensorProto.BOOL, ["N"]),
        value("score", TensorProto.FLOAT, ["N"]),
        value("logits", TensorProto.FLOAT, ["N", outputs]),
        *(value(f"score_{name}", TensorProto.FLOAT, ["N"]) for name in scores),
    ]


class _Head:
    """The nodes and constants of a head, as they are added."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.tensors: list[TensorProto] = []

    def constant(self, name: str, values: NDArray[Any]) -> str:
        name = f"head/{name}"
        self.tensors.append(numpy_helper.from_array(values, name))
        return name

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        name = f"{output}/{op}" if output.startswith("head/") else f"head/{output}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def scores(
        self, columns: list[int] | None, unknown_index: int | None, carried: Sequence[str]
    ) -> None:
        axis = self.constant("axis", np.array([1], dtype=np.int64))
        probabilities = self.node("Softmax", ["logits"], "head/probabilities", axis=1)
        known, p_known = "logits", probabilities
        if columns is not None:
            picked = self.constant("known_columns", np.array(columns, dtype=np.int64))
            known = self.node("Gather", ["logits", picked], "head/known", axis=1)
            p_known = self.node("Gather", [probabilities, picked], "head/p_known", axis=1)
        self.node("ArgMax", [known], "label", axis=1, keepdims=0)
        self.node("ReduceMax", [p_known, axis], "score_msp", keepdims=0)
        peak = self.node("ReduceMax", [known, axis], "head/peak", keepdims=1)
        shifted = self.node("Sub", [known, peak], "head/shifted")
        raised = self.node("Exp", [shifted], "head/exp")
        total = self.node("ReduceSum", [raised, axis], "head/sum", keepdims=0)
        log = self.node("Log", [total], "head/log")
        flat_peak = self.node("Squeeze", [peak, axis], "head/flat_peak")
        self.node("Add", [flat_peak, log], "score_ebo")
        # Runtimes may skip NaN in a maximum; zero times the logarithm carries it over, so that
        # an input with NaN logits has a NaN score and is never accepted.
        zero = self.constant("zero", np.array(0, dtype=np.float32))
        nothing = self.node("Mul", [log, zero], "head/nan_or_zero")
        self.node("Add", [flat_peak, nothing], "score_mls")
        if "unknown" in carried:
            column = self.constant("unknown_column", np.array(unknown_index, dtype=np.int64))
            p = self.node("Gather", [probabilities, column], "head/p_unknown", axis=1)
            self.node("Neg", [p], "score_unknown")

    def gate(self, carried: Sequence[str]) -> None:
        first = self.constant("first", np.array([0], dtype=np.int64))
        rows = [
            self.node("Unsqueeze", [f"score_{name}", first], f"head/row_{name}") for name in carried
        ]
        table = self.node("Concat", rows, "head/scores", axis=0)
        self.node("Gather", [table, "gate_score"], "score", axis=0)
        by_class = self.node("Gather", ["thresholds", "label"], "head/bar_of_class", axis=0)
        unset = self.node("IsNaN", ["threshold"], "head/by_class")
        bar = self.node("Where", [unset, by_class, "threshold"], "head/bar")
        above = self.node("GreaterOrEqual", ["score", bar], "head/reaches")
        infinity = self.constant("infinity", np.array(np.inf, dtype=np.float32))
        finite = self.node("Less", ["score", infinity], "head/finite")
        self.node("And", [above, finite], "accept")


def _feature_output(model: ModelProto, head: _Head) -> list[ValueInfoProto]:
    name = classifier_input(model)
    if name is None:
        raise ExportError(
            "features were asked for, and the model does not end in a linear layer",
            remedy="Export without features",
        )
    head.node("Identity", [name], "features")
    return [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", None])]


def add_normalisation(body: ModelProto, preprocess: Preprocess) -> ModelProto:
    """A copy of ``body`` that takes uint8 pixels [N, H, W, C] and normalises them itself.

    It computes ``(x / 255 - mean) / std`` in the order `Preprocess.normalise` does, so both ways
    give the same bits.
    """
    model = copied(body)
    graph = model.graph
    inner = "head/normalised"
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == "input":
                node.input[i] = inner
    side = np.array([1, preprocess.channels, 1, 1])
    constants = {
        "head/full_scale": np.array(255, dtype=np.float32),
        "head/mean": np.asarray(preprocess.mean, dtype=np.float32).reshape(side),
        "head/std": np.asarray(preprocess.std, dtype=np.float32).reshape(side),
    }
    graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
    steps = [
        helper.make_node("Cast", ["input"], ["head/pixels"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["head/pixels"], ["head/planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Div", ["head/planes", "head/full_scale"], ["head/unit"]),
        helper.make_node("Sub", ["head/unit", "head/mean"], ["head/centred"]),
        helper.make_node("Div", ["head/centred", "head/std"], [inner]),
    ]
    for step in steps:
        step.name = f"{step.output[0]}/{step.op_type}"
    rest = [NodeProto.FromString(node.SerializeToString()) for node in graph.node]
    del graph.node[:]
    graph.node.extend([*steps, *rest])
    shape: list[str | int | None] = ["N", *preprocess.crop, preprocess.channels]
    others = [value for value in graph.input if value.name != "input"]
    new = helper.make_tensor_value_info("input", TensorProto.UINT8, shape)
    kept = [type(value).FromString(value.SerializeToString()) for value in others]
    del graph.input[:]
    graph.input.extend([new, *kept])
    return model
