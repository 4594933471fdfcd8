"""Setting items aside for validation, the same number of every class as far as that goes."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from moon.errors import DataError, UsageError

__all__ = ["split_validation"]


def split_validation(
    labels: npt.ArrayLike, val: float | int, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split items at random into training and validation, stratified by label.

    Args:
        labels: whole numbers [N]; -1 (unknown) counts as a class.
        val: a share of the items between 0 and 1 (rounded to a whole number of them), or
            the number of items itself.
        seed: of the draw; the same labels, ``val`` and seed give the same split everywhere.

    Returns:
        Indices of training and of validation items, each sorted. A class's share differs
        from its exact one by less than one item, except where the class would be left
        without a training item.

    Raises:
        UsageError: ``val`` is neither a share nor a number of items.
        DataError: nothing would be set aside, or a class would have no training item left.
    """
    labels_N = np.asarray(labels)
    count = _count(val, len(labels_N))
    classes, numbers_N = np.unique(labels_N, return_inverse=True)
    sizes = np.bincount(numbers_N, minlength=len(classes))
    room = len(labels_N) - len(classes)
    if not 1 <= count <= room:
        raise DataError(
            f"cannot set {count} of {len(labels_N)} items aside for validation: "
            f"every one of the {len(classes)} classes must keep an item to train on",
            remedy=f"Set aside between 1 and {room}" if room >= 1 else "Use more images",
        )
    taken = _shares(sizes, count)
    chosen = []
    for c, share in enumerate(taken):
        members = np.flatnonzero(numbers_N == c)
        order = np.random.default_rng([seed, c]).permutation(len(members))
        chosen.append(members[order[:share]])
    held_out = np.zeros(len(labels_N), bool)
    held_out[np.concatenate(chosen)] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _count(val: float | int, total: int) -> int:
    value = float(val)
    if 0 < value < 1:
        return round(value * total)
    if not math.isfinite(value) or value < 1 or value != int(value):
        raise UsageError(
            f"the validation part must be a share between 0 and 1 or a number of items, got {val}"
        )
    return int(value)


def _shares(sizes: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """How many to take of each class: largest remainders, leaving one of each behind."""
    # In whole numbers, so that no rounding of floats decides between equal remainders.
    total = int(sizes.sum())
    shares = np.minimum(sizes * count // total, sizes - 1)
    remainders = sizes * count % total
    by_remainder = np.argsort(-remainders, kind="stable")
    while (missing := count - int(shares.sum())) > 0:
        open_classes = by_remainder[(shares < sizes - 1)[by_remainder]]
        shares[open_classes[:missing]] += 1
    return shares
