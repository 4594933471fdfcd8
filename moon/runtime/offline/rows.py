"""The rows of the table: what is decided of each image, and its columns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.data.items import Source
from moon.errors import ImageError, UsageError
from moon.gate import Decision
from moon.manifest import Manifest
from moon.runtime.predictor import Predictor
from moon.scores import known_probabilities

__all__ = ["CHUNK", "Row", "columns", "rows"]

Row = dict[str, Any]
# Images of one inference. Results can differ in their last bits between batches, so a chunk begins
# at a multiple of it, wherever and by whom it is run.
CHUNK = 64


def columns(manifest: Manifest, *, probabilities: bool) -> dict[str, str]:
    """Column names and their types as pyarrow calls them, in order.

    Raises:
        UsageError: a class is called as another column is.
    """
    fixed = {
        "input": "string",
        "label": "string",
        "decision": "string",
        "reason": "string",
        "score": "float32",
        "threshold": "float32",
        "p_value": "float64",
    }
    scores = dict.fromkeys(manifest.scores, "float32")
    classes = {f"p_{name}": "float32" for name in manifest.classes} if probabilities else {}
    table = {**fixed, **scores, **classes, "error": "string"}
    if len(table) != len(fixed) + len(scores) + len(classes) + 1:
        raise UsageError(
            "a class name makes a column that is there already", remedy="Leave out --probabilities"
        )
    return table


def rows(
    predictor: Predictor, images: Source, positions: range, *, probabilities: bool
) -> Iterator[Row]:
    """A row for each position, the images run together in chunks.

    An image that cannot be read has a row with its error, and the others are as without it but
    for rounding.
    """
    for start in range(positions.start, positions.stop, CHUNK):
        chunk = range(start, min(start + CHUNK, positions.stop))
        yield from _chunk(predictor, images, chunk, probabilities)


def _chunk(
    predictor: Predictor, images: Source, positions: range, probabilities: bool
) -> Iterator[Row]:
    good, prepared, errors = [], [], {}
    for position in positions:
        try:
            prepared.append(predictor.prepare(images.item(position)))
            good.append(position)
        except ImageError as error:
            errors[position] = str(error)
    decided = {}
    if good:
        outputs = predictor.raw(np.stack(prepared))
        names = [images.name(position) for position in good]
        extra = _extra(predictor.bundle.manifest, outputs, probabilities)
        for i, decision in enumerate(predictor.decisions(outputs, names)):
            decided[good[i]] = {
                **_row(decision),
                **{name: _finite(values[i]) for name, values in extra.items()},
            }
    for position in positions:
        if position in errors:
            yield {"input": images.name(position), "decision": None, "error": errors[position]}
        else:
            yield decided[position]


def _row(decision: Decision) -> Row:
    plain = decision.to_json()
    return {
        "input": plain["input"],
        "label": plain["label"],
        "decision": plain["decision"],
        "reason": plain["reason"],
        "score": plain["score"]["value"],
        "threshold": plain["score"]["threshold"],
        "p_value": plain["p_value"],
        "error": None,
    }


def _extra(
    manifest: Manifest, outputs: dict[str, NDArray[Any]], probabilities: bool
) -> dict[str, NDArray[Any]]:
    extra = {name: outputs[f"score_{name}"] for name in manifest.scores}
    if probabilities:
        p_NK = known_probabilities(outputs["logits"], manifest.unknown_index)
        extra |= {f"p_{name}": p_NK[:, i] for i, name in enumerate(manifest.classes)}
    return extra


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
