"""Voting: the final model is the average of the weights of the last epochs.

Source: Lei, Xu, Zhang, Mallick (TMLR), section on voting; batch-norm statistics are
recomputed for the average as in Izmailov et al. 2018.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from moon.errors import TrainingError
from moon.trainer.topology import Topology, unwrap

__all__ = ["Votes", "recompute_batch_norm"]

STATE_VERSION = 1


class Votes:
    """A uniform average of a model's parameters over several moments.

    Sums are kept in float64 (float32 on devices without it), so the order of votes does not
    matter and a weight that was zero at every vote is exactly zero in the average. Buffers
    are not averaged: batch-norm statistics of an average are recomputed, see
    ``recompute_batch_norm``.
    """

    def __init__(self) -> None:
        self._count = 0
        self._sums: dict[str, Tensor] = {}
        self._masks: Topology = {}

    @property
    def count(self) -> int:
        """Votes so far."""
        return self._count

    @torch.no_grad()
    def add(self, model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
        """Count the model's present weights as one vote.

        Args:
            masks: the topology, as ``Sparsifier.masks``; the same at every vote.

        Raises:
            TrainingError: the topology or the parameters changed since the first vote, a
                weight is not finite, or one outside the mask is not zero.
        """
        weights = dict(unwrap(model).named_parameters())
        masks = {} if masks is None else masks
        if self._count == 0:
            self._masks = {name: mask.detach().clone() for name, mask in masks.items()}
            self._sums = {name: _zeros(weight) for name, weight in weights.items()}
        self._check_vote(weights, masks)
        for name, weight in weights.items():
            self._sums[name] += weight.detach().to(self._sums[name].device)
        self._count += 1

    def _check_vote(self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        shapes = {name: weight.shape for name, weight in weights.items()}
        if shapes != {name: total.shape for name, total in self._sums.items()}:
            raise TrainingError("the model's parameters changed between votes")
        for name, weight in weights.items():
            if not bool(torch.isfinite(weight).all()):
                raise TrainingError(
                    f"{name} has weights that are NaN or infinite", remedy="Lower the learning rate"
                )
        same = set(masks) == set(self._masks) and all(
            torch.equal(mask, self._masks[name].to(mask.device)) for name, mask in masks.items()
        )
        if not same:
            raise TrainingError(
                "the topology changed between votes, so their average would not be sparse",
                remedy="Stop topology updates before the first vote (update.stop, freeze())",
            )
        _check_subset(weights, self._masks)

    def average(self) -> dict[str, Tensor]:
        """The averaged parameters by name, in float64 (float32 on devices without it).

        Raises:
            TrainingError: no votes yet.
        """
        if self._count == 0:
            raise TrainingError("there are no votes to average", remedy="Add at least one")
        return {name: total / self._count for name, total in self._sums.items()}

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Overwrite the model's parameters with the average, in place.

        The nonzeros of the result lie within the topology of the votes; this is checked.
        """
        average = self.average()
        _check_subset(average, self._masks)
        weights = dict(unwrap(model).named_parameters())
        if set(weights) != set(average):
            raise TrainingError("the votes were cast by another model")
        for name, weight in weights.items():
            weight.copy_(average[name])

    def state_dict(self) -> dict[str, Any]:
        """Sums and masks (tensors, copies) and the count; enough to resume bit for bit."""
        return {
            "version": STATE_VERSION,
            "count": self._count,
            "sums": {name: total.clone() for name, total in self._sums.items()},
            "masks": {name: mask.clone() for name, mask in self._masks.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()``.

        Raises:
            TrainingError: the state is of another version.
        """
        if state.get("version") != STATE_VERSION:
            raise TrainingError(
                f"the votes have version {state.get('version')}, not {STATE_VERSION}",
                remedy="Load them with the release that wrote them",
            )
        self._count = int(state["count"])
        self._sums = {name: total.clone() for name, total in state["sums"].items()}
        self._masks = {name: mask.clone() for name, mask in state["masks"].items()}


@torch.no_grad()
def recompute_batch_norm(model: nn.Module, batches: Iterable[Any]) -> int:
    """Replace every batch-norm statistic by the average over ``batches`` of training data.

    Batches weigh by their number of examples. Only batch-norm layers run in training mode,
    so dropout stays off as in use. A model without batch norm leaves ``batches`` unread.

    Args:
        batches: inputs [N, ...], or tuples or lists that start with them; moved to the
            model's device. Batches of a single example are left out.

    Returns:
        How many examples were used.

    Raises:
        TrainingError: no batch of at least two examples.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    device = next(model.parameters()).device
    seen = 0
    with _only_norms_training(model, norms):
        for batch in batches:
            inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
            size = len(inputs)
            if size < 2:
                continue
            if seen == 0:
                for norm in norms:
                    norm.reset_running_stats()
            seen += size
            for norm in norms:
                norm.momentum = size / seen
            model(inputs.to(device))
    if seen == 0:
        raise TrainingError(
            "batch-norm statistics need at least one batch of two examples",
            remedy="Pass batches of training data",
        )
    return seen


@contextmanager
def _only_norms_training(model: nn.Module, norms: Iterable[_BatchNorm]) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(norm, norm.momentum) for norm in norms]
    try:
        model.eval()
        for norm, _ in momenta:
            norm.train()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, momentum in momenta:
            norm.momentum = momentum


def _zeros(weight: Tensor) -> Tensor:
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64
    return torch.zeros_like(weight, dtype=dtype, requires_grad=False)


def _check_subset(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        weight = weights[name]
        if bool(((weight != 0) & ~mask.to(weight.device)).any()):
            raise TrainingError(
                f"{name} has nonzero weights outside its mask",
                remedy="Something else than the sparsifier's optimizer wrote the weights",
            )
