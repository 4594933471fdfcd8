"""Mixup: training on weighted means of pairs of images, and of the losses of both labels.

All randomness is drawn ahead, from (seed, epoch). Shape suffix: B images of a batch.
Source: Zhang, Cisse, Dauphin, Lopez-Paz, "mixup: Beyond Empirical Risk Minimization",
ICLR 2018.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from moon.errors import UsageError
from moon.trainer.augment import MIXUP, generator

__all__ = ["Mixup", "draw_mixup"]


@dataclass(frozen=True, kw_only=True)
class Mixup:
    """How one batch is mixed: image i with image ``partners[i]``, at one weight for all.

    Attributes:
        share: float32, 0-d: the weight of image i itself, lambda in the paper; from 0.5 to 1.
        partners: int64, a permutation of the batch.
    """

    share: Tensor
    partners: Tensor

    def mix(self, x: Tensor) -> Tensor:
        """share * x_i + (1 - share) * x_partner(i), for floating x [B, ...]; its layout stays."""
        self._check(x)
        return x.lerp(x[self.partners], (1 - self.share).to(x.dtype))

    def loss(self, criterion: nn.Module, logits_BK: Tensor, target_B: Tensor) -> Tensor:
        """share * criterion(z, y) + (1 - share) * criterion(z, y_partner), 0-d.

        The criterion keeps its moving averages from the first label alone, the one with the
        larger share: the second is seen in evaluation mode, in which ours differ in nothing else.
        """
        self._check(target_B)
        first = criterion(logits_BK, target_B)
        training = criterion.training
        criterion.eval()
        try:
            second = criterion(logits_BK, target_B[self.partners])
        finally:
            criterion.train(training)
        share = self.share.to(first.dtype)
        loss: Tensor = share * first + (1 - share) * second
        return loss

    def copy_(self, other: Mixup) -> None:
        """Overwrite in place with the mixing of another batch of the same size."""
        self.share.copy_(other.share)
        self.partners.copy_(other.partners)

    def clone(self) -> Mixup:
        """A copy in memory of its own."""
        return Mixup(share=self.share.clone(), partners=self.partners.clone())

    def _check(self, values: Tensor) -> None:
        if values.shape[:1] != self.partners.shape:
            raise UsageError(
                f"a mixing of {len(self.partners)} images came with {list(values.shape)} values"
            )


def draw_mixup(
    batches: Sequence[int], *, alpha: float, seed: int, epoch: int, device: torch.device
) -> list[Mixup]:
    """Draw the mixing of every batch of an epoch: lambda ~ Beta(alpha, alpha) and a permutation.

    Of lambda and 1 - lambda the larger is taken. That changes nothing but which image of a pair
    is called the first: swapping the two is taking the permutation's inverse, which is as likely.

    Args:
        batches: how many images each batch has.
        alpha: above 0; 1 makes every weight equally likely, and near 0 hardly anything is mixed.

    Returns:
        One for each batch, on ``device``.

    Raises:
        UsageError: alpha out of range.
    """
    if not 0 < alpha < float("inf"):
        raise UsageError(f"the alpha of mixup is {alpha}", remedy="Give a number above 0")
    draws = generator(seed, epoch, MIXUP)
    shares = draws.beta(alpha, alpha, size=len(batches))
    shares = np.maximum(shares, 1 - shares).astype(np.float32)
    partners = [draws.permutation(size) for size in batches]
    # One copy to the device, of which the batches are views.
    shares_on = torch.from_numpy(shares).to(device)
    partners_on = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *partners])).to(device)
    ends = list(itertools.accumulate(batches))
    return [
        Mixup(share=shares_on[i], partners=partners_on[end - size : end])
        for i, (size, end) in enumerate(zip(batches, ends, strict=True))
    ]
