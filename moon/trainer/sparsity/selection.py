"""The one choice behind every rule and structure: the best k, so many a group at most.

Ties go to the lowest index, so that equal inputs give equal choices on any device; a NaN
ranks above all numbers. Shape suffixes: G groups, U units of a group.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moon.trainer.sparsity.structure import UNSTRUCTURED, Structure

__all__ = ["best", "obeys", "strongest"]


def best(
    scores_GU: Tensor,
    k: int,
    *,
    among_GU: Tensor,
    taken_GU: Tensor | None = None,
    cap: int | None = None,
) -> Tensor:
    """The k largest scores that leave every group with at most ``cap`` units.

    Only the best of each group fit, so the k largest of those are the optimum under the cap.

    Args:
        scores_GU: none negative, except -1 where there is no unit.
        k: how many; fewer are chosen where no more are admissible.
        among_GU: bool, the candidates.
        taken_GU: bool, units that are there already and fill up their groups; no candidates.

    Returns:
        bool [G, U], True at the chosen.
    """
    if scores_GU.dtype in (torch.float16, torch.bfloat16):
        scores_GU = scores_GU.float()  # Exact, and NumPy knows no bfloat16.
    if cap is not None:
        among_GU = among_GU & ~(scores_GU < 0)
        if cap < scores_GU.shape[1]:
            among_GU &= _fitting(scores_GU, among_GU, taken_GU, cap)
    return _top(scores_GU, k, among_GU)


def strongest(scores: Tensor, nonzeros: int, structure: Structure = UNSTRUCTURED) -> Tensor:
    """The mask of ``nonzeros`` connections with the largest scores that the structure admits.

    Args:
        scores: of a weight's shape, none negative.
    """
    cap = structure.cap(scores.shape, nonzeros)
    units = structure.units(scores.shape, nonzeros)
    chosen = [
        best(part_GU, k, among_GU=torch.ones_like(part_GU, dtype=torch.bool), cap=cap)
        for part_GU, k in zip(structure.scores(scores), units, strict=True)
    ]
    return structure.join(chosen, scores.shape)


def obeys(mask: Tensor, nonzeros: int, structure: Structure, *, pruning: bool = False) -> bool:
    """Whether a mask of ``nonzeros`` connections has the structure.

    With ``pruning``: whether dropping some of its connections leads to one that has.
    """
    flags = structure.flags(mask)
    if not torch.equal(structure.join(flags, mask.shape), mask):
        return False
    cap = structure.cap(mask.shape, nonzeros)
    for flags_GU, units in zip(flags, structure.units(mask.shape, nonzeros), strict=True):
        held_G = flags_GU.sum(1)
        kept = int(held_G.clamp(max=cap).sum() if cap is not None else held_G.sum())
        if kept < units or (not pruning and int(held_G.sum()) != units):
            return False
    return True


def _fitting(scores_GU: Tensor, among_GU: Tensor, taken_GU: Tensor | None, cap: int) -> Tensor:
    """The ``cap`` first of each group, those taken ahead of all candidates: bool [G, U]."""
    largest = torch.finfo(scores_GU.dtype).max
    ranked = scores_GU.nan_to_num(nan=largest, posinf=largest).masked_fill_(~among_GU, -1.0)
    if taken_GU is not None:
        ranked.masked_fill_(taken_GU, float("inf"))
    last_G1 = _kth_largest(ranked, cap).unsqueeze(1)
    fits = ranked >= last_G1
    crowded = ((fits.sum(1) > cap) & (last_G1[:, 0] >= 0)).nonzero()[:, 0]
    if len(crowded):
        rows, last = ranked[crowded], last_G1[crowded]
        above, equal = rows > last, rows == last
        room = cap - above.sum(1, keepdim=True)
        fits[crowded] = above | (equal & (equal.cumsum(1) <= room))
    return fits


def _top(scores: Tensor, k: int, among: Tensor) -> Tensor:
    if k <= 0:
        return torch.zeros_like(among)
    values = _picked(scores, among)
    if len(values) <= k:
        return among.clone()
    last = _kth_largest(values, k)
    if last.isnan():
        return _top(scores.nan_to_num(nan=float("inf")), k, among)
    # Not ">=": a NaN compares false, and ranks above all.
    chosen = (scores < last).logical_not_().logical_and_(among)
    spare = int(torch.count_nonzero(chosen)) - k
    if spare:
        ties = (scores == last).logical_and_(among).view(-1).nonzero()[:, 0]
        chosen.view(-1)[ties[len(ties) - spare :]] = False
    return chosen


def _picked(values: Tensor, where: Tensor) -> Tensor:
    if values.device.type != "cpu":
        return values[where]
    return torch.from_numpy(values.numpy()[where.numpy()])


def _kth_largest(values: Tensor, k: int) -> Tensor:
    """Over the last dimension. NumPy's selection is ten times faster than torch's on a CPU."""
    if values.device.type != "cpu":
        return torch.topk(values, k).values[..., -1]
    place = values.shape[-1] - k
    return torch.from_numpy(np.asarray(np.partition(values.numpy(), place)[..., place]))
