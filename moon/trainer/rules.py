"""How a topology changes: drop the weakest connections, grow others.

A rule is a pure function of one layer: (mask, weight, gradient) -> new mask. RigL is SET
with another grow score. Layouts: all tensors of a layer share one shape; scores are ranked
in logical (row-major) order whatever the memory layout.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moon.errors import UsageError
from moon.trainer.topology import top_mask

__all__ = ["RULES", "RigL", "Rule", "Set", "Static", "make_rule", "rule_names"]


class Rule(Protocol):
    """What changes a layer's mask.

    Attributes:
        name: as ``make_rule`` takes it.
        updates: False when the topology never changes.
        needs_gradient: False when only the shape of the gradient is read.
    """

    name: str
    updates: bool
    needs_gradient: bool

    def step(
        self,
        mask: Tensor,
        weight: Tensor,
        gradient: Tensor,
        *,
        nonzeros: int,
        fraction: float,
        draw: torch.Generator,
    ) -> Tensor: ...


class Set:
    """Sparse evolutionary training: drop the smallest weights, grow at random.

    Source: Mocanu et al. 2018; dropping by magnitude as in Evci et al. 2020.

    Args:
        exclude_dropped: a connection dropped by an update cannot regrow in the same one.
    """

    name = "set"
    updates = True
    needs_gradient = False

    def __init__(self, *, exclude_dropped: bool = False) -> None:
        self.exclude_dropped = exclude_dropped

    def drop_score(self, weight: Tensor) -> Tensor:
        """What is kept: higher stays. Never negative."""
        return weight.abs()

    def grow_score(self, gradient: Tensor, draw: torch.Generator) -> Tensor:
        """What is grown: higher grows. Never negative."""
        return torch.rand(gradient.shape, generator=draw, device=gradient.device)

    def step(
        self,
        mask: Tensor,
        weight: Tensor,
        gradient: Tensor,
        *,
        nonzeros: int,
        fraction: float,
        draw: torch.Generator,
    ) -> Tensor:
        """The next mask of one layer, with exactly ``nonzeros`` connections.

        The nonzeros - k largest active weights stay, k = floor(fraction * nonzeros), where
        every active weight ranks above every inactive one, exact zeros included. Then the k
        best grow scores among all positions not kept are grown; a weight dropped just now
        may be among them unless ``exclude_dropped``.

        Args:
            mask: bool, True where active, with ``nonzeros`` True.
            weight: the layer's weight.
            gradient: its dense gradient (only its shape matters where ``needs_gradient``
                is False).
            fraction: share of the connections to replace, in [0, 1].

        Returns:
            A new bool tensor of the mask's shape, contiguous.
        """
        active = mask.flatten()
        replaced = int(fraction * nonzeros)
        if self.exclude_dropped:
            replaced = min(replaced, active.numel() - nonzeros)
        if replaced == 0:
            return mask.clone(memory_format=torch.contiguous_format)
        drop = self.drop_score(weight.detach()).flatten()
        kept = top_mask(drop.masked_fill(~active, -1.0), nonzeros - replaced)
        barred = active if self.exclude_dropped else kept
        grow = self.grow_score(gradient.detach(), draw).flatten()
        grown = top_mask(grow.masked_fill(barred, -1.0), replaced)
        return (kept | grown).view(mask.shape)


class RigL(Set):
    """SET that grows where the gradient of the loss is largest (Evci et al. 2020)."""

    name = "rigl"
    needs_gradient = True

    def grow_score(self, gradient: Tensor, draw: torch.Generator) -> Tensor:
        return gradient.abs()


class Static(Set):
    """The first topology stays to the end."""

    name = "static"
    updates = False


RULES: dict[str, type[Set]] = {rule.name: rule for rule in (Static, Set, RigL)}


def rule_names() -> tuple[str, ...]:
    """The names ``make_rule`` takes, and ``dense`` for no sparsity at all."""
    return ("dense", *RULES)


def make_rule(name: str, *, exclude_dropped: bool = False) -> Rule:
    """A rule by its name.

    Raises:
        UsageError: no such rule.
    """
    if name not in RULES:
        raise UsageError(f"unknown rule {name!r}", remedy=f"Use one of {', '.join(rule_names())}")
    return RULES[name](exclude_dropped=exclude_dropped)
