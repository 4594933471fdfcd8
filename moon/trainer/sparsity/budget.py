"""How a density is shared out: the connections of every layer of a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real

from moon.errors import UsageError
from moon.trainer.sparsity.structure import UNSTRUCTURED, Structure
from moon.trainer.sparsity.topology import Layer

__all__ = ["DISTRIBUTIONS", "check_fit", "counts", "densities", "share_out"]

DISTRIBUTIONS = ("uniform", "er", "erk")

# Float arithmetic must neither refuse nor miss a density that is met exactly.
TOLERANCE = 1e-9


def share_out(
    layers: Sequence[Layer],
    density: float,
    distribution: str = "erk",
    structure: Structure = UNSTRUCTURED,
) -> dict[str, int]:
    """Nonzeros of every layer, checked: what ``densities`` and ``counts`` say.

    Raises:
        UsageError: as ``check_fit`` and ``densities``, and a density too low to leave every
            layer a connection.
    """
    if density != 1.0:
        check_fit(layers, structure)
    found = counts(layers, densities(layers, density, distribution, structure), structure)
    total, least = _size(layers), _least(layers, structure)
    if density * total < least * (1 - TOLERANCE) and not _fills(structure, density):
        raise UsageError(
            f"density {density:.4g} is {density * total:.4g} connections, and {len(layers)} layers "
            f"need at least {least} with the structure {structure.name}",
            remedy=f"Use {_at_least(least / total)}",
        )
    return found


def _fills(structure: Structure, density: float) -> bool:
    """Whether the density asks for every group of the structure to be full."""
    return structure.full is not None and abs(density - structure.full) < TOLERANCE


def check_fit(layers: Sequence[Layer], structure: Structure) -> None:
    """UsageError naming the layers that cannot have the structure and how to keep them dense."""
    if structure == UNSTRUCTURED:
        return
    reasons = {}
    for place, layer in enumerate(layers):
        if layer.dense:
            continue
        why = structure.misfit(layer.shape, layer.groups)
        if layer.transposed:
            why = "is a transposed convolution, which can only be unstructured"
        if why:
            reasons["stem" if place == 0 else layer.name.removesuffix(".weight")] = why
    if reasons:
        names = {"stem": layers[0].name.removesuffix(".weight")}
        told = [f"{names.get(name, name)} {why}" for name, why in reasons.items()]
        raise UsageError(
            f"the structure {structure.name} does not fit: {'; '.join(told)}",
            # A list that is Python and TOML alike.
            remedy=f"Keep {'it' if len(told) == 1 else 'them'} dense: dense={list(reasons)}",
        )


def densities(
    layers: Sequence[Layer],
    density: float,
    distribution: str = "erk",
    structure: Structure = UNSTRUCTURED,
) -> dict[str, float]:
    """The density of every layer so that the whole has ``density``.

    ``uniform`` gives all layers one density. ``er`` makes it proportional to
    (n_in + n_out) / (n_in * n_out) and ``erk`` to sum(shape) / prod(shape), kernel
    dimensions included (Mocanu et al. 2018; Evci et al. 2020, RigL, section 3).
    A layer whose share exceeds what the structure admits, without one 1, gets just that, and
    the rest is solved again.

    A density of exactly N/M asks for the structure N:M in full: every layer has N of M
    then, and layers kept dense come on top.

    Args:
        layers: as found by ``find_layers``; dense ones count toward the total.
        density: nonzeros of all layers over their weights, in (0, 1].

    Returns:
        Layer name to density in (0, 1].

    Raises:
        UsageError: density out of range or above what the structure admits, an unknown
            distribution, or dense layers that alone hold more than ``density`` admits.
    """
    if distribution not in DISTRIBUTIONS:
        raise UsageError(
            f"unknown distribution {distribution!r}",
            remedy=f"Use one of {', '.join(DISTRIBUTIONS)}",
        )
    number = isinstance(density, Real) and not isinstance(density, bool)
    if not number or not 0.0 < density <= 1.0:
        raise UsageError(
            f"density must be above 0 and at most 1, not {density!r}",
            remedy="Density is the share of weights kept: a sparsity of 95% is density=0.05",
        )
    if _fills(structure, density):
        if all(layer.dense for layer in layers):
            _check_dense(layers, density, structure)
        return {layer.name: 1.0 if layer.dense else density for layer in layers}
    limits = {x.name: 1.0 if x.dense else structure.limit(x.shape) for x in layers}
    most = sum(limits[x.name] * x.size for x in layers) / _size(layers)
    if density > most * (1 + TOLERANCE):
        raise UsageError(
            f"density {density:.4g} is above what the structure {structure.name} admits",
            remedy=f"Use {_at_most(most)}",
        )
    if density == 1.0:
        return {layer.name: 1.0 for layer in layers}
    _check_dense(layers, density, structure)
    return _solve(layers, density, distribution, limits)


def _solve(
    layers: Sequence[Layer], density: float, distribution: str, limits: Mapping[str, float]
) -> dict[str, float]:
    budget = density * _size(layers)
    full = {layer.name for layer in layers if layer.dense}
    scores = {layer.name: _raw_score(layer.shape, distribution) for layer in layers}
    while True:
        rest = [layer for layer in layers if layer.name not in full]
        if not rest:
            return dict(limits)
        left = budget - sum(limits[x.name] * x.size for x in layers if x.name in full)
        epsilon = left / sum(scores[layer.name] * layer.size for layer in rest)
        over = [layer.name for layer in rest if epsilon * scores[layer.name] > limits[layer.name]]
        if not over:
            return {
                x.name: limits[x.name] if x.name in full else epsilon * scores[x.name]
                for x in layers
            }
        full.update(over)


def _check_dense(layers: Sequence[Layer], density: float, structure: Structure) -> None:
    """UsageError where dense layers leave nothing of the density to the others."""
    kept = [layer for layer in layers if layer.dense]
    share = _size(kept) / _size(layers)
    if share < density:
        return
    least = f", or use {_at_least(_least(layers, structure) / _size(layers))}"
    raise UsageError(
        f"the {len(kept)} of {len(layers)} layers kept dense, depth-wise convolutions included, "
        f"hold {share:.4g} of the weights, and the density is {density:.4g}",
        remedy="Keep fewer layers dense" + (least if share < 1 else ""),
    )


def _size(layers: Sequence[Layer]) -> int:
    return sum(layer.size for layer in layers)


def _least(layers: Sequence[Layer], structure: Structure) -> int:
    """Connections without which a layer is empty."""
    return sum(x.size if x.dense else structure.count(x.shape, 0.0) for x in layers)


def _raw_score(shape: tuple[int, ...], distribution: str) -> float:
    if distribution == "uniform":
        return 1.0
    dims = shape if distribution == "erk" else shape[:2]
    return sum(dims) / math.prod(dims)


def counts(
    layers: Sequence[Layer],
    density_of: Mapping[str, float],
    structure: Structure = UNSTRUCTURED,
) -> dict[str, int]:
    """Nonzeros of every layer: what its structure can hold nearest to density * size.

    At least one connection (or block, or connection a row) is kept where rounding leaves
    none, because an empty layer cuts the network in two.
    """
    return {
        layer.name: layer.size
        if density_of[layer.name] == 1.0
        else structure.count(layer.shape, density_of[layer.name])
        for layer in layers
    }


def _at_least(density: float) -> str:
    """In both of the words that people use, rounded to what is possible."""
    low = _rounded(density, math.ceil)
    return f"a density of at least {low:g}, a sparsity of at most {1 - low:.8g}"


def _at_most(density: float) -> str:
    high = _rounded(density, math.floor)
    return f"a density of at most {high:g}, a sparsity of at least {1 - high:.8g}"


def _rounded(value: float, towards: Callable[[float], int]) -> float:
    """To four significant digits, up or down."""
    scale = 10.0 ** (3 - math.floor(math.log10(value)))
    return towards(value * scale) / scale
