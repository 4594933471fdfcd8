"""Methods that MOON is compared with, as tables of a recipe: each is there or it is not.

Defaults are those of the papers named.
"""

from __future__ import annotations

from dataclasses import dataclass

from moon.trainer.ranges import at_least, positive, share

__all__ = ["CigLRecipe", "DacRecipe", "LogitNormRecipe", "MixupRecipe", "VosRecipe"]


@dataclass(frozen=True, kw_only=True)
class LogitNormRecipe:
    """Train on logits divided by ``tau`` times their norm (Wei et al. 2022)."""

    tau: float = 0.04

    def __post_init__(self) -> None:
        positive("logitnorm.tau", self.tau)


@dataclass(frozen=True, kw_only=True)
class MixupRecipe:
    """Train on convex combinations of two images and their labels, the share of the first
    drawn from Beta(alpha, alpha) for each batch (Zhang et al. 2018)."""

    alpha: float = 1.0

    def __post_init__(self) -> None:
        positive("mixup.alpha", self.alpha)


@dataclass(frozen=True, kw_only=True)
class DacRecipe:
    """The deep abstaining classifier: a further output to abstain by, paid for at a price
    that rises to ``alpha_final`` (Thulasidasan et al. 2019).

    ``warmup_epochs`` left out is 20% of the epochs (at least one).
    """

    alpha_final: float = 1.0
    init_factor: float = 64.0
    warmup_epochs: int | None = None

    def __post_init__(self) -> None:
        positive("dac.alpha_final", self.alpha_final)
        positive("dac.init_factor", self.init_factor)
        if self.warmup_epochs is not None:
            at_least("dac.warmup_epochs", self.warmup_epochs, 1)


@dataclass(frozen=True, kw_only=True)
class VosRecipe:
    """Virtual outliers drawn from the tails of class-conditional Gaussians over the features
    (Du et al. 2022): of ``sample_from`` points a class the ``select`` least likely.

    ``warmup_epochs`` left out is 40% of the epochs.
    """

    weight: float = 0.1
    warmup_epochs: int | None = None
    queue: int = 1000
    sample_from: int = 10_000
    select: int = 1

    def __post_init__(self) -> None:
        positive("vos.weight", self.weight)
        if self.warmup_epochs is not None:
            at_least("vos.warmup_epochs", self.warmup_epochs, 0)
        at_least("vos.queue", self.queue, 1)
        at_least("vos.select", self.select, 1)
        at_least("vos.sample_from", self.sample_from, self.select)


@dataclass(frozen=True, kw_only=True)
class CigLRecipe:
    """A random mask besides the sparse one at every step, and at the end the average of the
    weights (Lei et al. 2023, "Calibrating the Rigged Lottery").

    ``rate`` is the share of active weights set aside at each step.
    """

    rate: float = 0.1

    def __post_init__(self) -> None:
        positive("cigl.rate", self.rate)
        share("cigl.rate", self.rate)
