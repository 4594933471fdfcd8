"""Voting: the final model is the average of the weights of the last epochs.

Source: Lei, Xu, Zhang, Mallick (TMLR), section on voting; batch-norm statistics are
recomputed for the average as in Izmailov et al. 2018.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from moon.errors import TrainingError
from moon.trainer.sparsity.topology import unwrap

__all__ = ["Votes", "recompute_batch_norm"]

STATE_VERSION = 2


@dataclass(kw_only=True)
class _Sum:
    """The sum of one parameter's votes.

    Attributes:
        total: float64 (float32 on devices without it); of a sparse weight [nonzeros], one for
            each connection in row-major order, else of the parameter's shape.
        positions: int32 or int64 [nonzeros], of the connections in row-major order; None for
            a parameter without a mask.
    """

    total: Tensor
    positions: Tensor | None

    @classmethod
    def zero(cls, weight: Tensor, mask: Tensor | None) -> _Sum:
        dtype = torch.float32 if weight.device.type == "mps" else torch.float64
        if mask is None:
            return cls(total=torch.zeros_like(weight, dtype=dtype), positions=None)
        positions = _positions(mask).to(weight.device)
        total = torch.zeros(len(positions), dtype=dtype, device=weight.device)
        return cls(total=total, positions=positions)

    def add(self, weight: Tensor) -> None:
        values = weight.detach()
        if self.positions is not None:
            values = values.flatten().index_select(0, self.positions.to(weight.device))
        self.total += values.to(self.total.device)

    def average(self, count: int, shape: torch.Size) -> Tensor:
        mean = self.total / count
        if self.positions is None:
            return mean
        dense = torch.zeros(shape.numel(), dtype=mean.dtype, device=mean.device)
        return dense.index_copy_(0, self.positions.long(), mean).view(shape)


class Votes:
    """A uniform average of a model's parameters over several moments.

    Sums are kept in float64 (float32 on devices without it), so the order of votes does not
    matter. Of a sparse weight only the connections are kept: 12 bytes for each, which at 95%
    sparsity is less than a sixth of the weights themselves. Buffers are not averaged:
    batch-norm statistics of an average are recomputed, see ``recompute_batch_norm``.
    """

    def __init__(self) -> None:
        self._count = 0
        self._sums: dict[str, _Sum] = {}
        self._shapes: dict[str, torch.Size] = {}

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
        masks = {} if masks is None else _by_first_name(model, masks)
        if self._count == 0:
            self._shapes = {name: weight.shape for name, weight in weights.items()}
            self._sums = {n: _Sum.zero(weight, masks.get(n)) for n, weight in weights.items()}
        self._check_vote(weights, masks)
        for name, weight in weights.items():
            self._sums[name].add(weight)
        self._count += 1

    def _check_vote(self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        if {name: weight.shape for name, weight in weights.items()} != self._shapes:
            raise TrainingError("the model's parameters changed between votes")
        for name, weight in weights.items():
            if not bool(torch.isfinite(weight).all()):
                raise TrainingError(
                    f"{name} has weights that are NaN or infinite", remedy="Lower the learning rate"
                )
        sparse = {n: s.positions for n, s in self._sums.items() if s.positions is not None}
        same = set(masks) == set(sparse) and all(
            torch.equal(_positions(masks[name]), positions.to(masks[name].device))
            for name, positions in sparse.items()
        )
        if not same:
            raise TrainingError(
                "the topology changed between votes, so their average would not be sparse",
                remedy="Stop topology updates before the first vote (update.stop, freeze())",
            )
        for name, mask in masks.items():
            weight = weights[name]
            if bool(((weight != 0) & ~mask.to(weight.device)).any()):
                raise TrainingError(
                    f"{name} has nonzero weights outside its mask",
                    remedy="Something else than the sparsifier's optimizer wrote the weights",
                )

    def average(self) -> dict[str, Tensor]:
        """The averaged parameters by name, in float64 (float32 on devices without it).

        Weights outside the topology of the votes are exactly zero.

        Raises:
            TrainingError: no votes yet.
        """
        return {name: self._average(name) for name in self._sums or self._none()}

    def _average(self, name: str) -> Tensor:
        return self._sums[name].average(self._count, self._shapes[name])

    def _none(self) -> dict[str, _Sum]:
        raise TrainingError("there are no votes to average", remedy="Add at least one")

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Overwrite the model's parameters with the average, in place, one after the other.

        Raises:
            TrainingError: no votes, or another model's; nothing has been changed then.
        """
        weights = dict(unwrap(model).named_parameters())
        sums = self._sums or self._none()
        if {name: weight.shape for name, weight in weights.items()} != self._shapes:
            raise TrainingError("the votes were cast by another model")
        for name in sums:
            weights[name].copy_(self._average(name))

    def state_dict(self) -> dict[str, Any]:
        """Sums and connections (tensors, copies) and the count; enough to resume bit for bit."""
        places = {n: s.positions for n, s in self._sums.items() if s.positions is not None}
        return {
            "version": STATE_VERSION,
            "count": self._count,
            "sums": {name: s.total.clone() for name, s in self._sums.items()},
            "positions": {name: positions.clone() for name, positions in places.items()},
            "shapes": {name: list(shape) for name, shape in self._shapes.items()},
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
        places = state["positions"]
        self._sums = {
            name: _Sum(
                total=total.clone(), positions=places[name].clone() if name in places else None
            )
            for name, total in state["sums"].items()
        }
        self._shapes = {name: torch.Size(shape) for name, shape in state["shapes"].items()}


def _by_first_name(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks by the names of ``named_parameters``, where a weight that is shared has just one."""
    model = unwrap(model)
    first = {id(weight): name for name, weight in model.named_parameters()}
    every = {n: first[id(w)] for n, w in model.named_parameters(remove_duplicate=False)}
    return {every.get(name, name): mask for name, mask in masks.items()}


def _positions(mask: Tensor) -> Tensor:
    """Where a mask is True, in row-major order, in the smallest integers that will do."""
    dtype = torch.int32 if mask.numel() < 1 << 31 else torch.int64
    return mask.flatten().nonzero().flatten().to(dtype)


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
