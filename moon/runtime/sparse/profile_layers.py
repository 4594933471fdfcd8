"""What the layers of a program are, in words and figures."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from moon.runtime.sparse.layout import Planes
from moon.runtime.sparse.profile import Layer
from moon.runtime.sparse.program import Program
from moon.runtime.sparse.steps import Conv, Linear, Point, Pool, Reduce, Step
from moon.runtime.sparse.timing import Group, groups

__all__ = ["described", "speed"]


def described(
    program: Program, times: NDArray[np.float64], runs: int, limit: float
) -> Iterator[Layer]:
    """The layers of a program.

    Args:
        program: what ran.
        times: seconds by whole run and operation, [whole runs, operations].
        runs: of the program in a whole run.
        limit: GMAC/s of the cores together.
    """
    for group in groups(program):
        mine = slice(group.operations.start, group.operations.stop)
        us = float(np.median(times[:, mine].sum(axis=1))) * 1e6
        around = float(np.median(times[:, list(group.around)].sum(axis=1))) * 1e6
        nonzeros, weights, places = _counts(program, group)
        macs = nonzeros * places * runs
        gmacs, share = speed(macs, us, limit) if weights else (None, None)
        convolution = program.convolutions.get(group.target)
        yield Layer(
            name=group.step.node,
            kind=_kind(group.step),
            shape=_shape(program, group),
            tensor=group.target,
            density=nonzeros / weights if weights else None,
            macs=macs,
            kernels=tuple(dict.fromkeys(program.operations[i].kernel for i in group.operations)),
            plan=None if convolution is None else convolution[0].plan.to_json(),
            us=us,
            around_us=around,
            gmacs=gmacs,
            share_of_limit=share,
        )


def speed(macs: int, us: float, limit: float) -> tuple[float, float]:
    """GMAC/s, and that as a share of the limit."""
    gmacs = macs / max(us, 1e-3) / 1e3
    return gmacs, gmacs / limit


def _counts(program: Program, group: Group) -> tuple[int, int, int]:
    """Nonzero weights, weights, and how often each is used in a run of the program."""
    step = group.step
    if not isinstance(step, (Conv, Linear)):
        return 0, 0, 0
    made = program.tensor(group.target)
    places = made.pixels if isinstance(made, Planes) else made.images
    return int(np.count_nonzero(step.weight)), step.weight.size, places


def _kind(step: Step) -> str:
    word = type(step).__name__.lower()
    return f"{word} {step.kind}" if isinstance(step, (Point, Pool, Reduce)) else word


def _shape(program: Program, group: Group) -> str:
    step, made = group.step, program.tensor(group.target)
    if isinstance(step, Linear):
        return f"{step.weight.shape[0]}->{step.weight.shape[1]}"
    if not isinstance(made, Planes):
        return str(made.features)
    size = f"{made.height}x{made.width}"
    if not isinstance(step, (Conv, Pool)):
        return f"{made.channels} {size}"
    window = step.window
    taps = f"{window.kernel[0]}x{window.kernel[1]} /{_pair(window.strides)}"
    if window.dilations != (1, 1):
        taps += f" d{_pair(window.dilations)}"
    if isinstance(step, Pool):
        return f"{made.channels} {taps} {size}"
    channels = step.weight.shape[1] * step.groups
    groups_ = f" g{step.groups}" if step.groups > 1 else ""
    return f"{channels}->{made.channels} {taps}{groups_} {size}"


def _pair(pair: tuple[int, int]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"
