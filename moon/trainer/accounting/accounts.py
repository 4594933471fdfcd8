"""account: FLOPs and bytes of a model, to run and to train, layer by layer and in all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moon.errors import UsageError
from moon.trainer.accounting.costs import LayerCost
from moon.trainer.accounting.flops import count_flops
from moon.trainer.accounting.memory import optimizer_bytes, saved_bytes
from moon.trainer.sparsity.topology import find_layers, unwrap

__all__ = ["Accounts", "Rest", "account"]


@dataclass(frozen=True, kw_only=True)
class Rest:
    """Bytes of what is no Conv or Linear weight.

    Attributes:
        parameter_bytes: biases, norms, embeddings.
        gradient_bytes, slot_bytes: of those.
        buffer_bytes: such as the running statistics of batch norm.
        saved_bytes: kept by autograd outside Conv and Linear layers, for one example.
        saved_once_bytes: kept whatever the batch.
    """

    parameter_bytes: int
    gradient_bytes: int
    slot_bytes: int
    buffer_bytes: int
    saved_bytes: int
    saved_once_bytes: int


@dataclass(frozen=True, kw_only=True)
class Accounts:
    """What ``account`` found; every byte of the steady state of training is in one place.

    Attributes:
        layers: of every Conv and Linear weight, with all fields filled.
        rest: everything else.
    """

    layers: tuple[LayerCost, ...]
    rest: Rest

    @property
    def flops(self) -> int:
        """Forward FLOPs of one example, spent on nonzeros."""
        return sum(layer.flops for layer in self.layers)

    @property
    def dense_flops(self) -> int:
        """Forward FLOPs of one example with every weight."""
        return sum(layer.dense_flops for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Of parameters and buffers as ordinary tensors."""
        rest = self.rest.parameter_bytes + self.rest.buffer_bytes
        return rest + sum(layer.dense_bytes for layer in self.layers)

    @property
    def sparse_bytes(self) -> int:
        """Of parameters and buffers with every layer in its smallest format."""
        rest = self.rest.parameter_bytes + self.rest.buffer_bytes
        return rest + sum(layer.sparse_bytes for layer in self.layers)

    @property
    def activation_bytes(self) -> int:
        """Of the outputs of Conv and Linear layers, for one example."""
        return _total(layer.activation_bytes for layer in self.layers)

    @property
    def gradient_bytes(self) -> int:
        """Of all gradients; they are dense."""
        return self.rest.gradient_bytes + _total(layer.gradient_bytes for layer in self.layers)

    @property
    def slot_bytes(self) -> int:
        """Of the optimizer's state; it is dense."""
        return self.rest.slot_bytes + _total(layer.slot_bytes for layer in self.layers)

    @property
    def mask_bytes(self) -> int:
        """Of the masks."""
        return _total(layer.mask_bytes for layer in self.layers)

    @property
    def saved_bytes(self) -> int:
        """That autograd keeps for one example."""
        return self.rest.saved_bytes + _total(layer.saved_bytes for layer in self.layers)

    def training_bytes(self, batch_size: int) -> int:
        """Bytes held when the backward pass begins, with gradients already there.

        Parameters, buffers, gradients, optimizer state, masks, and what autograd keeps for
        the batch, its images included. Gradients that each step allocates anew share the
        room that the backward pass sets free, so that a real peak may be lower; workspaces
        of kernels, what the allocator loses, and votes come on top.
        """
        held = self.dense_bytes + self.gradient_bytes + self.slot_bytes + self.mask_bytes
        return held + self.rest.saved_once_bytes + batch_size * self.saved_bytes

    def totals(self, batch_size: int) -> dict[str, Any]:
        """The sums as plain numbers: what a checkpoint's metrics keep under ``memory``."""
        return {
            "batch_size": batch_size,
            "dense_bytes": self.dense_bytes,
            "sparse_bytes": self.sparse_bytes,
            "activation_bytes": self.activation_bytes,
            "gradient_bytes": self.gradient_bytes,
            "slot_bytes": self.slot_bytes,
            "mask_bytes": self.mask_bytes,
            "saved_bytes": self.saved_bytes,
            "saved_once_bytes": self.rest.saved_once_bytes,
            "training_bytes": self.training_bytes(batch_size),
        }


def account(
    model: nn.Module,
    example: Tensor,
    *,
    masks: Mapping[str, Tensor] | None = None,
    optimizer: Optimizer | None = None,
    slots: int | None = None,
) -> Accounts:
    """Count what a model costs to run and to train.

    FLOPs are counted from shapes and nonzeros, the bytes of activations and of what autograd
    keeps are measured on the example. Call it inside ``torch.autocast`` to account for a
    mixed-precision run. The model is left as it was.

    Args:
        example: one input with its batch dimension, [1, ...], on the model's device.
        masks: as ``Sparsifier.masks``; other layers count their nonzero weights.
        optimizer: its state is counted; before its first step, what the state will be.
        slots: numbers kept for every trained parameter, in place of ``optimizer``: SGD with
            momentum 1, Adam 2, AMSGrad 3. With neither, 0.

    Raises:
        UsageError: a batch that is not of size one, both of ``optimizer`` and ``slots``, or an
            optimizer whose state cannot be foreseen.
    """
    if optimizer is not None and slots is not None:
        raise UsageError("optimizer and slots say the same twice", remedy="Give one of them")
    model = unwrap(model)
    costs = count_flops(model, example, masks)
    saved = saved_bytes(model, example)
    state = {} if optimizer is None else optimizer_bytes(optimizer)
    weights = {layer.name: layer.weight for layer in find_layers(model)}
    held = {} if masks is None else {name: _bytes(mask) for name, mask in masks.items()}

    def slot_bytes(parameter: nn.Parameter) -> int:
        if slots is not None:
            return slots * _gradient_bytes(parameter)
        return state.get(id(parameter), 0)

    layers = tuple(
        replace(
            cost,
            saved_bytes=saved.layers[cost.name],
            gradient_bytes=_gradient_bytes(weights[cost.name]),
            slot_bytes=slot_bytes(weights[cost.name]),
            mask_bytes=held.get(cost.name, 0),
        )
        for cost in costs
    )
    counted = {id(weight) for weight in weights.values()}
    others = [p for p in model.parameters() if id(p) not in counted]
    rest = Rest(
        parameter_bytes=sum(map(_bytes, others)),
        gradient_bytes=sum(map(_gradient_bytes, others)),
        slot_bytes=sum(map(slot_bytes, others)),
        buffer_bytes=sum(map(_bytes, model.buffers())),
        saved_bytes=saved.elsewhere,
        saved_once_bytes=saved.once,
    )
    return Accounts(layers=layers, rest=rest)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _gradient_bytes(parameter: nn.Parameter) -> int:
    return _bytes(parameter) if parameter.requires_grad else 0


def _total(values: Iterable[int | None]) -> int:
    return sum(value or 0 for value in values)
