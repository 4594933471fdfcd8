"""Which weights of a network are sparse, how dense each layer is, and the first masks.

A topology is a mapping from a layer's weight name (its key in ``model.state_dict()``)
to a boolean mask of the weight's shape and memory layout, True where a connection exists.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from moon.errors import UsageError

__all__ = [
    "DISTRIBUTIONS",
    "HEAD",
    "STEM",
    "Layer",
    "Topology",
    "counts",
    "densities",
    "find_layers",
    "generator",
    "magnitude_mask",
    "random_mask",
    "top_mask",
    "unwrap",
]

Topology = dict[str, Tensor]

DISTRIBUTIONS = ("uniform", "er", "erk")
STEM = "stem"
HEAD = "head"


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """One Conv or Linear weight.

    Attributes:
        name: key of the weight in the model's state dict, such as ``layer1.0.conv1.weight``.
        weight: the parameter itself.
        dense: True when the layer keeps all its connections.
    """

    name: str
    weight: nn.Parameter
    dense: bool

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

    Biases, norms and embeddings are never listed. A weight shared by several modules is
    listed once. Depth-wise convolutions (one input channel a group) are dense unless
    ``sparse_depthwise``.

    Args:
        dense: layers to keep dense, by module name (``conv1``), weight name
            (``conv1.weight``), or ``stem`` (the first layer) and ``head`` (the last).

    Raises:
        UsageError: no such layer, a lazy or a parametrized layer.
    """
    modules = _weighted_modules(unwrap(model))
    names = list(modules)
    wanted = _dense_names(names, dense)
    return tuple(
        Layer(
            name=name,
            weight=_plain_weight(name, module),
            dense=name in wanted or (_is_depthwise(module) and not sparse_depthwise),
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


def densities(
    layers: Sequence[Layer], density: float, distribution: str = "erk"
) -> dict[str, float]:
    """The density of every layer so that the whole has ``density``.

    ``uniform`` gives all layers one density. ``er`` makes it proportional to
    (n_in + n_out) / (n_in * n_out) and ``erk`` to sum(shape) / prod(shape), kernel
    dimensions included (Mocanu et al. 2018; Evci et al. 2020, RigL, section 3).
    A layer whose share exceeds 1 becomes dense and the rest is solved again.

    Args:
        layers: as found by ``find_layers``; dense ones count toward the total.
        density: nonzeros of all layers over their weights, in (0, 1].

    Returns:
        Layer name to density in (0, 1].

    Raises:
        UsageError: density out of range, an unknown distribution, or dense layers that
            alone hold more than ``density`` admits.
    """
    if distribution not in DISTRIBUTIONS:
        raise UsageError(
            f"unknown distribution {distribution!r}",
            remedy=f"Use one of {', '.join(DISTRIBUTIONS)}",
        )
    if isinstance(density, bool) or not 0.0 < density <= 1.0:
        raise UsageError(
            f"density must be above 0 and at most 1, not {density}",
            remedy="Density is the share of weights kept: a sparsity of 95% is density=0.05",
        )
    if density == 1.0:
        return {layer.name: 1.0 for layer in layers}
    return _solve(layers, density, distribution)


def _solve(layers: Sequence[Layer], density: float, distribution: str) -> dict[str, float]:
    budget = density * sum(layer.size for layer in layers)
    full = {layer.name for layer in layers if layer.dense}
    scores = {layer.name: _raw_score(layer.shape, distribution) for layer in layers}
    while True:
        rest = [layer for layer in layers if layer.name not in full]
        left = budget - sum(layer.size for layer in layers if layer.name in full)
        if not rest or left <= 0:
            raise UsageError(
                f"the layers kept dense alone hold more than the density {density} allows",
                remedy="Keep fewer layers dense or raise the density",
            )
        epsilon = left / sum(scores[layer.name] * layer.size for layer in rest)
        over = [layer.name for layer in rest if epsilon * scores[layer.name] > 1.0]
        if not over:
            return {
                layer.name: 1.0 if layer.name in full else epsilon * scores[layer.name]
                for layer in layers
            }
        full.update(over)


def _raw_score(shape: tuple[int, ...], distribution: str) -> float:
    if distribution == "uniform":
        return 1.0
    dims = shape if distribution == "erk" else shape[:2]
    size = 1
    for extent in dims:
        size *= extent
    return sum(dims) / size


def counts(layers: Sequence[Layer], density_of: Mapping[str, float]) -> dict[str, int]:
    """Nonzeros of every layer: round(density * size), and at least one.

    One connection is kept where rounding leaves none, because an empty layer cuts the
    network in two.
    """
    return {layer.name: max(1, round(density_of[layer.name] * layer.size)) for layer in layers}


def random_mask(weight: Tensor, nonzeros: int, draw: torch.Generator) -> Tensor:
    """A mask of exactly ``nonzeros`` positions drawn uniformly without replacement.

    Drawn on the CPU, so that the same seed gives the same mask on any device; the mask
    has the weight's device and memory layout.
    """
    flat = torch.zeros(weight.numel(), dtype=torch.bool)
    flat[torch.randperm(weight.numel(), generator=draw)[:nonzeros]] = True
    return _like(weight, flat)


def magnitude_mask(weight: Tensor, nonzeros: int) -> Tensor:
    """A mask of the ``nonzeros`` largest absolute weights, exactly that many."""
    return _like(weight, top_mask(weight.detach().abs().flatten(), nonzeros))


def top_mask(scores: Tensor, k: int) -> Tensor:
    """Boolean [n], True at the k largest of ``scores`` [n]: exactly k of them, ties or not."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    if k > 0:
        chosen[torch.topk(scores, k, sorted=False).indices] = True
    return chosen


def _like(weight: Tensor, flat: Tensor) -> Tensor:
    mask = torch.empty_like(weight, dtype=torch.bool, requires_grad=False)
    return mask.copy_(flat.view(weight.shape))


def generator(
    seed: int, step: int, layer: str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator that depends on nothing but seed, step, layer and device.

    So a resumed run and every rank of a distributed one draw the same numbers.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{layer}".encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
