"""One layer's account: its size, FLOPs and bytes, and what training it costs.

Needs no torch, so that accounts can be read where runs are only looked at. FLOPs and the
bytes of a sparse format are what connections cost a machine that leaves out the zeros; dense
kernels spend the dense figure whatever the sparsity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moon.errors import UsageError

__all__ = ["COUNTED_RULES", "FORMATS", "LayerCost", "sparse_bytes", "training_flops"]

FORMATS = ("dense", "bitmask", "csr")
COUNTED_RULES = ("dense", "static", "set", "rigl", "gmp")

_POINTER_BYTES = 4
_SHORT = 1 << 16


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One layer's size and cost; None stands for what was not counted.

    Attributes:
        name: the weight's key in the model's state dict.
        shape: of the weight.
        nonzeros: connections.
        density: nonzeros over weights.
        flops: forward FLOPs spent on nonzeros, for one example.
        dense_flops: forward FLOPs if every weight were used, for one example.
        value_bytes: of one weight.
        activation_bytes: of the layer's outputs, for one example.
        saved_bytes: that autograd keeps for the backward pass from within the layer, for one
            example. A tensor that several layers keep counts for the first.
        gradient_bytes: of the weight's gradient.
        slot_bytes: of the optimizer's state for the weight.
        mask_bytes: of the mask.
    """

    name: str
    shape: tuple[int, ...]
    nonzeros: int
    density: float
    flops: int
    dense_flops: int
    value_bytes: int = 4
    activation_bytes: int | None = None
    saved_bytes: int | None = None
    gradient_bytes: int | None = None
    slot_bytes: int | None = None
    mask_bytes: int | None = None

    @property
    def weights(self) -> int:
        """Number of weights, zeros included."""
        return math.prod(self.shape)

    @property
    def dense_bytes(self) -> int:
        """Of the weight as an ordinary tensor."""
        return self.weights * self.value_bytes

    @property
    def sparse_format(self) -> str:
        """The smallest of ``FORMATS`` for this weight; see ``sparse_bytes``."""
        return min(FORMATS, key=self._bytes)

    @property
    def sparse_bytes(self) -> int:
        """Of the weight in its ``sparse_format``."""
        return self._bytes(self.sparse_format)

    def _bytes(self, form: str) -> int:
        return sparse_bytes(self.shape, self.nonzeros, form, value_bytes=self.value_bytes)


def sparse_bytes(
    shape: Sequence[int], nonzeros: int, form: str = "bitmask", *, value_bytes: int = 4
) -> int:
    """Bytes of a weight with so many nonzeros in one storage format.

    ``dense`` stores every weight. ``bitmask`` stores the nonzero values and one bit a weight.
    ``csr`` stores the nonzero values, each with its position within a row (2 bytes while rows
    have up to 65,536 weights, else 4), and a 4-byte offset a row and one more; a row is all
    that belongs to one index of the first dimension, an output channel.

    Raises:
        UsageError: no such format.
    """
    if form not in FORMATS:
        raise UsageError(
            f"there is no sparse format {form!r}", remedy=f"Use one of {', '.join(FORMATS)}"
        )
    weights = math.prod(shape)
    if form == "dense":
        return weights * value_bytes
    if form == "bitmask":
        return nonzeros * value_bytes + -(-weights // 8)
    row = math.prod(shape[1:])
    index = 2 if row <= _SHORT else 4
    return nonzeros * (value_bytes + index) + _POINTER_BYTES * (shape[0] + 1)


def training_flops(
    costs: Sequence[LayerCost],
    *,
    rule: str,
    examples: int,
    interval: int = 100,
    updating: float = 0.7,
) -> float:
    """FLOPs of a whole training run: forward, and backward at twice the forward.

    With f_S and f_D the sparse and dense forward FLOPs of an example, an example costs

    - ``dense``: 3 f_D.
    - ``static``, ``set``: 3 f_S.
    - ``rigl``: (3 f_S dT + 2 f_S + f_D) / (dT + 1) while it updates every dT steps (Evci et
      al. 2020, appendix H), 3 f_S afterwards.
    - ``gmp``: 3 (f_S + (f_D - f_S) / 4) while it prunes, 3 f_S afterwards. A layer's density
      falls as d + (1 - d) (1 - t / T_end)^3 to its final d (Zhu & Gupta 2017), whose mean
      is d + (1 - d) / 4; pruning in steps instead of continuously is neglected.

    All are sums over layers: give one layer for its own share, and ``examples`` of one batch
    for a mean step. Votes, masks and the choice of connections are not counted.

    Args:
        costs: of ``count_flops`` or ``account``, with the final numbers of connections.
        rule: one of ``COUNTED_RULES``.
        examples: training examples seen, epochs times their number.
        interval: dT, optimizer steps between updates.
        updating: share of the run in which the topology is updated, from its start.

    Raises:
        UsageError: no such rule, or a value out of range.
    """
    if interval < 1 or not 0.0 <= updating <= 1.0 or examples < 0:
        raise UsageError(
            f"interval {interval}, updating {updating} or examples {examples} is out of range",
            remedy="interval is at least 1, updating within 0..1, examples at least 0",
        )
    sparse = sum(cost.flops for cost in costs)
    dense = sum(cost.dense_flops for cost in costs)
    if rule == "dense":
        return 3.0 * examples * dense
    if rule in ("static", "set"):
        return 3.0 * examples * sparse
    if rule == "rigl":
        moving = (3 * sparse * interval + 2 * sparse + dense) / (interval + 1)
    elif rule == "gmp":
        moving = 3 * (sparse + (dense - sparse) / 4)
    else:
        raise UsageError(
            f"the training cost of the rule {rule!r} is not known",
            remedy=f"Use one of {', '.join(COUNTED_RULES)}",
        )
    return examples * (updating * moving + (1 - updating) * 3 * sparse)
