"""Per-weight optimizer state: which slots are known, and zeroing them where weights go."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.optim import Optimizer

from moon.errors import TrainingError

__all__ = ["KNOWN_SLOTS", "clear_slots", "weight_slots"]

# Slots for which zero is the state of a weight that has never moved.
KNOWN_SLOTS = frozenset(
    {
        "momentum_buffer",  # SGD, RMSprop
        "exp_avg",  # Adam, AdamW, NAdam, RAdam, Adamax
        "exp_avg_sq",
        "max_exp_avg_sq",  # AMSGrad
        "exp_inf",  # Adamax
        "square_avg",  # RMSprop, Adadelta
        "grad_avg",  # RMSprop
        "acc_delta",  # Adadelta
        "sum",  # Adagrad
    }
)


def weight_slots(optimizer: Optimizer, name: str, weight: Tensor) -> Iterator[Tensor]:
    """The tensors of ``optimizer``'s state that hold one number a weight.

    Raises:
        TrainingError: a slot whose meaning is not known, so that a grown weight could not
            start from a clean state.
    """
    for slot, value in optimizer.state.get(weight, {}).items():
        if not isinstance(value, Tensor) or value.shape != weight.shape:
            continue
        if slot not in KNOWN_SLOTS:
            raise TrainingError(
                f"{type(optimizer).__name__} keeps the state {slot!r} for {name}, and what a "
                "newly grown weight should have there is not known",
                remedy="Use SGD, Adam, AdamW or another optimizer of torch.optim whose state "
                "starts at zero",
            )
        yield value


def clear_slots(optimizer: Optimizer, name: str, weight: Tensor, away: Tensor) -> None:
    """Zero every slot of one weight, in place, where the boolean ``away`` is True.

    Filled rather than multiplied, so that infinities and NaN go too.
    """
    for slot in weight_slots(optimizer, name, weight):
        slot.masked_fill_(away.to(slot.device), 0.0)
