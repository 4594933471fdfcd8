"""Source: a numbered list of images that are decoded only when asked for, with their labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from moon.errors import DataError

__all__ = ["Item", "Items", "Labels", "Source", "checked_labels", "shown"]

Item = Path | bytes | Image.Image | npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


class Items(Protocol):
    """What `Source` reads its images from: a list, or something lazy that looks like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Item: ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """Images with a name each, and labels where they are known.

    Args:
        spec: what was opened, as it was written.
        items: paths, encoded bytes or Pillow images, which `Preprocess` converts, or
            arrays, which must already have the model's shape. Reading is thread-safe.
        names: of the items; default ``SPEC[i]``.
        labels: int64 [N] from 0, -1 where unknown; None where none is known.
        class_names: of the labels, in their order, where known.
        fields: further values [N] that filters can use.
    """

    spec: str
    items: Items
    names: Sequence[str] | None = None
    labels: Labels | None = None
    class_names: tuple[str, ...] | None = None
    fields: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    # Positions in `items` that a selection left; None stands for all of them.
    kept: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.items) if self.kept is None else len(self.kept)

    def item(self, i: int) -> Item:
        """The image at position ``i``, not decoded.

        Raises:
            ImageError: it cannot be read.
        """
        return self.items[self._position(i)]

    def name(self, i: int) -> str:
        """What to call the image at position ``i``: a relative path, a name or SPEC[i]."""
        position = self._position(i)
        return f"{self.spec}[{position}]" if self.names is None else str(self.names[position])

    def select(self, indices: npt.ArrayLike) -> Source:
        """The same source with only the items at ``indices``, in that order."""
        chosen = np.asarray(indices, np.int64)
        return replace(
            self,
            kept=chosen if self.kept is None else self.kept[chosen],
            labels=None if self.labels is None else self.labels[chosen],
            fields={key: values[chosen] for key, values in self.fields.items()},
        )

    def _position(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"item {i} of {len(self)} in {self.spec}")
        return int(i) if self.kept is None else int(self.kept[i])


def checked_labels(
    labels: npt.ArrayLike, count: int, class_names: Sequence[str] | None, where: str
) -> Labels:
    """Labels as int64 [N].

    Raises:
        DataError: not whole numbers, not one an item, below -1, or beyond the class names.
    """
    values = np.asarray(labels)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.shape != (count,):
        raise DataError(
            f"{where} has {count} images but labels of shape {list(values.shape)}",
            remedy="Give one whole number an image",
        )
    if values.dtype.kind not in "iuf" or (
        values.dtype.kind == "f" and not np.array_equal(values, np.trunc(values))
    ):
        raise DataError(
            f"the labels of {where} are not whole numbers but {values.dtype}",
            remedy="Store them as integers counted from 0",
        )
    limit = len(class_names) if class_names is not None else np.iinfo(np.int32).max
    wrong = np.flatnonzero((values < -1) | (values >= limit))
    if len(wrong):
        i = int(wrong[0])
        classes = f"there are {limit} classes" if class_names is not None else "that is no class"
        raise DataError(
            f"item {i} of {where} has the label {values[i]}, but {classes}",
            remedy="Labels count from 0; -1 stands for unknown",
        )
    return values.astype(np.int64)


def shown(names: Sequence[str], limit: int = 12) -> str:
    """A list for an error message, cut when long."""
    head = ", ".join(names[:limit])
    return f"{head} and {len(names) - limit} more" if len(names) > limit else head or "none"
