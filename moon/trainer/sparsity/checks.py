"""What a sparsifier refuses, each with its remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.optim import Optimizer

from moon.errors import TrainingError, UsageError
from moon.trainer.sparsity.masked import MaskedLayer, stray_layers
from moon.trainer.sparsity.slots import weight_slots

__all__ = [
    "check_bernoulli",
    "check_choice",
    "check_keeps_zeros",
    "check_no_closure",
    "check_optimizer",
    "check_pruning",
    "check_rule",
    "check_slots",
    "check_trained",
]


def check_choice(what: str, value: str, choices: Sequence[str]) -> None:
    """UsageError for a name that is not one of the choices."""
    if value not in choices:
        raise UsageError(f"unknown {what} {value!r}", remedy=f"Use one of {', '.join(choices)}")


def check_rule(rule: str, density: float) -> None:
    """UsageError for a dense rule with a sparse density: one of the two is a mistake."""
    if rule == "dense" and density != 1.0:
        raise UsageError(
            f"the rule dense keeps every weight, but density is {density}",
            remedy="Set density=1.0 or choose another rule",
        )


def check_pruning(rule: str, total_steps: int | None) -> None:
    """UsageError for pruning without an end."""
    if rule == "gmp" and total_steps is None:
        raise UsageError(
            "the rule gmp prunes towards an end, and total_steps is not given",
            remedy="Pass total_steps, the optimizer steps of the whole run",
        )


def check_bernoulli(init: str, rule: str, structure: str) -> None:
    """UsageError where connections drawn one by one cannot be had."""
    if init == "bernoulli" and (rule == "gmp" or structure != "unstructured"):
        raise UsageError(
            f"init bernoulli draws each connection by itself, which the "
            f"{'rule gmp' if rule == 'gmp' else f'structure {structure}'} does not do",
            remedy="Set init to random",
        )


def check_optimizer(optimizer: object) -> None:
    """UsageError for anything but a torch optimizer, whose step hooks are needed."""
    if not isinstance(optimizer, Optimizer):
        raise UsageError(
            f"the optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer",
            remedy="Pass the optimizer itself, not a wrapper around it",
        )


def check_trained(layers: Sequence[MaskedLayer], optimizer: Optimizer) -> None:
    """UsageError for a sparse weight that the optimizer does not train."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for layer in layers:
        if id(layer.weight) not in trained:
            raise UsageError(
                f"the optimizer does not train {layer.name}, so its sparsity cannot be kept",
                remedy="Give the optimizer all weights, or name the layer in dense=",
            )


def check_slots(layers: Sequence[MaskedLayer], optimizer: Optimizer) -> None:
    """TrainingError for optimizer state of unknown meaning."""
    for layer in layers:
        for _ in weight_slots(optimizer, layer.name, layer.weight):
            pass


def check_no_closure(args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    """TrainingError for ``step(closure)``; ``args`` start with the optimizer itself."""
    if any(arg is not None for arg in (*args[1:], kwargs.get("closure"))):
        raise TrainingError(
            "a closure computes gradients inside optimizer.step(), out of the masks' reach",
            remedy="Call backward() first and step() without a closure",
        )


def check_keeps_zeros(layers: Sequence[MaskedLayer], optimizer: Optimizer) -> None:
    """TrainingError for an optimizer that moves weights whose gradient and state are zero."""
    stray = stray_layers(layers)
    if stray:
        raise TrainingError(
            f"{type(optimizer).__name__} moved weights of {stray[0]} whose gradient is zero, so "
            "masking gradients cannot keep them at zero",
            remedy="Use an optimizer that works weight by weight, such as SGD or AdamW",
        )
