"""What a model costs to run and to train, dense and sparse.

One multiply-accumulate counts as two FLOPs. Conv and Linear layers are counted, per
example; biases, norms, activations and pooling are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from moon.errors import UsageError
from moon.trainer.topology import find_layers, unwrap

__all__ = ["LayerCost", "count_flops", "training_flops"]


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One layer's size and forward cost for one example.

    Attributes:
        name: the weight's key in the model's state dict.
        shape: of the weight.
        nonzeros: connections.
        density: nonzeros over weights.
        flops: forward FLOPs spent on nonzeros.
        dense_flops: forward FLOPs if every weight were used.
    """

    name: str
    shape: tuple[int, ...]
    nonzeros: int
    density: float
    flops: int
    dense_flops: int


@torch.no_grad()
def count_flops(
    model: nn.Module, example: Tensor, masks: Mapping[str, Tensor] | None = None
) -> tuple[LayerCost, ...]:
    """The cost of every Conv and Linear layer, found by running one example through it.

    Every weight is used once at each output position (of a transposed convolution, at each
    input position; of a Linear layer, at each row), so a layer's cost is 2 * positions *
    weights. Layers that did not run cost nothing.

    Args:
        example: one input with its batch dimension, [1, ...], on the model's device.
        masks: nonzeros are counted in these; other layers count their nonzero weights.

    Raises:
        UsageError: the batch is not of size one.
    """
    if example.ndim < 2 or example.shape[0] != 1:
        raise UsageError(f"FLOPs are counted on a batch of one example, not {list(example.shape)}")
    model = unwrap(model)
    positions = _positions(model, example)
    costs = []
    for layer in find_layers(model):
        mask = None if masks is None else masks.get(layer.name)
        nonzeros = int(torch.count_nonzero(layer.weight if mask is None else mask))
        where = positions.get(id(layer.weight), 0)
        costs.append(
            LayerCost(
                name=layer.name,
                shape=layer.shape,
                nonzeros=nonzeros,
                density=nonzeros / layer.size,
                flops=2 * where * nonzeros,
                dense_flops=2 * where * layer.size,
            )
        )
    return tuple(costs)


def _positions(model: nn.Module, example: Tensor) -> dict[int, int]:
    """How often one example uses the weight of each layer, by the weight's identity."""
    used: dict[int, int] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight = module.weight
        if isinstance(module, nn.Linear):
            count = output.numel() // output.shape[-1]
        elif isinstance(module, _ConvTransposeNd):
            count = inputs[0].shape[2:].numel()
        else:
            count = output.shape[2:].numel()
        used[id(weight)] = used.get(id(weight), 0) + count

    counted = [m for m in model.modules() if isinstance(m, (_ConvNd, nn.Linear))]
    handles = [module.register_forward_hook(note) for module in counted]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        model(example)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return used


def training_flops(
    costs: Sequence[LayerCost],
    *,
    rule: str,
    examples: int,
    interval: int = 100,
    updating: float = 0.7,
) -> float:
    """FLOPs of a whole training run: forward, and backward at twice the forward.

    With f_S and f_D the sparse and dense forward FLOPs of an example, RigL costs
    (3 f_S dT + 2 f_S + f_D) / (dT + 1) while it updates every dT steps (Evci et al. 2020,
    appendix H) and 3 f_S afterwards; SET and static cost 3 f_S, dense 3 f_D.

    Args:
        costs: of ``count_flops``.
        rule: ``rigl``, ``set``, ``static`` or ``dense``.
        examples: training examples seen, epochs times their number.
        interval: dT.
        updating: share of the run in which the topology is updated.

    Raises:
        UsageError: no such rule.
    """
    sparse = sum(cost.flops for cost in costs)
    dense = sum(cost.dense_flops for cost in costs)
    if rule == "rigl":
        step = (3 * sparse * interval + 2 * sparse + dense) / (interval + 1)
        return examples * (updating * step + (1 - updating) * 3 * sparse)
    if rule in ("set", "static"):
        return 3.0 * examples * sparse
    if rule == "dense":
        return 3.0 * examples * dense
    raise UsageError(
        f"the training cost of the rule {rule!r} is not known",
        remedy="Use one of dense, static, set, rigl",
    )
