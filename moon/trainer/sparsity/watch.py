"""Notices when something else has written the weights, or the optimizer breaks their zeros."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from moon.trainer.sparsity import checks
from moon.trainer.sparsity.masked import MaskedLayer

__all__ = ["Watch"]


class Watch:
    """Tells when weights may be nonzero outside their masks, without reading them.

    PyTorch counts the in-place writes of every tensor. A count that has moved since ``note``
    is a state dict that was loaded, or a hand that wrote; only writes through ``.data`` go
    unseen. The optimizer itself is trusted but checked, after its steps 1, 2, 4, 8 and so on:
    some do nothing odd at first.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._versions: list[int] | None = None

    def written(self, layers: Sequence[MaskedLayer]) -> bool:
        """Whether weights or optimizer state may have been written since ``note``."""
        return self._versions != _versions(layers)

    def note(self, layers: Sequence[MaskedLayer]) -> None:
        """The weights are as they should be now."""
        self._versions = _versions(layers)

    def restart(self) -> None:
        """Everything may have been written, and the optimizer is checked anew."""
        self._steps = 0
        self._versions = None

    def stepped(self, layers: Sequence[MaskedLayer], optimizer: Optimizer) -> bool:
        """Count an optimizer step; True when it was one of those that are checked.

        Raises:
            TrainingError: the step left optimizer state of unknown meaning, or moved weights
                whose gradient was zero.
        """
        self._steps += 1
        checked = self._steps & (self._steps - 1) == 0
        if checked:
            checks.check_slots(layers, optimizer)
            checks.check_keeps_zeros(layers, optimizer)
        return checked


def _versions(layers: Sequence[MaskedLayer]) -> list[int]:
    return [layer.weight._version for layer in layers]
