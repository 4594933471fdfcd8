"""Steps put together: fewer passes over memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from moon.runtime.sparse.steps import Clamped, Conv, Point, Step

__all__ = ["fuse"]

# Steps so far by what they make; how many read each name; a step before, and the two in one.
Found: TypeAlias = "Mapping[str, Step]"
Readers: TypeAlias = "Mapping[str, int]"
Joined: TypeAlias = "tuple[Step, Step]"
_Rule: TypeAlias = "Callable[[Step, Found, Readers], Joined | None]"


def fuse(steps: Sequence[Step], kept: frozenset[str]) -> list[Step]:
    """Steps put together where nothing else reads what is between them.

    A scale a channel goes into the convolution before it, an addition into a convolution whose
    result it adds, a clamp into what it clamps, and x times sigmoid(x) is one step.

    Args:
        steps: in order.
        kept: names that something else reads.
    """
    work = list(steps)
    for rule in (_fuse_affine, _fuse_silu, _fuse_add, _fuse_clip):
        work = _applied(rule, work, kept)
    return work


def _applied(rule: _Rule, steps: list[Step], kept: frozenset[str]) -> list[Step]:
    """Each step that the rule joins to one before it gives its place to the two in one."""
    found: dict[str, Step] = {}
    readers: dict[str, int] = {}
    for step in steps:
        for name in step.reads:
            readers[name] = readers.get(name, 0) + 1
    for name in kept:
        readers[name] = readers.get(name, 0) + 2
    for step in steps:
        joined = rule(step, found, readers)
        if joined is not None:
            gone, step = joined
            del found[gone.target]
        found[step.target] = step
    return list(found.values())


def _alone(name: str | None, found: Found, readers: Readers) -> Step | None:
    """The step that makes what only one step reads."""
    return found.get(name) if name is not None and readers.get(name) == 1 else None


def _fuse_affine(step: Step, found: Found, readers: Readers) -> Joined | None:
    before = _alone(step.source, found, readers)
    if not isinstance(step, Point) or step.kind != "affine" or not isinstance(before, Conv):
        return None
    if step.numbers is None:
        return None
    factor, shift = step.numbers[:, 0], step.numbers[:, 1]
    with np.errstate(all="ignore"):
        weight = before.weight * factor[:, None, None, None]
        bias = before.bias * factor + shift
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        return None
    return before, replace(before, target=step.target, weight=weight, bias=bias)


def _fuse_silu(step: Step, found: Found, readers: Readers) -> Joined | None:
    if not isinstance(step, Point) or step.kind != "mul":
        return None
    for one, other in ((step.source, step.other), (step.other, step.source)):
        gate = _alone(one, found, readers)
        if isinstance(gate, Point) and gate.kind == "sigmoid" and gate.source == other:
            return gate, replace(gate, kind="silu", target=step.target, node=step.node)
    return None


def _fuse_add(step: Step, found: Found, readers: Readers) -> Joined | None:
    if not isinstance(step, Point) or step.kind != "add" or step.source == step.other:
        return None
    # The step takes the place of the addition, so whatever is added is there by then.
    for one, other in ((step.source, step.other), (step.other, step.source)):
        conv = _alone(one, found, readers)
        if isinstance(conv, Conv) and conv.residual is None and not conv.clamped:
            return conv, replace(conv, target=step.target, residual=other)
    return None


def _fuse_clip(step: Step, found: Found, readers: Readers) -> Joined | None:
    if not isinstance(step, Point) or step.kind != "clip":
        return None
    before = _alone(step.source, found, readers)
    if not isinstance(before, Clamped) or before.clamped:
        return None
    if isinstance(before, Point) and before.kind not in ("add", "affine", "clip"):
        return None
    return before, replace(before, target=step.target, low=step.low, high=step.high)
