"""How a topology changes: drop the weakest connections and grow others, or only drop.

A rule is a pure function of one layer: (mask, weight, gradient) -> new mask. RigL is SET
with another grow score. Rules choose among the units of a structure, which without one are
the connections themselves; a unit's score is the sum over its connections. Ties go to the
first unit in logical (row-major) order whatever the memory layout.

Shape suffixes: G groups of a structure, U units of a group.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moon.errors import UsageError
from moon.trainer.sparsity.selection import best
from moon.trainer.sparsity.structure import UNSTRUCTURED, Structure

__all__ = ["RULES", "Pruning", "RigL", "Rule", "Set", "Static", "make_rule", "rule_names"]


class Rule(Protocol):
    """What changes a layer's mask.

    Attributes:
        name: as ``make_rule`` takes it.
        updates: False when the topology never changes.
        prunes: True when layers start dense and only lose connections.
    """

    name: str
    updates: bool
    prunes: bool

    def step(
        self,
        mask: Tensor,
        weight: Tensor,
        gradient: Tensor,
        *,
        nonzeros: int,
        fraction: float,
        draw: torch.Generator,
        structure: Structure = UNSTRUCTURED,
    ) -> Tensor: ...


class Set:
    """Sparse evolutionary training: drop the smallest weights, grow at random.

    Source: Mocanu et al. 2018; dropping by magnitude as in Evci et al. 2020.

    Args:
        exclude_dropped: a connection dropped by an update cannot regrow in the same one.
    """

    name = "set"
    updates = True
    prunes = False

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
        structure: Structure = UNSTRUCTURED,
    ) -> Tensor:
        """The next mask of one layer, with exactly ``nonzeros`` connections.

        The n - k largest of the n active units stay, k = floor(fraction * n), where every
        active one ranks above every inactive one, exact zeros included. Then the k best
        grow scores among all units not kept are grown, so far as their groups have room: of
        each group only its best fit. A unit dropped just now may be among them unless
        ``exclude_dropped``; then the strongest dropped return only where there is no room
        for k others.

        Args:
            mask: bool, True where active, with ``nonzeros`` True and of the structure.
            weight: the layer's weight.
            gradient: its dense gradient; random growth reads its shape and device only.
            nonzeros: as the structure counts them.
            fraction: share of the connections to replace, in [0, 1].

        Returns:
            A new bool tensor of the mask's shape, contiguous.
        """
        units = structure.units(mask.shape, nonzeros)
        replaced = [int(fraction * count) for count in units]
        if not any(replaced):
            return mask.clone(memory_format=torch.contiguous_format)
        cap = structure.cap(mask.shape, nonzeros)
        active = structure.flags(mask)
        drop = structure.scores(self.drop_score(weight.detach()))
        kept = [
            best(score_GU, n - k, among_GU=active_GU)
            for score_GU, active_GU, n, k in zip(drop, active, units, replaced, strict=True)
        ]
        if not self.exclude_dropped:
            drop.clear()  # Frees a copy of the layer before the next is made.
        grow = structure.scores(self.grow_score(gradient.detach(), draw))
        for part, (kept_GU, active_GU, k) in enumerate(zip(kept, active, replaced, strict=True)):
            barred_GU = active_GU if self.exclude_dropped else kept_GU
            kept_GU |= best(grow[part], k, among_GU=~barred_GU, taken_GU=kept_GU, cap=cap)
            if self.exclude_dropped:
                short = units[part] - int(torch.count_nonzero(kept_GU))
                back_GU = active_GU & ~kept_GU
                kept_GU |= best(drop[part], short, among_GU=back_GU, taken_GU=kept_GU, cap=cap)
        return structure.join(kept, mask.shape)


class RigL(Set):
    """SET that grows where the gradient of the loss is largest (Evci et al. 2020)."""

    name = "rigl"

    def grow_score(self, gradient: Tensor, draw: torch.Generator) -> Tensor:
        return gradient.abs()


class Static(Set):
    """The first topology stays to the end."""

    name = "static"
    updates = False


class Pruning:
    """Gradual magnitude pruning: from dense, drop the smallest weights and grow none.

    Source: Zhu and Gupta 2017, "To prune, or not to prune".
    """

    name = "gmp"
    updates = True
    prunes = True

    def step(
        self,
        mask: Tensor,
        weight: Tensor,
        gradient: Tensor,
        *,
        nonzeros: int,
        fraction: float,
        draw: torch.Generator,
        structure: Structure = UNSTRUCTURED,
    ) -> Tensor:
        """The next mask of one layer: the largest active weights.

        Blocks are dropped whole from the start. A bound per group (N:M, fan-in) holds once
        ``fraction`` is 0; until then the connections that would be left if pruning ended now
        are kept, and then the largest others, so that the end stays within reach.

        Args:
            mask: bool, True where active; all True before the first update.
            weight: the layer's weight.
            gradient: not read.
            nonzeros: connections at the end, as the structure counts them.
            fraction: share of the connections beyond ``nonzeros`` that is still there.

        Returns:
            A new bool tensor of the mask's shape, contiguous.
        """
        cap = structure.cap(mask.shape, nonzeros)
        chosen = []
        for score_GU, active_GU, last, first in zip(
            structure.scores(weight.detach().abs()),
            structure.flags(mask),
            structure.units(mask.shape, nonzeros),
            structure.units(mask.shape, mask.numel()),
            strict=True,
        ):
            kept_GU = best(score_GU, last, among_GU=active_GU, cap=cap)
            surplus = round((first - last) * fraction)
            others_GU = best(score_GU, surplus, among_GU=active_GU & ~kept_GU)
            chosen.append(kept_GU | others_GU)
        return structure.join(chosen, mask.shape)


RULES = ("static", "set", "rigl", "gmp")


def rule_names() -> tuple[str, ...]:
    """The names ``make_rule`` takes, and ``dense`` for no sparsity at all."""
    return ("dense", *RULES)


def make_rule(name: str, *, exclude_dropped: bool = False) -> Rule:
    """A rule by its name.

    Raises:
        UsageError: no such rule, or ``exclude_dropped`` for one that grows nothing back.
    """
    if name == "gmp":
        if exclude_dropped:
            raise UsageError(
                "the rule gmp never grows a connection back, so exclude_dropped means nothing",
                remedy="Leave exclude_dropped out",
            )
        return Pruning()
    for rule in (Static, Set, RigL):
        if rule.name == name:
            return rule(exclude_dropped=exclude_dropped)
    raise UsageError(f"unknown rule {name!r}", remedy=f"Use one of {', '.join(rule_names())}")
