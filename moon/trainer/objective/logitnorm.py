"""LogitNorm: a loss of the logits' direction, whatever their length.

Shapes: N samples, K outputs, the unknown included where there is one.
Source: Wei, Xie, Cheng, Feng, An, Li, "Mitigating Neural Network Overconfidence with Logit
Normalization", ICML 2022: equation 5.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from moon.errors import UsageError

__all__ = ["LogitNorm"]

EPSILON = 1e-7


class LogitNorm(nn.Module):
    """A criterion of z / (tau * (||z||_2 + 1e-7)), z being all of a sample's logits.

    Whatever the criterion reads from the logits, such as p(unknown), it reads from the
    normalised ones; their order, and so which samples are mistakes, is that of the logits.
    The model's own logits stay as they are, so that its softmax says little before a
    temperature is fitted.

    Args:
        criterion: from logits [N, K] and targets [N] to a loss; cross-entropy when None.
        tau: temperature, above 0; 0.04 is the paper's for CIFAR-10.

    Raises:
        UsageError: tau out of range.
    """

    def __init__(self, criterion: nn.Module | None = None, *, tau: float = 0.04) -> None:
        super().__init__()
        if not 0 < tau < float("inf"):
            raise UsageError(f"tau is {tau}", remedy="Give a finite temperature above 0")
        self.criterion = nn.CrossEntropyLoss() if criterion is None else criterion
        self.tau = tau

    @property
    def w(self) -> float:
        """The criterion's weight of the unknown; 0 for one that has none."""
        return float(getattr(self.criterion, "w", 0.0))

    @property
    def branch(self) -> Hashable:
        """The criterion's; a captured CUDA graph serves one of them."""
        branch: Hashable = getattr(self.criterion, "branch", None)
        return branch

    def start_epoch(self, epoch: int) -> None:
        """Tell the criterion, if it minds, which epoch begins, counted from 1."""
        start: Callable[[int], None] | None = getattr(self.criterion, "start_epoch", None)
        if start is not None:
            start(epoch)

    def forward(self, logits_NK: Tensor, target_N: Tensor) -> Tensor:
        """The criterion's loss of the normalised logits, computed in float32 at least.

        Args:
            logits_NK: [N, K], any floating dtype.
            target_N: as the criterion takes them.

        Raises:
            UsageError: logits of another shape.
        """
        if logits_NK.ndim != 2:
            raise UsageError(f"LogitNorm takes logits [N, K], not {list(logits_NK.shape)}")
        logits_NK = logits_NK if logits_NK.dtype == torch.float64 else logits_NK.float()
        length_N1 = torch.linalg.vector_norm(logits_NK, dim=1, keepdim=True)
        loss: Tensor = self.criterion(logits_NK / (self.tau * (length_N1 + EPSILON)), target_N)
        return loss

    def extra_repr(self) -> str:
        return f"tau={self.tau:g}"
