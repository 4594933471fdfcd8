"""Images worth looking at: the gate's clearest mistakes, as small embedded PNG pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moon.bundle import Bundle
from moon.evaluation.corruptions import reencoded
from moon.evaluation.metrics import Floats, Ints
from moon.evaluation.observe import Observed
from moon.evaluation.sets import EvalSet

__all__ = ["KINDS", "example_figures"]

KINDS = ("unknown accepted", "wrong accepted", "right rejected")
A_KIND = 8
_SIDE = 96


def example_figures(
    bundle: Bundle,
    sets: Sequence[EvalSet],
    seen: Mapping[tuple[str, str], Observed],
    labels: Ints | None,
    score: str,
    jpeg: int | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """A handful of each kind of mistake, the clearest first.

    Unknown images accepted and known images accepted with a wrong label, by the highest
    score; known images rejected though the label was right, by the lowest.

    Returns:
        By kind: ``set``, ``source``, ``score``, ``predicted``, ``label`` (None where unknown)
        and ``png``, the image as the model saw it in base64.
    """
    known, *others = sets
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    # Two of each set, more where the sets are few.
    each = max(2, A_KIND // max(1, len(others)))
    for one in others:
        rows = _first(-seen[one.key].scores[score], seen[one.key].accepted, each)
        found[KINDS[0]] += _shown(bundle, one, seen[one.key], rows, None, score, jpeg)
    if labels is not None:
        looked = seen[known.key]
        right = looked.predicted == labels
        wrong = _first(-looked.scores[score], looked.accepted & ~right & (labels >= 0), A_KIND)
        lost = _first(looked.scores[score], ~looked.accepted & right, A_KIND)
        found[KINDS[1]] += _shown(bundle, known, looked, wrong, labels, score, jpeg)
        found[KINDS[2]] += _shown(bundle, known, looked, lost, labels, score, jpeg)
    return found


def thumbnail(pixels_HWC: NDArray[np.uint8]) -> str:
    """A PNG in base64, no side above 96 pixels."""
    grey = pixels_HWC.shape[-1] == 1
    image = Image.fromarray(pixels_HWC[..., 0] if grey else pixels_HWC)
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _first(order: Floats, which: NDArray[np.bool_], most: int) -> Ints:
    rows = np.flatnonzero(which)
    return rows[np.argsort(order[rows], kind="stable")[:most]]


def _shown(
    bundle: Bundle,
    one: EvalSet,
    seen: Observed,
    rows: Ints,
    labels: Ints | None,
    score: str,
    jpeg: int | None,
) -> Iterator[dict[str, Any]]:
    for row in rows.tolist():
        i = int(one.indices[row])
        pixels = bundle.preprocess.pixels(one.source.item(i))
        value = float(seen.scores[score][row])
        yield {
            "set": one.name,
            "group": one.group,
            "source": str(one.source.name(i)),
            "score": value if np.isfinite(value) else None,
            "predicted": bundle.classes[int(seen.predicted[row])],
            "label": _label(bundle, one, labels, row, i),
            "png": thumbnail(pixels if jpeg is None else reencoded(pixels, jpeg)),
        }


def _label(bundle: Bundle, one: EvalSet, labels: Ints | None, row: int, i: int) -> str | None:
    if labels is not None:
        return bundle.classes[int(labels[row])] if labels[row] >= 0 else None
    source = one.source
    if source.labels is None or source.class_names is None or source.labels[i] < 0:
        return None
    return source.class_names[int(source.labels[i])]
