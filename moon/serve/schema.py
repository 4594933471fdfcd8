"""What /predict answers: the predictions, and the items that could not be read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moon.errors import ImageError
from moon.gate import Decision
from moon.serve.problem import Problem

__all__ = ["Item", "answer", "readable"]


@dataclass(frozen=True)
class Item:
    """One image of a request, decoded, or the reason why it was not.

    Attributes:
        name: file name, index in the request, or None for a raw body.
        pixels: uint8 [H, W, C].
        error: why there are no pixels.
    """

    name: str | int | None
    pixels: npt.NDArray[np.uint8] | None = None
    error: ImageError | None = None


def readable(items: Sequence[Item]) -> list[Item]:
    """The items that were read.

    Raises:
        Problem: 400, not a single one could be read.
    """
    good = [item for item in items if item.pixels is not None]
    if good:
        return good
    if len(items) == 1:
        raise Problem(400, "undecodable", str(items[0].error))
    detail = f"None of the {len(items)} images could be read."
    raise Problem(400, "undecodable", detail, extra={"errors": [_error(item) for item in items]})


def answer(
    request_id: str, model: dict[str, str], items: Sequence[Item], decisions: Iterable[Decision]
) -> bytes:
    """The JSON of an answered request: one prediction, or one error, an item, in order."""
    decided = iter(decisions)
    predictions = [
        _error(item) if item.pixels is None else next(decided).to_json() for item in items
    ]
    content = {"id": request_id, "model": model, "predictions": predictions}
    return json.dumps(content, allow_nan=False, ensure_ascii=False).encode()


def _error(item: Item) -> dict[str, Any]:
    return {"input": item.name, "error": str(item.error)}
