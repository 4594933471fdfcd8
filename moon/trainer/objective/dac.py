"""The loss of the deep abstaining classifier, which may answer "abstain" at a price.

Shapes: N samples, K known classes, K + 1 logits, of which one stands for abstaining.
Source: Thulasidasan, Bhattacharya, Bilmes, Chennupati, Mohd-Yusof, "Combating Label Noise in
Deep Learning Using Abstention", ICML 2019: equation 1 and Algorithm 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from moon.errors import TrainingError, UsageError
from moon.trainer.objective.loss import AutoWeight, check_batch

__all__ = ["AbstentionLoss"]


class AbstentionLoss(nn.Module):
    """Cross-entropy among the known classes, scaled by the probability of not abstaining.

    With p = softmax(logits) over all K + 1 and p_a the probability of abstaining:

        H = -log(p_y / (1 - p_a))                          cross-entropy among the known classes
        L = (1 - p_a) * H + alpha * log(1 / (1 - p_a))

    averaged over the batch. Abstaining lowers the first term and pays alpha for it. Both
    factors are functions of s = logsumexp(known logits) - z_a alone: 1 - p_a = sigmoid(s) and
    log(1 / (1 - p_a)) = softplus(-s), which neither overflow nor cancel.

    Through ``warmup_epochs`` (L of the paper) this is cross-entropy over all K + 1 logits, and
    a moving average of (1 - p_a) * H is kept, started at the first batch's value. Then alpha is
    average / ``init_factor`` for one epoch and grows linearly to ``alpha_final``, which it has
    in the last epoch. (The printed Algorithm 1 ends one increment short of it; the authors'
    code, as here, does not.) Under torch.distributed the average is taken over the ranks.

    Args:
        total_epochs: of the run.
        warmup_epochs: epochs without abstention, at least 1 and below ``total_epochs``.
        alpha_final: price of abstaining in the last epoch, at least 0.
        init_factor: rho, by which the average is divided.
        momentum: mu of the moving average, in (0, 1].
        unknown_index: which logit is the abstention; negative counts from the end.
        auto: False holds alpha at ``alpha_final`` from the start, with no warm-up.

    Raises:
        UsageError: a value out of range.
    """

    def __init__(
        self,
        *,
        total_epochs: int = 100,
        warmup_epochs: int = 20,
        alpha_final: float = 1.0,
        init_factor: float = 64.0,
        momentum: float = 0.05,
        unknown_index: int = -1,
        auto: bool = True,
    ) -> None:
        super().__init__()
        if auto and warmup_epochs < 1:
            raise UsageError(
                f"the abstention loss needs a warm-up, not {warmup_epochs} epochs",
                remedy="Without one alpha starts at 0, and abstaining on everything is free",
            )
        if alpha_final < 0:
            raise UsageError(f"alpha_final is {alpha_final}", remedy="Give a price of at least 0")
        self.unknown_index = unknown_index
        self.auto_weight = AutoWeight(
            total_epochs=total_epochs,
            warmup_epochs=warmup_epochs,
            w_final=alpha_final,
            init_factor=init_factor,
            momentum=momentum,
            auto=auto,
            lag=1,
        )

    @property
    def alpha(self) -> float:
        """The price of abstaining in force; 0 in the warm-up, where nothing abstains."""
        return self.auto_weight.value

    @property
    def w(self) -> float:
        """alpha, by the name other losses use."""
        return self.alpha

    @property
    def branch(self) -> bool:
        """Which of its Python paths a call takes; a captured CUDA graph serves one of them."""
        return self.auto_weight.warming_up

    def start_epoch(self, epoch: int) -> None:
        """Set alpha for an epoch, counted from 1.

        Raises:
            UsageError: a negative epoch.
            TrainingError: the warm-up has been skipped, so that there is no average.
        """
        auto = self.auto_weight
        skipped = auto.average is None and auto.w_initial is None
        if auto.auto and epoch > auto.warmup_epochs and skipped:
            raise TrainingError(
                f"epoch {epoch} begins and no batch of the warm-up has been seen",
                remedy="Start at epoch 1, or load the state of the loss",
            )
        auto.start_epoch(epoch)

    def forward(self, logits_NK: Tensor, target_N: Tensor) -> Tensor:
        """Mean loss of a batch.

        Args:
            logits_NK: [N, K + 1], any floating dtype; computed in float32 at least.
            target_N: int64 [N], indices of logits, never that of the abstention.

        Returns:
            0-d loss, float32 (float64 for float64 logits).

        Raises:
            UsageError: wrong shapes or dtypes.
        """
        unknown = check_batch(logits_NK, target_N, self.unknown_index)
        logits_NK = logits_NK if logits_NK.dtype == torch.float64 else logits_NK.float()
        auto = self.auto_weight
        if auto._weight.device != logits_NK.device:
            auto.to(logits_NK.device)
        if auto.warming_up:
            if self.training and torch.is_grad_enabled():
                known_N, margin_N = _parts(logits_NK.detach(), target_N, unknown)
                auto.observe(known_N, torch.sigmoid(-margin_N))
            return F.cross_entropy(logits_NK, target_N)
        known_N, margin_N = _parts(logits_NK, target_N, unknown)
        price_N = auto._weight.to(logits_NK.dtype) * F.logsigmoid(margin_N)
        return (torch.sigmoid(margin_N) * known_N - price_N).mean()

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, unknown_index={self.unknown_index}"


def _parts(logits_NK: Tensor, target_N: Tensor, unknown: int) -> tuple[Tensor, Tensor]:
    """H [N], and s [N]: how far the known classes together are above the abstention."""
    known_NK = logits_NK.clone()
    known_NK[:, unknown] = -torch.inf
    loss_N = F.cross_entropy(known_NK, target_N, reduction="none")
    return loss_N, known_NK.logsumexp(dim=1) - logits_NK[:, unknown]
