"""One masked weight and what is done to it in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moon.trainer.sparsity.slots import clear_slots

__all__ = [
    "MaskedLayer",
    "gradients_finite",
    "mask_gradients_",
    "stray_layers",
]

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(kw_only=True, eq=False)
class MaskedLayer:
    """A weight, its mask and its number of connections.

    Attributes:
        name: the weight's key in the model's state dict.
        weight: the parameter; its inactive entries are zero.
        mask: bool, of the weight's shape and memory layout.
        target: how many entries of the mask are True in the end.
        nonzeros: how many are now; ``target`` but while pruning.
    """

    name: str
    weight: nn.Parameter
    mask: Tensor
    target: int
    nonzeros: int

    def follow_weight(self) -> None:
        """Move the mask to where the model has been moved."""
        if self.mask.device != self.weight.device:
            self.mask = self.mask.to(self.weight.device)

    def set_mask_(self, mask: Tensor) -> None:
        """Overwrite in place, so that captured CUDA graphs and callers see the new mask."""
        self.mask.copy_(mask)
        self.nonzeros = int(torch.count_nonzero(self.mask))

    def clear_(self, optimizer: Optimizer, away: Tensor) -> None:
        """Zero the weight and all its optimizer state where the boolean ``away`` is True."""
        self.weight.masked_fill_(away, 0.0)
        clear_slots(optimizer, self.name, self.weight, away)

    def replace_(self, optimizer: Optimizer, mask: Tensor) -> Tensor:
        """Take over a new mask and return how many of its connections are new (0-d int64).

        A weight that is active both before and after keeps its value and state, whether or
        not it was dropped in between; every other one becomes zero.
        """
        away = ~(mask & self.mask)
        grown = torch.count_nonzero(mask & away)
        self.clear_(optimizer, away)
        self.set_mask_(mask)
        return grown


def mask_gradients_(layers: Sequence[MaskedLayer]) -> None:
    """Zero the gradients of inactive weights in place, infinities and NaN included.

    The bits of the gradients, read as integers, are multiplied by the boolean masks: as fast
    as multiplying floats, where an infinity times zero would be NaN, and with no copy of the
    masks in the gradient's dtype.
    """
    bits, masks = [], []
    for layer in layers:
        if layer.weight.grad is not None:
            layer.follow_weight()
            gradient = layer.weight.grad
            bits.append(gradient.view(INTEGERS[gradient.element_size()]))
            masks.append(layer.mask)
    if bits:
        torch._foreach_mul_(bits, masks)


def gradients_finite(optimizer: Optimizer) -> bool:
    """Whether every gradient of the optimizer is there and finite; one synchronisation.

    GradScaler calls the step of a fused optimizer even when a gradient overflowed and tells
    it so by the attribute ``found_inf`` only. The infinity norm cannot itself overflow.
    """
    gradients = [
        parameter.grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None and parameter.grad.numel() > 0
    ]
    if not gradients:
        return False
    device = gradients[0].device
    values = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    norms: list[Tensor] = list(torch._foreach_norm(values, float("inf")))
    flags = [torch.isfinite(norm).to(device) for norm in norms]
    found_inf = getattr(optimizer, "found_inf", None)
    if isinstance(found_inf, Tensor):
        flags.append((found_inf == 0).to(device).reshape(()))
    return bool(torch.stack(flags).all())


def stray_layers(layers: Sequence[MaskedLayer]) -> list[str]:
    """Names of layers with a finite nonzero weight outside the mask."""
    stray = [
        ((layer.weight != 0) & torch.isfinite(layer.weight) & ~layer.mask).any().cpu()
        for layer in layers
    ]
    return [layer.name for layer, found in zip(layers, stray, strict=True) if found]
