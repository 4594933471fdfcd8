"""What the scores of a head are built from: nodes, constants, and the values that several need.

Every value has a name, and adding it twice adds it once: scores ask for what they need in any
order, and nothing is computed twice. All is float32; nothing here takes the exponential of a
positive number, or a logarithm of what may have vanished.

Shapes: N inputs, L logits, K known classes, D features (what the last linear layer reads).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from moon.export.score_errors import ScoreError
from moon.export.score_nodes_layer import LastLayer

__all__ = ["HeadNodes", "Shifted", "narrowed"]

Floats = NDArray[np.float64]

# float32's smallest normal number: a divisor that leaves a zero vector zero.
LEAST = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Shifted:
    """Logits against their row's largest.

    Attributes:
        values: [N, K], at most 0.
        peak: the largest, [N].
        log: logarithm of the sum of exp(values), [N].
    """

    values: str
    peak: str
    log: str


def narrowed(score: str, field: str, values: ArrayLike, *, divisor: bool = False) -> NDArray[Any]:
    """A score's constant as float32.

    Args:
        divisor: it must not vanish either.

    Raises:
        ScoreError: float32 cannot hold it.
    """
    wide = np.asarray(values, dtype=np.float64)
    with np.errstate(over="ignore", under="ignore"):
        narrow: NDArray[Any] = wide.astype(np.float32)
    if not np.isfinite(narrow).all() or (divisor and (narrow == 0).any()):
        size = np.abs(wide)
        worst = size.min() if np.isfinite(narrow).all() else size.max()
        raise ScoreError(
            score,
            f"the constant {field} of the score {score} holds {worst:.3g}, which float32 cannot",
            remedy=f"Export without the score {score}",
        )
    return narrow


class HeadNodes:
    """The nodes and constants of a head, as they are added.

    Args:
        body: the graph the head comes behind.
        outputs: L.
        unknown_index: column of the unknown class, or None.
    """

    def __init__(self, body: ModelProto, *, outputs: int, unknown_index: int | None) -> None:
        self.outputs = outputs
        self.unknown_index = unknown_index
        self.known = np.array([i for i in range(outputs) if i != unknown_index], dtype=np.int64)
        self.nodes: list[NodeProto] = []
        self.tensors: list[TensorProto] = []
        self._made: dict[str, NodeProto | TensorProto] = {}
        self._away: dict[bytes, str] = {}
        self._last = LastLayer(body)

    # -- adding ------------------------------------------------------------------------------

    def constant(self, name: str, values: NDArray[Any]) -> str:
        """The initializer ``head/<name>``, of the values' own type."""
        name = f"head/{name}"
        tensor = numpy_helper.from_array(values, name)
        if self._new(name, tensor):
            self.tensors.append(tensor)
        return name

    def fitted(self, score: str, field: str, values: ArrayLike, *, divisor: bool = False) -> str:
        """A score's constant, as the float32 initializer ``head/<score>/<field>``.

        Raises:
            ScoreError: see :func:`narrowed`.
        """
        return self.constant(f"{score}/{field}", narrowed(score, field, values, divisor=divisor))

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        return self.many(op, inputs, [output], **attributes)[0]

    def many(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any
    ) -> Sequence[str]:
        """A node with several outputs; returns their names."""
        first = outputs[0]
        name = f"{first}/{op}" if first.startswith("head/") else f"head/{first}"
        made = helper.make_node(op, inputs, outputs, name=name, **attributes)
        if self._new(first, made):
            self.nodes.append(made)
        return outputs

    def _new(self, name: str, made: NodeProto | TensorProto) -> bool:
        before = self._made.setdefault(name, made)
        if before != made:
            raise ValueError(f"two values of the head are called {name}")
        return before is made

    @property
    def axis(self) -> str:
        """The axis of classes and features."""
        return self.constant("axis", np.array([1], dtype=np.int64))

    def number(self, name: str, value: float) -> str:
        return self.constant(name, np.array(value, dtype=np.float32))

    # -- logits ------------------------------------------------------------------------------

    def of_known(self, logits: str, output: str) -> str:
        """The known classes' columns: [N, L] -> [N, K]."""
        if self.unknown_index is None:
            return logits
        return self.node("Gather", [logits, self.constant("known_columns", self.known)], output,
                         axis=1)  # fmt: skip

    @property
    def known_logits(self) -> str:
        return self.of_known("logits", "head/known")

    @property
    def label(self) -> str:
        return self.node("ArgMax", [self.known_logits], "label", axis=1, keepdims=0)

    @property
    def probabilities(self) -> str:
        """Softmax over all logits, [N, L]."""
        return self.node("Softmax", ["logits"], "head/probabilities", axis=1)

    def against_peak(self, logits: str, prefix: str) -> tuple[str, str]:
        """The row's largest, [N, 1], and the logits less it."""
        peak = self.node("ReduceMax", [logits, self.axis], f"{prefix}/peak", keepdims=1)
        return peak, self.node("Sub", [logits, peak], f"{prefix}/shifted")

    def shifted(self, logits: str, prefix: str) -> Shifted:
        peak, values = self.against_peak(logits, prefix)
        raised = self.node("Exp", [values], f"{prefix}/exp")
        total = self.node("ReduceSum", [raised, self.axis], f"{prefix}/sum", keepdims=0)
        log = self.node("Log", [total], f"{prefix}/log")
        flat = self.node("Squeeze", [peak, self.axis], f"{prefix}/flat_peak")
        return Shifted(values, flat, log)

    @property
    def shifted_known(self) -> Shifted:
        return self.shifted(self.known_logits, "head")

    @property
    def all_prefix(self) -> str:
        """Where what is over all logits is kept: with the known ones where these are all."""
        return "head" if self.unknown_index is None else "head/all"

    def log_softmax(self, logits: str, prefix: str) -> str:
        parts = self.shifted(logits, prefix)
        log = self.node("Unsqueeze", [parts.log, self.axis], f"{prefix}/log_column")
        return self.node("Sub", [parts.values, log], f"{prefix}/log_p")

    def logsumexp(self, logits: str, prefix: str, output: str) -> str:
        parts = self.shifted(logits, prefix)
        return self.node("Add", [parts.peak, parts.log], output)

    @property
    def energy(self) -> str:
        """Log-sum-exp of the known logits, [N]."""
        return self.logsumexp(self.known_logits, "head", "score_ebo")

    # -- features ----------------------------------------------------------------------------

    def features(self, score: str) -> str:
        """What the last linear layer reads, [N, D].

        Raises:
            ScoreError: the model ends in none; names the score that needs it.
        """
        if not self._last.nodes:
            raise ScoreError(
                score,
                f"the score {score} needs features, and the model does not end in a linear layer",
                remedy=f"Export without the score {score}",
            )
        return str(self._last.nodes[0].input[0])

    def unit_features(self, score: str) -> str:
        """Features divided by their Euclidean length; a zero vector stays zero."""
        # Divided by the sum of the entries' sizes first, so that no square overflows or vanishes.
        size, least = self.size("features", score), self.number("least", LEAST)
        floor = self.node("Max", [size, least], "head/features_scale")
        column = self.node("Unsqueeze", [floor, self.axis], "head/features_scale_column")
        scaled = self.node("Div", [self.features(score), column], "head/features_scaled")
        length = self.node("ReduceL2", [scaled, self.axis], "head/features_length", keepdims=1)
        divisor = self.node("Max", [length, least], "head/features_divisor")
        return self.node("Div", [scaled, divisor], "head/features_unit")

    def away(self, score: str, centre_D: Floats) -> str:
        """Features less ``centre_D``, exact to float32 also where they are close to it."""
        key = centre_D.astype(np.float64).tobytes()
        if key not in self._away:
            high = narrowed(score, "centre", centre_D)
            low = narrowed(score, "centre_rest", centre_D - high)
            value = self.node(
                "Sub",
                [self.features(score), self.constant(f"{score}/centre", high)],
                f"head/{score}/near",
            )
            if low.any():
                rest = self.constant(f"{score}/centre_rest", low)
                value = self.node("Sub", [value, rest], f"head/{score}/away")
            self._away[key] = value
        return self._away[key]

    def distance(self, score: str, centre_D: Floats) -> str:
        """Length of :meth:`away`, [N]."""
        away = self.away(score, centre_D)
        return self.node("ReduceL2", [away, self.axis], f"{away}_length", keepdims=0)

    # -- the last layer ----------------------------------------------------------------------

    @property
    def last_layer(self) -> tuple[Floats, Floats]:
        """Weight [K, D] and bias [K] of the known classes, as the graph has them."""
        weight, bias = self._last.parameters()
        return weight[self.known], bias[self.known]

    def classify(self, features: str, prefix: str) -> str:
        """The known logits [N, K] of other features, by the last layer's own weights."""
        nodes = self._last.nodes
        renamed = {nodes[0].input[0]: features}
        for node in nodes:
            name = "all_logits" if node is nodes[-1] else "product"
            renamed[node.output[0]] = f"{prefix}/{name}"
            given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            inputs = [renamed.get(name, name) for name in node.input]
            self.node(node.op_type, inputs, renamed[node.output[0]], **given)
        return self.of_known(f"{prefix}/all_logits", f"{prefix}/logits")

    @property
    def answer_rows(self) -> str:
        """The last layer's weights for each input's label, [N, D]."""
        column = self.label
        if self.unknown_index is not None:
            columns = self.constant("known_columns", self.known)
            column = self.node("Gather", [columns, column], "head/answer_column", axis=0)
        weight, name = self._last.nodes[0].input[1], "head/answer_weights"
        if self._last.by_row:
            rows = self.node("Gather", [weight, column], name, axis=0)
        else:
            across = self.node("Gather", [weight, column], "head/answer_columns", axis=1)
            rows = self.node("Transpose", [across], name, perm=[1, 0])
        factor = self._last.factor
        if factor == 1:
            return rows
        return self.node("Mul", [rows, self.number("factor", factor)], "head/answer_scaled")

    # -- inputs that are not finite ----------------------------------------------------------

    def size(self, what: str, score: str) -> str:
        """Sum of the entries' sizes of ``features`` or ``logits``, [N]."""
        value = self.features(score) if what == "features" else what
        return self.node("ReduceL1", [value, self.axis], f"head/{what}_size", keepdims=0)

    def guard(self, score: str, reads: Sequence[str], distance: str = "") -> str:
        """[N]: zero, and NaN where an entry of what the score ``reads`` is not finite.

        Zero times a sum carries NaN and infinity over also in runtimes that skip NaN in a maximum.

        Args:
            distance: the features' from a centre, which is taken instead of their size: NaN also
                where it overflows.
        """
        zero, found = self.number("zero", 0), []
        for what in reads:
            size = distance if distance and what == "features" else self.size(what, score)
            found.append(self.node("Mul", [size, zero], f"{size}_guard"))
        return found[0] if len(found) == 1 else self.node("Add", found, f"{found[0]}_both")
