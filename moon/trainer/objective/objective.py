"""From a recipe to what its steps minimise: a loss of the logits, and what goes around it.

Shape suffixes: B images of a batch, K outputs, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from moon.trainer.objective.dac import AbstentionLoss
from moon.trainer.objective.dropconnect import DropConnect
from moon.trainer.objective.logitnorm import LogitNorm
from moon.trainer.objective.loss import AutoWeight, UnknownAwareLoss
from moon.trainer.objective.mixup import Mixup, draw_mixup
from moon.trainer.objective.vos import HeadInput, VirtualOutliers
from moon.trainer.recipe import Recipe

__all__ = ["Objective"]

# Of the authors' published code.
OFFICIAL_DROPCONNECT = 0.01


class Objective:
    """What a recipe's steps minimise, and all random numbers that takes.

    Draws are made by ``start_epoch`` and ``start_step`` and copied into fixed tensors, so that a
    captured CUDA graph finds those of the moment.

    Args:
        model: on ``device``; its head gives the features that virtual outliers need.
        known: number of known classes.
        unknown_index: the logit of the unknown; None where there is none.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        *,
        known: int,
        unknown_index: int | None,
        device: torch.device,
    ) -> None:
        self._recipe = recipe
        self._device = device
        self._criterion = _criterion(recipe, unknown_index).to(device)
        self._outliers: VirtualOutliers | None = None
        self._drop: DropConnect | None = None
        self._epoch_mixes: list[Mixup] = []
        self._mixes: dict[int, Mixup] = {}
        self._mix: Mixup | None = None
        self._draw: Tensor | None = None
        if recipe.vos is not None:
            self._head = HeadInput(model)
            self._outliers = VirtualOutliers(
                known=known,
                features=self._head.layer.in_features,
                unknown_index=unknown_index,
                weight=recipe.vos.weight,
                warmup_epochs=recipe.vos_warmup_epochs,
                queue=recipe.vos.queue,
                sample_from=recipe.vos.sample_from,
                select=recipe.vos.select,
                seed=recipe.seed,
            ).to(device)

    def follow(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        """Learn of the topology, of which a random part is dropped at every step."""
        rate = OFFICIAL_DROPCONNECT if self._recipe.follows("dropconnect") else 0.0
        if self._recipe.cigl is not None:
            rate = self._recipe.cigl.rate
        if rate:
            self._drop = DropConnect(model, masks, rate=rate, seed=self._recipe.seed)

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is learned besides the model."""
        return iter(()) if self._outliers is None else self._outliers.parameters()

    @property
    def w(self) -> float:
        """The weight of the unknown, or the price of abstaining."""
        return float(self._criterion.w)

    @property
    def branch(self) -> Hashable:
        """The Python path a call takes; a captured CUDA graph serves one of them."""
        return self._criterion.branch

    @property
    def capturable(self) -> bool:
        return self._outliers is None and self._drop is None

    def start_epoch(self, epoch: int, sizes: list[int]) -> None:
        """Begin an epoch, counted from 1, of batches of the given sizes."""
        self._criterion.start_epoch(epoch)
        if self._outliers is not None:
            self._outliers.start_epoch(epoch)
        if self._recipe.mixup is not None:
            self._epoch_mixes = draw_mixup(
                sizes,
                alpha=self._recipe.mixup.alpha,
                seed=self._recipe.seed,
                epoch=epoch,
                device=self._device,
            )

    def start_step(self, step: int, number: int, share: float = 1.0) -> None:
        """Make the draws of a step.

        Args:
            step: from 0, of the run.
            number: from 0, of the epoch.
            share: of the coming batch, see ``RawBatch``.
        """
        self._auto_weight.share = share
        if self._epoch_mixes:
            drawn = self._epoch_mixes[number]
            kept = self._mixes.setdefault(len(drawn.partners), drawn.clone())
            kept.copy_(drawn)
            self._mix = kept
        if self._drop is not None:
            self._drop.draw(step)
        if self._outliers is not None and self._outliers.active:
            self._draw = self._outliers.draw(step)

    def end_epoch(self) -> None:
        """Make what the epoch gathered the same on all ranks; a collective."""
        self._auto_weight.average_ranks()

    @property
    def _auto_weight(self) -> AutoWeight:
        loss = self._criterion
        inner = loss.criterion if isinstance(loss, LogitNorm) else loss
        assert isinstance(inner, (UnknownAwareLoss, AbstentionLoss))
        return inner.auto_weight

    def during_step(self) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a step."""
        return nullcontext() if self._drop is None else self._drop.training_step()

    def during_vote(self) -> AbstractContextManager[None]:
        """Around a vote: what the last step dropped counts as zero in the average."""
        return nullcontext() if self._drop is None else self._drop.applied()

    def __call__(self, model: nn.Module, x_BCHW: Tensor, target_B: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss (0-d) and the logits [B, K] in float32."""
        mix = self._mix
        logits_BK = model(x_BCHW if mix is None else mix.mix(x_BCHW)).float()
        if mix is None:
            loss: Tensor = self._criterion(logits_BK, target_B)
        else:
            loss = mix.loss(self._criterion, logits_BK, target_B)
        if self._outliers is not None:
            features_BD = self._head.features
            loss = loss + self._outliers(
                features_BD, logits_BK, target_B, self._head.head, self._draw
            )
        return loss, logits_BK

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"criterion": self._criterion.state_dict()}
        if self._outliers is not None:
            state["outliers"] = self._outliers.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._criterion.load_state_dict(state["criterion"])
        if self._outliers is not None:
            self._outliers.load_state_dict(state["outliers"])


def _criterion(
    recipe: Recipe, unknown_index: int | None
) -> UnknownAwareLoss | AbstentionLoss | LogitNorm:
    moon = recipe.moon
    loss: UnknownAwareLoss | AbstentionLoss
    if recipe.dac is not None:
        loss = AbstentionLoss(
            total_epochs=recipe.epochs,
            warmup_epochs=recipe.dac_warmup_epochs,
            alpha_final=recipe.dac.alpha_final,
            init_factor=recipe.dac.init_factor,
            unknown_index=-1 if unknown_index is None else unknown_index,
        )
    else:
        # Plain cross-entropy where it is not enabled.
        loss = UnknownAwareLoss(
            total_epochs=recipe.epochs,
            warmup_epochs=recipe.warmup_epochs,
            w_final=moon.w_final,
            init_factor=moon.init_factor,
            unknown_index=-1 if unknown_index is None else unknown_index,
            auto=moon.auto,
            enabled=moon.enabled and moon.loss,
        )
    return loss if recipe.logitnorm is None else LogitNorm(loss, tau=recipe.logitnorm.tau)
