"""A second, random mask on top of the topology: every step trains without some connections.

Sources: Lei, Zhang, Xu, Mallick, "Calibrating the Rigged Lottery: Making All Tickets
Reliable" (CigL), ICLR 2023, Algorithm 1; Wan et al., "Regularization of Neural Networks using
DropConnect", ICML 2013.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moon.errors import TrainingError, UsageError
from moon.trainer.sparsity.topology import find_layers, generator

__all__ = ["DropConnect"]

# Keeps the draws apart from those of the topology, which go by (seed, step, layer) too.
PURPOSE = "dropconnect"


class DropConnect:
    """Zeroes a random share of the active weights for one forward and backward pass.

    With M the topology and, drawn anew at every step, Z ~ Bernoulli(1 - rate) over its
    connections, a step of CigL is

        W <- W - lr * Z * gradient of L(Z * W)        elementwise, W zero outside M

    so that a dropped weight gets no gradient in that step; momentum and weight decay move it
    all the same. Gradients outside M stay as they are, for the topology to grow by. The final
    model averages Z * W over the last epochs, with the Z of each epoch's last step:

        drop.draw(step)                               # which connections: before the step
        with drop.training_step():                    # zeroes them, and puts back the same bits
            loss(model(x), y).backward()              # all micro-batches of the step
        optimizer.step()                              # unscaling, clipping and masking as ever
        ...
        with drop.applied():                          # at an epoch's end: the last step's draw
            votes.add(model, sparsifier.masks)

    Z follows from (seed, step, layer), the topology and the device, so there is no state to
    save. A step costs a handful of kernels a layer over the active weights alone. Only ``draw``
    makes random numbers, and it alone waits for the device, after a change of topology; what it
    draws stays where it is in memory, so that the blocks can be captured in a CUDA graph.

    Args:
        model: any module with Conv or Linear layers; may be compiled or wrapped in DDP.
        masks: the topology by weight name, as ``Sparsifier.masks``: the live tensors, which
            are followed. Conv and Linear weights without a mask are active throughout.
        rate: share of the active weights dropped in a step, from 0 to below 1. The paper's
            random mask has a sparsity of 10%.
        seed: of all draws.

    Raises:
        UsageError: a rate out of range, or a mask of no such layer or of another shape.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor] | None = None,
        *,
        rate: float = 0.1,
        seed: int = 0,
    ) -> None:
        if not 0 <= rate < 1:
            raise UsageError(
                f"the rate of dropped connections is {rate}", remedy="Give 0 to below 1"
            )
        self.rate = rate
        self.seed = seed
        self._masks = {} if masks is None else masks
        self._layers = [
            _Layer(name=layer.name, weight=layer.weight) for layer in find_layers(model)
        ]
        self._inside = False
        weights = {layer.name: layer.weight for layer in self._layers}
        for name, mask in self._masks.items():
            if name not in weights or weights[name].shape != mask.shape:
                raise UsageError(f"there is no layer {name} of shape {list(mask.shape)}")

    @torch.no_grad()
    def draw(self, step: int) -> None:
        """Choose the connections that the blocks below go without, for one step."""
        for layer in self._layers:
            numbers = generator(self.seed, step, f"{PURPOSE}/{layer.name}", layer.weight.device)
            layer.draw_(self._masks.get(layer.name), self.rate, numbers)

    @contextmanager
    def training_step(self) -> Iterator[None]:
        """Train without the chosen connections: around forward and backward.

        On leaving, the weights have the bits they came with and the gradients of dropped ones
        are zero. Gradients must not hold sums from before: gather micro-batches inside.

        Raises:
            TrainingError: before ``draw``, or inside another such block.
        """
        with self.applied():
            yield
        self._mask_gradients()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Weights without the chosen connections; on leaving they come back.

        Raises:
            TrainingError: before ``draw``, or inside another such block.
        """
        if self._inside:
            raise TrainingError(
                "connections are already dropped", remedy="Leave one block before the next"
            )
        if any(layer.dropped is None for layer in self._layers):
            raise TrainingError("no connections have been chosen", remedy="Call draw(step) first")
        self._inside = True
        try:
            self._drop()
            yield
        finally:
            self._restore()
            self._inside = False

    @torch.no_grad()
    def _drop(self) -> None:
        for layer in self._layers:
            layer.drop_()

    @torch.no_grad()
    def _restore(self) -> None:
        for layer in self._layers:
            layer.restore_()

    @torch.no_grad()
    def _mask_gradients(self) -> None:
        for layer in self._layers:
            layer.mask_gradient_()


@dataclass(kw_only=True, eq=False)
class _Layer:
    """One weight and what is dropped of it.

    Attributes:
        positions: of its active weights in its memory; None when all are. From ``source``.
        source: the mask that the positions are of, and its version.
        dropped: bool, one for each active weight, as last drawn.
        saved: the active weights' values while some are dropped.
    """

    name: str
    weight: nn.Parameter
    positions: Tensor | None = None
    source: tuple[Tensor, int] | None = field(default=None, repr=False)
    dropped: Tensor | None = None
    saved: Tensor | None = None

    def draw_(self, mask: Tensor | None, rate: float, numbers: torch.Generator) -> None:
        self._follow(mask)
        count = self.weight.numel() if self.positions is None else len(self.positions)
        dropped = torch.rand(count, generator=numbers, device=self.weight.device) < rate
        self.dropped = _renewed(self.dropped, dropped)

    def drop_(self) -> None:
        flat = _memory(self.weight)
        self.saved = flat.clone() if self.positions is None else flat[self.positions]
        assert self.dropped is not None
        self._write(flat, self.saved.masked_fill(self.dropped, 0.0))

    def restore_(self) -> None:
        if self.saved is not None:
            self._write(_memory(self.weight), self.saved)
            self.saved = None

    def mask_gradient_(self) -> None:
        gradient = self.weight.grad
        if gradient is None or self.dropped is None:
            return
        if gradient.stride() == self.weight.stride():
            aligned = gradient
        else:
            aligned = torch.empty_like(self.weight, dtype=gradient.dtype).copy_(gradient)
        flat = _memory(aligned)
        values = flat if self.positions is None else flat[self.positions]
        self._write(flat, values.masked_fill(self.dropped, 0.0))
        if aligned is not gradient:
            gradient.copy_(aligned)

    def _follow(self, mask: Tensor | None) -> None:
        """Find the active weights anew if the topology has changed since."""
        if mask is None:
            self.positions = self.source = None
            return
        device = self.weight.device
        if (
            self.source is not None
            and self.positions is not None
            and self.positions.device == device
            and self.source[0] is mask
            and self.source[1] == mask._version
        ):
            return
        aligned = torch.empty_like(self.weight, dtype=torch.bool, requires_grad=False).copy_(mask)
        self.positions = _renewed(self.positions, _memory(aligned).nonzero().flatten())
        self.source = (mask, mask._version)

    def _write(self, flat: Tensor, values: Tensor) -> None:
        if self.positions is None:
            flat.copy_(values)
        else:
            flat.index_copy_(0, self.positions, values)


def _renewed(old: Tensor | None, new: Tensor) -> Tensor:
    """``new``, in the memory of ``old`` where it fits: captured CUDA graphs read it there."""
    fits = old is not None and old.shape == new.shape and old.device == new.device
    return old.copy_(new) if old is not None and fits else new


def _memory(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order in which they lie in memory, [n]; no copy."""
    return torch.as_strided(tensor.detach(), (tensor.numel(),), (1,), tensor.storage_offset())
