"""Which weights of a network are sparse, and their first masks.

A topology is a mapping from a layer's weight name (its key in ``model.state_dict()``)
to a boolean mask of the weight's shape and memory layout, True where a connection exists.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from moon.errors import UsageError
from moon.trainer.sparsity.selection import strongest
from moon.trainer.sparsity.structure import UNSTRUCTURED, Structure

__all__ = [
    "HEAD",
    "STEM",
    "Layer",
    "Topology",
    "bernoulli_mask",
    "find_layers",
    "full_mask",
    "generator",
    "magnitude_mask",
    "random_mask",
    "unwrap",
]

Topology = dict[str, Tensor]

STEM = "stem"
HEAD = "head"


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """One Conv or Linear weight.

    Attributes:
        name: key of the weight in the model's state dict, such as ``layer1.0.conv1.weight``.
        weight: the parameter itself.
        dense: True when the layer keeps all its connections.
        groups: of a convolution.
        transposed: True for a transposed convolution, whose weight has its inputs first.
    """

    name: str
    weight: nn.Parameter
    dense: bool
    groups: int = 1
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def size(self) -> int:
        return self.weight.numel()


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile`` and (Distributed)DataParallel, whose names are used."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        inner = model.module if isinstance(model, wrappers) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def find_layers(
    model: nn.Module, *, dense: Sequence[str] = (), sparse_depthwise: bool = False
) -> tuple[Layer, ...]:
    """Every Conv and Linear weight of a model in the order of its modules.

    Biases, norms and embeddings are never listed, nor what other layers multiply by (LSTM, the
    joint input projection of MultiheadAttention). A weight shared by several modules is listed
    once, also where an embedding shares it. Depth-wise convolutions (one input channel a
    group) are dense unless ``sparse_depthwise``.

    Args:
        dense: layers to keep dense, by module name (``conv1``), weight name
            (``conv1.weight``), or ``stem`` (the first layer) and ``head`` (the last).

    Raises:
        UsageError: no such layer, or one that is lazy, parametrized or without data.
    """
    modules = _weighted_modules(unwrap(model))
    names = list(modules)
    wanted = _dense_names(names, dense)
    return tuple(
        Layer(
            name=name,
            weight=_plain_weight(name, module),
            dense=name in wanted or (_is_depthwise(module) and not sparse_depthwise),
            groups=module.groups if isinstance(module, _ConvNd) else 1,
            transposed=isinstance(module, _ConvTransposeNd),
        )
        for name, module in modules.items()
    )


def _weighted_modules(model: nn.Module) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        if not isinstance(module, (_ConvNd, nn.Linear)):
            continue
        if id(module.weight) in seen:
            continue
        seen.add(id(module.weight))
        found[f"{prefix}.weight" if prefix else "weight"] = module
    if not found:
        raise UsageError(
            f"{type(model).__name__} has no Conv or Linear layer",
            remedy="Pass a model that has some",
        )
    return found


def _plain_weight(name: str, module: nn.Module) -> nn.Parameter:
    weight = module._parameters.get("weight")
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise UsageError(
            f"the lazy layer {name} has no shape yet",
            remedy="Run the model on one batch before making it sparse",
        )
    if weight is None:
        raise UsageError(
            f"{name} is computed from other parameters (a parametrization)",
            remedy="Remove the parametrization before making the model sparse",
        )
    if weight.is_meta or weight.numel() == 0:
        raise UsageError(
            f"{name} {'is on the meta device' if weight.is_meta else 'has no elements'}",
            remedy="Give the layer its weights before making the model sparse",
        )
    return weight


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and module.groups > 1 and module.weight.shape[1] == 1


def _dense_names(names: list[str], dense: Sequence[str]) -> set[str]:
    if isinstance(dense, str):
        raise UsageError(
            f"dense must be a list of layer names, not the text {dense!r}",
            remedy=f"Pass ({dense!r},)",
        )
    known = {STEM: names[0], HEAD: names[-1]}
    for name in names:
        known[name] = name
        known.setdefault(name.removesuffix(".weight"), name)
    for name in dense:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise UsageError(
                f"dense names the layer {name!r}, which the model does not have",
                remedy=f"The nearest is {near[0]!r}" if near else "",
            )
    return {known[name] for name in dense}


def random_mask(
    weight: Tensor, nonzeros: int, draw: torch.Generator, structure: Structure = UNSTRUCTURED
) -> Tensor:
    """A mask of exactly ``nonzeros`` positions drawn at random within the structure.

    Without structure every choice of positions is equally likely; with one, units are
    ranked by uniform numbers. Drawn on the CPU, so that the same seed gives the same mask on
    any device; the mask has the weight's device and memory layout.
    """
    if structure == UNSTRUCTURED:
        flat = torch.zeros(weight.numel(), dtype=torch.bool)
        flat[torch.randperm(weight.numel(), generator=draw)[:nonzeros]] = True
        return _like(weight, flat.view(weight.shape))
    scores = torch.rand(weight.shape, generator=draw)
    return _like(weight, strongest(scores, nonzeros, structure))


def bernoulli_mask(weight: Tensor, expected: int, draw: torch.Generator) -> Tensor:
    """A mask whose positions are each active with the probability expected / size.

    Drawn on the CPU like ``random_mask``. At least one position is active.
    """
    flat = torch.rand(weight.numel(), generator=draw) < expected / weight.numel()
    if not bool(flat.any()):
        flat[0] = True
    return _like(weight, flat.view(weight.shape))


def magnitude_mask(weight: Tensor, nonzeros: int, structure: Structure = UNSTRUCTURED) -> Tensor:
    """The mask that keeps the largest absolute weights the structure admits."""
    return _like(weight, strongest(weight.detach().abs(), nonzeros, structure))


def full_mask(weight: Tensor) -> Tensor:
    """A mask of all positions."""
    return _like(weight, torch.ones((), dtype=torch.bool))


def _like(weight: Tensor, values: Tensor) -> Tensor:
    mask = torch.empty_like(weight, dtype=torch.bool, requires_grad=False)
    return mask.copy_(values)


def generator(
    seed: int, step: int, layer: str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator that depends on nothing but seed, step, layer and device.

    So a resumed run and every rank of a distributed one draw the same numbers.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{layer}".encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
