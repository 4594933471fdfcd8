"""What a model costs to run, dense and sparse, layer by layer.

One multiply-accumulate counts as two FLOPs. Conv and Linear layers are counted, per
example; biases, norms, activations and pooling are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from moon.errors import UsageError
from moon.trainer.accounting.costs import LayerCost, training_flops
from moon.trainer.sparsity.topology import find_layers, unwrap

__all__ = ["LayerCost", "count_flops", "training_flops"]


@torch.no_grad()
def count_flops(
    model: nn.Module, example: Tensor, masks: Mapping[str, Tensor] | None = None
) -> tuple[LayerCost, ...]:
    """The cost of every Conv and Linear layer, found by running one example through it.

    Every weight is used once at each output position (of a transposed convolution, at each
    input position; of a Linear layer, at each row), so a layer's cost is 2 * positions *
    weights. Layers that did not run cost nothing. ``account`` tells the bytes of training too.

    Args:
        example: one input with its batch dimension, [1, ...], on the model's device.
        masks: nonzeros are counted in these; other layers count their nonzero weights.

    Raises:
        UsageError: the batch is not of size one.
    """
    if example.ndim < 2 or example.shape[0] != 1:
        raise UsageError(f"FLOPs are counted on a batch of one example, not {list(example.shape)}")
    model = unwrap(model)
    uses = _uses(model, example)
    costs = []
    for layer in find_layers(model):
        mask = None if masks is None else masks.get(layer.name)
        nonzeros = int(torch.count_nonzero(layer.weight if mask is None else mask))
        positions, output_bytes = uses.get(id(layer.weight), (0, 0))
        costs.append(
            LayerCost(
                name=layer.name,
                shape=layer.shape,
                nonzeros=nonzeros,
                density=nonzeros / layer.size,
                flops=2 * positions * nonzeros,
                dense_flops=2 * positions * layer.size,
                value_bytes=layer.weight.element_size(),
                activation_bytes=output_bytes,
            )
        )
    return tuple(costs)


def _uses(model: nn.Module, example: Tensor) -> dict[int, tuple[int, int]]:
    """How often one example uses each layer's weight, and the bytes of the layer's outputs,
    by the weight's identity."""
    used: dict[int, tuple[int, int]] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight = module.weight
        if isinstance(module, nn.Linear):
            count = output.numel() // output.shape[-1]
        elif isinstance(module, _ConvTransposeNd):
            count = inputs[0].shape[2:].numel()
        else:
            count = output.shape[2:].numel()
        before, size = used.get(id(weight), (0, 0))
        used[id(weight)] = before + count, size + output.numel() * output.element_size()

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
