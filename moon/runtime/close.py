"""Close calls: images whose decision could turn on how many others were in their batch.

Batches of different sizes add in different orders, so the last places of a score may differ.
A threshold is itself one of the calibration images' scores, so that this does turn decisions:
that very image, in another batch, may fall below it. What is within rounding of its threshold,
or has two classes within rounding of each other, is therefore computed again by itself, and
every decision is the one that the image gets alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.runtime.agreement import scaled_tolerance
from moon.scores import known_logits
from moon.threshold import as_float32

__all__ = ["close_calls", "decide_alone"]

Outputs = dict[str, NDArray[Any]]


def close_calls(
    outputs: Outputs, bars_N: NDArray[np.float32], *, unknown_index: int | None, precision: str
) -> NDArray[np.int64]:
    """Rows whose label or acceptance rounding could change.

    Args:
        outputs: of a backend, for N images.
        bars_N: what each score is compared with.
        unknown_index: column of the unknown class among the logits, or None.
        precision: fp32 or fp16, what the graph computes in.

    Returns:
        int64 [M], the rows in order. Scores and logits that are not finite are no close calls.
    """
    scores_N = as_float32(outputs["score"]).astype(np.float64)
    logits_NL = outputs["logits"].astype(np.float64)
    with np.errstate(invalid="ignore"):
        slack_N = scaled_tolerance(np.abs(logits_NL).max(axis=1), precision)
        # Some scores are in the hundreds, and float32 rounds them in proportion.
        room_N = np.maximum(slack_N, scaled_tolerance(0.0, precision) * np.abs(scores_N))
        close_N = np.abs(scores_N - bars_N) <= room_N
        known_NK = known_logits(logits_NL, unknown_index)
        if known_NK.shape[1] > 1:
            best_N2 = np.partition(known_NK, -2, axis=1)[:, -2:]
            close_N |= best_N2[:, 1] - best_N2[:, 0] <= 2 * slack_N
    return np.flatnonzero(close_N & np.isfinite(slack_N) & np.isfinite(scores_N))


def decide_alone(
    outputs: Outputs, rows: NDArray[np.int64], run: Callable[[int], Outputs]
) -> Outputs:
    """The outputs with some rows replaced by what their images give alone.

    Args:
        outputs: for N images.
        rows: which.
        run: the outputs of one of the images alone.
    """
    if not len(rows):
        return outputs
    # A backend may keep the arrays it returned.
    found = {name: np.array(values) for name, values in outputs.items()}
    for row in rows:
        for name, values in run(int(row)).items():
            found[name][row] = values[0]
    return found
