"""The score head: confidence scores, label and decision as operators behind the logits.

With it one ONNX file gates itself in any runtime and language. It is always float32, and stable
for large logits: no exponential of a positive number is ever taken. The scores themselves are in
`moon.export.score_nodes`.

Graph inputs: ``input``, and ``threshold`` (float32, shape []), which is also an initializer and so
need not be fed. Outputs, in order:

    label         int64 [N]    arg max over the known classes, counted among these
    accept        bool [N]     score >= bar, and score < +inf; the bar is ``threshold``, or where
                               that is NaN the one of ``thresholds`` for the label
    score         float32 [N]  the gate's score: the carried score number ``gate_score``
    logits        float32 [N, L]
    score_<name>  float32 [N]  for each carried score: those of the logits alone, and behind them
                               those with constants that were fitted for this model
    p_<name>      float32 [N]  on request, for each carried score: its marginal p-value
    features      float32      on request: what the last linear layer reads

The initializers ``threshold``, ``gate_score`` (int64, shape []) and ``thresholds`` (float32, shape
[K], by known class) are plain: another gate is 12 + 4 K other bytes in the same file. A gate with
one threshold has it in all of them; one by predicted class has NaN in ``threshold``, so that a
number fed there overrides the gate either way. A graph without a gate has +inf and accepts nothing.

Two more come with p-values, plain too, a row for each of the S carried scores: ``p_scores``
(float32, [S, 1024]), calibration scores from the least up, the rest +inf, and ``p_levels``
(float32, [S, 1025]). A score's p-value is ``p_levels[row, j]``, j of its ``p_scores`` being at most
it; for a NaN score j is 0. Without calibration they are +inf and NaN, and every p-value of a
number is NaN.

Constants of fitted scores are float32 initializers ``head/<score>/<field>``, what is derived from
them included. The last layer's weights are not stored again: scores of other features read the
same initializers.
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
from moon.export.nodes import HeadNodes
from moon.export.score_nodes import check_fits, emit
from moon.p_table import PTable
from moon.scores import SCORE_TABLE, FittedScore

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
        "p_scores",
        "p_levels",
    }
    | {f"{kind}_{name}" for kind in ("score", "p") for name in SCORE_TABLE}
)


def carried_scores(unknown_index: int | None, fitted_names: Sequence[str] = ()) -> tuple[str, ...]:
    """The scores a graph carries, in graph order: all that its logits allow, then fitted ones.

    Raises:
        UsageError: a name of no score that is fitted, or one twice.
    """
    fitted = [name for name in SCORE_TABLE if name not in CARRIED and SCORE_TABLE[name].in_graph]
    for name in fitted_names:
        if name in CARRIED:
            raise UsageError(f"every graph carries the score {name}; it is not fitted to a model")
        if name not in fitted:
            raise UsageError(
                f"no score called {name} can be carried", remedy=f"Choose from {', '.join(fitted)}"
            )
        if list(fitted_names).count(name) > 1:
            raise UsageError(f"the score {name} is given twice")
    plain = tuple(name for name in CARRIED if name != "unknown" or unknown_index is not None)
    return (*plain, *(name for name in fitted if name in fitted_names))


def add_head(
    body: ModelProto,
    *,
    outputs: int,
    unknown_index: int | None,
    gate_score: str = "ebo",
    fitted: Sequence[FittedScore] = (),
    threshold: float = float("inf"),
    features: bool = False,
    p_values: bool = False,
) -> ModelProto:
    """A copy of ``body`` with the head behind its output ``logits``.

    Args:
        body: graph with the input ``input`` and the one output ``logits`` float32 [N, L].
        outputs: L.
        unknown_index: column of the unknown class, or None.
        gate_score: which carried score the gate compares.
        fitted: scores with constants, fitted to this model, to carry besides the plain ones.
        threshold: accept from this score on; +inf accepts nothing.
        features: also give the input of the last linear layer as an output.
        p_values: also give each carried score's p-value; NaN until calibration.

    Raises:
        UsageError: no such score, or ``unknown_index`` outside the logits.
        ExportError: features were asked for or are needed by a score, and the graph ends in no
            linear layer; or a score was fitted to another model, or has constants that float32
            cannot hold.
    """
    by_name = {score.name: score for score in fitted}
    scores = carried_scores(unknown_index, [score.name for score in fitted])
    _check(outputs, unknown_index, gate_score, scores)
    model = copied(body)
    head = HeadNodes(model, outputs=outputs, unknown_index=unknown_index)
    for name in scores:
        if name in by_name:
            check_fits(head, by_name[name])
        emit(head, name, by_name[name].to_arrays() if name in by_name else None)
    _gate(head, scores)
    if p_values:
        _p_values(head, scores)
    named = _feature_output(model, head) if features else []
    graph = model.graph
    graph.node.extend(head.nodes)
    graph.initializer.extend(head.tensors)
    settings = _settings(threshold, len(head.known), scores.index(gate_score))
    if p_values:
        blank = PTable.blank(len(scores))
        settings |= {"p_scores": blank.scores, "p_levels": blank.levels}
    graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in settings.items())
    graph.input.append(helper.make_tensor_value_info("threshold", TensorProto.FLOAT, []))
    del graph.output[:]
    graph.output.extend([*_outputs(outputs, scores, p_values), *named])
    return model


def _check(outputs: int, unknown_index: int | None, gate_score: str, scores: Sequence[str]) -> None:
    if gate_score not in scores:
        raise UsageError(
            f"the score {gate_score} cannot be had from this model",
            remedy=f"Choose one of {', '.join(scores)}",
        )
    if unknown_index is not None and not 0 <= unknown_index < outputs:
        raise UsageError(f"unknown index {unknown_index} is outside the {outputs} logits")
    if outputs <= (unknown_index is not None):
        raise UsageError("the model has no output but the unknown class")


def _settings(threshold: float, classes: int, gate_score: int) -> dict[str, NDArray[Any]]:
    """The initializers that calibration writes anew, as they are before it."""
    return {
        "threshold": np.array(threshold, dtype=np.float32),
        "thresholds": np.full(classes, threshold, dtype=np.float32),
        "gate_score": np.array(gate_score, dtype=np.int64),
    }


def _outputs(outputs: int, scores: Sequence[str], p_values: bool) -> list[ValueInfoProto]:
    value = helper.make_tensor_value_info
    each = [*(f"score_{name}" for name in scores)]
    each += [f"p_{name}" for name in scores if p_values]
    return [
        value("label", TensorProto.INT64, ["N"]),
        value("accept", TensorProto.BOOL, ["N"]),
        value("score", TensorProto.FLOAT, ["N"]),
        value("logits", TensorProto.FLOAT, ["N", outputs]),
        *(value(name, TensorProto.FLOAT, ["N"]) for name in each),
    ]


def _gate(head: HeadNodes, carried: Sequence[str]) -> None:
    # All in one line and then cut into rows: three nodes where a row each would take one more each.
    line = head.node("Concat", [f"score_{name}" for name in carried], "head/line", axis=0)
    shape = head.constant("rows", np.array([len(carried), -1], dtype=np.int64))
    table = head.node("Reshape", [line, shape], "head/scores")
    head.node("Gather", [table, "gate_score"], "score", axis=0)
    by_class = head.node("Gather", ["thresholds", head.label], "head/bar_of_class", axis=0)
    unset = head.node("IsNaN", ["threshold"], "head/by_class")
    bar = head.node("Where", [unset, by_class, "threshold"], "head/bar")
    above = head.node("GreaterOrEqual", ["score", bar], "head/reaches")
    infinity = head.number("infinity", np.inf)
    finite = head.node("Less", ["score", infinity], "head/finite")
    head.node("And", [above, finite], "accept")


def _p_values(head: HeadNodes, carried: Sequence[str]) -> None:
    """For each carried score, the level of how many calibration scores are at most it."""
    last = head.constant("last", np.array([2], dtype=np.int64))
    column = head.node("Unsqueeze", ["head/scores", last], "head/p_column")
    row = head.node("Unsqueeze", ["p_scores", head.axis], "head/p_row")
    below = head.node("LessOrEqual", [row, column], "head/p_below")
    ones = head.node("Cast", [below], "head/p_ones", to=TensorProto.INT32)
    count = head.node("ReduceSum", [ones, last], "head/p_count", keepdims=0)
    levels = head.node("GatherElements", ["p_levels", count], "head/p_values", axis=1)
    for i, name in enumerate(carried):
        which = head.constant(f"row_{i}", np.array(i, dtype=np.int64))
        head.node("Gather", [levels, which], f"p_{name}", axis=0)


def _feature_output(model: ModelProto, head: HeadNodes) -> list[ValueInfoProto]:
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
