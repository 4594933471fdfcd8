"""From a recipe to what its steps minimise.

Shape suffixes: B images of a batch, K outputs, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn

from moon.trainer.loss import UnknownAwareLoss
from moon.trainer.recipe import Recipe

__all__ = ["Criterion", "make_criterion"]


class Criterion:
    """The loss of a batch's logits alone.

    Args:
        loss: from logits [B, K] and targets [B] to a 0-d mean loss.
    """

    capturable = True

    def __init__(self, loss: UnknownAwareLoss) -> None:
        self._loss = loss

    @property
    def w(self) -> float:
        """Weight of the unknown."""
        return self._loss.w

    @property
    def branch(self) -> Hashable:
        return self._loss.branch

    def start_epoch(self, epoch: int) -> None:
        self._loss.start_epoch(epoch)

    def __call__(self, model: nn.Module, x_BCHW: Tensor, target_B: Tensor) -> tuple[Tensor, Tensor]:
        logits_BK = model(x_BCHW).float()
        return self._loss(logits_BK, target_B), logits_BK

    def state_dict(self) -> dict[str, Any]:
        return self._loss.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loss.load_state_dict(state)


def make_criterion(recipe: Recipe, unknown_index: int | None) -> UnknownAwareLoss:
    """The unknown-aware loss; plain cross-entropy where the recipe has no unknown."""
    moon = recipe.moon
    return UnknownAwareLoss(
        total_epochs=recipe.epochs,
        warmup_epochs=recipe.warmup_epochs,
        w_final=moon.w_final,
        init_factor=moon.init_factor,
        unknown_index=-1 if unknown_index is None else unknown_index,
        auto=moon.auto,
        enabled=moon.enabled and moon.loss,
    )
