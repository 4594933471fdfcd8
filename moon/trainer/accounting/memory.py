"""Bytes that training needs beside the weights: what autograd keeps, and optimizer state.

Both are measured, not modelled: the first by looking at every tensor that a forward pass
saves, the second in the optimizer's state or, before its first step, in that of a twin.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moon.errors import UsageError
from moon.trainer.sparsity.topology import find_layers, unwrap

__all__ = ["Saved", "optimizer_bytes", "saved_bytes"]


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Bytes that the backward pass needs, apart from parameters and buffers.

    A batch of B examples keeps ``once`` + B * (the sum of ``layers`` + ``elsewhere``).

    Attributes:
        layers: for one example, kept from within each Conv and Linear layer, by weight name;
            as a rule the layer's input.
        elsewhere: for one example, kept by everything else: norms, activations, pooling.
        once: whatever the batch: statistics of norms, weights cast by autocast.
    """

    layers: Mapping[str, int]
    elsewhere: int
    once: int


def saved_bytes(model: nn.Module, example: Tensor) -> Saved:
    """What autograd keeps between the forward and the backward pass of a training step.

    Batches of two and three copies of the example go through the model in training mode, and
    the storage of every saved tensor is counted once; the difference of the two is one
    example's. Buffers, modes and the global generators are left as they were. Called inside
    ``torch.autocast`` it counts what a mixed-precision step keeps. The loss is not included.

    Args:
        example: one input with its batch dimension, [1, ...], on the model's device.
    """
    model = unwrap(model)
    two, three = (_saved(model, example, copies) for copies in (2, 3))
    names = [layer.name for layer in find_layers(model)]
    each = {name: three.get(name, 0) - two.get(name, 0) for name in names}
    elsewhere = three.get(None, 0) - two.get(None, 0)
    once = sum(two.values()) - 2 * (sum(each.values()) + elsewhere)
    return Saved(layers=each, elsewhere=elsewhere, once=once)


def _saved(model: nn.Module, example: Tensor, copies: int) -> dict[str | None, int]:
    """Bytes by layer, None for what is saved outside of layers."""
    batch = example.repeat(copies, *[1] * (example.ndim - 1))
    # Held until the end: a freed storage's address would be given out again.
    found: dict[int, tuple[str | None, torch.UntypedStorage]] = {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    within: list[str] = []

    def pack(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place = within[-1] if within else None
        known = found.get(storage.data_ptr())
        if storage.data_ptr() not in own and (known is None or known[0] is None):
            found[storage.data_ptr()] = place, storage

    def unpack(nothing: None) -> Tensor:
        raise AssertionError("nothing is differentiated here")

    with (
        _undisturbed(model, example),
        _tracked(model, within),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, unpack),
    ):
        outputs = model.train()(batch)
    del outputs
    bytes_of: dict[str | None, int] = {}
    for place, storage in found.values():
        bytes_of[place] = bytes_of.get(place, 0) + storage.nbytes()
    return bytes_of


@contextmanager
def _tracked(model: nn.Module, within: list[str]) -> Iterator[None]:
    """Keep in ``within`` the name of the layer that is running."""
    names = {id(layer.weight): layer.name for layer in find_layers(model)}
    handles = []
    for module in model.modules():
        name = names.get(id(getattr(module, "weight", None)))
        if name is None:
            continue
        enter, leave = _enter(within, name), _leave(within)
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enter(within: list[str], name: str) -> Any:
    return lambda module, inputs: within.append(name)


def _leave(within: list[str]) -> Any:
    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        within.pop()

    return leave


@contextmanager
def _undisturbed(model: nn.Module, example: Tensor) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [example.device] if example.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def optimizer_bytes(optimizer: Optimizer) -> dict[int, int]:
    """Bytes of state of a parameter's shape, by the parameter's identity.

    Parameters that have no state yet are counted as their group's others will be: one step
    on a single number, with the group's own settings, shows how many slots there are.

    Raises:
        UsageError: the optimizer cannot be tried out like that.
    """
    found = {}
    for group in optimizer.param_groups:
        slots: int | None = None
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if state:
                found[id(parameter)] = sum(
                    value.numel() * value.element_size()
                    for name, value in state.items()
                    if isinstance(value, Tensor)
                    and value.shape == parameter.shape
                    and name != "step"
                )
                continue
            slots = _slots(optimizer, group) if slots is None else slots
            found[id(parameter)] = slots * parameter.numel() * parameter.element_size()
    return found


def _slots(optimizer: Optimizer, group: Mapping[str, Any]) -> int:
    first: Tensor = group["params"][0]
    lone = torch.zeros(2, dtype=first.dtype, device=first.device, requires_grad=True)
    lone.grad = torch.ones_like(lone)
    kind = type(optimizer)
    # Not constructed: the arguments of a constructor cannot be told from its defaults.
    twin: Optimizer = kind.__new__(kind)
    try:
        twin.__setstate__(
            {
                "defaults": dict(optimizer.defaults),
                "state": defaultdict(dict),
                "param_groups": [{**group, "params": [lone]}],
            }
        )
        twin.step()
        state = twin.state[lone]
    except Exception as error:
        raise UsageError(
            f"could not see how many numbers {kind.__name__} keeps for a weight: {error}",
            remedy="Give slots=, or take a step first",
        ) from error
    return sum(isinstance(v, Tensor) and v.shape == lone.shape for v in state.values())
