"""One masked weight and what is done to it in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moon.trainer.slots import clear_slots

__all__ = [
    "MaskedLayer",
    "gradients_finite",
    "mask_gradients_",
    "stray_layers",
]


@dataclass(kw_only=True, eq=False)
class MaskedLayer:
    """A weight, its mask and its constant number of connections.

    Attributes:
        name: the weight's key in the model's state dict.
        weight: the parameter; its inactive entries are zero.
        mask: bool, of the weight's shape and memory layout.
        nonzeros: how many entries of the mask are True.
        factor: the mask in the gradient's dtype, made when first needed: multiplying lists
            of equal dtype is several times faster than filling by a boolean.
    """

    name: str
    weight: nn.Parameter
    mask: Tensor
    nonzeros: int
    factor: Tensor | None = None

    def follow_weight(self) -> None:
        """Move the mask to where the model has been moved."""
        if self.mask.device != self.weight.device:
            self.mask = self.mask.to(self.weight.device)

    def factor_for(self, gradient: Tensor) -> Tensor:
        """The mask as ones and zeros in the gradient's dtype, device and memory layout."""
        factor = self.factor
        if (
            factor is None
            or factor.dtype is not gradient.dtype
            or factor.device != gradient.device
            or factor.stride() != gradient.stride()
        ):
            factor = self.factor = torch.empty_like(gradient).copy_(self.mask)
        return factor

    def set_mask_(self, mask: Tensor) -> None:
        """Overwrite in place, so that captured CUDA graphs and callers see the new mask."""
        self.mask.copy_(mask)
        if self.factor is not None:
            self.factor.copy_(mask)

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
        grown = (mask & away).sum()
        self.clear_(optimizer, away)
        self.set_mask_(mask)
        return grown


def mask_gradients_(layers: Sequence[MaskedLayer]) -> None:
    """Zero the gradients of inactive weights in place, all layers at once."""
    gradients, factors = [], []
    for layer in layers:
        if layer.weight.grad is not None:
            gradients.append(layer.weight.grad)
            factors.append(layer.factor_for(layer.weight.grad))
    if gradients:
        torch._foreach_mul_(gradients, factors)


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
