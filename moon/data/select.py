"""Ranges and filters over a Source: which items stay, and how their classes are renumbered."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moon.data.items import Labels, Source, shown
from moon.data.spec import Filter, Range, number
from moon.errors import DataError, UsageError

__all__ = ["select"]

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
# The fields that speak of classes: their filters decide which classes there are.
_LABEL, _CLASS, _NAME = "label", "class", "name"


def select(source: Source, selectors: Sequence[Range | Filter]) -> Source:
    """Apply ranges and filters from left to right.

    ``label`` and ``class`` (its name) always mean the class before any filter. After a
    filter on either, only the admitted classes are left, numbered from 0 in their old order.

    Raises:
        DataError: there is no such field, or nothing is left.
        UsageError: a field is compared with a value of another kind.
    """
    count = _class_count(source)
    admitted = np.ones(count, bool)
    by_class = False
    for selector in selectors:
        if isinstance(selector, Range):
            order = np.arange(len(source))
            kept = order[slice(selector.start, selector.stop, selector.step)]
            what = f"the range of {source.spec}"
        else:
            what = f"the filter {selector.text} of {source.spec}"
            kept = np.flatnonzero(_matches(_field(source, selector), selector))
            if selector.field in (_LABEL, _CLASS) and source.labels is not None:
                by_class = True
                _check_class_names(source, selector)
                admitted &= _matches(_class_values(source, selector.field, count), selector)
        if not len(kept):
            raise DataError(
                f"{what} leaves nothing of its {len(source)} items",
                remedy="Widen it, or leave it out",
            )
        source = source.select(kept)
    return _renumbered(source, admitted) if by_class else source


def _class_count(source: Source) -> int:
    if source.class_names is not None:
        return len(source.class_names)
    if source.labels is None or not len(source.labels):
        return 0
    return int(source.labels.max()) + 1


def _class_values(source: Source, field: str, count: int) -> npt.NDArray[Any]:
    if field == _LABEL:
        return np.arange(count)
    return np.asarray(source.class_names, object)


def _field(source: Source, selector: Filter) -> npt.NDArray[Any]:
    field = selector.field
    if source.labels is not None:
        if field == _LABEL:
            return source.labels
        if field == _CLASS and source.class_names is not None:
            # Label -1 picks the last entry, the empty name.
            return np.asarray((*source.class_names, ""), object)[source.labels]
    if field in source.fields:
        return source.fields[field]
    if field == _NAME:
        return np.array([source.name(i) for i in range(len(source))], object)
    raise DataError(
        f"{source.spec} has no field {field} for the filter {selector.text}",
        remedy=f"Its fields are {shown(_known_fields(source))}",
    )


def _known_fields(source: Source) -> list[str]:
    known = {*source.fields, _NAME}
    if source.labels is not None:
        known |= {_LABEL} if source.class_names is None else {_LABEL, _CLASS}
    return sorted(known)


def _check_class_names(source: Source, selector: Filter) -> None:
    names = source.class_names or ()
    unknown = [value for value in selector.values if value not in names]
    if selector.field == _CLASS and selector.op in ("==", "!=", "among") and unknown:
        raise DataError(
            f"{source.spec} has no class {unknown[0]} for the filter {selector.text}",
            remedy=f"Its classes are {shown(names)}",
        )


def _matches(values: npt.NDArray[Any], selector: Filter) -> npt.NDArray[np.bool_]:
    text = values.dtype.kind in "OUS"
    wanted = [_wanted(value, text, selector) for value in selector.values]
    found = np.zeros(len(values), bool)
    if selector.op == "among":
        for value in wanted:
            found |= np.asarray(values == value, bool)
    elif selector.op == "span":
        if text:
            raise UsageError(
                f"the filter {selector.text} spans numbers, but {selector.field} is text",
                remedy="List the values: {field in a,b}",
            )
        low, high = wanted
        found = np.asarray((values >= low) & (values <= high), bool)
    else:
        found = np.asarray(_OPERATORS[selector.op](values, wanted[0]), bool)
    return found


def _wanted(value: str, text: bool, selector: Filter) -> int | float | str:
    if text:
        return value
    wanted = number(value)
    if wanted is None:
        hint = " Classes have names in the field class" if selector.field == _LABEL else ""
        raise UsageError(
            f"the filter {selector.text} compares the numbers of {selector.field} "
            f"with the text {value!r}",
            remedy=f"Give a number.{hint}",
        )
    return wanted


def _renumbered(source: Source, admitted: npt.NDArray[np.bool_]) -> Source:
    # One more entry, for label -1 to find itself.
    number = np.full(len(admitted) + 1, -1, np.int64)
    number[:-1][admitted] = np.arange(admitted.sum())
    labels: Labels | None = None if source.labels is None else number[source.labels]
    names = source.class_names
    if names is not None:
        names = tuple(name for name, stays in zip(names, admitted, strict=True) if stays)
    return replace(source, labels=labels, class_names=names)
