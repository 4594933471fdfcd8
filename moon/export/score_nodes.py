"""Each score as standard operators: the twins, in a graph, of what `moon.scores` computes in numpy.

An emitter adds the output ``score_<name>`` [N] and what it needs to a head. Scores with constants
give NaN for an input with NaN or infinite features or logits, where they read these; the
plain ones do as their numpy functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.export.nodes import HeadNodes
from moon.export.score_errors import ScoreError
from moon.export.score_nodes_features import FEATURE_NODES
from moon.scores import SCORE_TABLE, FittedScore

__all__ = ["SCORE_NODES", "Emitter", "check_fits", "emit"]

Constants = Mapping[str, NDArray[Any]]
Emitter = Callable[[HeadNodes, Constants], str]

# A last layer whose weights were rounded to fp16 since is still the same.
ROUNDING = 2e-3


def _msp(head: HeadNodes, fitted: Constants) -> str:
    known = head.of_known(head.probabilities, "head/p_known")
    return head.node("ReduceMax", [known, head.axis], "score_msp", keepdims=0)


def _ebo(head: HeadNodes, fitted: Constants) -> str:
    return head.energy


def _mls(head: HeadNodes, fitted: Constants) -> str:
    # Runtimes may skip NaN in a maximum; zero times the logarithm carries it over, so that
    # an input with NaN logits has a NaN score and is never accepted.
    parts = head.shifted_known
    nothing = head.node("Mul", [parts.log, head.number("zero", 0)], "head/nan_or_zero")
    return head.node("Add", [parts.peak, nothing], "score_mls")


def _unknown(head: HeadNodes, fitted: Constants) -> str:
    column = head.constant("unknown_column", np.array(head.unknown_index, dtype=np.int64))
    p = head.node("Gather", [head.probabilities, column], "head/p_unknown", axis=1)
    return head.node("Neg", [p], "score_unknown")


def _temperature(head: HeadNodes, fitted: Constants) -> str:
    # Shifted before the division, which would round large logits.
    _, shifted = head.against_peak("logits", head.all_prefix)
    temperature = head.fitted("temperature", "temperature", fitted["temperature"], divisor=True)
    cooled = head.node("Div", [shifted, temperature], "head/temperature/logits")
    p = head.node("Softmax", [cooled], "head/temperature/probabilities", axis=1)
    known = head.of_known(p, "head/temperature/p_known")
    best = head.node("ReduceMax", [known, head.axis], "head/temperature/best", keepdims=0)
    return head.node("Add", [best, head.guard("temperature", ["logits"])], "score_temperature")


def _gen(head: HeadNodes, fitted: Constants) -> str:
    classes = len(head.known)
    guard = head.guard("gen", ["logits"])
    if classes == 1:  # sure of its one class whatever the logits
        return head.node("Identity", [guard], "score_gen")
    log_p = head.log_softmax(head.known_logits, "head")
    log_rest = _log_rest(head, log_p, classes)
    both = head.node("Add", ["head/gen/sorted", log_rest], "head/gen/log_product")
    top = int(fitted["top"])
    if top < classes:
        ends = [("begin", 0), ("top", top)]
        cut = [head.constant(f"gen/{name}", np.array([end], dtype=np.int64)) for name, end in ends]
        both = head.node("Slice", [both, *cut, head.axis], "head/gen/log_products")
    gamma = head.fitted("gen", "gamma", fitted["gamma"])
    power = head.node("Mul", [both, gamma], "head/gen/log_power")
    terms = head.node("Exp", [power], "head/gen/terms")
    total = head.node("ReduceSum", [terms, head.axis], "head/gen/total", keepdims=0)
    return head.node("Sub", [guard, total], "score_gen")


def _log_rest(head: HeadNodes, log_p: str, classes: int) -> str:
    """log(1 - p), descending by p [N, K], the largest's summed from the other classes.

    In logarithms throughout, so that a p down to exp(-1e4) has its say.
    """
    count = head.constant("gen/classes", np.array([classes], dtype=np.int64))
    ordered, _ = head.many("TopK", [log_p, count], ["head/gen/sorted", "head/gen/order"], axis=1)
    sizes = head.constant("gen/sizes", np.array([1, classes - 1], dtype=np.int64))
    parts = ["head/gen/first", "head/gen/others"]
    _, others = head.many("Split", [ordered, sizes], parts, axis=1)
    second, shifted = head.against_peak(others, "head/gen")
    raised = head.node("Exp", [shifted], "head/gen/exp")
    total = head.node("ReduceSum", [raised, head.axis], "head/gen/sum", keepdims=1)
    log = head.node("Log", [total], "head/gen/log")
    rest_of_first = head.node("Add", [second, log], "head/gen/log_rest_first")
    p = head.node("Exp", [others], "head/gen/p_others")
    rest = head.node("Sub", [head.number("one", 1), p], "head/gen/rest_others")
    rest_of_others = head.node("Log", [rest], "head/gen/log_rest_others")
    joined = [rest_of_first, rest_of_others]
    return head.node("Concat", joined, "head/gen/log_rest", axis=1)


def _klm(head: HeadNodes, fitted: Constants) -> str:
    over_all = len(fitted["known"]) > len(head.known)
    log_p = (
        head.log_softmax("logits", head.all_prefix)
        if over_all
        else head.log_softmax(head.known_logits, "head")
    )
    p = head.node("Exp", [log_p], "head/klm/p")
    product = head.node("Mul", [p, log_p], "head/klm/p_log_p")
    own = head.node("ReduceSum", [product, head.axis], "head/klm/own", keepdims=0)
    means = head.fitted("klm", "log_means", fitted["log_means"])
    cross = head.node("Gemm", [p, means], "head/klm/cross", transB=1)
    nearest = head.node("ReduceMax", [cross, head.axis], "head/klm/nearest", keepdims=0)
    less = head.node("Sub", [nearest, own], "head/klm/divergence")
    return head.node("Add", [less, head.guard("klm", ["logits"])], "score_klm")


_LOGIT_NODES: dict[str, Emitter] = {
    "msp": _msp,
    "ebo": _ebo,
    "mls": _mls,
    "unknown": _unknown,
    "temperature": _temperature,
    "gen": _gen,
    "klm": _klm,
}

# Every score that a graph can carry, in the order of SCORE_TABLE.
SCORE_NODES: Mapping[str, Emitter] = MappingProxyType(
    {
        name: {**_LOGIT_NODES, **FEATURE_NODES}[name]
        for name in SCORE_TABLE
        if name in {**_LOGIT_NODES, **FEATURE_NODES}
    }
)


def emit(head: HeadNodes, name: str, fitted: Constants | None = None) -> str:
    """Add the score ``name``; returns the output's name.

    Args:
        fitted: the constants, as ``FittedScore.to_arrays`` gives them; None where it has none.

    Raises:
        ScoreError: the graph lacks what the score needs, or float32 cannot hold a constant.
    """
    return SCORE_NODES[name](head, fitted or {})


def check_fits(head: HeadNodes, fitted: FittedScore) -> None:
    """The score is of the head's own model: its logits, its features' width, its last layer.

    Raises:
        ScoreError: it is not.
    """
    constants = fitted.to_arrays()
    right = True
    if "outputs" in constants:
        right &= int(constants["outputs"]) == head.outputs
    if "unknown" in constants:
        right &= int(constants["unknown"]) == (
            -1 if head.unknown_index is None else head.unknown_index
        )
    if "known" in constants:
        columns = [head.known.tolist()]
        if fitted.name == "klm":
            columns.append(list(range(head.outputs)))
        right &= constants["known"].tolist() in columns
    if "features" in fitted.reads:
        head.features(fitted.name)
        right &= _same_layer(head, constants)
    if not right:
        raise ScoreError(
            fitted.name,
            f"the score {fitted.name} was fitted to another model than this one",
            remedy="Fit it to the model that is exported",
        )


def _same_layer(head: HeadNodes, constants: Constants) -> bool:
    weight, bias = head.last_layer
    width = [constants[name].shape[-1] for name in ("weight", "bank", "centre", "origin")
             if name in constants]  # fmt: skip
    if any(size != weight.shape[1] for size in width):
        return False
    for name, own in (("weight", weight), ("bias", bias)):
        given = constants.get(name, own)
        if given.shape != own.shape or np.abs(given - own).max() > ROUNDING * np.abs(own).max():
            return False
    return True
