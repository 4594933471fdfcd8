"""The unknown-aware loss and the automatic tuning of its weight.

Shapes: N samples, K known classes, K + 1 logits, of which one stands for the unknown.
Source: Lei, Xu, Zhang, Mallick, "Embracing Unknown Step by Step: Towards Reliable Sparse
Training in Real World", TMLR: equation 1 and Algorithm 1. Equation 1 prints no minus sign
for wrong predictions; the text, and this module, minimise the negative logarithm.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from moon.errors import TrainingError, UsageError

__all__ = ["AutoWeight", "UnknownAwareLoss", "check_batch"]


class AutoWeight(nn.Module):
    """The weight w of the loss, epoch by epoch (Algorithm 1).

    Through epoch ``warmup_epochs`` (T_e) w is 0 and a moving average e of
    (1 - p_unknown) * loss is kept, e <- (1 - mu) e + mu * batch mean, started at the first
    batch's value. Then w_i = e / r, and w moves linearly from w_i to ``w_final``, which it
    has at ``total_epochs`` (T) and after: w = w_i + (t - T_e) (w_f - w_i) / (T - T_e).
    Under torch.distributed e is averaged over the ranks before use.

    Args:
        total_epochs: T, epochs of the run.
        warmup_epochs: T_e, at least 0 and below T.
        w_final: w_f.
        init_factor: r.
        momentum: mu, in (0, 1].
        auto: False holds w at ``w_final`` from the start.
        lag: epochs after the warm-up through which w stays at w_i.

    Raises:
        UsageError: a value out of range.
    """

    def __init__(
        self,
        *,
        total_epochs: int = 100,
        warmup_epochs: int = 5,
        w_final: float = 1.0,
        init_factor: float = 64.0,
        momentum: float = 0.05,
        auto: bool = True,
        lag: int = 0,
    ) -> None:
        super().__init__()
        if auto and not 0 <= warmup_epochs < total_epochs:
            raise UsageError(
                f"warmup_epochs is {warmup_epochs} and total_epochs {total_epochs}",
                remedy="Leave at least one epoch after the warm-up",
            )
        large = torch.finfo(torch.float32).max
        good = 0 <= w_final <= large and 0 < init_factor <= large and 0 < momentum <= 1
        if not good:
            raise UsageError(
                f"w_final {w_final}, init_factor {init_factor} or momentum {momentum} is out of "
                "range",
                remedy="w_final is at least 0, init_factor above 0, momentum in (0, 1]",
            )
        self.total_epochs = total_epochs
        self.warmup_epochs = warmup_epochs
        self.w_final = float(w_final)
        self.init_factor = float(init_factor)
        self.momentum = float(momentum)
        self.auto = auto
        self.lag = lag
        # The coming batch's images over those of an equal share among the ranks: with it, the
        # average over ranks of unequal batches is the moving average of the whole batches.
        self.share = 1.0
        self.epoch = 0
        self.w_initial: float | None = None
        self.value = 0.0 if auto else self.w_final
        # Tensors, so that neither a step nor a captured CUDA graph waits for the host.
        self._average: Tensor
        self._weight: Tensor
        self.register_buffer("_average", torch.full((), float("nan")), persistent=False)
        self.register_buffer("_weight", torch.tensor(self.value), persistent=False)

    @property
    def warming_up(self) -> bool:
        """Whether the moving average is being kept."""
        return self.auto and self.epoch <= self.warmup_epochs

    @property
    def average(self) -> float | None:
        """e, or None before the first batch."""
        value = float(self._average)
        return None if value != value else value

    def start_epoch(self, epoch: int) -> None:
        """Set w for an epoch, counted from 1; a collective at the end of the warm-up.

        Raises:
            UsageError: a negative epoch.
        """
        if epoch < 0:
            raise UsageError(f"epochs count from 1, not {epoch}")
        self.epoch = epoch
        if not self.auto:
            return
        if epoch <= self.warmup_epochs:
            self.w_initial = None
            self._set(0.0)
            return
        if self.w_initial is None:
            self.w_initial = self._rank_average() / self.init_factor
        start = self.warmup_epochs + self.lag
        if epoch >= self.total_epochs:
            self._set(self.w_final)
            return
        done = max(0, epoch - start) / max(1, self.total_epochs - start)
        self._set(self.w_initial + done * (self.w_final - self.w_initial))

    @torch.no_grad()
    def observe(self, loss_N: Tensor, p_unknown_N: Tensor) -> None:
        """Take a batch of the warm-up into the average; a batch that overflowed is left out."""
        batch = self.share * ((1 - p_unknown_N) * loss_N).mean().to(self._average.dtype)
        old = torch.where(self._average.isnan(), batch, self._average)
        new = (1 - self.momentum) * old + self.momentum * batch
        self._average.copy_(torch.where(batch.isfinite(), new, self._average))

    def average_ranks(self) -> None:
        """Set e to its mean over the ranks, a collective: then any rank's state is that of all.

        The mean moves on as it would have, being linear in each rank's e.
        """
        if not self.warming_up:
            return
        mean = self._rank_average()
        if mean != 0.0:  # Nothing was observed yet.
            self._average.fill_(mean)

    def _set(self, value: float) -> None:
        self.value = value
        self._weight.fill_(value)

    def _rank_average(self) -> float:
        average = torch.nan_to_num(self._average, nan=0.0)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(average)
            average = average / torch.distributed.get_world_size()
        return float(average)

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "w": self.value,
            "w_initial": self.w_initial,
            "average": self.average,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        try:
            initial, average = state["w_initial"], state["average"]
            self.epoch = int(state["epoch"])
            self.w_initial = None if initial is None else float(initial)
            self._set(float(state["w"]))
        except (KeyError, TypeError, ValueError) as error:
            raise TrainingError(
                "the saved state of the loss is not one of UnknownAwareLoss",
                remedy="Load what its state_dict() returned",
            ) from error
        self._average.fill_(float("nan") if average is None else float(average))


class UnknownAwareLoss(nn.Module):
    """Cross-entropy over K + 1 logits that weighs mistakes by how little they say "unknown".

    With p = softmax(logits), y-hat the arg max over all K + 1 and w from ``AutoWeight``:

        correct (y-hat == y):  -log p_y
        wrong   (y-hat != y):  -(1 + w / (1 + w * p_unknown)) * log p_y

    averaged over the batch. The gradient flows through p_unknown: raising it lowers the
    weight of a mistake. With w = 0, and if ``start_epoch`` is never called with the default
    ``auto``, this is cross-entropy exactly. Computed in float32 at least.

    Args:
        unknown_index: which logit is the unknown; negative counts from the end.
        enabled: False is cross-entropy throughout (the ablation without the loss).
        total_epochs, warmup_epochs, w_final, init_factor, momentum, auto: see ``AutoWeight``;
            the defaults are the paper's for CIFAR-10.

    Raises:
        UsageError: a value out of range.
    """

    def __init__(
        self,
        *,
        total_epochs: int = 100,
        warmup_epochs: int = 5,
        w_final: float = 1.0,
        init_factor: float = 64.0,
        momentum: float = 0.05,
        unknown_index: int = -1,
        auto: bool = True,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        self.unknown_index = unknown_index
        self.enabled = enabled
        self.auto_weight = AutoWeight(
            total_epochs=total_epochs,
            warmup_epochs=warmup_epochs,
            w_final=w_final,
            init_factor=init_factor,
            momentum=momentum,
            auto=auto,
        )

    @property
    def w(self) -> float:
        """The weight in force."""
        return self.auto_weight.value if self.enabled else 0.0

    @property
    def branch(self) -> tuple[bool, bool]:
        """Which of its Python paths a call takes; a captured CUDA graph serves one of them."""
        auto = self.auto_weight
        plain = not self.enabled or auto.value == 0.0
        return plain, plain and self.enabled and auto.warming_up

    def start_epoch(self, epoch: int) -> None:
        """Set w for an epoch, counted from 1 (0 is taken as warm-up; past T w stays at w_f)."""
        self.auto_weight.start_epoch(epoch)

    def forward(self, logits_NK: Tensor, target_N: Tensor) -> Tensor:
        """Mean loss of a batch.

        Args:
            logits_NK: [N, K + 1], any floating dtype.
            target_N: int64 [N], class indices.

        Returns:
            0-d loss, float32 (float64 for float64 logits).

        Raises:
            UsageError: wrong shapes or dtypes.
        """
        unknown = check_batch(logits_NK, target_N, self.unknown_index)
        logits_NK = logits_NK if logits_NK.dtype == torch.float64 else logits_NK.float()
        log_p_NK = F.log_softmax(logits_NK, dim=1)
        if not self.enabled:
            return F.nll_loss(log_p_NK, target_N)
        auto = self.auto_weight
        if auto._weight.device != logits_NK.device:
            auto.to(logits_NK.device)
        if auto.value == 0.0:
            if auto.warming_up and self.training and torch.is_grad_enabled():
                loss_N = F.nll_loss(log_p_NK.detach(), target_N, reduction="none")
                auto.observe(loss_N, log_p_NK[:, unknown].detach().exp())
            return F.nll_loss(log_p_NK, target_N)
        loss_N = F.nll_loss(log_p_NK, target_N, reduction="none")
        w = auto._weight.to(log_p_NK.dtype)
        weight_N = 1 + w / (1 + w * log_p_NK[:, unknown].exp())
        wrong_N = logits_NK.argmax(dim=1) != target_N
        return torch.where(wrong_N, weight_N * loss_N, loss_N).mean()

    def extra_repr(self) -> str:
        return f"w={self.w:g}, unknown_index={self.unknown_index}, enabled={self.enabled}"


def check_batch(logits_NK: Tensor, target_N: Tensor, unknown_index: int) -> int:
    """The unknown's index from the front, for a batch of the right shapes and types.

    Raises:
        UsageError: it is not one.
    """
    if logits_NK.ndim != 2 or target_N.shape != logits_NK.shape[:1]:
        raise UsageError(
            f"the loss takes logits [N, K + 1] and targets [N], not "
            f"{list(logits_NK.shape)} and {list(target_N.shape)}"
        )
    if target_N.dtype is not torch.int64:
        raise UsageError(
            f"targets are class indices of type int64, not {target_N.dtype}",
            remedy="Convert whole numbers with .long(); soft labels are not supported",
        )
    outputs = logits_NK.shape[1]
    if outputs < 2 or not -outputs <= unknown_index < outputs:
        raise UsageError(
            f"unknown_index {unknown_index} is outside the {outputs} logits"
            if outputs > 1
            else "one logit cannot stand for a class and the unknown",
            remedy="Build the model with one output more than there are classes",
        )
    return unknown_index % outputs
