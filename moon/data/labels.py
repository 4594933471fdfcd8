"""Labels of a source as a model counts them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moon.data.items import Labels, Source
from moon.errors import DataError

__all__ = ["known_labels", "match_labels"]


def match_labels(source: Source, classes: Sequence[str]) -> Labels | None:
    """The labels of a source as indices into a model's classes.

    By name where the source has class names: a name that is none of ``classes`` becomes
    -1. By number otherwise. -1 stays -1.

    Args:
        classes: the model's known classes, in its order.

    Returns:
        int64 [N], or None when the source has no labels.

    Raises:
        DataError: a number beyond ``classes``.
    """
    if source.labels is None:
        return None
    if source.class_names is not None:
        number = {name: i for i, name in reversed(list(enumerate(classes)))}
        # One more entry, for label -1 to find itself.
        to = [*(number.get(name, -1) for name in source.class_names), -1]
        return np.array(to, np.int64)[source.labels]
    beyond = np.flatnonzero(source.labels >= len(classes))
    if len(beyond):
        i = int(beyond[0])
        raise DataError(
            f"{source.name(i)} has the label {source.labels[i]}, but the model has "
            f"{len(classes)} classes",
            remedy="Use images of the model's own classes, or a source with class names",
        )
    return source.labels


def known_labels(
    source: Source,
    indices: npt.NDArray[np.int64],
    classes: Sequence[str],
    *,
    role: str = "in-distribution",
) -> Labels | None:
    """Labels of in-distribution items as indices into ``classes``, or None where none has one.

    Args:
        role: what the source is for, as errors call it.

    Raises:
        DataError: an item is of a class the model does not know, so it is not in-distribution.
    """
    matched = match_labels(source, classes)
    if matched is None or source.labels is None:
        return None
    matched, given = matched[indices], source.labels[indices]
    foreign = (matched < 0) & (given >= 0)
    if foreign.any():
        names = source.class_names or ()
        examples = sorted({names[i] for i in given[foreign]})
        shown = ", ".join(examples[:3]) + (", ..." if len(examples) > 3 else "")
        raise DataError(
            f"{int(foreign.sum()):,} of {len(given):,} items of the {role} source "
            f"{source.spec} are of classes the bundle does not know ({shown})",
            remedy="Keep the known classes with a filter, as {label in 0..7}, or rename them",
        )
    return matched if (matched >= 0).any() else None
