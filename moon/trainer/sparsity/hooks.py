"""A sparsifier's hold on its optimizer: one sparsifier at a time, until it lets go."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from moon.errors import UsageError

__all__ = ["Hooks", "attach", "detach"]

Hooks = tuple[RemovableHandle, ...]
StepHook = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], None]

_attached: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def attach(
    optimizer: Optimizer,
    *,
    before: StepHook,
    after: StepHook,
    loaded: Callable[[Optimizer], None],
) -> Hooks:
    """Have the optimizer call around every step, and when it has loaded a state.

    Raises:
        UsageError: another sparsifier drives by this optimizer.
    """
    if optimizer in _attached:
        raise UsageError(
            "the optimizer already has a Sparsifier",
            remedy="Call remove() on the old one first, or make a new optimizer",
        )
    _attached.add(optimizer)
    return (
        optimizer.register_step_pre_hook(_untraced(before)),
        optimizer.register_step_post_hook(_untraced(after)),
        optimizer.register_load_state_dict_post_hook(loaded),
    )


def detach(optimizer: Optimizer, hooks: Hooks) -> None:
    """Undo ``attach``; without hooks there is nothing to undo."""
    for hook in hooks:
        hook.remove()
    if hooks:
        _attached.discard(optimizer)


def _untraced(hook: StepHook) -> StepHook:
    """Keep the masks' bookkeeping out of a compiled optimizer step."""
    disabled: StepHook = torch.compiler.disable(  # type: ignore[no-untyped-call]
        hook, reason="a Sparsifier masks gradients outside the graph: compile without fullgraph"
    )
    return disabled
